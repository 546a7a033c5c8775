"""Fits canvas, anchors, crop and steps to the boxes of a dataset, before training."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.coverage import best_iou, scales
from focal.retinanet.data.dataset import Dataset, coco_annotation, read_example

__all__ = ["Fitted", "fit_config"]

# Percentiles of the box sides, and the pixels of the canvas that such a box should have
SMALL, SMALL_SIDE = 10, 25
TYPICAL, TYPICAL_SIDE = 50, 44
LARGE, LARGE_SIDE, LONGEST = 90, 80, 160
LEAST_SIDE = 28
"""Images are enlarged where their typical boxes have fewer pixels, at most twofold."""
MAX_CANVAS = 1024
MARGIN, MAX_CROP = 1.5, 384
"""The crop is so many times as long as a large box, up to so many pixels."""
# In the order of preference; each level has twice the size of the one before.
BASES = (24.0, 20.0, 16.0, 14.0, 12.0, 10.0, 8.0)
LEVELS: tuple[tuple[int, ...], ...] = ((3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 7))
RATIOS: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 2.0), (1 / 3, 1.0, 3.0))
ENOUGH = 0.01
"""Share of the boxes that a preferred choice may reach less than the best one."""
MAX_BOXES, MAX_EXAMPLES = 2000, 500


class Fitted(NamedTuple):
    """Both configs, and one line on what was chosen and why."""

    detector: RetinaNetConfig
    train: TrainConfig
    sentence: str


def fit_config(
    dataset: Dataset,
    detector: RetinaNetConfig,
    train: TrainConfig,
    fixed: Collection[str] = frozenset(),
) -> Fitted:
    """Choose canvas, anchors, crop and steps for the boxes of a training set.

    Args:
        dataset: What to train on. Without `ground_truth`, up to 500 of its images are read.
        detector: The detector of the preset `tiny`.
        train: Its run. All steps together keep about as many pixels, at most twice the steps.
        fixed: Fields that stay as they are, such as "image_size", "steps" or "anchors.sizes".

    Returns:
        The changed configs, and a line for the log. Without boxes they are not changed.

    Example:
        >>> from focal.retinanet import PRESETS
        >>> from focal.retinanet.data import ShapesDataset
        >>> fit_config(ShapesDataset("val", size=(128, 128)), *PRESETS["tiny"]).detector.image_size
        (128, 128)
    """
    truth = _truth(dataset)
    row = {record["id"]: n for n, record in enumerate(truth["images"])}
    own = [a for a in truth["annotations"] if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
    if not own:
        return Fitted(detector, train, "fit: no boxes, so the settings stay")
    sizes = np.array([(record["height"], record["width"]) for record in truth["images"]], float)
    image = np.array([row[a["image_id"]] for a in own])
    boxes = np.array([a["bbox"] for a in own], float)
    spans = boxes[:, 2:].copy()
    boxes[:, 2:] += boxes[:, :2]
    # Every class counts the same, as it does in AP.
    _, labels, counts = np.unique(
        [a["category_id"] for a in own], return_inverse=True, return_counts=True
    )
    weights, longest = 1 / counts[labels], sizes.max(axis=1)
    # What is thin is as hard to find as what is small.
    sides = np.minimum(np.sqrt(np.prod(spans, axis=1)), 2 * spans.min(axis=1))
    small, typical, large, long = (
        float(np.percentile(x / longest[image], share, weights=weights, method="inverted_cdf"))
        for x, share in (
            *((sides, share) for share in (SMALL, TYPICAL, LARGE)),
            (spans.max(axis=1), LARGE),
        )
    )
    if "image_size" not in fixed:
        # Large boxes are learned sooner on a small canvas.
        length = min(max(SMALL_SIDE / small, TYPICAL_SIDE / typical), LARGE_SIDE / large)
        length = max(length, min(max(detector.image_size), LONGEST / long))
        own_length = float(np.median(longest))
        limit = max(own_length, min(2 * own_length, LEAST_SIDE / typical))
        cells = max(1, round(min(length, limit, MAX_CANVAS) / 32))
        # The shape of the images; a square where some are tall and others wide.
        shape = np.percentile(sizes / longest[:, None], 80, axis=0)
        height, width = (32 * math.ceil(side * cells - 1e-3) for side in shape)
        detector = detector.replace(image_size=(height, width))
    canvas, scale = detector.image_size, scales(sizes, detector.image_size)[image]
    some = np.linspace(0, len(boxes) - 1, min(len(boxes), MAX_BOXES)).astype(int)
    detector, reached = _anchors((boxes * scale[:, None])[some], weights[some], detector, fixed)
    if train.crop is not None and "crop" not in fixed:
        least = 32 * round(min(MARGIN * long * max(canvas), MAX_CROP) / 32)
        crop = min(max(train.crop[0], least), canvas[0]), min(max(train.crop[1], least), canvas[1])
        share = min(math.prod(train.crop) / math.prod(crop), 2)
        steps = train.steps if "steps" in fixed else round(train.steps * share)
        train = train.replace(crop=crop, steps=steps)

    height, width = np.median(sizes, axis=0).round().astype(int)
    low, high = np.percentile(sides, [5, 95])
    verb = "stay at" if (height, width) == canvas else "are scaled to"
    why = "as set, with boxes of" if "image_size" in fixed else "since boxes are"
    anchors = [size * scale for size in detector.anchors.sizes for scale in detector.anchors.scales]
    rows, columns = train.crop or canvas
    sentence = (
        f"fit: images of {height}x{width} {verb} {canvas[0]}x{canvas[1]}, {why} {low:.0f} to "
        f"{high:.0f} pixels (5 % to 95 %); anchors {min(anchors):.0f} to {max(anchors):.0f}; "
        f"crop {rows}x{columns}, {train.steps} steps; {reached:.0%} of the boxes have an anchor"
    )
    return Fitted(detector, train, sentence)


def _truth(dataset: Dataset) -> dict[str, Any]:
    """The ground truth, or that of some examples."""
    if hasattr(dataset, "ground_truth"):
        return dataset.ground_truth()
    some = np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_EXAMPLES)).astype(int)
    truth: dict[str, Any] = {"images": [], "annotations": []}
    for n, (image, boxes, labels, _) in enumerate(
        read_example(dataset, index) for index in some.tolist()
    ):
        truth["images"].append({"id": n, "height": image.shape[0], "width": image.shape[1]})
        pairs = zip(labels.tolist(), boxes, strict=True)
        truth["annotations"] += [coco_annotation(0, n, label, box) for label, box in pairs]
    return truth


def _anchors(
    boxes: np.ndarray, weights: np.ndarray, detector: RetinaNetConfig, fixed: Collection[str]
) -> tuple[RetinaNetConfig, float]:
    """The preferred anchors that reach nearly as many boxes as any, and the share they reach."""
    own = detector.anchors
    held = {part for part in vars(own) if {"anchors", f"anchors.{part}"} & set(fixed)}
    spans = boxes[:, 2:] - boxes[:, :2]
    long = np.percentile(spans.max(axis=1) / spans.min(axis=1), [50, 90]).round(1).tolist()
    ratios = [*RATIOS]
    if long[1] > max(RATIOS[-1]):  # both ways: images may be turned
        ratios.append((1 / long[1], 1 / long[0], 1.0, *long))
    levels = [n for n in LEVELS if len(n) >= len(detector.levels)]
    tried = []
    for ratio, level, base in itertools.product(
        [own.ratios] if "ratios" in held else ratios,
        [detector.levels] if {"sizes", "strides"} & held or "levels" in fixed else levels,
        [None] if "sizes" in held else BASES,
    ):
        anchors = dataclasses.replace(
            own,
            ratios=ratio,
            strides=tuple(2**n for n in level),
            sizes=own.sizes if base is None else tuple(base * 2.0**n for n in range(len(level))),
        )
        config = detector.replace(levels=level, anchors=anchors)
        reaches = best_iou(boxes, config) >= config.foreground
        tried.append((np.average(reaches, weights=weights), config, float(np.mean(reaches))))
    best = max(share for share, _, _ in tried)
    return next((config, reached) for share, config, reached in tried if share >= best - ENOUGH)
