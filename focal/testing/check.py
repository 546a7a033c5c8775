"""Somebody's own loss against the reference formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focal.core import checks
from focal.testing.frameworks import DTYPES, FRAMEWORKS, Framework
from focal.testing.grid import Grid
from focal.testing.references import REFERENCES, Exact, checked_parameters, exact, grids
from focal.testing.report import Errors, LossReport, Part
from focal.testing.ulp import LIMITS, allowed_ulp, power_of_two

__all__ = ["check_loss"]

NAME = "check_loss"
SECOND_TOLERANCE = {
    "float16": 2.0**-7,
    "bfloat16": 2.0**-4,
    "float32": 2.0**-10,
    "float64": 2.0**-39,
}
"""How close a second derivative must be to be called close: no more than a handful of digits
are lost. For half types, which round it twice, eight ULP."""


def check_loss(
    fn: Callable[[Any, Any], Any],
    reference: str = "sigmoid_focal_loss",
    backend: str = "torch",
    dtype: str = "float32",
    *,
    max_ulp: float | None = None,
    soft_targets: bool = True,
    **params: Any,
) -> LossReport:
    r"""Compare a loss, value and gradient, with a reference formula over a hard grid.

    The grid has the logits where losses break: 0, the smallest numbers, :math:`\pm 17` (beyond
    which :math:`1 - \sigma(x)` is 0 in float32), 20, 88 (where :math:`e^x` overflows), 100 and
    1000, and a dense grid between. An error is measured in units in the last place (ULP) of the
    exact result; that of the gradient at a soft target, whose terms may cancel, in ULP of the
    sum of their absolute values. A result below the smallest normal number may be zero, or off
    by that number (in float16, which frameworks compute in float32, it may not). For FL* and
    softmax the error that the rounding of the margin explains comes on top of the bound.

    Args:
        fn: The loss to check, `fn(inputs, targets)`: arrays of the framework in, the unreduced
            loss out. For "sparse_sigmoid_focal_loss" it gets logits (N, 3) and labels (N,) and
            returns (N, 3), for "softmax_focal_loss" it returns (N,); else all shapes are (N,).
            PyTorch's arrays are on the CPU: `lambda x, y: kernel(x.cuda(), y.cuda())` checks
            a kernel.
        reference: Name of the formula: "sigmoid_focal_loss" (default),
            "sparse_sigmoid_focal_loss", "softmax_focal_loss", "sigmoid_focal_loss_star" or
            "balanced_cross_entropy".
        backend: "torch" (default), "jax", "tensorflow", or "numpy", where there is only the
            value to check.
        dtype: Type of the logits and targets: "float16", "bfloat16", "float32" (default) or
            "float64".
        max_ulp: The bound; default 6 + 4 gamma for float32 and float64, and 1 for half types: a
            loss computed in float32 and rounded once keeps it, one computed in the half type
            does not.
        soft_targets: Whether to check targets between 0 and 1 too, where the reference takes
            them. Default True.
        params: Parameters of the reference (`alpha`, `gamma`, `beta`); its defaults hold for
            those not given. `fn` must have the same ones built in.

    Returns:
        The report: the largest errors and where they are. `print` it for a table.

    Raises:
        AssertionError: a value or a gradient is beyond the bound, NaN or infinite, or there is
            no gradient. The message is the table.
        TypeError: an argument has the wrong type, or a parameter is not one of the reference's.
        ValueError: a name is unknown, a number out of range, or `fn` returned another shape.

    Example:
        >>> import numpy as np
        >>> from focal.testing import check_loss
        >>> def cross_entropy(x, y):
        ...     return y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
        >>> report = check_loss(
        ...     cross_entropy, "balanced_cross_entropy", "numpy", "float64", alpha=None
        ... )
        >>> report.kept
        True

    Source: the closed forms of `focal.numpy`; Lin et al. 2017, equations 3 to 5 and appendix B.
    """
    if not callable(fn):
        raise TypeError(f"{NAME}: fn must be callable; got {fn!r}")
    checks.check_choice(NAME, "reference", reference, REFERENCES)
    checks.check_choice(NAME, "backend", backend, tuple(FRAMEWORKS))
    checks.check_choice(NAME, "dtype", dtype, DTYPES)
    if dtype not in FRAMEWORKS[backend].dtypes:
        raise ValueError(f"{NAME}: dtype must be one that {backend} has; got {dtype!r}")
    params = checked_parameters(NAME, reference, params)
    if max_ulp is None:
        bound = allowed_ulp(dtype, params.get("gamma", 0.0))
    else:
        bound = checks.check_number(NAME, "max_ulp", max_ulp, low=0)

    framework = FRAMEWORKS[backend](dtype)
    with framework.scope():
        parts = tuple(
            _part(fn, framework, name, grid, exact(reference, params, dtype, grid), bound)
            for name, grid in grids(reference, dtype, soft_targets).items()
        )
    report = LossReport(
        loss=getattr(fn, "__name__", type(fn).__name__),
        reference=reference,
        params=params,
        backend=backend,
        dtype=dtype,
        max_ulp=bound,
        parts=parts,
        kept=all(_kept(part, framework) for part in parts),
    )
    if not report.kept:
        raise AssertionError(str(report))
    return report


def _kept(part: Part, framework: Framework) -> bool:
    gradient = part.gradient is not None and part.gradient.kept
    return part.value.kept and (gradient or not framework.differentiates)


def _part(
    fn: Callable[[Any, Any], Any],
    framework: Framework,
    name: str,
    grid: Grid,
    expected: Exact,
    bound: float,
) -> Part:
    x, t = framework.array(grid.inputs), framework.array(grid.targets)
    value = framework.numpy(fn(x, t))
    if value.shape != expected.value.shape:
        raise ValueError(
            f"{NAME}: fn must return a loss of shape {expected.value.shape}; got {value.shape}"
        )

    def measured(got: NDArray[Any], what: str) -> Errors:
        if what == "value":
            sizes = expected.value, expected.value, expected.value_slack
        else:
            sizes = expected.gradient, expected.gradient_size, expected.gradient_slack
        return _errors(got, *sizes, framework.dtype, bound, grid)

    gradient, status, second = None, "not available: NumPy has no autodiff", "not available"
    if framework.differentiates:
        # Whatever a framework raises where there is no derivative is what there is to report.
        try:
            got = framework.numpy(framework.value_and_gradient(fn, x, t)[1])
        except Exception as error:
            status = f"not available: {_reason(error)}"
        else:
            gradient = measured(got, "gradient")
            status = "kept" if gradient.kept else "beyond the bound"
        try:
            pick = framework.array(expected.pick)
            got = framework.numpy(framework.second(fn, x, t, pick))
        except Exception as error:
            second = f"not available: {_reason(error)}"
        else:
            second = _second_status(got, expected, framework.dtype, grid)
    return Part(name, measured(value, "value"), gradient, status, second)


def _errors(
    got: NDArray[Any],
    exact: NDArray[Any],
    size: NDArray[Any],
    slack: NDArray[Any],
    dtype: str,
    bound: float,
    grid: Grid,
) -> Errors:
    epsilon, tiny, may_flush = LIMITS[dtype]
    size = np.abs(size)
    error = np.abs(np.where(np.isfinite(got), got, np.inf) - exact)
    unit = epsilon * np.maximum(power_of_two(size), tiny)
    ulp, allowed = error / unit, bound + slack / unit
    normal = size >= tiny * (1 + allowed * epsilon)
    if may_flush:
        ulp = np.where(~normal & (error <= tiny), 0, ulp)
    relative = np.divide(error, size, out=np.zeros_like(error), where=normal)
    # The worst finite one; where none is beyond its bound, the largest error.
    finite = np.where(np.isfinite(ulp), ulp / np.maximum(allowed, tiny), -1)
    at = np.unravel_index(np.argmax(finite), finite.shape)
    # A loss of softmax belongs to a row: its logit is that of the label.
    row = at if finite.ndim == grid.inputs.ndim else (*at, grid.targets[at])
    return Errors(
        ulp=float(ulp[at]),
        allowed=float(allowed[at]),
        relative=float(np.max(relative[np.isfinite(relative)], initial=0)),
        logit=float(grid.inputs[row]),
        target=float(grid.target_of_logit[row]),
        nan=int(np.isnan(got).sum()),
        infinite=int(np.isinf(got).sum()),
    )


def _second_status(got: NDArray[Any], expected: Exact, dtype: str, grid: Grid) -> str:
    nan, infinite = int(np.isnan(got).sum()), int(np.isinf(got).sum())
    if nan or infinite:
        return f"{nan} NaN, {infinite} infinite"
    error = np.abs(got - expected.second)
    # Beyond |x| = 87 its factor p q is subnormal, and what multiplies it may reach hundreds.
    _, tiny, may_flush = LIMITS[dtype]
    floor = 2**10 * tiny if may_flush else tiny
    allowed = SECOND_TOLERANCE[dtype] * expected.second_size + expected.second_slack + floor
    at = np.unravel_index(np.argmax(error / allowed), error.shape)
    if error[at] <= allowed[at]:
        return "close"
    where = f"logit {grid.inputs[at]:g}, target {grid.target_of_logit[at]:g}"
    return f"not close: {got[at]:.4g} for {expected.second[at]:.4g} at {where}"


def _reason(error: Exception) -> str:
    """The first line of what was raised."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
