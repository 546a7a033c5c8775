"""A loss tried on a grid, in a framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focal.testing.exact import Exact, Result
from focal.testing.frameworks import Framework
from focal.testing.grid import Grid
from focal.testing.measure import measured
from focal.testing.report import NO_AUTODIFF, PASSED, Errors, Part
from focal.testing.ulp import LIMITS

__all__ = ["Trial"]

Numbers = NDArray[Any]
Loss = Callable[[Any, Any], Any]
SECOND_TOLERANCE = {
    "float16": 2.0**-7,
    "bfloat16": 2.0**-4,
    "float32": 2.0**-10,
    "float64": 2.0**-39,
}
"""How close a second derivative must be to be called close: no more than a handful of digits
are lost. For half types, which round it twice, eight ULP."""
NOT_CHECKED = "not checked"
SAMPLE = 3
"""Rows that a loss is tried on first."""


class Trial(NamedTuple):
    """A loss at one setting of the parameters."""

    fn: Callable[..., Any]
    names: Collection[str]
    """Parameters that `fn` can be given by name."""
    framework: Framework
    params: Mapping[str, Any]
    bound: float
    atol: float
    thorough: bool
    """Whether to ask for the value without a gradient, too."""

    def check_shape(self, name: str, grid: Grid, exact: Exact) -> None:
        """Of the loss of a few rows; one that broadcasts would fill the memory with all."""
        few = (self.framework.array(a[:SAMPLE]) for a in (grid.inputs, grid.targets))
        shape = self.framework.shape(self._loss("none"), *few)
        expected = exact.value.exact[:SAMPLE].shape
        if shape != expected:
            raise ValueError(
                f"{name}: fn must return the unreduced loss, of shape {expected} for inputs "
                f"{grid.inputs[:SAMPLE].shape}; got {shape}"
            )

    def parts(self, grid: Grid, exact: Exact, reduction: str = "none") -> list[Part]:
        """The results for each kind of targets."""
        framework, loss = self.framework, self._loss(reduction)
        x, t = framework.array(grid.inputs), framework.array(grid.targets)
        values: list[Numbers] = []
        slope: Numbers | str = NO_AUTODIFF
        if framework.differentiates:
            slope = _attempt(lambda: self._gradient(loss, x, t, values))
        if not values or (self.thorough and reduction == "none"):
            values.append(framework.numpy(framework.value(loss, x, t)))
        if np.array_equal(values[0], values[-1], equal_nan=True):
            values = values[:1]
        parts = [
            self._part(kind, mask, values, slope, grid, exact) for kind, mask in grid.kinds.items()
        ]
        # The derivative of a wrong gradient says nothing.
        second = exact.second
        if second is None or not all(part.gradient_status == PASSED for part in parts):
            return parts
        pick = framework.array(np.broadcast_to(exact.pick, second.exact.shape))
        bend = _attempt(lambda: framework.numpy(framework.second(loss, x, t, pick)))
        return [
            dataclasses.replace(
                part,
                second_status=bend
                if isinstance(bend, str)
                else _second_status(bend, second, framework.dtype, grid, mask),
            )
            for part, mask in zip(parts, grid.kinds.values(), strict=True)
        ]

    def _part(
        self,
        kind: str,
        mask: NDArray[np.bool_],
        values: list[Numbers],
        slope: Numbers | str,
        grid: Grid,
        exact: Exact,
    ) -> Part:
        def errors(got: Numbers, result: Result) -> Errors:
            result = result._replace(slack=result.slack + self.atol)
            dtype = self.framework.dtype
            return measured(got, result, self.bound, dtype, grid, self.params, mask)

        value = Errors.merged([errors(got, exact.value) for got in values])
        if isinstance(slope, str):
            return Part(kind, value, None, slope, NOT_CHECKED)
        gradient = errors(slope, exact.gradient)
        status = PASSED if gradient.passed else "beyond the bound"
        return Part(kind, value, gradient, status, NOT_CHECKED)

    def _loss(self, reduction: str) -> Loss:
        """The loss with the parameters that it takes by name."""
        given = {**self.params, "reduction": reduction}
        given = {name: value for name, value in given.items() if name in self.names}

        def loss(x: Any, t: Any) -> Any:
            try:
                return self.fn(x, t, **given)
            except Exception as error:
                if given:
                    error.add_note(f"It was given {given}.")
                raise

        return loss

    def _gradient(self, loss: Loss, x: Any, t: Any, values: list[Numbers]) -> Numbers:
        """The gradient; the value that comes with it joins `values`."""
        value, slope = map(self.framework.numpy, self.framework.value_and_gradient(loss, x, t))
        values.append(value)
        return slope


def _attempt(function: Callable[[], Numbers]) -> Numbers | str:
    """Whatever a framework raises where there is no derivative is what there is to report."""
    try:
        return function()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"not available: {type(error).__name__}: {first}"


def _second_status(
    got: Numbers, exact: Result, dtype: str, grid: Grid, mask: NDArray[np.bool_]
) -> str:
    got, exact = got[mask], Result(*(a[mask] for a in exact))
    nan, infinite = int(np.isnan(got).sum()), int(np.isinf(got).sum())
    if nan or infinite:
        return f"{nan} NaN, {infinite} infinite"
    error = np.abs(got - exact.exact)
    # Beyond |x| = 87 its factor p q is subnormal, and what multiplies it may reach hundreds.
    _, tiny, may_flush = LIMITS[dtype]
    floor = 2**10 * tiny if may_flush else tiny
    allowed = SECOND_TOLERANCE[dtype] * exact.size + exact.slack + floor
    at = np.unravel_index(np.argmax(error / allowed), error.shape)
    if error[at] <= allowed[at]:
        return "close"
    inputs, targets = grid.inputs[mask][at], grid.target_of_logit[mask][at]
    where = f"logit {inputs:g}, target {targets:g}"
    return f"not close: {got[at]:.4g} for {exact.exact[at]:.4g} at {where}"
