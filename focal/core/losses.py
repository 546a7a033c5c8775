"""The public losses: check, pick the formula, reduce. Every adapter binds these functions.

They take the array namespace `xp` first; `focal.numpy`, `focal.torch` and the rest bind it, so
that users see only what follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from focal.core import checks
from focal.core.formulas import SigmoidFocal, SigmoidFocalStar, Sparse
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
from focal.core.parameters import is_number

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
    balance = None
    if alphas is not None:
        y = formula.smoothed(xp.astype(targets, alphas.dtype))
        balance = class_balance(along_last_axis(xp, alphas, inputs), y)
    return dense_loss(xp, name, formula, inputs, targets, reduction, weight, balance)


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
            a GPU, where looking at the labels would wait for them.
        alpha: Weight of positives, `1 - alpha` for negatives, in [0, 1]: a number, or one per
            class. None or -1 turns it off. Default 0.25.
        gamma: Focusing parameter, finite, >= 0. Default 2. May be an array, as in
            :func:`sigmoid_focal_loss`.
        reduction: "none" (default), "mean" over the logits of rows not ignored, "sum", or
            "positives": the sum over max(1, number of labels >= 0), the paper's normaliser.
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

    Source: Lin et al. 2017, equation 5 and section 4.1 (normaliser); the labels are those of
    NVIDIA Apex's focal loss.
    """
    name = "sparse_sigmoid_focal_loss"
    checks.check_choice(name, "reduction", reduction, (*checks.REDUCTIONS, "positives"))
    inputs = checks.check_floating(xp, name, "inputs", inputs)
    labels = checks.check_labels(xp, name, "labels", labels)
    axis = checks.check_class_axis(name, axis, inputs) if len(inputs.shape) else axis
    if not len(inputs.shape) or inputs.shape[axis] == 0:
        raise ValueError(
            f"{name}: inputs must have at least one class on their class axis; "
            f"got shape {tuple(inputs.shape)}"
        )
    checks.check_labels_fit(name, labels, inputs, axis)
    classes = xp.shape(inputs)[axis]
    expected = f"lie in [0, {classes}) or be negative"
    labels = checks.check_label_values(xp, name, labels, lambda a: a >= classes, -2, expected)
    formula, alphas = focal_formula(xp, name, alpha, gamma, label_smoothing, inputs, axis)
    wide = checks.wide_type(xp, inputs)
    if weight is not None:
        weight = checked_weight(xp, name, weight, inputs, wide)
    last = len(inputs.shape) - 1
    if axis != last:
        inputs = xp.moveaxis(inputs, axis, last)
        weight = None if weight is None else xp.moveaxis(weight, axis, last)

    count: Array | int = 1
    if reduction == "positives":
        count = xp.maximum(xp.sum(xp.astype(labels >= 0, wide)), 1)
    elif reduction == "mean":
        rows = xp.sum(xp.astype(labels >= -1, wide))
        count = xp.maximum(rows * checks.as_factor(xp, classes, wide), 1)
    balance = None
    if alphas is not None:
        at = xp.maximum(labels, xp.zeros_like(labels))
        y_at = formula.smoothed(xp.astype(labels >= 0, wide)[..., None])
        own = xp.reshape(xp.take(alphas, xp.reshape(at, (-1,)), axis=0), xp.shape(at))[..., None]
        others = class_balance(along_last_axis(xp, alphas, inputs), formula.smoothed(0.0))
        background = xp.zeros_like(xp.astype(inputs, wide)) + others
        balance = xp.put_along_axis(background, at[..., None], class_balance(own, y_at))
    losses = reduced(xp, Sparse(formula), inputs, labels, reduction, weight, count, balance)
    return xp.moveaxis(losses, last, axis) if reduction == "none" and axis != last else losses


def num_positives(
    xp: Framework[In, Out], labels: In, *, over_replicas: Callable[[Out], Out] | None = None
) -> Out:
    """The number of positive labels, but at least 1: what the paper divides a batch's loss by.

    In PyTorch, JAX and TensorFlow the function of this name counts on all replicas that share a
    batch, in the framework's own way. NumPy knows of none; `over_replicas` brings them in.

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
    balance: Array | None = None,
) -> Array:
    """A loss with targets like the logits, both checked; `balance` are factors of its elements."""
    checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)
    wide = checks.wide_type(xp, inputs)
    if weight is not None:
        weight = checked_weight(xp, name, weight, inputs, wide)
    count = checks.count(xp, inputs, wide) if reduction == "mean" else 1
    return reduced(xp, formula, inputs, targets, reduction, weight, count, balance)


def reduced(
    xp: Namespace,
    formula: Formula,
    inputs: Array,
    targets: Array,
    reduction: str,
    weight: Array | None,
    count: Array | int,
    balance: Array | None,
) -> Array:
    """The loss reduced as asked; `count` is what a sum is divided by."""
    if weight is not None:
        balance = weight if balance is None else balance * weight
    if balance is not None:
        wide = checks.wide_type(xp, inputs)
        losses = xp.pointwise(formula, xp.astype(inputs, wide), targets) * balance
        if reduction == "none":
            return xp.astype(losses, inputs.dtype)
        total = xp.sum(losses)
    elif reduction == "none":
        return xp.pointwise(formula, inputs, targets)
    else:
        total = xp.pointwise_sum(formula, inputs, targets)
    return total if reduction == "sum" else total / count


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
    """The formula, and one alpha per class where alpha is that: factors of a loss without alpha."""
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


def along_last_axis(xp: Namespace, alphas: Array, inputs: Array) -> Array:
    """One alpha per class with the axes of the logits."""
    return xp.reshape(alphas, (1,) * (len(inputs.shape) - 1) + (-1,))


def class_balance(alphas: Array, y: Array | float) -> Array:
    """The factor a for targets y, with alphas that broadcast."""
    return alphas * y + (1 - alphas) * (1 - y)


def checked_weight(xp: Namespace, name: str, weight: Array, inputs: Array, wide: object) -> Array:
    weight = checks.check_real(xp, name, "weight", weight)
    checks.check_broadcasts(name, "weight", weight, "inputs", tuple(inputs.shape))
    missing = len(inputs.shape) - len(weight.shape)
    if missing:
        weight = xp.reshape(weight, (1,) * missing + xp.shape(weight))
    return xp.astype(weight, wide)


def star_formula(
    xp: Namespace, name: str, alpha: object, gamma: object, beta: object, inputs: Array
) -> SigmoidFocalStar:
    slope = checks.check_scalar(xp, name, "gamma", gamma, inputs, low=0)
    if is_number(slope) and slope == 0:
        raise ValueError(f"{name}: gamma must be > 0, the loss is divided by it; got {gamma!r}")
    return SigmoidFocalStar(
        checks.check_alpha_scalar(xp, name, alpha, inputs),
        slope,
        checks.check_scalar(xp, name, "beta", beta, inputs),
    )
