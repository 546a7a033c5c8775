"""Matching and suppression of boxes in PyTorch on a GPU, in Triton.

Matching is that of `focal.core.targets`: each program goes through all boxes for its anchors, and
only the result is written. Suppression is that of `focal.core.nms` in another order: a bit for each
pair of boxes that overlap, then one sweep per image over the bits. The host waits for nothing.

The arithmetic is that of the core in float32, operation by operation: the division is rounded
correctly, and fused multiply-adds are forbidden, so that results are equal to the last bit.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["match", "suppress", "takes"]

BLOCK = 1024
"""Anchors per program."""
ROWS = 64
"""Boxes per program that looks for overlaps, each with the 32 boxes of a word."""
MOST = 8192
"""The most boxes of an image to suppress: one bit for each pair of them is stored."""
EXACT = {"enable_fp_fusion": False}
"""Options of the kernels that compute overlaps."""


def takes(boxes: Tensor, others: Tensor | None) -> bool:
    """Whether the kernels take these anchors and boxes, or boxes and perhaps their classes."""
    if others is None or not others.is_floating_point():
        corners, few = [boxes], boxes.shape[-2] <= MOST
    else:
        corners, few = [boxes, others], True
    fits = all(a.dtype == torch.float32 and a.numel() > 0 for a in corners)
    return few and fits and (others is None or others.device == boxes.device)


def match(
    anchors: Tensor, boxes: Tensor, foreground: float, background: float, floor: float | None
) -> Tensor:
    """`match_anchors` of anchors (N, 4) and boxes (..., M, 4): (..., N).

    Args:
        anchors: Float32.
        boxes: Float32.
        foreground: Least IoU of a match.
        background: IoU below which an anchor is background.
        floor: Least IoU of a low-quality match, or None for no such matches.
    """
    *lead, m, _ = boxes.shape
    n, images = len(anchors), math.prod(lead)
    out = anchors.new_empty((*lead, n), dtype=torch.int64)
    blocks = triton.cdiv(n, BLOCK)
    operands = anchors.contiguous(), boxes.contiguous()
    with torch.cuda.device_of(boxes):  # Triton launches on the current device
        tops = None
        if floor is not None:
            tops = anchors.new_empty((images, blocks, m))
            _top_kernel[(images, blocks)](*operands, tops, n, m, BLOCK=BLOCK, **EXACT)
            tops = tops.amax(dim=1)
        _match_kernel[(images, blocks)](
            *(*operands, tops, out, n, m),
            *(foreground, background, floor or 0.0),
            BLOCK=BLOCK,
            **EXACT,
        )
    return out


def suppress(boxes: Tensor, classes: Tensor | None, threshold: float) -> Tensor:
    """`focal.core.nms.suppress` of boxes (..., N, 4) in float32 and classes (..., N)."""
    *lead, n, _ = boxes.shape
    images, words = math.prod(lead), triton.cdiv(n, 32)
    hits = boxes.new_empty((images, n, words), dtype=torch.int32)
    keep = boxes.new_empty((*lead, n), dtype=torch.bool)
    classes = None if classes is None else classes.contiguous()
    with torch.cuda.device_of(boxes):
        _hits_kernel[(images, triton.cdiv(n, ROWS), words)](
            *(boxes.contiguous(), classes, hits, n, words, threshold), ROWS=ROWS, **EXACT
        )
        _sweep_kernel[(images,)](
            *(hits, keep.view(torch.uint8), n, words),
            WORDS=triton.next_power_of_2(words),
            UNROLL=8,
            num_warps=1,  # within which it needs no barrier
        )
    return keep


# ---------------------------------------------------------------- matching


@triton.jit(do_not_specialize=["n", "m"])
def _top_kernel(anchors, boxes, tops, n, m, BLOCK: tl.constexpr):
    """The greatest IoU of each box with the anchors of the program."""
    image, place = _place(n, BLOCK)
    x1, y1, x2, y2, area = _solid(anchors, place, place < n)
    block = image * tl.num_programs(1) + tl.program_id(1)
    i = 0
    while i < m:  # Triton's interpreter has no `range` up to a number that is an argument
        a, b, c, d, other = _solid(boxes, image * m + i, True)
        overlap = _iou(x1, y1, x2, y2, area, a, b, c, d, other)
        tl.store(tops + block * m + i, tl.max(overlap))
        i += 1


@triton.jit(do_not_specialize=["n", "m"])
def _match_kernel(
    anchors,
    boxes,
    tops,
    out,
    n,
    m,
    foreground,
    background,
    floor,
    BLOCK: tl.constexpr,
):
    image, place = _place(n, BLOCK)
    x1, y1, x2, y2, area = _solid(anchors, place, place < n)
    best = tl.zeros((BLOCK,), tl.float32)
    index = tl.zeros((BLOCK,), tl.int32)
    flagged = index != 0
    i = 0
    while i < m:
        a, b, c, d, other = _solid(boxes, image * m + i, True)
        overlap = _iou(x1, y1, x2, y2, area, a, b, c, d, other)
        index = tl.where(overlap > best, i, index)
        best = tl.maximum(best, overlap)
        if tops is not None:
            top = tl.load(tops + image * m + i)
            flagged |= overlap >= tl.where((top > 0) & (top >= floor), top, 2.0)  # 2: out of reach
        i += 1
    matched = ((best >= foreground) & (best > 0)) | flagged
    label = tl.where(matched, index, tl.where((best < background) | (best <= 0), -1, -2))
    tl.store(out + image * n + place, label.to(tl.int64), mask=place < n)


@triton.jit
def _place(n, BLOCK: tl.constexpr):
    """The image of the program, and its anchors."""
    image = tl.program_id(0).to(tl.int64)
    return image, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)


# ---------------------------------------------------------------- suppression


@triton.jit(do_not_specialize=["n", "words"])
def _hits_kernel(boxes, classes, hits, n, words, threshold, ROWS: tl.constexpr):
    """For each box one bit per later box that it suppresses, and its own bit if it is NaN."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, 32)
    column = tl.program_id(2) * 32 + bit
    x1, y1, x2, y2, area = _solid(boxes, image * n + row, row < n)
    a, b, c, d, other = _solid(boxes, image * n + column, column < n)
    x1, y1, x2, y2, area = x1[:, None], y1[:, None], x2[:, None], y2[:, None], area[:, None]
    iou = _iou(x1, y1, x2, y2, area, a[None, :], b[None, :], c[None, :], d[None, :], other[None, :])
    found = (iou > threshold) & (row[:, None] < column[None, :])
    if classes is not None:
        own = tl.load(classes + image * n + row, mask=row < n, other=0)
        others = tl.load(classes + image * n + column, mask=column < n, other=0)
        found &= own[:, None] == others[None, :]
    x1, y1, x2, y2 = _load(boxes, image * n + row, row < n)
    is_nan = (x1 != x1) | (y1 != y1) | (x2 != x2) | (y2 != y2)
    found |= is_nan[:, None] & (row[:, None] == column[None, :])
    word = tl.sum(tl.where(found, tl.full((1,), 1, tl.int64) << bit, 0), axis=1)
    at = (image * n + row) * words + tl.program_id(2)
    tl.store(hits + at, word.to(tl.int32), mask=row < n)


@triton.jit(do_not_specialize=["n", "words"])
def _sweep_kernel(hits, keep, n, words, WORDS: tl.constexpr, UNROLL: tl.constexpr):
    """From the first box to the last: one that is not suppressed suppresses those of its bits."""
    image = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WORDS)
    dropped = tl.zeros((WORDS,), tl.int32)
    start = 0
    while start < n:
        for k in tl.static_range(UNROLL):  # so that several rows are on their way at once
            i = start + k
            there = (lane < words) & (i < n)
            row = tl.load(hits + (image * n + i) * words + lane, mask=there, other=0)
            own = tl.sum(tl.where(lane == i // 32, dropped, 0))
            dropped |= tl.where(((own >> (i % 32)) & 1) == 0, row, 0)
        start += UNROLL
    for bit in tl.static_range(32):
        box = lane * 32 + bit
        stays = ((dropped >> bit) & 1) == 0
        tl.store(keep + image * n + box, stays.to(tl.uint8), mask=box < n)


# ---------------------------------------------------------------- boxes


@triton.jit
def _load(boxes, at, there):
    """x1, y1, x2, y2."""
    x1 = tl.load(boxes + at * 4, mask=there, other=0.0)
    y1 = tl.load(boxes + at * 4 + 1, mask=there, other=0.0)
    x2 = tl.load(boxes + at * 4 + 2, mask=there, other=0.0)
    y2 = tl.load(boxes + at * 4 + 3, mask=there, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _solid(boxes, at, there):
    """`focal.core.boxes.solid`; what is not there has no area."""
    x1, y1, x2, y2 = _load(boxes, at, there)
    area = (x2 - x1) * (y2 - y1)
    good = (area > 0) & (area < float("inf")) & (x2 > x1)
    x1, x2 = tl.where(good, x1, 0.0), tl.where(good, x2, 0.0)
    y1, y2 = tl.where(good, y1, 0.0), tl.where(good, y2, 0.0)
    return x1, y1, x2, y2, tl.where(good, area, 1.0)


@triton.jit
def _iou(ax1, ay1, ax2, ay2, a_area, bx1, by1, bx2, by2, b_area):
    """`focal.core.boxes.solid_iou`."""
    w = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    h = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    common = w * h
    return tl.div_rn(common, a_area + b_area - common)
