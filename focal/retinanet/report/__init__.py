"""What is drawn and written for a reader: pictures, curves, the report, the check of data."""
