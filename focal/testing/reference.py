"""The reference losses and their derivatives: the core's formulas on NumPy, in a wider type.

A half-precision or float32 loss is compared with float64, a float64 one with NumPy's `longdouble`
(80 bits on x86; where it is no wider than float64, the reference has rounding errors of its own).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import focal.numpy
from focal.core import box_losses, boxes, checks, losses, softmax, variants
from focal.core.namespace import Formula
from focal.numpy._namespace import xp
from focal.testing.grid import Grid
from focal.testing.ulp import LIMITS, Limits

__all__ = [
    "REFERENCES",
    "VALUES",
    "Exact",
    "Result",
    "exact",
    "exponent",
    "is_valid",
    "parameters_of",
    "reduced",
]

Wide = NDArray[Any]
Params = dict[str, Any]
CORE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        losses.sigmoid_focal_loss,
        losses.sparse_sigmoid_focal_loss,
        softmax.softmax_focal_loss,
        losses.sigmoid_focal_loss_star,
        losses.balanced_cross_entropy,
        variants.quality_focal_loss,
        variants.varifocal_loss,
        variants.heatmap_focal_loss,
        variants.asymmetric_loss,
        box_losses.smooth_l1_loss,
        box_losses.giou_loss,
    )
}
REFERENCES = tuple(CORE)
VALUES: dict[str, tuple[float, ...]] = {
    "alpha": (0.1, 0.25, 0.75),
    "gamma": (0.0, 0.5, 1.0, 2.0, 3.7),
    "beta": (0.0, 0.11, 1.0, 4.0),
    "gamma_positive": (0.0, 0.5, 1.0, 2.0, 3.7),
    "gamma_negative": (0.0, 0.5, 1.0, 2.0, 3.7),
    "margin": (0.0, 0.05, 0.2),
    "label_smoothing": (0.0, 0.1, 0.3),
}
"""The parameters of all references, and the values that a loss is checked at."""
EXPONENTS = {
    "quality_focal_loss": ("beta",),
    "heatmap_focal_loss": ("gamma", "beta"),
    "asymmetric_loss": ("gamma_positive", "gamma_negative"),
}
"""The parameters that are exponents, where that is not gamma alone."""
SCORE_ULPS = 2
"""Error of a score that something close to it is subtracted from."""
ROUNDED: dict[str, dict[str, int]] = {
    "sigmoid_focal_loss_star": {"gamma": 1, "beta": 1},
    "asymmetric_loss": {"margin": SCORE_ULPS},
}
"""Parameters of a margin, and the change in ULP that is equivalent to its rounding error."""
CROSS_ENTROPY: tuple[str, Params] = ("balanced_cross_entropy", {"alpha": None})
MIXTURES = ("sigmoid_focal_loss_star", "asymmetric_loss")
"""Losses that are mixtures of the losses of a positive and of a negative at a soft target."""
STEP = 1e-200
"""Of complex-step differentiation."""
REDUCED, ORDINARY = 1000, 8.0
"""Rows of a reduced loss, and their largest logit."""


class Result(NamedTuple):
    """Exact numbers, the magnitude that sets the unit of their error, and unavoidable error.

    `size` is the sum of the absolute terms where terms may cancel (the gradient at a soft
    target), else the result itself. `slack` is the absolute error that follows from rounding an
    intermediate result: the margin of FL*, of asymmetric loss and of softmax, the difference of
    quality focal loss, a smoothed label. At a kink it covers both slopes.
    """

    exact: Wide
    size: Wide
    slack: Wide

    def rows(self, rows: Any) -> Result:
        """Those of some rows."""
        return Result(*(array[rows] for array in self))


class Exact(NamedTuple):
    """A loss and its derivatives; `second` is None where it is not checked."""

    value: Result
    gradient: Result
    second: Result | None = None
    pick: Wide | float = 1.0
    """Weights of the gradients whose sum is differentiated for `second`."""


def parameters_of(reference: str) -> Params:
    """The parameters of a reference and their defaults."""
    signature = inspect.signature(CORE[reference]).parameters
    return {name: signature[name].default for name in VALUES if name in signature}


def is_valid(reference: str, params: Params) -> bool:
    """Whether a reference takes these values of its parameters, each one number or None."""
    x = np.zeros((1, 4))
    labels = reference in ("sparse_sigmoid_focal_loss", "softmax_focal_loss")
    t = np.zeros(1, int) if labels else x
    try:
        CORE[reference](xp, x, t, **params)
    except (TypeError, ValueError):
        return False
    return not any(map(checks.is_sequence, params.values()))


def exponent(reference: str, params: Params) -> float:
    """The largest exponent: the error of its base is multiplied by it."""
    names = EXPONENTS.get(reference, ("gamma",))
    return max((params[name] for name in names if name in params), default=0.0)


def exact(reference: str, params: Params, dtype: str, grid: Grid, second: bool) -> Exact:
    """The reference on a grid, with its second derivative where `second` asks for it.

    All numbers but alpha are rounded to the type that the loss is computed in, as a framework
    does with a Python number; m^gamma depends on it at large logits.
    """
    wide: Any = np.float64
    limits = LIMITS[dtype]._replace(epsilon=min(LIMITS[dtype].epsilon, LIMITS["float32"].epsilon))
    if dtype == "float64":
        wide = np.longdouble
    else:
        rounded = {k: float(np.float32(v)) for k, v in params.items() if k != "alpha"}
        params = params | rounded
    x = grid.inputs.astype(wide)
    if reference == "softmax_focal_loss":
        return _softmax(x, grid.targets, params, limits)
    if reference == "smooth_l1_loss":
        return _smooth_l1(x, grid.targets.astype(wide), params["beta"], limits)
    if reference == "giou_loss":
        return _giou(x, grid.targets.astype(wide))
    smoothing = params.get("label_smoothing", 0.0)
    y = grid.target_of_logit.astype(wide) * (1 - smoothing) + smoothing / 2
    labels = grid.targets.dtype.kind == "i"
    targets = grid.targets if labels else grid.targets.astype(wide)
    return _elementwise(reference, params, x, targets, y, limits, second)


def _elementwise(
    reference: str, params: Params, x: Wide, targets: Wide, y: Wide, limits: Limits, second: bool
) -> Exact:
    """A loss of single logits; `y` is the smoothed target in [0, 1] of each."""
    found = _derivatives(reference, params, x, targets, second)
    slack = [np.zeros_like(x) for _ in found]
    for pair in _rounded(reference, params, x, targets, limits):
        changed = (_derivatives(reference, p, x, t, second) for p, t in pair)
        for total, here, below, above in zip(slack, found, *changed, strict=True):
            total += np.maximum(np.abs(below - here), np.abs(above - here))

    size, soft = [np.abs(derivative) for derivative in found], (y > 0) & (y < 1)
    terms = _terms(reference, params, x[soft], y[soft], found[0][soft], found[1][soft])
    size[1][soft] = np.maximum(size[1][soft], terms)
    if second:  # it crosses zero: there p q (that of cross entropy) sets the unit
        pq = _derivatives(*CROSS_ENTROPY, x, np.ones_like(x), second)[2]
        size[2] += np.minimum(np.abs(found[1]), pq)
    value, gradient, *bend = map(Result, found, size, slack)
    return Exact(value, gradient, bend[0] if bend else None)


def _derivatives(
    reference: str, params: Params, x: Wide, targets: Wide, second: bool = False
) -> list[Wide]:
    """A loss of single logits, its first derivative, and its second one if `second` asks for it.

    They are those of the formula that the public loss passes to its framework.
    """
    recorder = _Recorder()
    CORE[reference](recorder, x, targets, **params)
    formula, x, t = recorder.passed
    found = list(formula.value_and_grad(xp, x, t))
    return [*found, formula.hess(xp, x, t)] if second else found


class _Recorder:
    """The NumPy namespace, except that it records a formula and its arguments."""

    passed: tuple[Formula, Wide, Wide]

    def __getattr__(self, name: str) -> Any:
        return getattr(xp, name)

    def pointwise(self, formula: Formula, x: Wide, t: Wide) -> Wide:
        self.passed = formula, x, t
        return x


def _rounded(
    reference: str, params: Params, x: Wide, targets: Wide, limits: Limits
) -> list[list[tuple[Params, Wide]]]:
    """Pairs of parameters and targets: rounded down, and rounded up.

    A smoothed label 1 - s / 2 is rounded as a number near 1.
    """
    steps = {
        name: ulps * limits.epsilon * abs(params[name])
        for name, ulps in ROUNDED.get(reference, {}).items()
    }
    if params.get("label_smoothing"):
        smoothing = params["label_smoothing"]
        steps["label_smoothing"] = min(limits.epsilon, smoothing, 1 - smoothing)
    pairs = [
        [(params | {name: params[name] + sign * step}, targets) for sign in (-1, 1)]
        for name, step in steps.items()
        if step
    ]
    if reference == "quality_focal_loss":
        step = np.where(targets < 1, SCORE_ULPS * limits.epsilon * targets, 0)
        low, high = targets - step, np.minimum(targets + step, 1)
        # The loss is least, and its slope greatest, where the target is the score.
        near = np.minimum(np.maximum(xp.sigmoid(x), low), high)
        pairs += [[(params, low), (params, high)], [(params, near), (params, near)]]
    return pairs


def _terms(reference: str, params: Params, x: Wide, y: Wide, value: Wide, gradient: Wide) -> Wide:
    """Sum of the absolute terms of a gradient, which may cancel at a soft target.

    A loss is a factor times a mixture, by y, of the losses of y = 1 and y = 0. The derivative of
    the mixture has two terms, one per class; the third term is the derivative of the factor.
    """
    plain = CROSS_ENTROPY
    if reference in MIXTURES:
        plain = reference, params | ({"alpha": None} if "alpha" in params else {})
    mixture, slope = _derivatives(*plain, x, y)
    factor = np.divide(value, mixture, out=np.zeros_like(x), where=mixture > 0)
    negative, positive = (
        np.abs(_derivatives(*plain, x, np.full_like(x, t))[1]) for t in (0.0, 1.0)
    )
    straight = (1 - y) * negative + y * positive
    return np.asarray(np.abs(gradient - factor * slope) + factor * straight)


def _softmax(x: Wide, labels: NDArray[Any], params: Params, limits: Limits) -> Exact:
    """The loss of the label; smoothed, the mixture of the losses of all labels."""
    smoothing, classes = params["label_smoothing"], x.shape[-1]
    own = _softmax_of_label(x, labels, params, limits)
    if not smoothing:
        return own
    every = [_softmax_of_label(x, labels * 0 + k, params, limits) for k in range(classes)]
    mixture = [(1 - smoothing, own), *((smoothing / classes, other) for other in every)]

    def mixed(name: str) -> Result:
        parts = [(share, getattr(part, name)) for share, part in mixture]
        return Result(*(sum(share * part[i] for share, part in parts) for i in range(3)))

    return Exact(mixed("value"), mixed("gradient"))


def _softmax_of_label(x: Wide, labels: NDArray[Any], params: Params, limits: Limits) -> Exact:
    """With the second derivatives of the gradient at the label, FL''(z) dz/dx."""
    options = {"alpha": params["alpha"], "gamma": params["gamma"]}
    value = focal.numpy.softmax_focal_loss(x, labels, **options)
    gradient = focal.numpy.softmax_focal_loss_grad(x, labels, **options)
    label = labels[:, None] == np.arange(x.shape[-1])
    others = np.where(label, -np.inf, x - x[label][:, None])
    z = -xp.logsumexp(others)
    share = np.abs(np.where(label, 1.0, np.exp(others + z[:, None])))  # |dz/dx|
    scale = 1.0 if params["alpha"] in (None, -1) else params["alpha"]
    unweighted = options | {"alpha": None}
    bend = scale * _derivatives("sigmoid_focal_loss", unweighted, z, np.ones_like(z), True)[2]
    slope = np.abs(gradient[label])
    # Three roundings (x_j - x_c, logsumexp, their difference) of numbers as large as the range of
    # the row, by half an ULP each; exp makes them relative errors.
    rounding = 1.5 * limits.epsilon * (1 + np.ptp(x, axis=-1))
    # The gradient at the label is a sum over the others, each of which may be flushed to zero.
    flushed = x.shape[-1] * limits.tiny if limits.may_flush else 0.0
    slack = (share * np.abs(bend)[:, None] + np.abs(gradient)) * rounding[:, None] + flushed
    size = share * (np.abs(bend) + slope * xp.sigmoid(-np.abs(z)))[:, None]
    return Exact(
        Result(value, np.abs(value), slope * rounding),
        Result(gradient, np.abs(gradient), slack),
        Result(
            np.where(label, 1, -1) * bend[:, None] * share,
            size,
            share * (slope * rounding)[:, None],
        ),
        pick=label.astype(np.float64),
    )


def _smooth_l1(x: Wide, t: Wide, beta: float, limits: Limits) -> Exact:
    """The slope is d / beta within [-1, 1]; at the kink of L1 any slope between is right."""
    value, difference = focal.numpy.smooth_l1_loss(x, t, beta), x - t
    slope = np.clip(difference / beta, -1, 1) if beta else np.sign(difference)
    zero = limits.tiny if limits.may_flush else 0.0
    kink = ((beta == 0) & (np.abs(difference) <= zero)).astype(x.dtype)
    return Exact(Result(value, value, 0 * value), Result(slope, np.abs(slope), 2 * kink))


def _giou(a: Wide, b: Wide) -> Exact:
    """The gradient in `a` by complex steps: f(a + ih) = f(a) + ih f'(a).

    h is so small that its square is 0 in floating point, and there is no error but rounding.
    NumPy orders complex numbers of equal real parts by the imaginary ones: where edges coincide,
    the result is the slope on the side of h, and any slope between those of both sides is right.
    """
    value = focal.numpy.giou_loss(a, b)

    def slope(h: float) -> Wide:
        steps = (a + 1j * h * axis for axis in np.eye(4))
        return np.stack([-boxes.giou(xp, moved, b + 0j).imag / h for moved in steps], axis=-1)

    one, other = slope(STEP), slope(-STEP)
    # An upper bound of what an edge changes in intersection and union, and in the hull.
    size = np.maximum(a[:, 2:] - a[:, :2], 0)
    area = np.maximum(size.prod(-1), (b[:, 2:] - b[:, :2]).prod(-1))[:, None]
    hull = np.maximum(a, b)[:, 2:] - np.minimum(a, b)[:, :2]
    terms = _ratio(size[:, ::-1], area) + _ratio(np.ones_like(hull), hull)
    return Exact(
        Result(value, np.maximum(value, 1), 0 * value),
        Result((one + other) / 2, np.tile(terms, 2), np.abs(one - other) / 2),
    )


def _ratio(a: Wide, b: Wide) -> Wide:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def reduced(
    reference: str, params: Params, dtype: str, grid: Grid, exact: Exact, reduction: str
) -> tuple[Grid, Exact]:
    """Some rows of a grid, and the reduced loss there.

    The rows have ordinary logits, because an extreme one would hide the errors of the others.
    """
    ordinary = np.abs(grid.inputs).reshape(len(grid.inputs), -1).max(-1) <= ORDINARY
    rows = np.random.default_rng(0).permutation(np.flatnonzero(ordinary))[:REDUCED]
    x, t, y = grid.inputs[rows], grid.targets[rows], grid.target_of_logit[rows]
    few = Grid(x, t, y, {reduction: np.ones(len(rows), bool)})

    value, gradient = exact.value.rows(rows), exact.gradient.rows(rows)
    loss = getattr(focal.numpy, reference)
    total = loss(x, t, reduction="sum", **params)
    share = loss(x, t, reduction=reduction, **params) / total  # of a mean, 1 / count
    epsilon = min(LIMITS[dtype].epsilon, LIMITS["float32"].epsilon)
    # Each addition is a rounding of the sum; a gradient is multiplied once more.
    added = value.slack.sum() + value.size.size / 2 * epsilon * value.size.sum()
    more = gradient.slack + 2 * LIMITS[dtype].epsilon * gradient.size
    return few, Exact(
        Result(share * value.exact.sum(), share * value.size.sum(), share * added),
        Result(share * gradient.exact, share * gradient.size, share * more),
    )
