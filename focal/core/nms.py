"""Exact greedy non-maximum suppression, as a fixed point instead of a sequential loop."""

from __future__ import annotations

import numpy as np

from focal.core import checks
from focal.core.boxes import box_iou
from focal.core.namespace import Array, Namespace

__all__ = ["batched_nms", "nms", "suppress"]

BLOCK = 256
"""Boxes resolved at once: bounds the memory to BLOCK x N overlaps, the rounds to BLOCK."""


def nms(xp: Namespace, boxes: Array, scores: Array, iou_threshold: float) -> Array:
    """Greedy non-maximum suppression.

    Walking from the best score down, a box is kept unless its IoU with a box already kept is
    greater than the threshold. Equal scores are taken in the order given.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2) in pixels, floating-point.
        scores: (N,) floating-point.
        iou_threshold: In [0, 1].

    Returns:
        Indices of the kept boxes, best score first. Under the transformations of JAX (`jit`,
        `vmap`), where shapes are static, padded with -1 to N.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or the threshold is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import nms
        >>> boxes = np.array([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
        >>> nms(boxes, np.array([0.8, 0.9, 0.5]), 0.5)
        array([1, 2])

    Source: `torchvision.ops.nms`.
    """
    boxes, scores, threshold = _arguments(xp, "nms", boxes, scores, iou_threshold)
    order = xp.argsort(-scores, stable=True)
    keep = suppress(xp, xp.take(boxes, order, axis=0), None, threshold)
    return xp.select_kept(order, keep)


def batched_nms(
    xp: Namespace, boxes: Array, scores: Array, classes: Array, iou_threshold: float
) -> Array:
    """Non-maximum suppression within each class.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2) in pixels, floating-point.
        scores: (N,) floating-point.
        classes: (N,) integers; boxes of different classes never suppress one another.
        iou_threshold: In [0, 1].

    Returns:
        Indices of the kept boxes, best score first. Under the transformations of JAX (`jit`,
        `vmap`), where shapes are static, padded with -1 to N.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or the threshold is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import batched_nms
        >>> boxes = np.array([[0.0, 0, 10, 10], [1, 1, 11, 11], [0, 0, 10, 10]])
        >>> batched_nms(boxes, np.array([0.8, 0.9, 0.5]), np.array([0, 0, 1]), 0.5)
        array([1, 2])

    Source: `torchvision.ops.batched_nms`; classes are compared, not shifted apart, so that no
    coordinate loses digits.
    """
    name = "batched_nms"
    boxes, scores, threshold = _arguments(xp, name, boxes, scores, iou_threshold)
    classes = checks.check_labels(xp, name, "classes", classes)
    checks.check_same_shape(name, "classes", classes, "scores", scores)
    order = xp.argsort(-scores, stable=True)
    boxes, classes = xp.take(boxes, order, axis=0), xp.take(classes, order, axis=0)
    return xp.select_kept(order, suppress(xp, boxes, classes, threshold))


def suppress(xp: Namespace, boxes: Array, classes: Array | None, threshold: float) -> Array:
    """Which of the boxes (..., N, 4), sorted by falling score, greedy NMS keeps: (..., N).

    Within a block the greedy answer is the fixed point of "kept are those that no kept box
    before me overlaps", reached from all kept in as many rounds as the longest chain of
    overlaps; what a block keeps then suppresses everything after it.
    """
    n = boxes.shape[-2]
    if n is None:
        raise ValueError("non-maximum suppression: the number of boxes must be known when traced")
    alive = boxes[..., 0] == boxes[..., 0]  # all True but for NaN boxes
    kept = []
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        over = box_iou(xp, boxes[..., start:stop, :], boxes[..., start:, :]) > threshold
        if classes is not None:
            over = over & (classes[..., start:stop, None] == classes[..., None, start:])
        here = stop - start
        before = xp.constant(np.triu(np.ones((here, here), bool), 1), boxes)
        inner = over[..., :here] & before
        candidates = alive[..., :here]

        def step(keep: Array, candidates: Array = candidates, inner: Array = inner) -> Array:
            return candidates & ~xp.any(keep[..., :, None] & inner, axis=-2)

        keep = xp.fixed_point(step, candidates)
        kept.append(keep)
        alive = alive[..., here:] & ~xp.any(keep[..., :, None] & over[..., here:], axis=-2)
    return xp.concat(kept, axis=-1) if kept else alive


def _arguments(
    xp: Namespace, name: str, boxes: Array, scores: Array, iou_threshold: float
) -> tuple[Array, Array, float]:
    boxes = checks.check_boxes(xp, name, "boxes", boxes)
    if len(boxes.shape) != 2:
        raise ValueError(f"{name}: boxes must have shape (N, 4); got {tuple(boxes.shape)}")
    scores = checks.check_floating(xp, name, "scores", scores)
    checks.check_shape(name, "scores", scores, tuple(boxes.shape[:1]), "boxes.shape[:1]")
    threshold = checks.check_number(name, "iou_threshold", iou_threshold, 0, 1)
    return checks.wide(xp, boxes), scores, threshold
