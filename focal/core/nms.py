"""Exact greedy non-maximum suppression, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from focal.core import checks
from focal.core.boxes import solid, solid_iou
from focal.core.namespace import Array, Framework, In, Namespace, Out

__all__ = ["batched_nms", "best", "nms", "suppress"]

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


def suppress(xp: Namespace, boxes: Array, classes: Array | None, threshold: float) -> Array:
    """Which of the boxes (..., N, 4), sorted by falling score, greedy NMS keeps: (..., N).

    A box with NaN is dropped. Boxes of different `classes` (..., N) do not suppress one another.
    """
    if boxes.shape[-2] is None:
        raise ValueError("non-maximum suppression: the number of boxes must be known when traced")
    boxes = xp.stop_gradient(boxes)
    kernels = xp.box_kernels(boxes, classes)
    if kernels is not None:
        return kernels.suppress(boxes, classes, threshold)
    return xp.compiled(_suppress, xp, boxes, classes, threshold)


def best(
    xp: Namespace, boxes: Array, classes: Array, threshold: float, most: int
) -> tuple[Array, Array]:
    """The first `most` <= N boxes that greedy NMS, as in :func:`suppress`, keeps of each list.

    Returns where they are, (..., most), and which of these there are, since a list may have fewer.
    Block by block again, but compared with these boxes alone, and only until there are enough.
    """
    boxes, n = xp.stop_gradient(boxes), boxes.shape[-2]
    kernels = xp.box_kernels(boxes, classes)
    if kernels is not None:
        return _first(xp, kernels.suppress(boxes, classes, threshold), most)
    drop, settle, rows = _rules(xp, boxes, classes, threshold)
    size = min(BLOCK // 2, n)  # it ends sooner with fewer at once
    places, inside = _places(xp, n + -n % size, rows[0]), xp.constant(np.arange(size), boxes)
    rows = [*rows, places[..., :n] + xp.astype(xp.zeros_like(rows[0]), xp.index_type)]
    rows = [xp.concat([row, row[..., : -n % size]], axis=-1) for row in rows]  # whole blocks
    rows[0] = xp.where(places >= n, math.inf, rows[0])
    end = xp.max(xp.astype(rows[0] < math.inf, xp.index_type) * (places + 1), axis=-1)

    def unfinished(start: Array, *found: Array) -> Array:
        count = xp.sum(xp.astype(found[0] < math.inf, xp.index_type), axis=-1)
        return xp.any(xp.reshape((start < end) & (count < most), (-1,)), axis=0)

    def advance(start: Array, *found: Array) -> tuple[Array, ...]:
        block = [xp.take(row, start + inside, axis=-1) for row in rows]
        block[0] = drop(block, found)
        block[0] = settle(block)
        both = [xp.concat(pair, axis=-1) for pair in zip(found, block, strict=True)]
        at, _ = _first(xp, both[0] < math.inf, most)
        return start + size, *(xp.take_along_axis(row, at, axis=-1) for row in both)

    found = [xp.zeros_like(row[..., :most]) for row in rows]
    found[0] = found[0] + math.inf
    start = xp.constant(np.asarray(0), boxes)
    _, areas, *_, at = xp.while_loop(unfinished, advance, (start, *found))
    return at, areas < math.inf


def _first(xp: Namespace, keep: Array, most: int) -> tuple[Array, Array]:
    """Where the first `most` that are kept are, (..., most), and which of these there are."""
    n = keep.shape[-1]
    rank = xp.astype(n - _places(xp, n, keep), xp.float32)
    found, at = xp.top_k(xp.astype(keep, xp.float32) * rank, most)
    return at, found > 0


def _places(xp: Namespace, n: int, like: Array) -> Array:
    """0 to n - 1 along the last axis of (..., N)."""
    return xp.constant(np.arange(n).reshape((1,) * (len(like.shape) - 1) + (n,)), like)


def _suppress(xp: Namespace, boxes: Array, classes: Array | None, threshold: float) -> Array:
    """Block by block: boxes kept in earlier blocks suppress those of a block, then its own do."""
    drop, settle, rows = _rules(xp, boxes, classes, threshold)
    sweep = partial(_sweep, xp) if xp.sweep is None else xp.sweep
    return sweep(drop, settle, rows) < math.inf


def _rules(
    xp: Namespace, boxes: Array, classes: Array | None, threshold: float
) -> tuple[Drop, Settle, list[Array]]:
    """What others drop of a block, what it drops itself, and the rows of all boxes.

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

    return drop, settle, rows


def _sweep(xp: Namespace, drop: Drop, settle: Settle, rows: Rows) -> Array:
    """The areas after a plain loop over the blocks."""
    areas: list[Array] = []
    chunks: list[Rows] = []
    n = rows[0].shape[-1]
    for start in range(0, n, BLOCK):
        block = [row[..., start : min(start + BLOCK, n)] for row in rows]
        for chunk in chunks:
            block[0] = drop(block, chunk)
        block[0] = settle(block)
        areas.append(block[0])
        kept = xp.compress(block, block[0] < math.inf)
        if chunks and chunks[-1][0].shape[-1] + BLOCK <= CHUNK:
            pairs = zip(chunks.pop(), kept, strict=True)
            kept = [xp.concat(pair, axis=-1) for pair in pairs]
        chunks.append(kept)
    return xp.concat(areas, axis=-1) if areas else rows[0]


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
