"""Post-processing: raw outputs to detections, on the device, batched, with static shapes."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

from focal.core.anchors import level_shapes
from focal.core.namespace import Array, Namespace
from focal.core.nms import best
from focal.retinanet.config import RetinaNetConfig

__all__ = ["Detections", "detections"]

FEW = 16
"""With fewer classes, all logits are sorted at once."""


class Detections(NamedTuple):
    """The best D detections of each image, best first; scores are 0 where there are fewer."""

    boxes: Array
    scores: Array
    labels: Array


def detections(
    F: ModuleType,
    logits: Array,
    deltas: Array,
    anchors: Array,
    sizes: Array,
    config: RetinaNetConfig,
) -> Detections:
    """Threshold, take the best of each level, decode, clip, suppress per class, take the best.

    Args:
        F: The framework's module, such as `focal.torch`.
        logits: (B, N, K) class logits of the canvas.
        deltas: (B, N, 4) box deltas.
        anchors: (N, 4) of the canvas.
        sizes: (B, 2) the (height, width) in pixels that each image covers of the canvas.
        config: Thresholds, candidates and limits.

    Returns:
        Boxes (B, D, 4) in pixels of the canvas, scores (B, D), labels (B, D).

    Source: Lin et al. 2017, section 4.1, "Inference"; suppression per class and the limit of
    detections as in Detectron.
    """
    xp, classes = F.xp, logits.shape[-1]
    scores, positions, start = [], [], 0
    for rows, columns in level_shapes(config.image_size, config.anchors):
        count = rows * columns * config.anchors.per_cell
        level = logits[:, start : start + count, :]
        top, at = _top(xp, level, count, min(config.candidates, count * classes))
        scores.append(xp.sigmoid(xp.astype(top, xp.float32)))
        positions.append(at + start * classes)
        start += count
    score, position = xp.concat(scores, axis=-1), xp.concat(positions, axis=-1)

    score, at = xp.top_k(score, score.shape[-1])
    position = xp.take_along_axis(position, at, axis=-1)
    anchor, label = position // classes, position % classes
    of_anchor = xp.take(anchors, xp.reshape(anchor, (-1,)), axis=0)
    of_anchor = xp.reshape(of_anchor, (*xp.shape(anchor), 4))
    # Half types could not tell the pixels of a large image apart.
    deltas = xp.astype(xp.take_rows(deltas, anchor), xp.float32)
    boxes = F.decode_boxes(deltas, of_anchor)
    boxes = _clip(xp, boxes, sizes)

    low = ~(score > config.score_threshold)
    rivals = xp.where(low[..., None], math.nan, boxes)  # which drops them
    most = min(config.max_detections, score.shape[-1])
    at, real = best(xp, rivals, label, config.nms_threshold, most)
    score = xp.where(~real, 0.0, xp.take_along_axis(score, at, axis=-1))
    return Detections(xp.take_rows(boxes, at), score, xp.take_along_axis(label, at, axis=-1))


def _top(xp: Namespace, logits: Array, n: int, k: int) -> tuple[Array, Array]:
    """The k greatest of logits (B, n, K) and where they are in (B, n * K), greatest first.

    They are all among the k anchors with the greatest maxima, so that only these are sorted. Taken
    in their order, equal logits keep theirs.
    """
    classes = logits.shape[-1]
    if k >= n or classes < FEW:
        return xp.top_k(xp.reshape(logits, (-1, n * classes)), k)
    _, at = xp.top_k(xp.max(logits, axis=-1), k)
    anchor = -xp.top_k(-at, k)[0]
    top, at = xp.top_k(xp.reshape(xp.take_rows(logits, anchor), (-1, k * classes)), k)
    return top, xp.take_along_axis(anchor, at // classes, axis=-1) * classes + at % classes


def _clip(xp: Namespace, boxes: Array, sizes: Array) -> Array:
    """Boxes clipped to the part of the canvas that each image covers."""
    limit = xp.astype(xp.stack([sizes[:, 1], sizes[:, 0]] * 2, axis=-1), boxes.dtype)
    return xp.minimum(xp.maximum(boxes, 0.0), limit[:, None, :])
