"""A logarithm for losses compiled to one loop, of which `log1p` would take half of the time."""

from __future__ import annotations

from focal.core.namespace import Array

__all__ = ["log1p_to_half"]

# Minimax for the relative error, in rising order: log(1 + x) = x + x^2 (c0 + c1 x + ...).
COEFFICIENTS = (
    -0.500000894, 0.333262146, -0.251888543, 0.175690159, -0.34104684,
    -0.59536624, -1.97671187, -2.48232055, -1.74594295,
)  # fmt: skip


def log1p_to_half(x: Array) -> Array:
    """log(1 + x) for float32 x in [-1/2, 0], within 1.1 ULP."""
    series = COEFFICIENTS[-1]
    for coefficient in COEFFICIENTS[-2::-1]:
        series = series * x + coefficient
    return x + x * x * series
