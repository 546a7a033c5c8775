"""What a loss is compared with: the core's formulas on NumPy, in a wider type.

A float32 or half-precision loss is compared in float64, a float64 one in NumPy's `longdouble`
(80 bits on x86; where it is no wider than float64, the reference has errors of its own).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focal.numpy._namespace import xp
from focal.testing.references import derivatives
from focal.testing.ulp import Limits

__all__ = ["Exact", "Result", "elementwise"]

Wide = NDArray[Any]
Params = dict[str, Any]
SCORE = 2
"""ULPs of a score that something near it is subtracted from."""
ROUNDED: dict[str, dict[str, int]] = {
    "sigmoid_focal_loss_star": {"gamma": 1, "beta": 1},
    "asymmetric_loss": {"margin": SCORE},
}
"""Parameters of a margin, and how many ULPs of them do what its rounding does."""
MIXTURES = ("sigmoid_focal_loss_star", "asymmetric_loss")
"""Losses whose soft targets mix the loss of a positive and that of a negative."""
PLAIN = "balanced_cross_entropy", {"alpha": None}


class Result(NamedTuple):
    """Exact numbers, the size that an error is measured by, and what cannot be helped.

    `size` is the sum of the absolute terms where terms may cancel (the gradient at a soft
    target), else the result itself. `slack` is the absolute error that follows from rounding
    what is itself computed: the margin of FL*, of asymmetric loss and of softmax, the difference
    of quality focal loss, a smoothed label. At a kink it takes in both slopes.
    """

    exact: Wide
    size: Wide
    slack: Wide


class Exact(NamedTuple):
    """A loss and its derivatives; `second` is None where it is not checked."""

    value: Result
    gradient: Result
    second: Result | None = None
    pick: Wide | float = 1.0
    """Weights of the gradients whose sum is differentiated for `second`."""


def elementwise(
    reference: str, params: Params, x: Wide, targets: Wide, y: Wide, limits: Limits, second: bool
) -> Exact:
    """A loss of single logits.

    Args:
        reference: Its name.
        params: Its parameters, in the type computed in.
        x: The logits.
        targets: Targets or labels, as the loss takes them.
        y: The target in [0, 1] of each logit, smoothed.
        limits: Those of the type, with the epsilon of the type computed in.
        second: Whether to give the second derivative, too.
    """
    found = derivatives(reference, params, x, targets, second)
    slack = [np.zeros_like(x) for _ in found]
    for below, above in _rounded(reference, params, x, targets, limits):
        changed = (derivatives(reference, p, x, t, second) for p, t in (below, above))
        for total, here, one, other in zip(slack, found, *changed, strict=True):
            total += np.maximum(np.abs(one - here), np.abs(other - here))

    value, gradient = found[:2]
    size, soft = np.abs(gradient), (y > 0) & (y < 1)
    terms = _terms(reference, params, x[soft], y[soft], value[soft], gradient[soft])
    size[soft] = np.maximum(size[soft], terms)
    bend = None
    if second:
        # It crosses zero: there p q (that of cross entropy) is the measure.
        least = np.minimum(np.abs(gradient), derivatives(*PLAIN, x, np.ones_like(x), True)[2])
        bend = Result(found[2], np.abs(found[2]) + least, slack[2])
    return Exact(Result(value, np.abs(value), slack[0]), Result(gradient, size, slack[1]), bend)


def _rounded(
    reference: str, params: Params, x: Wide, targets: Wide, limits: Limits
) -> list[list[tuple[Params, Wide]]]:
    """Pairs of parameters and targets with what is rounded on the way moved down, and up.

    A smoothed label 1 - s / 2 is rounded as a number near 1.
    """
    steps = {
        name: ulps * limits.epsilon * abs(params[name])
        for name, ulps in ROUNDED.get(reference, {}).items()
        if name in params
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
        step = np.where(targets < 1, SCORE * limits.epsilon * targets, 0)
        low, high = targets - step, np.minimum(targets + step, 1)
        # The loss is least, and its slope greatest, where the target is the score.
        near = np.minimum(np.maximum(xp.sigmoid(x), low), high)
        pairs += [[(params, low), (params, high)], [(params, near), (params, near)]]
    return pairs


def _terms(reference: str, params: Params, x: Wide, y: Wide, value: Wide, gradient: Wide) -> Wide:
    """Sum of the absolute terms of a gradient: three, of which a soft target makes some cancel.

    A loss is a factor times a mixture, by y, of the losses of y = 1 and y = 0. The derivative of
    the mixture has two terms, one per class, and what remains is that of the factor.
    """
    plain: tuple[str, Params] = PLAIN
    if reference in MIXTURES:
        plain = reference, params | ({"alpha": None} if "alpha" in params else {})
    mixture, slope = derivatives(*plain, x, y)
    factor = np.divide(value, mixture, out=np.zeros_like(x), where=mixture > 0)
    negative, positive = (np.abs(derivatives(*plain, x, np.full_like(x, t))[1]) for t in (0.0, 1.0))
    straight = (1 - y) * negative + y * positive
    return np.asarray(np.abs(gradient - factor * slope) + factor * straight)
