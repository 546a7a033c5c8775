"""Matching and suppression of boxes on a CPU, in NumPy: only boxes near each other are compared.

The IoU is that of `focal.core.boxes`, in the type of the boxes, so results are equal to the last
bit: boxes that are not near each other share no area, and their IoU is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from focal.core.boxes import solid, solid_iou
from focal.core.targets import decided

__all__ = ["match", "suppress"]

Array = np.ndarray
xp: Any = np
"""All that areas and overlaps need of a namespace."""

TILE = 128
"""Anchors that are compared with a box or passed over together; neighbors lie close."""
BLOCK = 512
"""Boxes resolved at once: the best that are left."""
STRIP = 32
"""Neighbors among the kept boxes that are compared at once with the others near them."""


def _rows(boxes: Array) -> list[Array]:
    """x1, y1, x2, y2, area of boxes (..., 4) as `solid` has them."""
    corners, areas = solid(xp, boxes)
    return [*corners, areas]


def _iou(a: Sequence[Array], b: Sequence[Array]) -> Array:
    """Of the rows of both."""
    return np.asarray(solid_iou(xp, (a[0], a[1], a[2], a[3]), a[4], (b[0], b[1], b[2], b[3]), b[4]))


@np.errstate(all="ignore")  # infinite coordinates and areas are allowed
def match(
    anchors: Array, boxes: Array, foreground: float, background: float, floor: float | None
) -> Array:
    """`match_anchors` of anchors (N, 4) and boxes (..., M, 4): (..., N).

    The thresholds are those of `focal.kernels.torch_boxes.match`. Each round compares every tile of
    anchors with the next of the boxes near it. Tiles with many such boxes come first, so that a
    round works on the first rows of all arrays.
    """
    *lead, m, _ = boxes.shape
    n = len(anchors)
    padding = np.zeros((-n % TILE, 4), anchors.dtype)
    tiles = [row.reshape(-1, TILE) for row in _rows(np.concatenate([anchors, padding]))]
    columns = [row.reshape(-1, 1) for row in _rows(boxes)]
    low, high = ([row.reshape(-1, 1, m) for row in pair] for pair in (columns[:2], columns[2:4]))
    near: Array = np.ones((1, 1, 1), bool)
    for i in (0, 1):
        near = near & (tiles[i].min(axis=1)[:, None] < high[i])
        near = near & (low[i] < tiles[i + 2].max(axis=1)[:, None])
    near = near.reshape(-1, m)

    count = near.sum(axis=1)
    rows = np.argsort(-count, kind="stable")[: np.count_nonzero(count)]
    image, tile = np.divmod(rows, max(1, len(tiles[0])))
    tiles = [row[tile] for row in tiles]
    nearest = np.nonzero(near)[1]
    start, count = (np.cumsum(count) - count)[rows], count[rows]

    def overlap(rows: Any, own: Array) -> Array:
        return _iou([row[rows] for row in tiles], [column[own] for column in columns])

    best = np.zeros(tiles[0].shape, anchors.dtype)
    index = np.zeros(best.shape, np.int32)
    top = np.zeros(len(columns[0]), anchors.dtype)
    rounds = []
    for k in range(count[0] if len(rows) else 0):
        r = int(np.searchsorted(-count, -k))  # rows with more than k boxes
        box = nearest[start[:r] + k]
        own = image[:r] * m + box
        found = overlap(slice(r), own)
        np.copyto(index[:r], box[:, None], "same_kind", where=found > best[:r])
        np.maximum(best[:r], found, out=best[:r])
        if floor is not None:
            highest = found.max(axis=1)
            np.maximum.at(top, own, highest)
            rounds.append((own, highest))
    flags = np.zeros(best.shape, bool)
    for own, highest in rounds:
        at = np.flatnonzero((highest > 0) & (highest >= floor) & (highest >= top[own]))
        flags[at] |= overlap(at, own[at]) >= top[own[at], None]

    labels = np.full((len(near), TILE), -1)
    labels[rows] = decided(xp, best, index, [flags], (foreground, background))
    return np.ascontiguousarray(labels.reshape(*lead, -1)[..., :n])


@np.errstate(all="ignore")  # infinite coordinates and areas are allowed
def suppress(boxes: Array, classes: Array | None, threshold: float) -> Array:
    """`focal.core.nms.suppress` of boxes (N, 4) and classes (N,).

    The best boxes that are left are resolved among themselves, and what they suppress is removed.
    """
    keep = ~np.isnan(boxes).any(axis=-1)
    rows = _rows(boxes)
    there = rows[2] > rows[0]  # the others overlap nothing
    rows = [row[there] for row in rows]
    if classes is not None:  # as numbers that are exact in float64
        rows.append(np.unique(classes[there], return_inverse=True)[1].astype(np.float64))
    rows = _by_place(rows)
    stay = np.zeros(len(rows[0]), bool)
    while (left := len(rows[0])) > 0:
        last = min(BLOCK, left) - 1
        best = rows[0] <= np.partition(rows[0], last)[last]
        block, rows = [row[best] for row in rows], [row[~best] for row in rows]
        settled = _settled(block, threshold)
        block = [row[settled] for row in block]
        stay[block[0]] = True
        dropped = np.zeros(len(rows[0]), bool)
        for _, others, found in _overlaps(block, rows, threshold):
            dropped[others] |= found.any(axis=0)
        rows = [row[~dropped] for row in rows]
    keep[there] = stay
    return keep


def _by_place(rows: list[Array]) -> list[Array]:
    """Rank, low, high and the rows, sorted by low, along the axis with fewer pairs to compare.

    Low and high are coordinates. With classes they are complex numbers, which NumPy orders by the
    real part, the class, first.
    """
    plans = []
    for low, high in ((rows[0], rows[2]), (rows[1], rows[3])):
        low, high = (rows[5] + 1j * row if rows[5:] else row for row in (low, high))
        order = np.argsort(low, kind="stable")
        plans.append((np.searchsorted(low[order], high).sum(), order, low, high))
    _, order, low, high = min(plans, key=lambda plan: int(plan[0]))
    return [order, *(row[order] for row in (low, high, *rows))]


def _settled(block: Sequence[Array], threshold: float) -> Array:
    """Which of the boxes stay: those that no better one that stays overlaps, a fixed point."""
    rank = block[0]
    hits = np.zeros((len(rank), len(rank)), bool)
    for some, others, found in _overlaps(block, block, threshold):
        hits[some, others] = found & (rank[some, None] < rank[others])
    keep = np.ones(len(rank), bool)
    while True:
        following = ~np.any(hits[keep], axis=0)
        if np.array_equal(following, keep):
            return following
        keep = following


def _overlaps(
    rows: Sequence[Array], others: Sequence[Array], threshold: float
) -> Iterator[tuple[slice, slice, Array]]:
    """Strips of the rows, the others near each, and which pairs overlap more than the threshold."""
    if not len(rows[0]) or not len(others[0]):
        return
    starts = np.arange(0, len(rows[0]), STRIP)
    reach = np.maximum.accumulate(others[2])
    first = np.searchsorted(reach, rows[1][starts], side="right")
    last = np.maximum.reduceat(np.searchsorted(others[1], rows[2]), starts)
    for start, *ends in zip(*(at.tolist() for at in (starts, first, last)), strict=True):
        strip, near = slice(start, start + STRIP), slice(*ends)
        a, b = [row[strip, None] for row in rows[3:]], [row[near] for row in others[3:]]
        found = _iou(a, b) > threshold
        if a[5:]:
            found &= a[5] == b[5]
        yield strip, near, found
