"""Measurements of focal against what its users would otherwise have.

Every comparison runs both sides in turn in one process: a ratio is worth more than a time.
"""
