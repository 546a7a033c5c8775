"""The losses of box regression."""

from __future__ import annotations

from focal.core import checks
from focal.core.boxes import giou
from focal.core.losses import dense_arguments, reduce
from focal.core.namespace import Framework, In, Out, Reduction

__all__ = ["giou_loss", "smooth_l1_loss"]


def giou_loss(xp: Framework[In, Out], boxes1: In, boxes2: In, reduction: Reduction = "none") -> Out:
    r"""1 - GIoU of paired boxes.

    Args:
        boxes1: (..., 4) as (x1, y1, x2, y2) in pixels, of a real type.
        boxes2: Same shape; box i of one is compared with box i of the other.
        reduction: "none" (default), "mean" or "sum".

    Returns:
        (...) in [0, 2] for "none", else a scalar. The mean of no boxes is 0.

    Raises:
        TypeError: an argument is not an array of a real type.
        ValueError: the shapes differ, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import giou_loss
        >>> giou_loss(np.array([[0.0, 0, 1, 1]]), np.array([[2.0, 0, 3, 1]])).round(4)
        array([1.3333])

    Source: Rezatofighi et al. 2019; `torchvision.ops.generalized_box_iou_loss`.
    """
    name = "giou_loss"
    checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)
    boxes1 = checks.check_boxes(xp, name, "boxes1", boxes1)
    boxes2 = checks.check_boxes(xp, name, "boxes2", boxes2)
    checks.check_same_shape(name, "boxes2", boxes2, "boxes1", boxes1)
    losses = 1 - giou(xp, *checks.wide_pair(xp, boxes1, boxes2))
    return reduce(xp, losses, reduction, boxes1.dtype)


def smooth_l1_loss(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    beta: float = 1.0,
    reduction: Reduction = "none",
) -> Out:
    r"""Smooth L1 loss: square below `beta`, linear above.

    .. math:: d^2 / (2 \beta) \text{ if } |d| < \beta, \quad |d| - \beta / 2 \text{ else};
              \qquad d = \text{inputs} - \text{targets}

    Args:
        inputs: Any shape, floating-point.
        targets: Same shape, any real type.
        beta: Where the two pieces meet, finite, >= 0; 0 is L1, of slope 0 at 0. Default 1.
            Detectron uses 0.11.
        reduction: "none" (default), "mean" or "sum".

    Returns:
        The loss: the shape and type of `inputs` for "none", else a scalar (float32 where
        `inputs` is a half type). The mean of no elements is 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, beta is out of range, or the reduction is unknown.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import smooth_l1_loss
        >>> smooth_l1_loss(np.array([0.5, 3.0]), np.array([0.0, 0.0]))
        array([0.125, 2.5  ])

    Source: Girshick 2015 (Fast R-CNN), equation 3, with the beta of
    `torch.nn.functional.smooth_l1_loss`.
    """
    name = "smooth_l1_loss"
    checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)
    beta = checks.check_number(name, "beta", beta, low=0)
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    wide = checks.wide_type(xp, inputs)
    distance = xp.abs(xp.astype(inputs, wide) - xp.astype(targets, wide))
    if beta == 0:
        losses = distance
    else:
        # Written as the sum of both pieces, the slope at a small difference would cancel.
        core = xp.minimum(distance, beta)
        square = core * core * (0.5 / beta)
        losses = xp.where(distance < beta, square, distance - beta / 2)
    return reduce(xp, losses, reduction, inputs.dtype)
