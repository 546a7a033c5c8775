"""A loss on a grid in a framework, and its errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focal.testing.frameworks import Framework
from focal.testing.grid import Grid
from focal.testing.reference import Exact, Result
from focal.testing.report import NO_AUTODIFF, Errors, Findings, Place
from focal.testing.ulp import LIMITS, power_of_two

__all__ = ["Bound", "measure"]

Numbers = NDArray[Any]
Loss = Callable[[Any, Any], Any]
FLUSHED = 64
"""Results below this multiple of the smallest normal number may be zero, because a framework may
flush a subnormal factor of them."""
SECOND_TOLERANCE = {
    "float16": 2.0**-7,
    "bfloat16": 2.0**-4,
    "float32": 2.0**-10,
    "float64": 2.0**-39,
}
"""Relative error of a second derivative that is called close: 2 or 3 digits are lost. For half
types, which round it twice, it is 8 ULP."""


class Bound(NamedTuple):
    """The errors allowed at one setting of the parameters."""

    dtype: str
    ulp: float
    atol: float
    params: Mapping[str, Any]


def measure(
    loss: Loss, framework: Framework, grid: Grid, exact: Exact, bound: Bound, without: bool
) -> dict[str, Findings]:
    """The errors for each kind of targets.

    `without` asks for the value without a gradient, too: a loss may compute it in another way.
    """
    integers = grid.targets.dtype.kind == "i"
    x = framework.asarray(grid.inputs, bound.dtype)
    t = framework.asarray(grid.targets, None if integers else bound.dtype)
    values: list[Numbers] = []
    slope: Numbers | str = NO_AUTODIFF
    if framework.differentiates:
        both = framework.compiled(partial(framework.value_and_gradient, loss))
        try:
            value, slope = map(framework.numpy, both(x, t))
            values.append(value)
        except Exception as error:
            slope = _message(error)
    if not values or without:
        values.append(framework.numpy(framework.compiled(loss)(x, t)))
    if np.array_equal(values[0], values[-1], equal_nan=True):
        values = values[:1]

    found = {}
    for kind, mask in grid.kinds.items():
        value_errors = [_errors(got, exact.value, grid, mask, bound) for got in values]
        gradient: Errors | str = (
            slope if isinstance(slope, str) else _errors(slope, exact.gradient, grid, mask, bound)
        )
        found[kind] = Findings(Errors.merged(value_errors), gradient)
    # The derivative of a wrong gradient is not worth checking.
    right = all(isinstance(f.gradient, Errors) and f.gradient.passed for f in found.values())
    if exact.second is None or not right:
        return found

    def picked(x: Any, t: Any, pick: Any) -> Any:
        return pick * framework.value_and_gradient(loss, x, t)[1]

    pick = framework.asarray(np.broadcast_to(exact.pick, exact.second.exact.shape), bound.dtype)
    second = framework.compiled(partial(framework.value_and_gradient, picked))
    try:
        bend = framework.numpy(second(x, t, pick)[1])
    except Exception as error:
        return {kind: f._replace(second=_message(error)) for kind, f in found.items()}
    return {
        kind: f._replace(second=_second_status(bend, exact.second, bound.dtype, grid, mask))
        for (kind, f), mask in zip(found.items(), grid.kinds.values(), strict=True)
    }


def _message(error: Exception) -> str:
    """Why a framework has no derivative."""
    first = (str(error).splitlines() or [""])[0]
    return f"not available: {type(error).__name__}: {first}"


@np.errstate(over="ignore")  # errors in units of the smallest number
def _errors(
    got: Numbers, result: Result, grid: Grid, mask: NDArray[np.bool_], bound: Bound
) -> Errors:
    """The errors of the rows in `mask`, or of a reduced loss, which has no rows."""
    epsilon, tiny, may_flush = LIMITS[bound.dtype]
    rows: Any = np.flatnonzero(mask) if got.ndim else ...
    got, (exact, size, slack) = got[rows], result.rows(rows)
    unit = epsilon * np.maximum(power_of_two(size), tiny)
    allowed = bound.ulp + (slack + bound.atol) / unit
    overflows = np.abs(exact) + allowed * unit > (2 - epsilon) * 2 / tiny
    got = np.where(np.isinf(got) & (np.sign(got) == np.sign(exact)) & overflows, exact, got)
    finite = np.isfinite(got)
    error = np.abs(np.where(finite, got, exact) - exact)
    flushed = (np.abs(exact) < FLUSHED * tiny) & (error <= FLUSHED * tiny) & may_flush
    ulp = np.where(flushed, 0, error / unit)
    relative = np.divide(error, size, out=np.zeros_like(error), where=size >= tiny)

    def place(badness: Numbers) -> Place:
        at = np.unravel_index(np.argmax(badness), badness.shape)
        row = rows[at[0]] if at else None
        return Place(
            inputs=None if row is None else _plain(grid.inputs[row]),
            targets=None if row is None else _plain(grid.targets[row]),
            column=int(at[1]) if len(at) > 1 else None,
            params=bound.params,
            expected=float(exact[at]),
            got=float(got[at]),
            ulp=float(ulp[at]) if finite[at] else np.inf,
            allowed=float(allowed[at]),
        )

    worst = place(np.where(finite, ulp / np.maximum(allowed, tiny), -1))
    places: tuple[Place, ...] = (worst,)
    if not finite.all():  # show the one nearest to 0
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


def _second_status(
    got: Numbers, exact: Result, dtype: str, grid: Grid, mask: NDArray[np.bool_]
) -> str:
    got, exact = got[mask], exact.rows(mask)
    nan, infinite = int(np.isnan(got).sum()), int(np.isinf(got).sum())
    if nan or infinite:
        return f"{nan} NaN, {infinite} infinite"
    error = np.abs(got - exact.exact)
    # Beyond |x| = 87 its factor p q is subnormal, and other factors may be several hundred.
    _, tiny, may_flush = LIMITS[dtype]
    floor = 2**10 * tiny if may_flush else tiny
    allowed = SECOND_TOLERANCE[dtype] * exact.size + exact.slack + floor
    at = np.unravel_index(np.argmax(error / allowed), error.shape)
    if error[at] <= allowed[at]:
        return "close"
    where = f"input {grid.inputs[mask][at]:g}, target {grid.target_of_logit[mask][at]:g}"
    return f"not close: {got[at]:.4g} instead of {exact.exact[at]:.4g} at {where}"
