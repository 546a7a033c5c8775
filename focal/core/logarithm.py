"""Logarithms for losses compiled to one loop, of which `log1p` would take half of the time.

Minimax polynomials in float32, for the relative error: log(1 + x) = x + x^2 (c0 + c1 x + ...).
"""

from __future__ import annotations

from focal.core.namespace import Array

__all__ = ["log1p_from_minus_half", "log1p_to_one"]

FROM_MINUS_HALF = (
    -0.500000894, 0.333262146, -0.251888543, 0.175690159, -0.34104684, -0.59536624, -1.97671187,
    -2.48232055, -1.74594295,
)  # fmt: skip
TO_ONE = (
    -0.49999982, 0.3333197, -0.24973336, 0.19769031, -0.15561585, 0.11020409, -0.060938265,
    0.02190995, -0.0036895473,
)  # fmt: skip
"""The Triton kernels have the same numbers."""


def log1p_from_minus_half(x: Array) -> Array:
    """log(1 + x) for float32 x in [-1/2, 0], within 1.1 ULP."""
    return x + x * x * _series(FROM_MINUS_HALF, x)


def log1p_to_one(x: Array) -> Array:
    """log(1 + x) for float32 x in [0, 1], within 2.1 ULP."""
    return x * x * _series(TO_ONE, x) + x


def _series(coefficients: tuple[float, ...], x: Array) -> Array:
    """The polynomial in x."""
    *rest, highest = coefficients
    series = x * highest + rest.pop()
    for coefficient in reversed(rest):
        series = series * x + coefficient
    return series
