"""Errors in units in the last place (ULP), and what is allowed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["LIMITS", "Limits", "allowed_ulp", "power_of_two", "rounded"]


class Limits(NamedTuple):
    """Constants of a floating-point type."""

    epsilon: float
    """Distance from 1 to the next number."""
    tiny: float
    """Smallest normal number."""
    may_flush: bool
    """Whether a result below `tiny` may come as zero: frameworks do so, but not in float16,
    which they compute in float32."""


LIMITS = {
    "float16": Limits(2.0**-10, 2.0**-14, False),
    "bfloat16": Limits(2.0**-7, 2.0**-126, True),
    "float32": Limits(2.0**-23, 2.0**-126, True),
    "float64": Limits(2.0**-52, 2.0**-1022, True),
}


def allowed_ulp(dtype: str, gamma: float) -> float:
    """The library's error bound for a loss and its gradient.

    6 + 4 gamma, because m^gamma multiplies the relative error of m by gamma. Half types are
    computed in float32 and rounded once, an error of half an ULP: a bound of 1 leaves room for
    the float32 error and none for a computation in the half type itself.
    """
    return 6 + 4 * gamma if dtype in ("float32", "float64") else 1.0


def power_of_two(size: NDArray[Any]) -> NDArray[Any]:
    """The greatest power of two that is not above each number; 0 for 0."""
    _, exponent = np.frexp(size)
    return np.where(size > 0, np.ldexp(np.ones_like(size), exponent - 1), 0)


def rounded(values: Any, dtype: str) -> NDArray[np.float64]:
    """The numbers of a type that are nearest to the values, as float64."""
    values = np.asarray(values, np.float64)
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return np.asarray(bits.view(np.float32), np.float64)
    return np.asarray(values.astype(dtype), np.float64)
