"""Boxes (x1, y1, x2, y2) in pixels: areas, overlaps, and the R-CNN code."""

from __future__ import annotations

import math

from focal.core import checks
from focal.core.namespace import Array, Framework, In, Namespace, Out

__all__ = [
    "box_area",
    "box_iou",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "generalized_box_iou",
]

Weights = tuple[float, float, float, float]
Columns = tuple[Array, Array, Array, Array]
SIZE_CLIP = math.log(1000 / 16)


def box_area(xp: Framework[In, Out], boxes: In) -> Out:
    r"""Areas of boxes, :math:`(x_2 - x_1)(y_2 - y_1)`.

    Args:
        boxes: (..., 4) as (x1, y1, x2, y2) in pixels, of a real type.

    Returns:
        (...) areas in square pixels; float32 where `boxes` has an integer or half type.

    Raises:
        TypeError: `boxes` is not an array of a real type.
        ValueError: its last axis is not 4.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import box_area
        >>> box_area(np.array([[0.0, 0.0, 2.0, 3.0]]))
        array([6.])

    Source: `torchvision.ops.box_area`; widths are x2 - x1, without the +1 of older code.
    """
    return area(columns(checks.wide(xp, checks.check_boxes(xp, "box_area", "boxes", boxes))))


def box_iou(xp: Framework[In, Out], boxes1: In, boxes2: In) -> Out:
    r"""Intersection over union of every box of one set with every box of another.

    .. math:: \mathrm{IoU} = |A \cap B| / |A \cup B|

    Args:
        boxes1: (..., N, 4) as (x1, y1, x2, y2) in pixels, of a real type.
        boxes2: (..., M, 4), with the leading axes of `boxes1` or none.

    Returns:
        (..., N, M) in [0, 1]; 0 where the union has no area. Integer and half types give
        float32.

    Raises:
        TypeError: an argument is not an array of a real type.
        ValueError: a last axis is not 4.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import box_iou
        >>> box_iou(np.array([[0.0, 0.0, 2.0, 2.0]]), np.array([[1.0, 0.0, 3.0, 2.0]])).round(4)
        array([[0.3333]])

    Source: `torchvision.ops.box_iou`, with 0 instead of NaN for boxes without area.
    """
    a, b = _pairs(xp, "box_iou", boxes1, boxes2)
    return ratio(xp, *_overlap(xp, a, b))


def generalized_box_iou(xp: Framework[In, Out], boxes1: In, boxes2: In) -> Out:
    r"""Generalized IoU of every box of one set with every box of another.

    .. math:: \mathrm{GIoU} = \mathrm{IoU} - |C \setminus (A \cup B)| / |C|

    where C is the smallest box around A and B.

    Args:
        boxes1: (..., N, 4) as (x1, y1, x2, y2) in pixels, of a real type.
        boxes2: (..., M, 4), with the leading axes of `boxes1` or none.

    Returns:
        (..., N, M) in [-1, 1]; a quotient with denominator 0 counts as 0. Integer and half types
        give float32.

    Raises:
        TypeError: an argument is not an array of a real type.
        ValueError: a last axis is not 4.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import generalized_box_iou
        >>> generalized_box_iou(np.array([[0.0, 0, 1, 1]]), np.array([[2.0, 0, 3, 1]])).round(4)
        array([[-0.3333]])

    Source: Rezatofighi et al. 2019; `torchvision.ops.generalized_box_iou`.
    """
    return giou(xp, *_pairs(xp, "generalized_box_iou", boxes1, boxes2))


def encode_boxes(
    xp: Framework[In, Out], boxes: In, anchors: In, weights: Weights = (1.0, 1.0, 1.0, 1.0)
) -> Out:
    r"""Boxes as offsets from anchors, the R-CNN parameterization.

    .. math:: w_x \frac{x - x_a}{w_a},\quad w_y \frac{y - y_a}{h_a},\quad
              w_w \log\frac{w}{w_a},\quad w_h \log\frac{h}{h_a}

    with (x, y) centers and (w, h) sizes; the subscript a marks the anchor.

    Args:
        boxes: (..., 4) as (x1, y1, x2, y2) in pixels, of a real type. Sides are taken as at
            least the smallest positive number, so a box without area gives finite deltas.
        anchors: (..., 4), broadcasting with `boxes`; sides > 0.
        weights: Factors (wx, wy, ww, wh), each > 0. Default 1; R-CNN heads use (10, 10, 5, 5).

    Returns:
        (..., 4) deltas (dx, dy, dw, dh), without unit, in the type of `boxes` (float32 for
        integers).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a last axis is not 4, or a weight is not positive.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import encode_boxes
        >>> encode_boxes(np.array([[1.0, 0, 3, 2]]), np.array([[0.0, 0, 2, 2]]))
        array([[0.5, 0. , 0. , 0. ]])

    Source: Girshick et al. 2014 (R-CNN), appendix C; torchvision's `BoxCoder`.
    """
    name = "encode_boxes"
    boxes = checks.check_boxes(xp, name, "boxes", boxes)
    anchors = checks.check_boxes(xp, name, "anchors", anchors)
    _check_broadcast(name, anchors, "boxes", boxes)
    return encoded(xp, boxes, anchors, checks.check_weights(name, weights))


def encoded(xp: Namespace, boxes: Array, anchors: Array, weights: Weights) -> Array:
    """`encode_boxes` of checked arguments."""
    wx, wy, ww, wh = weights
    wide, wide_anchors = checks.wide_pair(xp, *_of_one_rank(boxes, anchors))
    x, y, w, h = _center_size(wide)
    xa, ya, wa, ha = _center_size(wide_anchors)
    tiny = xp.finfo(w.dtype).smallest_normal
    w, h = xp.maximum(w, tiny), xp.maximum(h, tiny)
    # One division per anchor instead of one per box. XLA rewrites the quotients of a batch, but not
    # those of one image, into this product, so the two would differ in the last bit.
    dx, dy = (x - xa) * (wx / wa), (y - ya) * (wy / ha)
    dw, dh = ww * (xp.log(w) - xp.log(wa)), wh * (xp.log(h) - xp.log(ha))
    return xp.astype(xp.stack([dx, dy, dw, dh], axis=-1), boxes.dtype)


def decode_boxes(
    xp: Framework[In, Out],
    deltas: In,
    anchors: In,
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
    clip: float = SIZE_CLIP,
) -> Out:
    r"""Boxes from offsets: the inverse of :func:`encode_boxes`.

    .. math:: x = x_a + w_a\, d_x / w_x,\quad w = w_a\, e^{\min(d_w / w_w,\ \mathrm{clip})}

    Args:
        deltas: (..., 4) as (dx, dy, dw, dh), floating-point.
        anchors: (..., 4) as (x1, y1, x2, y2) in pixels, broadcasting with `deltas`.
        weights: Factors (wx, wy, ww, wh), each > 0. Default 1.
        clip: Greatest log-size ratio; clamped from above only. Default log(1000 / 16).

    Returns:
        (..., 4) boxes (x1, y1, x2, y2) in pixels.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a last axis is not 4, or a number is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import decode_boxes
        >>> decode_boxes(np.array([[0.5, 0.0, 0.0, 0.0]]), np.array([[0.0, 0, 2, 2]]))
        array([[1., 0., 3., 2.]])

    Source: Girshick et al. 2014 (R-CNN), appendix C; torchvision's `BoxCoder`.
    """
    name = "decode_boxes"
    deltas = checks.check_floating(xp, name, "deltas", deltas)
    checks.check_coordinates(name, "deltas", deltas)
    anchors = checks.check_boxes(xp, name, "anchors", anchors)
    wx, wy, ww, wh = checks.check_weights(name, weights)
    _check_broadcast(name, anchors, "deltas", deltas)
    clip = checks.check_number(name, "clip", clip)
    wide, wide_anchors = checks.wide_pair(xp, *_of_one_rank(deltas, anchors))
    xa, ya, wa, ha = _center_size(wide_anchors)
    dx, dy, dw, dh = columns(wide)
    x, y = xa + wa * (dx / wx), ya + ha * (dy / wy)
    half_w = 0.5 * wa * xp.exp(xp.minimum(dw / ww, clip))
    half_h = 0.5 * ha * xp.exp(xp.minimum(dh / wh, clip))
    boxes = xp.stack([x - half_w, y - half_h, x + half_w, y + half_h], axis=-1)
    return xp.astype(boxes, deltas.dtype)


def clip_boxes(xp: Framework[In, Out], boxes: In, image_size: tuple[int, int]) -> Out:
    """Boxes cut off at the edges of the image.

    Args:
        boxes: (..., 4) as (x1, y1, x2, y2) in pixels, of a real type.
        image_size: (height, width) in whole pixels, each >= 1.

    Returns:
        (..., 4) with x in [0, width] and y in [0, height], in the type of `boxes` (float32 for
        integers). The gradient at an edge is that of inside.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the last axis is not 4, or a size is below 1 or no whole number.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import clip_boxes
        >>> clip_boxes(np.array([[-5.0, 10.0, 50.0, 99.0]]), (32, 40))
        array([[ 0., 10., 40., 32.]])

    Source: `torchvision.ops.clip_boxes_to_image`.
    """
    name = "clip_boxes"
    boxes = checks.check_boxes(xp, name, "boxes", boxes)
    height, width = checks.check_image_size(name, image_size)
    limits = (float(width), float(height)) * 2
    clipped = [
        xp.minimum(xp.maximum(x, 0.0), limit)
        for x, limit in zip(columns(boxes), limits, strict=True)
    ]
    return xp.stack(clipped, axis=-1)


# Shared with the losses, matching and suppression. Arguments are checked, and broadcast.


def ratio(xp: Namespace, a: Array, b: Array) -> Array:
    """A / b where b > 0, else 0, without a NaN in value or gradient."""
    unsafe = ~(b > 0)
    return xp.where(unsafe, 0.0, a / xp.where(unsafe, 1.0, b))


def columns(boxes: Array) -> Columns:
    """x1, y1, x2, y2."""
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]


def area(box: Columns) -> Array:
    """Width times height."""
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


def intersection(xp: Namespace, a: Columns, b: Columns) -> Array:
    """The area that two boxes share."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    w = xp.maximum(xp.minimum(ax2, bx2) - xp.maximum(ax1, bx1), 0.0)
    h = xp.maximum(xp.minimum(ay2, by2) - xp.maximum(ay1, by1), 0.0)
    return w * h


def solid(xp: Namespace, boxes: Array) -> tuple[Columns, Array]:
    """Columns and areas for an IoU without gradient: never NaN, and no union is 0.

    A box without a finite area above 0 (empty, inverted, NaN) becomes a point with an area of 1,
    so that its IoU with any box is 0.
    """
    x1, y1, x2, y2 = columns(boxes)
    areas = area((x1, y1, x2, y2))
    bad = ~((areas > 0) & (areas < math.inf) & (x2 > x1))
    x1, y1, x2, y2 = (xp.where(bad, 0.0, x) for x in (x1, y1, x2, y2))
    return (x1, y1, x2, y2), xp.where(bad, 1.0, areas)


def solid_iou(xp: Namespace, a: Columns, a_area: Array, b: Columns, b_area: Array) -> Array:
    """IoU of `solid` boxes."""
    common = intersection(xp, a, b)
    return common / (a_area + b_area - common)


def giou(xp: Namespace, a: Array, b: Array) -> Array:
    """Generalized IoU."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = columns(a), columns(b)
    low, high = xp.minimum, xp.maximum
    hull = area((low(ax1, bx1), low(ay1, by1), high(ax2, bx2), high(ay2, by2)))
    common, union = _overlap(xp, a, b)
    return ratio(xp, common, union) - ratio(xp, hull - union, hull)


def _overlap(xp: Namespace, a: Array, b: Array) -> tuple[Array, Array]:
    """Intersection and union."""
    common = intersection(xp, columns(a), columns(b))
    return common, area(columns(a)) + area(columns(b)) - common


def _center_size(boxes: Array) -> Columns:
    x1, y1, x2, y2 = columns(boxes)
    w, h = x2 - x1, y2 - y1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h


def _pairs(xp: Namespace, name: str, boxes1: Array, boxes2: Array) -> tuple[Array, Array]:
    boxes1 = checks.check_boxes(xp, name, "boxes1", boxes1, at_least_2d=True)
    boxes2 = checks.check_boxes(xp, name, "boxes2", boxes2, at_least_2d=True)
    checks.check_leading_axes(name, "boxes2", boxes2, "boxes1", boxes1, trailing=2)
    boxes1, boxes2 = checks.wide_pair(xp, *_of_one_rank(boxes1, boxes2))
    return boxes1[..., :, None, :], boxes2[..., None, :, :]


def _of_one_rank(a: Array, b: Array) -> tuple[Array, Array]:
    """With leading axes of size 1 where one has fewer, for JAX without rank promotion."""
    more = len(a.shape) - len(b.shape)
    return _with_axes(a, -more), _with_axes(b, more)


def _with_axes(x: Array, more: int) -> Array:
    return x[(None,) * more + (...,)] if more > 0 else x


def _check_broadcast(name: str, anchors: Array, other: str, other_array: Array) -> None:
    own, whole = tuple(anchors.shape), tuple(other_array.shape)
    # Not by numpy.broadcast_shapes: it fails on sizes that are symbolic while tracing.
    sizes = zip(reversed(own), reversed(whole), strict=False)
    if not all(a is None or b is None or a == b or a == 1 or b == 1 for a, b in sizes):
        raise ValueError(
            f"{name}: anchors must broadcast with {other}; got {other} {whole}, anchors {own}"
        )
