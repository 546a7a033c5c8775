"""Measurements of focal against the textbook composition; `python -m benchmarks` runs them."""
