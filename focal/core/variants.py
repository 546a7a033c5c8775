"""Variants of focal loss, for detectors and multi-label classifiers."""

from __future__ import annotations

from focal.core import checks
from focal.core.losses import checked_weight, count_true, dense_arguments, dense_loss, reduced
from focal.core.namespace import Framework, In, Out, Reduction, SparseReduction
from focal.core.variant_formulas import Asymmetric, HeatmapFocal, QualityFocal, Varifocal

__all__ = ["asymmetric_loss", "heatmap_focal_loss", "quality_focal_loss", "varifocal_loss"]


def quality_focal_loss(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    beta: float | In = 2.0,
    reduction: Reduction = "none",
    *,
    weight: In | None = None,
) -> Out:
    r"""Quality focal loss: cross entropy with a soft target, focused on how far the score is off.

    .. math:: \mathrm{QFL} = |y - p|^\beta\, \mathrm{CE}(x, y), \qquad p = \sigma(x)

    For targets 0 and 1 it is :func:`sigmoid_focal_loss` without alpha. A target between is a
    quality, such as the IoU of a detection, and the loss is 0 where the score equals it.

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, values in [0, 1], any real or boolean type.
        beta: Exponent, finite, >= 0; 0 is cross entropy. Below 1 the derivative grows without
            bound toward p = y (it is finite at every number, and 0 there). Default 2. A number
            or an array without axes.
        reduction: "none" (default), "mean" over all elements, or "sum".
        weight: Factors that broadcast to the shape of `inputs`, multiplied into the loss.

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import quality_focal_loss
        >>> quality_focal_loss(np.array([-2.0, 0.0, 2.0]), np.array([0.0, 0.5, 0.6])).round(4)
        array([0.0018, 0.    , 0.0731])

    Source: Li et al. 2020, "Generalized Focal Loss" (arXiv 2006.04388), equation 2.
    """
    name = "quality_focal_loss"
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula = QualityFocal(checks.check_scalar(xp, name, "beta", beta, inputs, low=0))
    return dense_loss(xp, name, formula, inputs, targets, reduction, weight)


def varifocal_loss(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    alpha: float | In = 0.75,
    gamma: float | In = 2.0,
    reduction: Reduction = "none",
    *,
    weight: In | None = None,
) -> Out:
    r"""Varifocal loss: positives weighted by their quality, only negatives focused.

    .. math::
        \mathrm{VFL} = y\, \mathrm{CE}(x, y) \text{ for } y > 0, \qquad
        \alpha\, p^\gamma (-\log(1 - p)) \text{ for } y = 0

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, any real or boolean type: 0 for a negative, the quality
            in (0, 1] (the IoU of the box) for a positive.
        alpha: Factor of the negatives, finite, >= 0. Default 0.75.
        gamma: Focusing parameter of the negatives, finite, >= 0. Default 2. Like `alpha`, a
            number or an array without axes.
        reduction: "none" (default), "mean" over all elements, or "sum".
        weight: Factors that broadcast to the shape of `inputs`, multiplied into the loss.

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import varifocal_loss
        >>> varifocal_loss(np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.5, 1.0])).round(4)
        array([0.13  , 0.3466, 0.6931])

    Source: Zhang et al. 2021, "VarifocalNet" (arXiv 2008.13367), equation 2.
    """
    name = "varifocal_loss"
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula = Varifocal(
        checks.check_scalar(xp, name, "alpha", alpha, inputs, low=0),
        checks.check_scalar(xp, name, "gamma", gamma, inputs, low=0),
    )
    return dense_loss(xp, name, formula, inputs, targets, reduction, weight)


def heatmap_focal_loss(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    gamma: float | In = 2.0,
    beta: float | In = 4.0,
    reduction: SparseReduction = "none",
    *,
    weight: In | None = None,
) -> Out:
    r"""Penalty-reduced focal loss of keypoint heatmaps (CornerNet, CenterNet).

    .. math::
        (1 - p)^\gamma (-\log p) \text{ for } y = 1, \qquad
        (1 - y)^\beta\, p^\gamma (-\log(1 - p)) \text{ elsewhere}

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, any real or boolean type: exactly 1 at a keypoint, and a
            value in [0, 1), such as a Gaussian around it, elsewhere. It must be 1 in the type
            that it comes in.
        gamma: Focusing parameter, finite, >= 0; the papers' alpha. Default 2.
        beta: How fast the penalty falls near a keypoint, finite, >= 0. Default 4. Like `gamma`,
            a number or an array without axes.
        reduction: "none" (default), "mean" over all elements, "sum", or "positives": the sum
            over max(1, number of targets that are 1), the papers' normalizer.
        weight: Factors that broadcast to the shape of `inputs`, multiplied into the loss.

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import heatmap_focal_loss
        >>> heatmap_focal_loss(np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.5, 1.0])).round(4)
        array([0.1733, 0.0108, 0.1733])

    Source: Law and Deng 2018, "CornerNet" (arXiv 1808.01244), equation 1; Zhou et al. 2019,
    "Objects as Points" (arXiv 1904.07850), equation 1.
    """
    name = "heatmap_focal_loss"
    checks.check_choice(name, "reduction", reduction, checks.SPARSE_REDUCTIONS)
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    weight = checked_weight(xp, name, weight, inputs)
    formula = HeatmapFocal(
        checks.check_scalar(xp, name, "gamma", gamma, inputs, low=0),
        checks.check_scalar(xp, name, "beta", beta, inputs, low=0),
    )
    count = None
    if reduction == "positives":
        wide = checks.wide_type(xp, inputs)
        count = count_true(xp, xp.astype(targets, wide) >= 1, wide)
    return reduced(xp, formula, inputs, targets, reduction, weight, count=count)


def asymmetric_loss(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    gamma_positive: float | In = 1.0,
    gamma_negative: float | In = 4.0,
    margin: float = 0.05,
    reduction: Reduction = "none",
    *,
    weight: In | None = None,
) -> Out:
    r"""Asymmetric loss (ASL): a gamma for each class, and easy negatives dropped.

    .. math::
        y\, (1-p)^{\gamma_+} (-\log p) + (1-y)\, p_m^{\gamma_-} (-\log(1 - p_m)), \qquad
        p_m = \max(p - m, 0)

    With equal gammas and no margin it is, for targets 0 and 1, :func:`sigmoid_focal_loss`
    without alpha. A soft target mixes the two terms. With a margin the derivative of a negative
    falls to 0 as its score nears 1, so that a missing label costs little.

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, values in [0, 1], any real or boolean type.
        gamma_positive: Focusing parameter of the positives, finite, >= 0. Default 1.
        gamma_negative: Focusing parameter of the negatives, finite, >= 0. Default 4. Both are
            numbers or arrays without axes.
        margin: m, in [0, 1): the score that a negative may have without loss. Default 0.05.
        reduction: "none" (default), "mean" over all elements, or "sum", as in the paper.
        weight: Factors that broadcast to the shape of `inputs`, multiplied into the loss.

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, a number is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import asymmetric_loss
        >>> asymmetric_loss(np.array([-3.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])).round(4)
        array([0.    , 0.0245, 0.3466])

    Source: Ridnik et al. 2021, "Asymmetric Loss for Multi-Label Classification"
    (arXiv 2009.14119), section 2.
    """
    name = "asymmetric_loss"
    shift = checks.check_margin(name, "margin", margin)
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula = Asymmetric(
        checks.check_scalar(xp, name, "gamma_positive", gamma_positive, inputs, low=0),
        checks.check_scalar(xp, name, "gamma_negative", gamma_negative, inputs, low=0),
        shift,
    )
    return dense_loss(xp, name, formula, inputs, targets, reduction, weight)
