"""Generated images for `benchmarks.regimes`: shapes, of which one can set what makes them hard."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from focal.retinanet.data import Example, ShapesDataset
from focal.retinanet.data.dataset import coco_annotation


class Scene(NamedTuple):
    """What is in the images and how it is labeled."""

    size: int = 96
    """Height and width in pixels."""
    objects: float = 2
    """Mean number of shapes in an image."""
    sides: tuple[int, int] = (20, 44)
    """Range of the longer side of a box in pixels."""
    classes: str = "shapes"
    """`shapes`: three classes. `one`: all shapes are one class. `circles`: circles are the class,
    the others are distractors without a label. `colors`: shape and color make 24 classes."""
    unused: int = 0
    """Further classes, of which there are no objects."""
    missing: float = 0.0
    """Share of the training boxes without a label."""
    wrong: float = 0.0
    """Share of the training labels that are another class."""


NAMES = {
    "shapes": ShapesDataset.classes,
    "one": ("shape",),
    "circles": ("circle",),
    "colors": tuple(f"{s}{c}" for s in ShapesDataset.classes for c in range(8)),
}


def names(scene: Scene) -> tuple[str, ...]:
    """The classes of a scene."""
    return (*NAMES[scene.classes], *(f"unused{i}" for i in range(scene.unused)))


class Scenes:
    """A split of a scene, held in memory; a `Dataset`."""

    constant = True

    def __init__(self, split: str, count: int, scene: Scene) -> None:
        self.name, self.classes = f"scenes/{split}", names(scene)
        self.category_ids = tuple(range(1, len(self.classes) + 1))
        size = scene.size, scene.size
        drawn = ShapesDataset(
            split, size, count, num_objects=scene.objects, object_size=scene.sides
        )
        self.max_boxes = drawn.max_boxes
        self._examples = [labeled(example, scene) for example in drawn]
        if split == "train":
            noise = np.random.default_rng(0)
            own = len(NAMES[scene.classes])
            self._examples = [spoiled(e, scene, own, noise) for e in self._examples]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def ground_truth(self) -> dict[str, Any]:
        """All boxes in the COCO format."""
        annotations: list[dict[str, Any]] = []
        for example in self._examples:
            for box, label in zip(example.boxes, example.labels, strict=True):
                number = len(annotations) + 1
                category = self.category_ids[label]
                annotations.append(coco_annotation(number, example.image_id, category, box))
        return {
            "images": [
                {"id": e.image_id, "height": e.image.shape[0], "width": e.image.shape[1]}
                for e in self._examples
            ],
            "annotations": annotations,
            "categories": [
                {"id": c, "name": n} for c, n in zip(self.category_ids, self.classes, strict=True)
            ],
        }


def labeled(example: Example, scene: Scene) -> Example:
    """The boxes and labels of the scene's classes."""
    labels = example.labels
    if scene.classes == "one":
        return example._replace(labels=np.zeros_like(labels))
    if scene.classes == "circles":
        own = labels == 0
        return example._replace(boxes=example.boxes[own], labels=labels[own])
    if scene.classes == "colors":
        colors = [_color(example.image, box) for box in example.boxes]
        return example._replace(labels=labels * 8 + np.array(colors, np.int64))
    return example


def _color(image: np.ndarray, box: np.ndarray) -> int:
    """Which of red, green and blue are in the upper half at the center of a shape, in bits."""
    x, y = (int(v) for v in (box[:2] + box[2:]) / 2)
    bright = image[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1)) > 127.5
    return int(bright @ [4, 2, 1])


def spoiled(example: Example, scene: Scene, classes: int, rng: np.random.Generator) -> Example:
    """The example with some labels lost and some wrong."""
    count = len(example.labels)
    kept = rng.random(count) >= scene.missing
    other = (example.labels + rng.integers(1, max(2, classes), count)) % classes
    labels = np.where(rng.random(count) < scene.wrong, other, example.labels)
    return example._replace(boxes=example.boxes[kept], labels=labels[kept])
