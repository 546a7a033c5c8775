"""Errors of results beside the exact ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focal.testing.exact import Result
from focal.testing.grid import Grid
from focal.testing.report import Errors, Place
from focal.testing.ulp import LIMITS, power_of_two

__all__ = ["measured"]

FLUSHED = 64
"""Results below so many times the smallest normal number may come as zero: a framework that
flushes subnormal numbers may do it to a factor of theirs."""


@np.errstate(over="ignore")  # an error beside the smallest number
def measured(
    got: NDArray[Any],
    result: Result,
    bound: float,
    dtype: str,
    grid: Grid,
    params: Mapping[str, Any],
    mask: NDArray[np.bool_],
) -> Errors:
    """The errors of the rows in `mask`, or of a reduced loss, which has no rows."""
    epsilon, tiny, may_flush = LIMITS[dtype]
    rows: Any = np.flatnonzero(mask) if got.ndim else ...
    got, (exact, size, slack) = got[rows], (a[rows] for a in result)
    unit = epsilon * np.maximum(power_of_two(size), tiny)
    allowed = bound + slack / unit
    overflows = np.abs(exact) + allowed * unit > (2 - epsilon) * 2 / tiny
    got = np.where(np.isinf(got) & (np.sign(got) == np.sign(exact)) & overflows, exact, got)
    finite = np.isfinite(got)
    error = np.abs(np.where(finite, got, exact) - exact)
    flushed = (np.abs(exact) < FLUSHED * tiny) & (error <= FLUSHED * tiny) & may_flush
    ulp = np.where(flushed, 0, error / unit)
    relative = np.divide(error, size, out=np.zeros_like(error), where=size >= tiny)

    def place(badness: NDArray[Any]) -> Place:
        at = np.unravel_index(np.argmax(badness), badness.shape)
        row = rows[at[0]] if at else None
        return Place(
            inputs=None if row is None else _plain(grid.inputs[row]),
            targets=None if row is None else _plain(grid.targets[row]),
            column=int(at[1]) if len(at) > 1 else None,
            params=params,
            expected=float(exact[at]),
            got=float(got[at]),
            ulp=float(ulp[at]) if finite[at] else np.inf,
            allowed=float(allowed[at]),
        )

    worst = place(np.where(finite, ulp / np.maximum(allowed, tiny), -1))
    places: tuple[Place, ...] = (worst,)
    if not finite.all():  # the one nearest to 0 is where it begins
        far = np.abs(grid.inputs[rows]) if got.shape == grid.inputs[rows].shape else 0.0
        places = (place(np.where(finite, -np.inf, -far)), worst)
    return Errors(
        ulp=worst.ulp,
        allowed=worst.allowed,
        relative=float(relative.max(initial=0)),
        beyond=int((~finite | (ulp > allowed)).sum()),
        nan=int(np.isnan(got).sum()),
        infinite=int(np.isinf(got).sum()),
        places=places,
    )


def _plain(value: Any) -> Any:
    """A number, or a tuple of them."""
    return tuple(map(float, value)) if np.ndim(value) else float(value)
