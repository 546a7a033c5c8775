"""Exact greedy non-maximum suppression, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from focal.core import checks
from focal.core.boxes import solid, solid_iou
from focal.core.namespace import Array, Framework, In, Namespace, Out

__all__ = ["batched_nms", "nms", "suppress"]

BLOCK = 256
"""Boxes resolved at once, in at most as many rounds."""

CHUNK = 1024
"""Kept boxes that a block is compared with at once: BLOCK x CHUNK overlaps fit the cache."""

Rows = Sequence[Array]
"""Areas, x1, y1, x2, y2 and perhaps classes, each (..., N); the area of what is dropped is inf."""
Drop = Callable[[Rows, Rows], Array]
Settle = Callable[[Rows], Array]


def nms(xp: Framework[In, Out], boxes: In, scores: In, iou_threshold: float) -> Out:
    """Greedy non-maximum suppression.

    Walking from the best score down, a box is kept unless its IoU with a box already kept is
    greater than the threshold. Equal scores are taken in the order given, NaN comes last. A box
    with NaN is dropped and suppresses nothing.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2) in pixels, of a real type.
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
    return xp.select(_kept, xp, boxes, scores, None, threshold)


def batched_nms(
    xp: Framework[In, Out], boxes: In, scores: In, classes: In, iou_threshold: float
) -> Out:
    """Non-maximum suppression within each class, as :func:`nms`.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2) in pixels, of a real type.
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

    Source: `torchvision.ops.batched_nms`; classes are compared rather than offset, so that no
    coordinate loses precision.
    """
    name = "batched_nms"
    boxes, scores, threshold = _arguments(xp, name, boxes, scores, iou_threshold)
    classes = checks.check_labels(xp, name, "classes", classes)
    checks.check_same_shape(name, "classes", classes, "scores", scores)
    return xp.select(_kept, xp, boxes, scores, classes, threshold)


def _kept(
    xp: Namespace, boxes: Array, scores: Array, classes: Array | None, threshold: float
) -> tuple[Array, Array]:
    """The boxes by falling score, and which of them stay."""
    order = xp.argsort(-scores, stable=True)
    if classes is not None:
        classes = xp.take(classes, order, axis=0)
    return order, suppress(xp, xp.take(boxes, order, axis=0), classes, threshold)


def suppress(
    xp: Namespace,
    boxes: Array,
    classes: Array | None,
    threshold: float,
    most: int | None = None,
) -> Array:
    """Which of the boxes (..., N, 4), sorted by falling score, greedy NMS keeps: (..., N).

    A box with NaN is dropped. Boxes of different `classes` (..., N) do not suppress one another.
    Of each list the first `most` that are kept are needed; those after them may be dropped.
    """
    if boxes.shape[-2] is None:
        raise ValueError("non-maximum suppression: the number of boxes must be known when traced")
    boxes = xp.stop_gradient(boxes)
    if (kernels := xp.box_kernels(boxes, classes)) is not None:
        return kernels.suppress(boxes, classes, threshold)
    most = boxes.shape[-2] if most is None else most
    return xp.compiled(_suppress, xp, boxes, classes, threshold, most)


def _suppress(
    xp: Namespace, boxes: Array, classes: Array | None, threshold: float, most: int
) -> Array:
    """Block by block: boxes kept in earlier blocks suppress those of a block, then its own do.

    Within a block the greedy result is a fixed point: a box stays unless an earlier box stays and
    overlaps it. The iteration starts from all remaining boxes and takes at most as many rounds as
    the longest chain of overlaps has boxes.
    """
    place = np.arange(BLOCK).reshape((1,) * (len(boxes.shape) - 2) + (BLOCK,))
    before = xp.constant(place[..., :, None] < place[..., None, :], boxes)
    corners, areas = solid(xp, boxes)
    areas = xp.where(xp.any(boxes != boxes, axis=-1), math.inf, areas)
    rows = [areas, *corners] if classes is None else [areas, *corners, classes]

    def over(rows: Rows, others: Rows) -> Array:
        area, x1, y1, x2, y2, *own = (row[..., :, None] for row in rows)
        other_area, ox1, oy1, ox2, oy2, *other = (row[..., None, :] for row in others)
        found = solid_iou(xp, (x1, y1, x2, y2), area, (ox1, oy1, ox2, oy2), other_area) > threshold
        return found & (own[0] == other[0]) if own else found

    def drop(block: Rows, earlier: Rows) -> Array:
        hit = xp.any(over(earlier, block), axis=-2)
        return xp.where(hit, math.inf, block[0])

    def settle(block: Rows) -> Array:
        size = block[0].shape[-1]
        inner = over(block, block) & before[..., :size, :size]
        left = block[0] < math.inf
        keep = xp.fixed_point(
            lambda keep: left & ~xp.any(keep[..., :, None] & inner, axis=-2), left
        )
        return xp.where(~keep, math.inf, block[0])

    loop = xp.traced_loop()
    if loop is None:
        return _sweep(xp, drop, settle, rows, most) < math.inf
    return _traced_sweep(xp, loop, drop, settle, rows, most) < math.inf


def _sweep(xp: Namespace, drop: Drop, settle: Settle, rows: Rows, most: int) -> Array:
    """The areas after a plain loop over the blocks."""
    areas, *others = rows
    chunks: list[Rows] = []
    n = areas.shape[-1]
    for start in range(0, n, BLOCK):
        later = _places(xp, areas) >= start
        if most < n and not _unfinished(xp, areas, later, most):
            return xp.where(later, math.inf, areas)
        stop = min(start + BLOCK, n)
        block = [row[..., start:stop] for row in (areas, *others)]
        for chunk in chunks:
            block[0] = drop(block, chunk)
        block[0] = settle(block)
        areas = xp.concat([areas[..., :start], block[0], areas[..., stop:]], axis=-1)
        kept = xp.compress(block, block[0] < math.inf)
        if chunks and chunks[-1][0].shape[-1] + BLOCK <= CHUNK:
            pairs = zip(chunks.pop(), kept, strict=True)
            kept = [xp.concat(pair, axis=-1) for pair in pairs]
        chunks.append(kept)
    return areas


def _traced_sweep(
    xp: Namespace, loop: Callable[..., Any], drop: Drop, settle: Settle, rows: Rows, most: int
) -> Array:
    """The same in loops of the graph, whose size does not depend on the number of boxes."""
    areas, *others = rows
    n = areas.shape[-1]
    if n <= BLOCK:
        return settle(rows)
    count = -(-n // BLOCK)
    areas, *others = (xp.concat([row, row[..., : count * BLOCK - n]], axis=-1) for row in rows)
    places = _places(xp, areas)
    areas = xp.where(places >= n, math.inf, areas)  # the padding is dropped
    inside = xp.constant(np.arange(BLOCK), areas)

    def block(row: Array, i: Array) -> Array:
        return xp.take(row, i * BLOCK + inside, axis=-1)

    def unfinished(i: Array, areas: Array) -> Array:
        return _unfinished(xp, areas, places >= i * BLOCK, most)

    def resolve(i: Array, areas: Array) -> tuple[Array, Array]:
        corners = [block(row, i) for row in others]

        def after(earlier: Array, area: Array) -> tuple[Array, Array]:
            rivals = [block(row, earlier) for row in (areas, *others)]
            return earlier + 1, drop([area, *corners], rivals)

        first = xp.zeros_like(i), block(areas, i)
        area = settle([loop(lambda earlier, _: earlier < i, after, first)[1], *corners])
        area = xp.concat([area] * count, axis=-1)
        own = (places >= i * BLOCK) & (places < (i + 1) * BLOCK)
        return i + 1, xp.where(own, area, areas)

    start = xp.constant(np.asarray(0), areas), areas
    stop, areas = loop(unfinished, resolve, start)
    return xp.where(places >= stop * BLOCK, math.inf, areas)[..., :n]


def _places(xp: Namespace, areas: Array) -> Array:
    """0, 1, 2, ... along the last axis of `areas`."""
    places = np.arange(areas.shape[-1])
    return xp.constant(places.reshape((1,) * (len(areas.shape) - 1) + (-1,)), areas)


def _unfinished(xp: Namespace, areas: Array, later: Array, most: int) -> Array:
    """Whether some list has fewer than `most` kept boxes, and boxes left among the `later`."""
    there = areas < math.inf
    kept = xp.sum(xp.astype(there & ~later, xp.index_type), axis=-1)
    left = (kept < most) & xp.any(there & later, axis=-1)
    return xp.any(xp.reshape(left, (-1,)), axis=0)


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
