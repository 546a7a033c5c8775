"""Somebody's own loss against the reference formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from focal.core import checks
from focal.testing.frameworks import DTYPES, FRAMEWORKS
from focal.testing.problem import exact, grid_of, reduced
from focal.testing.references import REFERENCES, exponent
from focal.testing.report import LossReport, Part
from focal.testing.settings import checked, names_taken, settings
from focal.testing.trial import Trial
from focal.testing.ulp import allowed_ulp

__all__ = ["check_loss"]

NAME = "check_loss"


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
    r"""Compare a loss, value and gradient, with a reference formula over a hard grid.

    **The grid.** The logits where losses break: 0, the smallest numbers, :math:`\pm 17` (beyond
    which :math:`1 - \sigma(x)` is 0 in float32), 20, 88 (where :math:`e^x` overflows), 100,
    1000, and one between any two powers of two, up to :math:`2^{64}` (in float16 to
    :math:`2^{14}`). Besides them [-8, 8], [-128, 128] and [-4096, 4096] are cut into 4096, 8192
    and 4096 equal parts, and each edge and a random number in each part is a logit: with target
    0, with target 1, and with a target in between. Those targets come in the same way from 4096
    parts of [0, 1]. So an error in any band of an axis that is a thousandth of it wide is found.

    **The measure.** An error is measured in units in the last place (ULP) of the exact result;
    that of a gradient whose terms may cancel in ULP of the sum of their absolute values. On top
    of the bound comes what rounding explains that no formula avoids: of the margin of FL*, of
    asymmetric and of softmax focal loss, of the difference between score and target in quality
    focal loss, of a smoothed label. At a kink any slope between those of the two sides is right.
    A result below 64 times the smallest normal number may be zero, or off by that much, because
    some frameworks flush smaller numbers (in float16, which they compute in float32, it may
    not); a result beyond the largest number may be infinite.

    **The parameters.** Where `fn` takes parameters of the reference by name (`gamma`, `alpha`,
    `beta`, `gamma_positive`, `gamma_negative`, `margin`, `label_smoothing`), it is given them:
    those in `params` with their value; all others first with the default of `fn` (or of the
    reference, where `fn` has none that the reference takes), then with several values each in
    random combinations. An alpha of None is given only where it is the default of `fn`. What
    `fn` does not take is built in, and is compared with the reference at the value in `params`,
    or at the reference's default. A `fn` that takes `reduction` is given "none", and with its
    first parameters "mean" and "sum", too. To keep a parameter from being given, wrap `fn`:
    `lambda x, y: fn(x, y)`.

    Args:
        fn: The loss to check, `fn(inputs, targets)`: arrays of the framework in, the unreduced
            loss out. All shapes are (N,), except: for "sparse_sigmoid_focal_loss" it gets
            logits (N, 3) and labels (N,) and returns (N, 3), for "softmax_focal_loss" it
            returns (N,), for "giou_loss" it gets boxes (N, 4) twice and returns (N,). The
            gradient is that in `inputs`. PyTorch's arrays are on the CPU:
            `lambda x, y: kernel(x.cuda(), y.cuda())` checks a kernel. In JAX `fn` is compiled,
            unless it cannot be traced.
        reference: Name of a public loss. Default "sigmoid_focal_loss".
        backend: "torch" (default), "jax", "tensorflow", or "numpy", where there is only the
            value to check.
        dtype: Type of the logits and targets: "float16", "bfloat16", "float32" (default) or
            "float64".
        max_ulp: The bound; default 6 + 4 gamma for float32 and float64 (of several exponents
            the largest counts), and 1 for half types: a loss computed in float32 and rounded
            once keeps it, one computed in the half type does not.
        atol: An absolute error that is harmless, allowed on top of the bound. Default 0.
        soft_targets: Whether to check targets between 0 and 1 too, where the reference takes
            them. Default True.
        seed: Of the random numbers, an integer >= 0. Default 0.
        params: Parameters of the reference; those of `fn`, or built into it.

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
    names = names_taken(fn)
    tried = settings(reference, checked(NAME, reference, params), names, seed)

    framework = FRAMEWORKS[backend](dtype)
    grid = grid_of(reference, dtype, soft_targets, seed)
    found: dict[str, list[Part]] = {}
    bounds = []
    with framework.scope():
        for i, setting in enumerate(tried):
            default = allowed_ulp(dtype, exponent(reference, setting))
            bounds.append(default if max_ulp is None else max_ulp)
            trial = Trial(fn, names, framework, setting, bounds[-1], atol, thorough=i == 0)
            answers = exact(reference, setting, dtype, grid, second=i == 0)
            if i == 0:
                trial.check_shape(NAME, grid, answers)
            parts = trial.parts(grid, answers)
            if i == 0 and "reduction" in names:
                for reduction in ("mean", "sum"):
                    few, total = reduced(reference, setting, dtype, grid, answers, reduction)
                    parts += trial.parts(few, total, reduction)
            for part in parts:
                found.setdefault(part.targets, []).append(part)
    merged = tuple(map(Part.merged, found.values()))
    report = LossReport(
        loss=getattr(fn, "__name__", type(fn).__name__),
        reference=reference,
        params=tried[0],
        settings=tuple(tried),
        backend=backend,
        dtype=dtype,
        max_ulp=max(bounds),
        parts=merged,
        passed=all(part.passed for part in merged),
    )
    if not report.passed:
        raise AssertionError(str(report))
    return report
