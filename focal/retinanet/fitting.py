"""Chooses canvas, anchors, crop and steps from the boxes of a dataset, before training."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.coverage import best_iou, scales

if TYPE_CHECKING:  # it needs Pillow
    from focal.retinanet.data import Dataset

__all__ = ["Fitted", "fit_boxes", "fit_config"]

SMALL, LARGE = 10, 90
"""Percentiles of the box sides that count as small and as large."""
SMALL_SIDE = 28
"""Pixels of the canvas that a small box should have."""
LEAST_SIDE = 16
"""Images are scaled up where their small boxes have fewer pixels than this, at most twofold."""
MAX_CANVAS = 1024
BASES = (32.0, 28.0, 24.0, 20.0, 16.0, 14.0, 12.0, 10.0, 8.0)
"""Sizes to try of the anchors of the first level, the preferred first."""
LEVELS = ((3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 7))
RATIOS = ((0.5, 1.0, 2.0), (1 / 3, 1.0, 3.0), (0.25, 0.5, 1.0, 2.0, 4.0), (1 / 6, 0.4, 1.0, 2.5, 6.0))
ENOUGH = 0.01
"""Share of the boxes that a preferred choice may reach less than the best one."""
MAX_BOXES = 2000
"""Anchors are fitted to as many boxes, evenly chosen."""
MAX_EXAMPLES = 500
"""As many images are read of a dataset that has no ground truth."""


class Fitted(NamedTuple):
    """The configs that fit a dataset, and what was chosen and why, in one line."""

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
        dataset: What to train on. Without `ground_truth`, 500 of its images are read.
        detector: The detector; its image size is the least canvas.
        train: The run; the pixels that all its steps read together stay the same.
        fixed: Fields that stay as they are, such as "image_size", "levels" or "anchors.sizes".

    Returns:
        Both configs, changed, and a line for the log.
    """
    return fit_boxes(*_read(dataset), detector, train, fixed)


def fit_boxes(
    sizes: np.ndarray,
    image: np.ndarray,
    boxes: np.ndarray,
    detector: RetinaNetConfig,
    train: TrainConfig,
    fixed: Collection[str] = frozenset(),
) -> Fitted:
    """`fit_config` for images of (height, width) `sizes` and boxes in the `image` of that index."""
    if not len(boxes):
        return Fitted(detector, train, "fit: no boxes, so the settings stay")
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    if "image_size" not in fixed:
        relative = sides / sizes.max(axis=1)[image]
        detector = detector.replace(image_size=_canvas(sizes, relative, max(detector.image_size)))
    scale = scales(sizes, detector.image_size)[image]
    some = np.linspace(0, len(boxes) - 1, min(len(boxes), MAX_BOXES)).astype(int)
    detector, reached = _anchors((boxes * scale[:, None])[some], detector, fixed)
    train = _train(sides * scale, detector.image_size, train, fixed)
    return Fitted(detector, train, _sentence(sizes, sides, detector, train, reached))


def _canvas(sizes: np.ndarray, sides: np.ndarray, least: int) -> tuple[int, int]:
    """The canvas for images of these sizes, with box sides relative to the longest image side."""
    longest = sizes.max(axis=1)
    own, small = float(np.median(longest)), float(np.percentile(sides, SMALL))
    most = own * min(max(LEAST_SIDE / (small * own), 1), 2)
    length = min(max(SMALL_SIDE / small, least), most, MAX_CANVAS)
    length = _multiple(length)
    # The typical shape: where some images are tall and others wide, a square.
    height, width = np.percentile(sizes / longest[:, None], 80, axis=0)
    return _multiple(height * length), _multiple(width * length)


def _anchors(
    boxes: np.ndarray, detector: RetinaNetConfig, fixed: Collection[str]
) -> tuple[RetinaNetConfig, float]:
    """The simplest anchors that reach nearly as many boxes as any, and the share that they reach."""
    own = detector.anchors
    kept = {f"anchors.{name}" for name in vars(own)} if "anchors" in fixed else set(fixed)
    held = bool(kept & {"levels", "anchors.sizes", "anchors.strides"} or "anchors" in fixed)
    tried = []
    for ratios, levels, base in itertools.product(
        [own.ratios] if "anchors.ratios" in kept else RATIOS,
        [detector.levels] if held else LEVELS,
        [own.sizes[0]] if kept & {"anchors.sizes"} else BASES,
    ):
        sizes = own.sizes if "anchors.sizes" in kept else tuple(base * 2.0**n for n in range(len(levels)))
        anchors = dataclasses.replace(own, strides=tuple(2**n for n in levels), sizes=sizes, ratios=ratios)
        config = detector.replace(levels=levels, anchors=anchors)
        tried.append((config, float(np.mean(best_iou(boxes, config) >= detector.foreground))))
    best = max(reached for _, reached in tried)
    return next(choice for choice in tried if choice[1] >= best - ENOUGH)


def _train(
    sides: np.ndarray, canvas: tuple[int, int], train: TrainConfig, fixed: Collection[str]
) -> TrainConfig:
    """The run with a crop that holds large boxes, of `sides` on the canvas."""
    if train.crop is None or "crop" in fixed:
        return train
    height, width = train.crop
    large = _multiple(2 * float(np.percentile(sides, LARGE)))
    crop = min(max(height, large), canvas[0]), min(max(width, large), canvas[1])
    steps = train.steps
    if "steps" not in fixed:  # as many pixels as before
        share = height * width * train.steps / (crop[0] * crop[1])
        steps = min(steps, max(100, round(share / 100) * 100))
    return train.replace(crop=crop, steps=steps)


def _sentence(
    sizes: np.ndarray, sides: np.ndarray, detector: RetinaNetConfig, train: TrainConfig, reached: float
) -> str:
    """What was chosen and why."""
    low, high = np.percentile(sides, [5, 95]).round()
    height, width = np.median(sizes, axis=0).round()
    anchors = detector.anchors
    crop = train.crop or detector.image_size
    return (
        f"fit: images of {height:.0f}x{width:.0f} on a canvas of {_by(detector.image_size)}, since boxes are {low:.0f} "
        f"to {high:.0f} pixels (5 % to 95 %); anchors {min(anchors.sizes):.0f} to "
        f"{max(anchors.sizes) * max(anchors.scales):.0f}; crop {_by(crop)}; {train.steps} steps; "
        f"{reached:.0%} of the boxes have an anchor"
    )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _multiple(side: float) -> int:
    """To whole cells of the coarsest level of three."""
    return max(1, round(side / 32)) * 32


def _read(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The (height, width) of the images, the image index of each box, and the boxes."""
    if hasattr(dataset, "ground_truth"):
        truth = dataset.ground_truth()
        row = {record["id"]: n for n, record in enumerate(truth["images"])}
        sizes = [(record["height"], record["width"]) for record in truth["images"]]
        own = [a for a in truth["annotations"] if not a.get("iscrowd")]
        image = [row[a["image_id"]] for a in own]
        boxes = np.array([a["bbox"] for a in own], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
    else:
        some = np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_EXAMPLES)).astype(int)
        examples = [dataset[n] for n in some.tolist()]
        sizes = [e.image.shape[:2] for e in examples]
        image = [n for n, e in enumerate(examples) for _ in e.boxes]
        boxes = np.concatenate([e.boxes for e in examples], dtype=float).reshape(-1, 4)
    return np.array(sizes, float).reshape(-1, 2), np.array(image, int), boxes
