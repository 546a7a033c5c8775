"""Softmax focal loss: the sigmoid focal loss of the margin of the label."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from focal.core import checks
from focal.core.formulas import Positive, SigmoidFocal
from focal.core.losses import along_last_axis, count_true, of_each, reduce
from focal.core.namespace import Array, Framework, In, Namespace, Out, Reduction
from focal.core.parameters import is_number

__all__ = [
    "all_margins",
    "margin",
    "margin_grad",
    "softmax_focal_loss",
    "softmax_focal_loss_grad",
]


def softmax_focal_loss(
    xp: Framework[In, Out],
    inputs: In,
    labels: In,
    alpha: float | Sequence[float] | In | None = None,
    gamma: float | In = 2.0,
    reduction: Reduction = "none",
    *,
    ignore_index: int | None = -100,
    axis: int = -1,
    label_smoothing: float | In = 0.0,
) -> Out:
    r"""Focal loss of one choice among K classes, from logits.

    .. math:: \mathrm{FL} = \alpha_c (1 - p_c)^\gamma (-\log p_c), \qquad
              p = \mathrm{softmax}(x)

    Computed as the sigmoid focal loss of the margin
    :math:`z = x_c - \log\sum_{j \ne c} e^{x_j}`, which keeps full precision where
    :math:`p_c` is near 1.

    Args:
        inputs: Logits of any floating-point type, with the K classes on `axis`.
        labels: Integers of the shape of `inputs` without `axis`: the class in [0, K), or
            `ignore_index`. Other values are an error in eager code on a CPU, and ignored in
            compiled code and on a GPU, where checking the values would synchronize.
        alpha: None or -1 (off; None is the default), a number >= 0 that multiplies every loss,
            or K such numbers, one per class: a sequence or an array.
        gamma: Focusing parameter, finite, >= 0; 0 is cross entropy. Default 2. Like `alpha` and
            `label_smoothing`, a number or an array without axes.
        reduction: "none" (default), "mean" over the labels that are not ignored (not divided
            by the alphas), or "sum".
        ignore_index: Label that has no loss, no gradient and does not count; None: there is
            none. Default -100.
        axis: The class axis. Default -1; image logits (N, K, H, W) have it at 1.
        label_smoothing: s in [0, 1]: the loss is the mixture of `1 - s` times that of the label
            and `s / K` times that of each class, as if it were the label, as in
            `keras.losses.CategoricalFocalCrossentropy`. Default 0.

    Returns:
        The loss: the shape of `labels` and the type of `inputs` for "none", else a scalar
        (float32 where `inputs` is a half type).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import softmax_focal_loss
        >>> softmax_focal_loss(np.array([[2.0, 0.5, -1.0]]), np.array([0])).round(6)
        array([0.011093])

    Source: Lin et al. 2017, equation 4, with the softmax of its footnote in section 3;
    `ignore_index` as in `torch.nn.functional.cross_entropy`.
    """
    name = "softmax_focal_loss"
    checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)
    x, at, valid, alphas = _softmax_arguments(xp, name, inputs, labels, alpha, ignore_index, axis)
    formula = Positive(SigmoidFocal(None, checks.check_scalar(xp, name, "gamma", gamma, x, low=0)))
    smoothing = checks.check_scalar(xp, name, "label_smoothing", label_smoothing, x, 0, 1)
    smoothed = not (is_number(smoothing) and smoothing == 0)
    of_class = smoothed and checks.is_sequence(alphas)  # others are factors of a row's loss
    if smoothed:
        way = partial(_mixture, xp, formula, smoothing, alphas if of_class else None)
    else:
        way = partial(_labeled, xp, formula)
    focusing = formula.formula.gamma
    if xp.softmax_pass is None or of_class or not (is_number(focusing) and is_number(smoothing)):
        losses = way(x, at, valid)
    else:
        losses = xp.softmax_pass(way, focusing, smoothing, x, at, valid)
    losses = losses if of_class else _times_alphas(xp, losses, alphas, at)
    losses = xp.where(~valid, 0.0, losses)
    count = count_true(xp, valid, losses.dtype) if reduction == "mean" else None
    return reduce(xp, losses, reduction, inputs.dtype, count)


def _labeled(xp: Namespace, formula: Positive, x: Array, at: Array, valid: Array) -> Array:
    """The loss of the label's margin."""
    return xp.pointwise(formula, xp.label_margin(x, at, valid), 1.0)


def _mixture(
    xp: Namespace, formula: Positive, s: Any, alphas: Any, x: Array, at: Array, valid: Array
) -> Array:
    """(1 - s) times the loss of the label and s / K times that of each class, if it were it."""
    each = xp.pointwise(formula, all_margins(xp, x, valid), 1.0)
    if alphas is not None:
        each = each * (alphas if is_number(alphas) else along_last_axis(xp, alphas, x))
    own = xp.take_along_axis(each, at[..., None], axis=-1)[..., 0]
    share = s / checks.as_factor(xp, xp.shape(x)[-1], x.dtype)
    return (1 - s) * own + share * xp.sum(each, axis=-1)


def softmax_focal_loss_grad(
    xp: Framework[In, Out],
    inputs: In,
    labels: In,
    alpha: float | Sequence[float] | In | None = None,
    gamma: float | In = 2.0,
    *,
    ignore_index: int | None = -100,
    axis: int = -1,
) -> Out:
    r"""Gradient of the unreduced :func:`softmax_focal_loss`, unsmoothed, in its logits.

    With the margin z of the label c and FL' its derivative,

    .. math:: \mathrm{FL}'(z) \left(e_c - (1 - e_c) \odot \mathrm{softmax}_{j \ne c}(x)\right)

    Args:
        inputs: Logits of any floating-point type, with the K classes on `axis`.
        labels: Integers of the shape of `inputs` without `axis`, or `ignore_index`.
        alpha: As in :func:`softmax_focal_loss`.
        gamma: As in :func:`softmax_focal_loss`.
        ignore_index: As in :func:`softmax_focal_loss`.
        axis: The class axis. Default -1.

    Returns:
        The gradient of each loss in its own K logits, with the shape and type of `inputs`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit or a number is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import softmax_focal_loss_grad
        >>> softmax_focal_loss_grad(np.array([[0.0, 0.0]]), np.array([0]), gamma=0)
        array([[-0.5,  0.5]])

    Source: chain rule on equation 4 of Lin et al. 2017; docs/math.md derives it.
    """
    name = "softmax_focal_loss_grad"
    x, at, valid, alphas = _softmax_arguments(xp, name, inputs, labels, alpha, ignore_index, axis)
    formula = Positive(SigmoidFocal(None, checks.check_scalar(xp, name, "gamma", gamma, x, low=0)))
    z, odds = margin(xp, x, at, valid)
    _, slope = formula.value_and_grad(xp, z, 1.0)
    slope = _times_alphas(xp, xp.where(~valid, 0.0, slope), alphas, at)
    grad = margin_grad(xp, odds, at, slope)
    return xp.astype(xp.moveaxis(grad, -1, axis), inputs.dtype)


def margin(xp: Namespace, x: Array, at: Array, valid: Array) -> tuple[Array, Array]:
    """The margin z = x_c - log(sum_{j != c} exp(x_j)) of class c = `at`.

    And the other classes' exp(x_j - max_{j != c} x_j), with 0 for the class itself. The maximum is
    that of the others, so that large logits lose no precision, whichever class they belong to.

    Args:
        xp: The namespace.
        x: Logits (..., K), float32 or float64. Infinite ones (masked classes) count as large
            finite ones.
        at: (...) integers in [0, K).
        valid: (...) booleans; the logits of other rows count as zeros.
    """
    limit = xp.finfo(x.dtype).max / 4
    x = xp.keep_rows(xp.clip(x, -limit, limit), valid)
    c = at[..., None]
    own = xp.take_along_axis(x, c, axis=-1)
    # The least finite number: with a single class, -inf would make NaN.
    others = xp.put_along_axis(x, c, xp.zeros_like(own) + xp.finfo(x.dtype).min)
    top = xp.stop_gradient(xp.max(others, axis=-1, keepdims=True))
    odds = xp.exp(others - top)
    z = (own - top) - xp.log(xp.sum(odds, axis=-1, keepdims=True))
    return z[..., 0], odds


def margin_grad(xp: Namespace, odds: Array, at: Array, upstream: Array) -> Array:
    """The product upstream dz/dx, with dz/dx = e_c - odds / sum(odds)."""
    upstream = upstream[..., None]
    grad = odds * (-upstream / xp.sum(odds, axis=-1, keepdims=True))
    return xp.put_along_axis(grad, at[..., None], upstream)


class Bounded(NamedTuple):
    """The logits, infinite ones as large finite ones; the derivative is 1 for these as well."""

    limit: float

    def value(self, xp: Namespace, x: Array, _: Any) -> Array:
        """The logits within the limits."""
        return xp.clip(x, -self.limit, self.limit)

    def value_and_grad(self, xp: Namespace, x: Array, _: Any) -> tuple[Array, Array]:
        """And 1."""
        return self.value(xp, x, _), xp.zeros_like(x) + 1

    def hess(self, xp: Namespace, x: Array, _: Any) -> Array:
        """0."""
        return xp.zeros_like(x)


def all_margins(xp: Namespace, x: Array, valid: Array) -> Array:
    """The margin of every class, as if it were the label: x_k - log(sum_{j != k} exp(x_j)).

    That of the greatest logit is relative to the second: its derivatives have no exp that is 0.
    """
    limits = xp.finfo(x.dtype)
    x = xp.keep_rows(xp.pointwise(Bounded(limits.max / 4), x, 1.0), valid)
    _, top = xp.top_k(x, 1)
    x = x - xp.stop_gradient(xp.take_along_axis(x, top, axis=-1))
    x_top = xp.take_along_axis(x, top, axis=-1)  # 0, with a derivative
    zero = xp.zeros_like(x_top)
    odds = xp.put_along_axis(xp.exp(x), top, zero)
    z = x - xp.log(xp.exp(x_top) + (xp.sum(odds, axis=-1, keepdims=True) - odds))
    others = xp.put_along_axis(x, top, zero + limits.min)
    second = xp.stop_gradient(xp.max(others, axis=-1, keepdims=True))
    log_sum = xp.log(xp.sum(xp.exp(others - second), axis=-1, keepdims=True))
    return xp.put_along_axis(z, top, (x_top - second) - log_sum)


def _softmax_arguments(
    xp: Namespace,
    name: str,
    inputs: Array,
    labels: Array,
    alpha: object,
    ignore_index: int | None,
    axis: int,
) -> tuple[Array, Array, Array, Array | float | None]:
    """The logits in a wide type with the classes last, the labels, which count, and the alphas."""
    inputs = checks.check_floating(xp, name, "inputs", inputs)
    labels = checks.check_labels(xp, name, "labels", labels)
    axis = checks.check_class_axis(name, axis, inputs)
    checks.check_classes(name, inputs, axis)
    checks.check_labels_fit(name, labels, inputs, axis)
    alphas = _checked_alphas(xp, name, alpha, inputs.shape[axis], inputs)
    classes = xp.shape(inputs)[axis]
    ignored, expected = -1, f"lie in [0, {classes})"
    if ignore_index is not None:
        ignored = checks.check_integer(name, "ignore_index", ignore_index, low=-(2**63))
        expected = f"{expected} or be {ignored}"

    def is_wrong(labels: Array) -> Array:
        outside = (labels >= classes) | (labels < 0)
        return outside if ignore_index is None else outside & (labels != ignored)

    labels = checks.check_label_values(xp, name, labels, is_wrong, ignored, expected)
    valid = labels != ignored
    at = xp.where(~valid, 0, labels)
    return xp.moveaxis(checks.wide(xp, inputs), axis, -1), at, valid, alphas


def _checked_alphas(
    xp: Namespace, name: str, alpha: Any, classes: int, like: Array
) -> Array | float | None:
    """None, one number, or an array (K,)."""
    if alpha is None or (isinstance(alpha, numbers.Real) and alpha == -1):
        return None
    if checks.is_sequence(alpha):
        return checks.check_class_alphas(xp, name, alpha, classes, like)
    return checks.check_scalar(xp, name, "alpha", alpha, like, low=0)


def _times_alphas(xp: Namespace, values: Array, alphas: Array | float | None, at: Array) -> Array:
    if alphas is None:
        return values
    return values * (of_each(xp, alphas, at) if checks.is_sequence(alphas) else alphas)
