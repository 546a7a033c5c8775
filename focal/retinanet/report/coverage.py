"""How well the anchors of a detector fit the boxes of a dataset."""

from __future__ import annotations

import dataclasses

import numpy as np

from focal.core.anchors import level_shapes
from focal.numpy import anchors
from focal.retinanet.config import RetinaNetConfig

__all__ = ["anchor_shapes", "best_iou", "scales"]


def scales(sizes: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Canvas pixels per image pixel of images of (height, width) `sizes` (N, 2): (N,)."""
    return np.min(np.asarray(canvas) / sizes, axis=1)


def anchor_shapes(config: RetinaNetConfig) -> list[np.ndarray]:
    """The (width, height) of the anchors of one cell, (A, 2), for each level."""
    return [cell[:, 2:] - cell[:, :2] for cell in _cells(config)]


def best_iou(boxes: np.ndarray, config: RetinaNetConfig) -> np.ndarray:
    """The IoU of each box with the anchor that fits it best.

    Of the anchors of one shape the one whose centre is nearest overlaps most, so one anchor of
    each shape and level is compared, not each of some hundred thousand.

    Args:
        boxes: (N, 4) float, `(x1, y1, x2, y2)` in pixels of the canvas.
        config: its canvas and anchors.

    Returns:
        (N,) float64.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    best = np.zeros(len(boxes))
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    shapes = level_shapes(config.canvas, config.anchors)
    for cell, stride, (rows, columns) in zip(
        _cells(config), config.anchors.strides, shapes, strict=True
    ):
        # `cell` is the anchors of the first cell; the others lie whole strides away.
        first = config.anchors.offset * stride
        steps = np.clip(np.rint((centre - first) / stride), 0, [columns - 1, rows - 1])
        near = np.tile(steps * stride, 2)
        for anchor in cell:
            low = np.maximum(boxes[:, :2], near[:, :2] + anchor[:2])
            high = np.minimum(boxes[:, 2:], near[:, 2:] + anchor[2:])
            shared = np.prod(np.maximum(high - low, 0), axis=1)
            own = np.prod(anchor[2:] - anchor[:2])
            best = np.maximum(best, shared / (area + own - shared))
    return best


def _cells(config: RetinaNetConfig) -> list[np.ndarray]:
    """The anchors of the first cell of each level: (A, 4)."""
    return [
        anchors(
            (stride, stride), dataclasses.replace(config.anchors, strides=(stride,), sizes=(size,))
        ).astype(np.float64)
        for stride, size in zip(config.anchors.strides, config.anchors.sizes, strict=True)
    ]
