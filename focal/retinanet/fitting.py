"""Fits canvas, anchors, crop and steps to the boxes of a dataset, before training."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.coverage import best_iou, scales

if TYPE_CHECKING:  # it needs Pillow
    from focal.retinanet.data import Dataset

__all__ = ["Fitted", "fit_config"]

SMALL, LARGE = 10, 90
"""Percentiles of the box sides that count as small and as large."""
SMALL_SIDE = 32
"""Pixels of the canvas that a small box should have."""
LEAST_SIDE = 16
"""Images are enlarged where their small boxes have fewer pixels, at most twofold."""
LARGE_SIDE = 160
"""Pixels of the canvas that a large box need not exceed."""
MAX_CANVAS = 1024
MARGIN = 1.5
"""Side of the crop over that of a large box, at least."""
BASES = (32.0, 28.0, 24.0, 20.0, 16.0, 14.0, 12.0, 10.0, 8.0)
"""Sizes to try for the first level, each level having twice the size; the preferred first."""
LEVELS: tuple[tuple[int, ...], ...] = ((3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 7))
RATIOS = (
    (0.5, 1.0, 2.0),
    (1 / 3, 1.0, 3.0),
    (0.25, 0.5, 1.0, 2.0, 4.0),
    (1 / 6, 0.4, 1.0, 2.5, 6.0),
)
ENOUGH = 0.01
"""Share of the boxes that a preferred choice of anchors may reach less than the best one."""
MAX_BOXES, MAX_EXAMPLES = 2000, 500
"""Anchors are fitted to so many boxes; so many images are read where there is no ground truth."""


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

    The side of a box is the square root of its area. Every class counts the same, as it does in AP.

    Args:
        dataset: What to train on. Without `ground_truth`, up to 500 of its images are read.
        detector: The detector of the preset `tiny`; its image size is the least canvas, except
            for large objects, and its anchors keep scales, offset and rounding.
        train: The run. All its steps together see as many pixels as before.
        fixed: Fields that stay as they are, such as "image_size", "steps" or "anchors.sizes".

    Returns:
        The changed configs, and a line for the log. Without boxes they are not changed.

    Example:
        >>> from focal.retinanet import PRESETS
        >>> from focal.retinanet.data import ShapesDataset
        >>> fit_config(ShapesDataset("val", size=(128, 128)), *PRESETS["tiny"]).detector.image_size
        (128, 128)
    """
    sizes, image, boxes, labels = _read(dataset)
    if not len(boxes):
        return Fitted(detector, train, "fit: no boxes, so the settings stay")
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    weights = 1 / np.bincount(labels)[labels]
    relative = sides / sizes.max(axis=1)[image]
    small, large = np.percentile(relative, [SMALL, LARGE], weights=weights, method="inverted_cdf")
    if "image_size" not in fixed:
        canvas = _canvas(sizes, small, large, max(detector.image_size))
        detector = detector.replace(image_size=canvas)
    scale = scales(sizes, detector.image_size)[image]
    some = np.linspace(0, len(boxes) - 1, min(len(boxes), MAX_BOXES)).astype(int)
    detector, reached = _anchors((boxes * scale[:, None])[some], weights[some], detector, fixed)
    train = _train(large * max(detector.image_size), detector.image_size, train, fixed)

    low, high = np.percentile(sides, [5, 95])
    own = tuple(np.median(sizes, axis=0).round().astype(int))
    verb = "stay at" if own == detector.image_size else "are scaled to"
    why = "as set, with boxes of" if "image_size" in fixed else "since boxes are"
    anchors = [size * scale for size in detector.anchors.sizes for scale in detector.anchors.scales]
    sentence = (
        f"fit: images of {_by(own)} {verb} {_by(detector.image_size)}, {why} {low:.0f} to "
        f"{high:.0f} pixels (5 % to 95 %); anchors {min(anchors):.0f} to {max(anchors):.0f}; "
        f"crop {_by(train.crop or detector.image_size)}, {train.steps} steps; "
        f"{reached:.0%} of the boxes have an anchor"
    )
    return Fitted(detector, train, sentence)


def _canvas(sizes: np.ndarray, small: float, large: float, least: int) -> tuple[int, int]:
    """The canvas for images of these sizes, with box sides relative to the longer image side."""
    longest = sizes.max(axis=1)
    own = float(np.median(longest))
    length = max(SMALL_SIDE / small, min(least, LARGE_SIDE / large))
    most = min(max(own, min(2 * own, LEAST_SIDE / small)), MAX_CANVAS)
    length = _multiple(min(length, most))
    # Where some images are tall and others wide, a square.
    shape = np.percentile(sizes / longest[:, None], 80, axis=0)
    height, width = (_multiple(side) for side in shape * length)
    return height, width


def _anchors(
    boxes: np.ndarray, weights: np.ndarray, detector: RetinaNetConfig, fixed: Collection[str]
) -> tuple[RetinaNetConfig, float]:
    """The preferred anchors that reach nearly as many boxes as any, and the share they reach."""
    own = detector.anchors
    held = {part for part in vars(own) if {"anchors", f"anchors.{part}"} & set(fixed)}
    deeper = [levels for levels in LEVELS if len(levels) >= len(detector.levels)]
    if {"sizes", "strides"} & held or "levels" in fixed:
        deeper = [detector.levels]
    tried = []
    for ratios, levels, base in itertools.product(
        [own.ratios] if "ratios" in held else RATIOS,
        deeper,
        BASES if "sizes" not in held else [None],
    ):
        sizes = own.sizes if base is None else tuple(base * 2.0**n for n in range(len(levels)))
        strides = tuple(2**level for level in levels)
        anchors = dataclasses.replace(own, ratios=ratios, sizes=sizes, strides=strides)
        config = detector.replace(levels=levels, anchors=anchors)
        reaches = best_iou(boxes, config) >= detector.foreground
        tried.append((np.average(reaches, weights=weights), config, float(np.mean(reaches))))
    best = max(share for share, _, _ in tried)
    return next((config, reached) for share, config, reached in tried if share >= best - ENOUGH)


def _train(
    large: float, canvas: tuple[int, int], train: TrainConfig, fixed: Collection[str]
) -> TrainConfig:
    """The run with a crop that holds large boxes, and as many pixels in all."""
    if train.crop is None or "crop" in fixed:
        return train
    height, width = (
        min(max(side, _multiple(MARGIN * large)), limit)
        for side, limit in zip(train.crop, canvas, strict=True)
    )
    steps, share = train.steps, height * width / np.prod(train.crop)
    if "steps" not in fixed and share > 1:
        steps = max(1, int(round(steps / share, -2)))
    return train.replace(crop=(height, width), steps=steps)


def _read(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(height, width) of the images; of each box its image's index, its corners, its label."""
    records: list[tuple[int, Any, int]]
    if hasattr(dataset, "ground_truth"):
        truth = dataset.ground_truth()
        row = {record["id"]: n for n, record in enumerate(truth["images"])}
        sizes = [(record["height"], record["width"]) for record in truth["images"]]
        own = [a for a in truth["annotations"] if not a.get("iscrowd")]
        records = [(row[a["image_id"]], a["bbox"], a["category_id"]) for a in own]
    else:
        some = np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_EXAMPLES)).astype(int)
        examples = [dataset[n] for n in some.tolist()]
        sizes = [e.image.shape[:2] for e in examples]
        records = [
            (n, [*box[:2], *(box[2:] - box[:2])], label)
            for n, e in enumerate(examples)
            for box, label in zip(e.boxes, e.labels, strict=True)
        ]
    image, boxes, names = zip(*records, strict=True) if records else ((), (), ())
    corners = np.array(boxes, float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    labels = np.unique(np.array(names, int), return_inverse=True)[1]
    return np.array(sizes, float).reshape(-1, 2), np.array(image, int), corners, labels


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _multiple(side: float) -> int:
    """A multiple of the coarsest stride that every detector has."""
    return max(1, round(side / 32)) * 32
