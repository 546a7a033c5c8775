"""The public losses: check the arguments, choose the formula, reduce.

Every function takes the array namespace `xp` first. `focal.numpy`, `focal.torch` and the other
adapters bind it, so users see the signature without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from focal.core import checks
from focal.core.formulas import SigmoidFocal, SigmoidFocalStar, Sparse, alpha_t
from focal.core.namespace import (
    Array,
    Formula,
    Framework,
    In,
    Namespace,
    Out,
    Reduction,
    SparseReduction,
)

__all__ = [
    "balanced_cross_entropy",
    "num_positives",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "sparse_sigmoid_focal_loss",
]


def sigmoid_focal_loss(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    alpha: float | Sequence[float] | In | None = 0.25,
    gamma: float | In = 2.0,
    reduction: Reduction = "none",
    *,
    weight: In | None = None,
    label_smoothing: float | In = 0.0,
) -> Out:
    r"""Focal loss of independent binary classifications, from logits.

    .. math::
        \mathrm{FL} = \alpha_t (1 - p_t)^\gamma\, \mathrm{CE}, \qquad p = \sigma(x)

    with :math:`1 - p_t = y(1-p) + (1-y)p`, :math:`\alpha_t = \alpha y + (1-\alpha)(1-y)` and
    CE the binary cross entropy. Value and gradient are exact to a few units in the last place
    for every finite logit and every gamma >= 0; the gradient is never NaN.

    Args:
        inputs: Logits of any shape and floating-point type. float16 and bfloat16 are computed
            in float32.
        targets: Same shape as `inputs` (nothing broadcasts), values in [0, 1], any real or
            boolean type. Soft targets blend inside :math:`p_t` and CE, as in torchvision.
        alpha: Weight of positives, `1 - alpha` for negatives, in [0, 1]: a number, or one per
            class, K numbers for the K classes on the last axis. None or -1 turns it off.
            Default 0.25.
        gamma: Focusing parameter, finite, >= 0; 0 is cross entropy. Default 2. Like `alpha` and
            `label_smoothing`, a number or an array without axes, which may be traced or
            learned; the value of an array is not checked.
        reduction: "none" (default), "mean" over all elements, or "sum".
        weight: Factors that broadcast to the shape of `inputs`, multiplied into the loss.
        label_smoothing: s in [0, 1]: each target y becomes `y (1 - s) + s / 2`, as in
            `keras.losses.BinaryFocalCrossentropy`. Default 0.

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar (float32 where
        `inputs` is a half type). The mean of no elements is 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import sigmoid_focal_loss
        >>> sigmoid_focal_loss(np.array([-4.0, 0.0, 4.0]), np.array([1.0, 1.0, 1.0])).round(6)
        array([9.68727e-01, 4.33220e-02, 1.00000e-06])

    Source: Lin et al. 2017, equation 5; the argument order and the soft targets are those of
    `torchvision.ops.sigmoid_focal_loss`.
    """
    name = "sigmoid_focal_loss"
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula, alphas = focal_formula(xp, name, alpha, gamma, label_smoothing, inputs)
    factors = dense_factors(xp, formula, alphas, inputs, targets)
    return dense_loss(xp, name, formula, inputs, targets, reduction, weight, factors)


def balanced_cross_entropy(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    alpha: float | In | None = 0.75,
    reduction: Reduction = "none",
    *,
    weight: In | None = None,
) -> Out:
    r"""Alpha-balanced binary cross entropy, from logits: focal loss at gamma 0.

    .. math:: \alpha_t\, \mathrm{CE}, \qquad \alpha_t = \alpha y + (1 - \alpha)(1 - y)

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, values in [0, 1], any real or boolean type.
        alpha: Weight of positives, `1 - alpha` for negatives, in [0, 1]. None or -1 turns it
            off. Default 0.75, the paper's best for cross entropy.
        reduction: "none" (default), "mean" over all elements, or "sum".
        weight: Factors that broadcast to the shape of `inputs`, multiplied into the loss.

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import balanced_cross_entropy
        >>> balanced_cross_entropy(np.array([0.0, 0.0]), np.array([1, 0])).round(6)
        array([0.51986 , 0.173287])

    Source: Lin et al. 2017, equation 3 and Table 1a.
    """
    name = "balanced_cross_entropy"
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula = SigmoidFocal(checks.check_alpha_scalar(xp, name, alpha, inputs), 0.0)
    return dense_loss(xp, name, formula, inputs, targets, reduction, weight)


def sigmoid_focal_loss_star(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    alpha: float | In | None = 0.25,
    gamma: float | In = 2.0,
    beta: float | In = 1.0,
    reduction: Reduction = "none",
    *,
    weight: In | None = None,
) -> Out:
    r"""FL*, the alternate form of focal loss of the paper's appendix, from logits.

    .. math::
        \mathrm{FL}^* = -\alpha_t \log \sigma(\gamma x_t + \beta) / \gamma, \qquad
        x_t = x \text{ for } y = 1,\ -x \text{ for } y = 0

    A soft target is the mixture `y FL*(y=1) + (1 - y) FL*(y=0)` times :math:`\alpha_t`, so that
    gamma 1, beta 0 is binary cross entropy.

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, values in [0, 1], any real or boolean type.
        alpha: Weight of positives, `1 - alpha` for negatives, in [0, 1]. None or -1 turns it
            off. Default 0.25.
        gamma: Slope of the margin, finite, > 0. Default 2.
        beta: Shift of the margin, finite. Default 1. All three may be arrays without axes.
        reduction: "none" (default), "mean" over all elements, or "sum".
        weight: Factors that broadcast to the shape of `inputs`, multiplied into the loss.

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import sigmoid_focal_loss_star
        >>> sigmoid_focal_loss_star(np.array([0.0]), np.array([1.0]), alpha=None).round(6)
        array([0.156631])

    Source: Lin et al. 2017, appendix A, equations 6 to 8. fvcore's function of this name has
    no beta.
    """
    name = "sigmoid_focal_loss_star"
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula = star_formula(xp, name, alpha, gamma, beta, inputs)
    return dense_loss(xp, name, formula, inputs, targets, reduction, weight)


def sparse_sigmoid_focal_loss(
    xp: Framework[In, Out],
    inputs: In,
    labels: In,
    alpha: float | Sequence[float] | In | None = 0.25,
    gamma: float | In = 2.0,
    reduction: SparseReduction = "none",
    *,
    weight: In | None = None,
    label_smoothing: float | In = 0.0,
    axis: int = -1,
) -> Out:
    r"""Sigmoid focal loss with class labels instead of dense targets: a detector's loss.

    The same as :func:`sigmoid_focal_loss` with one-hot targets, but no one-hot array is built.

    Args:
        inputs: Logits of any floating-point type, with the K classes on `axis`.
        labels: Integers of the shape of `inputs` without `axis`: the class in [0, K), -1 for
            background (all K targets are 0), -2 or below for ignored (no loss, no gradient, not
            counted).
            K and above is an error in eager code on a CPU, and ignored in compiled code and on
            a GPU, where checking the values would synchronize.
        alpha: Weight of positives, `1 - alpha` for negatives, in [0, 1]: a number, or one per
            class. None or -1 turns it off. Default 0.25.
        gamma: Focusing parameter, finite, >= 0. Default 2. May be an array, as in
            :func:`sigmoid_focal_loss`.
        reduction: "none" (default), "mean" over the logits of rows not ignored, "sum", or
            "positives": the sum over max(1, number of labels >= 0), the paper's normalizer.
        weight: Factors that broadcast to the shape of `inputs`, multiplied into the loss.
        label_smoothing: s in [0, 1]: the targets are `1 - s / 2` and `s / 2`. Default 0.
        axis: The class axis of `inputs` (and of `weight`). Default -1; image logits
            (N, K, H, W) have it at 1.

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar (float32 where
        `inputs` is a half type). A mean where every row is ignored is 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import sparse_sigmoid_focal_loss
        >>> logits = np.array([[2.0, -1.0], [0.0, 0.0], [3.0, 3.0]])
        >>> sparse_sigmoid_focal_loss(logits, np.array([0, -1, -2])).round(4)
        array([[0.0005, 0.017 ],
               [0.13  , 0.13  ],
               [0.    , 0.    ]])

    Source: Lin et al. 2017, equation 5 and section 4.1 (normalizer); the labels are those of
    NVIDIA Apex's focal loss.
    """
    name = "sparse_sigmoid_focal_loss"
    checks.check_choice(name, "reduction", reduction, checks.SPARSE_REDUCTIONS)
    inputs = checks.check_floating(xp, name, "inputs", inputs)
    labels = checks.check_labels(xp, name, "labels", labels)
    axis = checks.check_class_axis(name, axis, inputs) if len(inputs.shape) else axis
    checks.check_classes(name, inputs, axis)
    checks.check_labels_fit(name, labels, inputs, axis)
    classes = xp.shape(inputs)[axis]
    expected = f"lie in [0, {classes}) or be negative"
    labels = checks.check_label_values(xp, name, labels, lambda a: a >= classes, -2, expected)
    formula, alphas = focal_formula(xp, name, alpha, gamma, label_smoothing, inputs, axis)
    wide = checks.wide_type(xp, inputs)
    weight = checked_weight(xp, name, weight, inputs)
    last = len(inputs.shape) - 1
    if axis != last:
        inputs = xp.moveaxis(inputs, axis, last)
        weight = None if weight is None else xp.moveaxis(weight, axis, last)

    count = None
    if reduction == "positives":
        count = count_true(xp, labels >= 0, wide)
    elif reduction == "mean":
        count = count_true(xp, labels >= -1, wide) * checks.as_factor(xp, classes, wide)
    factors = None
    if alphas is not None:
        at = xp.maximum(labels, 0)
        y_at = formula.smoothed(xp.astype(labels >= 0, wide)[..., None])
        others = alpha_t(along_last_axis(xp, alphas, inputs), formula.smoothed(0.0))
        background = xp.zeros_like(xp.astype(inputs, wide)) + others
        own = alpha_t(of_each(xp, alphas, at)[..., None], y_at)
        factors = xp.put_along_axis(background, at[..., None], own)
    losses = reduced(xp, Sparse(formula), inputs, labels, reduction, weight, factors, count)
    return xp.moveaxis(losses, last, axis) if reduction == "none" and axis != last else losses


def num_positives(
    xp: Framework[In, Out], labels: In, *, over_replicas: Callable[[Out], Out] | None = None
) -> Out:
    """The number of positive labels, at least 1: the paper's normalizer of a batch's loss.

    In PyTorch, JAX and TensorFlow the function of this name counts over all replicas that share a
    batch, by the framework's own collectives. NumPy has none: pass one as `over_replicas`.

    Args:
        labels: Integers of any shape, in the convention of :func:`sparse_sigmoid_focal_loss`:
            a class >= 0, -1 background, -2 ignored.
        over_replicas: Turns the count of one replica into the sum over all of them, such as
            `allreduce` of an MPI communicator. Default: there is one replica.

    Returns:
        A float32 scalar.

    Raises:
        TypeError: `labels` are not integers.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import num_positives
        >>> num_positives(np.array([2, 0, -1, -2])), num_positives(np.array([-1, -1]))
        (np.float32(2.0), np.float32(1.0))

    Source: Lin et al. 2017, section 4.1.
    """
    labels = checks.check_labels(xp, "num_positives", "labels", labels)
    count = xp.sum(xp.astype(labels >= 0, xp.float32))
    return xp.maximum(count if over_replicas is None else over_replicas(count), 1)


def dense_loss(
    xp: Namespace,
    name: str,
    formula: Formula,
    inputs: Array,
    targets: Array,
    reduction: str,
    weight: Array | None,
    factors: Array | None = None,
) -> Array:
    """A loss of checked logits and targets of one shape, times `factors`."""
    checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)
    weight = checked_weight(xp, name, weight, inputs)
    return reduced(xp, formula, inputs, targets, reduction, weight, factors)


def reduced(
    xp: Namespace,
    formula: Formula,
    inputs: Array,
    targets: Array,
    reduction: str,
    weight: Array | None,
    factors: Array | None = None,
    count: Array | None = None,
) -> Array:
    """The loss times `weight` and `factors`, reduced as in `reduce`."""
    if weight is not None:
        factors = weight if factors is None else factors * weight
    if factors is not None:
        losses = xp.pointwise(formula, checks.wide(xp, inputs), targets) * factors
        return reduce(xp, losses, reduction, inputs.dtype, count)
    if reduction == "none":
        return xp.pointwise(formula, inputs, targets)
    return sum_or_mean(xp, xp.pointwise_sum(formula, inputs, targets), inputs, reduction, count)


def reduce(
    xp: Namespace, losses: Array, reduction: str, dtype: object, count: Array | None = None
) -> Array:
    """Losses in a wide type, reduced as in `sum_or_mean`, or unreduced in `dtype`."""
    if reduction == "none":
        return xp.astype(losses, dtype)
    return sum_or_mean(xp, xp.sum(losses), losses, reduction, count)


def sum_or_mean(
    xp: Namespace, total: Array, elements: Array, reduction: str, count: Array | None
) -> Array:
    """`total`, or `total / count` for a mean; by default the number of elements, at least 1."""
    if reduction == "sum":
        return total
    return total / (checks.count(xp, elements, total.dtype) if count is None else count)


def count_true(xp: Namespace, mask: Array, dtype: object) -> Array:
    """How many elements are true, at least 1."""
    return xp.maximum(xp.sum(xp.astype(mask, dtype)), 1)


def dense_arguments(xp: Namespace, name: str, inputs: Array, targets: Array) -> tuple[Array, Array]:
    inputs = checks.check_floating(xp, name, "inputs", inputs)
    targets = checks.check_real(xp, name, "targets", targets)
    checks.check_same_shape(name, "targets", targets, "inputs", inputs)
    return inputs, targets


def focal_formula(
    xp: Namespace,
    name: str,
    alpha: object,
    gamma: object,
    label_smoothing: object,
    inputs: Array,
    axis: int = -1,
) -> tuple[SigmoidFocal, Array | None]:
    """The formula and None; for one alpha per class, the formula without alpha, and the alphas."""
    exponent = checks.check_scalar(xp, name, "gamma", gamma, inputs, low=0)
    smoothing = checks.check_scalar(xp, name, "label_smoothing", label_smoothing, inputs, 0, 1)
    if not checks.is_sequence(alpha):
        own = checks.check_alpha_scalar(xp, name, alpha, inputs)
        return SigmoidFocal(own, exponent, smoothing), None
    if not len(inputs.shape):
        raise ValueError(
            f"{name}: one alpha per class needs inputs with a class axis; got shape ()"
        )
    alphas = checks.check_class_alphas(xp, name, alpha, inputs.shape[axis], inputs, high=1)
    return SigmoidFocal(None, exponent, smoothing), alphas


def dense_factors(
    xp: Namespace, formula: SigmoidFocal, alphas: Array | None, inputs: Array, targets: Array
) -> Array | None:
    """The factor a of every element where alpha is one per class."""
    if alphas is None:
        return None
    y = formula.smoothed(xp.astype(targets, alphas.dtype))
    return alpha_t(along_last_axis(xp, alphas, inputs), y)


def along_last_axis(xp: Namespace, alphas: Array, inputs: Array) -> Array:
    """One alpha per class with the axes of the logits."""
    return xp.reshape(alphas, (1,) * (len(inputs.shape) - 1) + (-1,))


def of_each(xp: Namespace, alphas: Array, at: Array) -> Array:
    """The alpha of the class of every row."""
    return xp.reshape(xp.take(alphas, xp.reshape(at, (-1,)), axis=0), xp.shape(at))


def checked_weight(xp: Namespace, name: str, weight: Array | None, inputs: Array) -> Array | None:
    """The weight with the axes of the logits, in their compute type."""
    if weight is None:
        return None
    weight = checks.check_real(xp, name, "weight", weight)
    checks.check_broadcasts(name, "weight", weight, "inputs", tuple(inputs.shape))
    missing = len(inputs.shape) - len(weight.shape)
    if missing:
        weight = xp.reshape(weight, (1,) * missing + xp.shape(weight))
    return xp.astype(weight, checks.wide_type(xp, inputs))


def star_formula(
    xp: Namespace, name: str, alpha: object, gamma: object, beta: object, inputs: Array
) -> SigmoidFocalStar:
    gamma = checks.as_number(gamma)
    slope = (
        checks.check_scalar(xp, name, "gamma", gamma, inputs)
        if checks.is_array(gamma)
        else checks.check_slope(name, "gamma", gamma)
    )
    return SigmoidFocalStar(
        checks.check_alpha_scalar(xp, name, alpha, inputs),
        slope,
        checks.check_scalar(xp, name, "beta", beta, inputs),
    )
