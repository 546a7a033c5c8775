"""How well the anchors of a detector fit the boxes of a dataset."""

from __future__ import annotations

import dataclasses

import numpy as np

from focal.core.anchors import level_shapes, level_steps
from focal.numpy import anchors, box_iou
from focal.retinanet.config import RetinaNetConfig

__all__ = ["anchor_shapes", "best_iou", "scales"]


def scales(sizes: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Canvas pixels per image pixel, (N,), of images of (height, width) `sizes` (N, 2)."""
    return np.asarray(np.min(np.asarray(canvas) / sizes, axis=1))


def anchor_shapes(config: RetinaNetConfig) -> list[np.ndarray]:
    """The (width, height) of the anchors of one cell, (A, 2), for each level."""
    return [cell[:, 2:] - cell[:, :2] for cell in _cells(config)]


def best_iou(boxes: np.ndarray, config: RetinaNetConfig) -> np.ndarray:
    """The IoU of each box with its best anchor.

    Of the anchors of one shape, the one with the nearest center has the largest overlap, so only
    one anchor per shape and level is compared, not all of some hundred thousand.

    Args:
        boxes: (N, 4) float, `(x1, y1, x2, y2)` in pixels of the canvas.
        config: its canvas and anchors are used.

    Returns:
        (N,) float64.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    best = np.zeros(len(boxes))
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    shapes = level_shapes(config.image_size, config.anchors)
    steps = level_steps(config.image_size, config.anchors)
    for cell, (down, right), (rows, columns) in zip(_cells(config), steps, shapes, strict=True):
        # `cell` holds the anchors of the first cell; all others are whole steps away.
        place = np.rint(centers / [right, down] - config.anchors.offset)
        place = np.clip(place, 0, [columns - 1, rows - 1])
        near = cell + np.tile(place * [right, down], 2)[:, None]  # [N, A, 4]
        best = np.maximum(best, box_iou(boxes[:, None], near)[:, 0].max(axis=1))
    return best


def _cells(config: RetinaNetConfig) -> list[np.ndarray]:
    """The anchors of the first cell of each level: (A, 4)."""
    steps = level_steps(config.image_size, config.anchors)
    levels = zip(config.anchors.strides, config.anchors.sizes, steps, strict=True)
    return [
        anchors(step, dataclasses.replace(config.anchors, strides=(s,), sizes=(size,)))
        for s, size, step in levels
    ]
