"""`check_loss`: somebody's own loss against the reference formulas."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from focal.core import checks
from focal.testing.frameworks import DTYPES, FRAMEWORKS, Framework
from focal.testing.grid import Grid, grid_of
from focal.testing.measure import Bound, measure
from focal.testing.reference import (
    REFERENCES,
    VALUES,
    Exact,
    exact,
    exponent,
    is_valid,
    parameters_of,
    reduced,
)
from focal.testing.report import Findings, LossReport, Part
from focal.testing.ulp import allowed_ulp

__all__ = ["check_loss"]

NAME = "check_loss"
Params = dict[str, Any]
SAMPLE = 5
"""Rows that a loss is called with first, to check the shape that it returns; not as many as there
are classes, or (N, N) would pass for (N, K)."""


def check_loss(
    fn: Callable[..., Any],
    reference: str = "sigmoid_focal_loss",
    backend: str = "torch",
    dtype: str = "float32",
    *,
    max_ulp: float | None = None,
    atol: float = 0.0,
    soft_targets: bool = True,
    seed: int = 0,
    **params: Any,
) -> LossReport:
    r"""Compare a loss and its gradient with a reference formula over a grid of extreme inputs.

    **Grid.** The logits where losses break: 0, the smallest numbers, :math:`\pm 17` (beyond which
    :math:`1 - \sigma(x)` is 0 in float32), 20, 88 (where :math:`e^x` overflows), 100, 1000, and
    one between any two powers of two up to :math:`2^{64}` (in float16 to :math:`2^{14}`). In
    addition, [-8, 8], [-128, 128] and [-4096, 4096] are divided into 4096, 8192 and 4096 equal
    parts; each edge, and a random number in each part, is a logit with target 0, with target 1
    and with a soft target. The soft targets are drawn in the same way from 4096 parts of [0, 1].
    So an error in any interval that is a thousandth of an axis wide is found.

    **Measure.** An error is measured in units in the last place (ULP) of the exact result; that
    of a gradient whose terms may cancel, in ULP of the sum of their absolute values. Added to the
    bound is rounding error that no formula avoids: of the margin of FL*, of asymmetric and of
    softmax focal loss, of the difference between score and target in quality focal loss, of a
    smoothed label. At a kink any slope between those of the two sides is accepted. A result below
    64 times the smallest normal number may be zero, or off by as much, because some frameworks
    flush subnormal numbers (not in float16, which they compute in float32); a result beyond the
    largest number may be infinite.

    **Parameters.** Parameters of the reference that `fn` takes by name (`gamma`, `alpha`, `beta`,
    `gamma_positive`, `gamma_negative`, `margin`, `label_smoothing`) are passed to it: those in
    `params` with their value; all others first with the default of `fn` (or of the reference,
    where `fn` has none that the reference takes), then with several values each in random
    combinations. An alpha of None is passed only where it is the default of `fn`. What `fn` does
    not take is part of it, and is compared with the reference at the value in `params`, or at the
    reference's default. A `fn` that takes `reduction` is called with "none", and at its first
    setting with "mean" and "sum", too. To keep parameters from being passed, wrap `fn`:
    `lambda x, y: fn(x, y)`.

    Args:
        fn: The loss to check, `fn(inputs, targets)`: arrays of the framework in, the unreduced
            loss out. All shapes are (N,), except: "sparse_sigmoid_focal_loss" has logits (N, 3),
            labels (N,) and a loss (N, 3), "softmax_focal_loss" has logits (N, 3), labels (N,)
            and a loss (N,), "giou_loss" has boxes (N, 4) twice and a loss (N,). The gradient is
            that in `inputs`. PyTorch's arrays are on the CPU;
            `lambda x, y: kernel(x.cuda(), y.cuda())` checks a kernel. In JAX `fn` is compiled,
            unless it cannot be traced.
        reference: Name of a public loss. Default "sigmoid_focal_loss".
        backend: "torch" (default), "jax", "tensorflow", or "numpy", which has no autodiff, so
            that only the value is checked.
        dtype: Type of the logits and targets: "float16", "bfloat16", "float32" (default) or
            "float64".
        max_ulp: The bound; default 6 + 4 gamma for float32 and float64 (of several exponents
            the largest counts), and 1 for half types: a loss computed in float32 and rounded
            once satisfies it, one computed in the half type does not.
        atol: Absolute tolerance, added to the bound. Default 0.
        soft_targets: Whether to check targets between 0 and 1 too, where the reference takes
            them. Default True.
        seed: Of the random numbers, an integer >= 0. Default 0.
        params: Parameters of the reference.

    Returns:
        The report: the largest errors and where they are. `print` it for a table.

    Raises:
        AssertionError: a value or a gradient is beyond the bound, NaN or infinite, or there is
            no gradient. The message is the table, with the worst places.
        TypeError: an argument has the wrong type, or a parameter is not one of the reference's.
        ValueError: a name is unknown, a number out of range, or `fn` returned another shape.

    Example:
        >>> import numpy as np
        >>> from focal.testing import check_loss
        >>> def cross_entropy(x, y, alpha=0.5):
        ...     ce = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
        ...     return (alpha * y + (1 - alpha) * (1 - y)) * ce
        >>> report = check_loss(cross_entropy, "balanced_cross_entropy", "numpy")
        >>> report.passed, [setting["alpha"] for setting in report.settings]
        (True, [0.5, 0.25, 0.1, 0.75])

    Source: the formulas of `focal.core`, evaluated in a wider type.
    """
    if not callable(fn):
        raise TypeError(f"{NAME}: fn must be callable; got {fn!r}")
    checks.check_choice(NAME, "reference", reference, REFERENCES)
    checks.check_choice(NAME, "backend", backend, tuple(FRAMEWORKS))
    checks.check_choice(NAME, "dtype", dtype, DTYPES)
    if dtype not in FRAMEWORKS[backend].dtypes:
        raise ValueError(f"{NAME}: dtype must be one that {backend} has; got {dtype!r}")
    if max_ulp is not None:
        max_ulp = checks.check_number(NAME, "max_ulp", max_ulp, low=0)
    atol = checks.check_number(NAME, "atol", atol, low=0)
    seed = checks.check_integer(NAME, "seed", seed, low=0)
    _check_params(reference, params)
    names = _parameters_by_name(fn)
    settings = _settings(reference, params, names, seed)

    framework = FRAMEWORKS[backend]()
    grid = grid_of(reference, dtype, soft_targets, seed)
    found: dict[str, list[Findings]] = {}
    bounds = []
    with framework.scope(dtype):
        for i, setting in enumerate(settings):
            default = allowed_ulp(dtype, exponent(reference, setting))
            bound = Bound(dtype, default if max_ulp is None else max_ulp, atol, setting)
            bounds.append(bound.ulp)
            answers = exact(reference, setting, dtype, grid, second=i == 0)
            loss = _with_parameters(fn, setting | {"reduction": "none"}, names)
            if i == 0:
                _check_shape(loss, framework, dtype, grid, answers)
            results = measure(loss, framework, grid, answers, bound, without=i == 0)
            if i == 0 and "reduction" in names:
                for reduction in ("mean", "sum"):
                    few, total = reduced(reference, setting, dtype, grid, answers, reduction)
                    loss = _with_parameters(fn, setting | {"reduction": reduction}, names)
                    results |= measure(loss, framework, few, total, bound, without=False)
            for kind, result in results.items():
                found.setdefault(kind, []).append(result)
    parts = tuple(Part.merged(kind, results) for kind, results in found.items())
    report = LossReport(
        loss=getattr(fn, "__name__", type(fn).__name__),
        reference=reference,
        params=settings[0],
        settings=tuple(settings),
        backend=backend,
        dtype=dtype,
        max_ulp=max(bounds),
        parts=parts,
        passed=all(part.passed for part in parts),
    )
    if not report.passed:
        raise AssertionError(str(report))
    return report


def _check_params(reference: str, params: Params) -> None:
    """Each must be a number, or None, for a parameter of the reference."""
    known = parameters_of(reference)
    for name, value in params.items():
        if name not in known:
            raise TypeError(
                f"{NAME}: params must be among those of {reference}, "
                f"{', '.join(known) or 'which has none'}; got {name}"
            )
        if value is not None:
            checks.check_number(NAME, name, value)


def _check_shape(
    loss: Callable[..., Any], framework: Framework, dtype: str, grid: Grid, answers: Exact
) -> None:
    """Of the loss of a few rows; one that broadcasts would need too much memory for all."""
    inputs, targets = grid.inputs[:SAMPLE], grid.targets[:SAMPLE]
    x = framework.asarray(inputs, dtype)
    t = framework.asarray(targets, None if targets.dtype.kind == "i" else dtype)
    shape = framework.numpy(framework.compiled(loss)(x, t)).shape
    expected = answers.value.exact[:SAMPLE].shape
    if shape != expected:
        raise ValueError(
            f"{NAME}: fn must return the unreduced loss, of shape {expected} for inputs "
            f"{inputs.shape}; got {shape}"
        )


def _parameters_by_name(fn: Callable[..., Any]) -> Params:
    """The parameters that a function can be given by name, and their defaults."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some that are written in C have none
        return {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p.default for name, p in signature.parameters.items() if p.kind in by_name}


def _with_parameters(
    fn: Callable[..., Any], params: Params, names: Collection[str]
) -> Callable[[Any, Any], Any]:
    """The loss with the parameters that it takes by name."""
    given = {name: value for name, value in params.items() if name in names}

    def loss(x: Any, t: Any) -> Any:
        try:
            return fn(x, t, **given)
        except Exception as error:
            if given:
                error.add_note(f"It was called with {given}.")
            raise

    return loss


def _settings(reference: str, params: Params, names: Params, seed: int) -> list[Params]:
    """The parameters to check at: first the defaults of the function, or else of the reference.

    Then settings in which each parameter that the function takes, and that is not in `params`,
    has each of its values at least once, in random combinations.
    """
    base = parameters_of(reference) | params
    columns = {}
    for name in [name for name in base if name in names and name not in params]:
        values: list[Any] = [v for v in VALUES[name] if is_valid(reference, {name: v})]
        own = names[name]
        if is_valid(reference, {name: own}):
            base[name] = own
        elif base[name] is None:  # a function shows by its default whether it takes None
            base[name] = values[0]
        values.insert(0, base[name])
        columns[name] = list(dict.fromkeys(values))
    if not columns:
        return [base]
    random = np.random.default_rng(seed)
    count = max(map(len, columns.values()))
    drawn = {
        name: [values[i % len(values)] for i in random.permutation(count)]
        for name, values in columns.items()
    }
    rows = [base | {name: drawn[name][i] for name in drawn} for i in range(count)]
    return [base, *(row for row in rows if row != base)]
