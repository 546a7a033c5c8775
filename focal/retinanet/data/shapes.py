"""Shapes: a generated detection set that needs no download.

Circles, squares and triangles of random colors on a noisy background with lines, arcs, specks and
soft blobs as distractors. An image is a function of (seed, split, index) and is drawn on demand.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from focal.retinanet.data.dataset import Example, coco_annotation
from focal.retinanet.data.images import DataError

__all__ = ["ShapesDataset"]

_CLASSES = ("circle", "square", "triangle")
_SPLITS = {"train": 2000, "val": 200, "test": 200}
_OVERSAMPLE = 4  # masks are drawn this many times larger, then averaged
_DENSITY = 12 / 128**2  # shapes per pixel
_OVERLAP = 0.3  # the largest overlap of two boxes, as a fraction of the smaller one's area


class _Shape(NamedTuple):
    label: int
    box: tuple[int, int, int, int]
    corners: np.ndarray | None  # (n, 2), the x and y of each in [0, 1] of the box; None: an ellipse


class ShapesDataset:
    """A generated set with many objects per image; a `Dataset`.

    Args:
        split: "train", "val" or "test"; they share no image.
        size: (height, width) of every image in pixels.
        num_images: number of images; None: 2000 for train, 200 for val and test.
        seed: an integer >= 0; each seed gives another set.
        num_objects: mean number of shapes per image, which varies by 25 %. None: 12 per 128 x 128
            pixels. Fewer are drawn where no room is left.
        object_size: range of the longer side of a box, in pixels; small ones are more frequent.

    Raises:
        DataError: no such split.

    >>> data = ShapesDataset("val")
    >>> data.classes, len(data), data[0].image.shape
    (('circle', 'square', 'triangle'), 200, (128, 128, 3))
    """

    classes = _CLASSES
    category_ids = tuple(range(1, len(_CLASSES) + 1))
    constant = True

    def __init__(
        self,
        split: str,
        size: tuple[int, int] = (128, 128),
        num_images: int | None = None,
        seed: int = 0,
        num_objects: float | None = None,
        object_size: tuple[int, int] = (16, 48),
    ) -> None:
        if split not in _SPLITS:
            raise DataError(f"shapes: no split {split!r}; found {', '.join(_SPLITS)}")
        self.name = f"shapes/{split}"
        self.size = size
        self._length = _SPLITS[split] if num_images is None else num_images
        self._entropy = (seed, list(_SPLITS).index(split))
        mean = size[0] * size[1] * _DENSITY if num_objects is None else num_objects
        self._counts = math.floor(0.75 * mean), math.ceil(1.25 * mean)
        self._log_sides = np.log(np.minimum(object_size, min(size)))

    @property
    def max_boxes(self) -> int:
        """An upper bound of the number of shapes in an image."""
        return self._counts[1]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Draw one image."""
        index = range(self._length)[index]
        rng, shapes = self._layout(index)
        image = _draw(rng, self.size, shapes)
        boxes = np.array([shape.box for shape in shapes], np.float32).reshape(-1, 4)
        labels = np.array([shape.label for shape in shapes], np.int64)
        return Example(image, boxes, labels, index + 1)

    def ground_truth(self) -> dict[str, Any]:
        """All boxes in the COCO format; no image is drawn."""
        height, width = self.size
        annotations: list[dict[str, Any]] = []
        for index in range(self._length):
            for shape in self._layout(index)[1]:
                number = len(annotations) + 1
                category = self.category_ids[shape.label]
                annotations.append(coco_annotation(number, index + 1, category, shape.box))
        return {
            "images": [
                {"id": i + 1, "file_name": f"{i + 1}.png", "height": height, "width": width}
                for i in range(self._length)
            ],
            "annotations": annotations,
            "categories": [
                {"id": c, "name": n} for c, n in zip(self.category_ids, self.classes, strict=True)
            ],
        }

    def _layout(self, index: int) -> tuple[np.random.Generator, list[_Shape]]:
        """The shapes of an image, largest first, and its random generator."""
        rng = np.random.default_rng([*self._entropy, index])
        count = int(rng.integers(self._counts[0], self._counts[1] + 1))
        sides = np.sort(np.exp(rng.uniform(self._log_sides[0], self._log_sides[1], count)))[::-1]
        shapes: list[_Shape] = []
        boxes = np.zeros((0, 4))
        for side in sides:
            label = int(rng.integers(len(_CLASSES)))
            corners, width, height = _outline(label, side, rng)
            box = _free_place(boxes, width, height, self.size, rng)
            if box is not None:
                shapes.append(_Shape(label, box, corners))
                boxes = np.concatenate([boxes, [box]])
        return rng, shapes


def _outline(
    label: int, side: float, rng: np.random.Generator
) -> tuple[np.ndarray | None, int, int]:
    """Corners relative to the box, and width and height of the box in whole pixels."""
    if label == 0:
        return None, round(side), round(side)
    sides = 4 if label == 1 else 3
    # Squares turn by up to 20 degrees: further, they would be diamonds, which look like circles.
    turn = rng.uniform(-math.pi / 9, math.pi / 9) if sides == 4 else rng.uniform(0, 2 * math.pi)
    angles = turn + math.pi / 4 + np.arange(sides) * (2 * math.pi / sides)
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    corners -= corners.min(axis=0)
    extent = corners.max(axis=0)
    width, height = np.rint(extent * (side / extent.max())).astype(int).tolist()
    return corners / extent, width, height


def _free_place(
    boxes: np.ndarray, width: int, height: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """The first of 32 random places where the box overlaps little with the others, if any."""
    x = rng.integers(size[1] - width + 1, size=32)
    y = rng.integers(size[0] - height + 1, size=32)
    places = np.stack([x, y, x + width, y + height], axis=1)
    low = np.maximum(places[:, None, :2], boxes[:, :2])
    high = np.minimum(places[:, None, 2:], boxes[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    free = (shared <= _OVERLAP * np.minimum(areas, width * height)).all(axis=1)
    if not free.any():
        return None
    x1, y1, x2, y2 = places[free.argmax()].tolist()
    return x1, y1, x2, y2


def _draw(rng: np.random.Generator, size: tuple[int, int], shapes: list[_Shape]) -> np.ndarray:
    image = _background(rng, size)
    for shape in shapes:
        under = image.resize((1, 1), Image.Resampling.BOX, box=shape.box).getpixel((0, 0))
        image.paste(_color_unlike(under, rng), shape.box[:2], _mask(shape))
    noise = rng.integers(-16, 17, (*size, 3), np.int16)
    return np.asarray(np.clip(np.asarray(image) + noise, 0, 255), np.uint8)


def _mask(shape: _Shape) -> Image.Image:
    """The coverage of each pixel of the box, 0 to 255; it touches all four sides."""
    x1, y1, x2, y2 = shape.box
    width, height = (x2 - x1) * _OVERSAMPLE, (y2 - y1) * _OVERSAMPLE
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    if shape.corners is None:
        draw.ellipse((0, 0, width - 1, height - 1), fill=255)
    else:
        draw.polygon((shape.corners * [width - 1, height - 1]).ravel().tolist(), fill=255)
    return mask.reduce(_OVERSAMPLE)


def _color_unlike(under: Any, rng: np.random.Generator) -> tuple[int, ...]:
    """A random color that differs from the color `under` by 70 or more in some channel."""
    colors = rng.integers(256, size=(8, 3))
    contrast = np.abs(colors - under).max(axis=1)
    # The first far enough; once in millions of draws there is none, then the farthest.
    chosen = np.minimum(contrast, 70).argmax()
    return tuple(colors[chosen].tolist())


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A smooth texture with soft blobs, under sharp lines, arcs and specks."""
    height, width = size
    base = rng.integers(40, 216, 3)
    blocks = base + rng.normal(0, 25, (height // 24 + 2, width // 24 + 2, 3))
    soft = Image.fromarray(np.clip(blocks, 0, 255).astype(np.uint8))
    soft = soft.resize((width // 4 + 1, height // 4 + 1), Image.Resampling.BICUBIC)
    amount = height * width / 128**2
    draw = ImageDraw.Draw(soft)
    for x, y, w, h, *color in _clutter(rng, round(5 * amount), size, (8, 40), base):
        draw.ellipse((x / 4, y / 4, (x + w) / 4, (y + h) / 4), fill=tuple(color))
    image = soft.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for x, y, w, h, *color in _clutter(rng, round(8 * amount), size, (-50, 50), base):
        draw.line((x, y, x + w, y + h), fill=tuple(color), width=1 + (x + y) % 2)
    for x, y, w, h, *color in _clutter(rng, round(4 * amount), size, (10, 30), base):
        start = 3 * (x + y + h)
        draw.arc((x, y, x + w, y + h), start, start + 100, fill=tuple(color), width=2)
    for x, y, w, h, *color in _clutter(rng, round(10 * amount), size, (1, 4), base):
        draw.rectangle((x, y, x + w, y + h), fill=tuple(color))
    return image


def _clutter(
    rng: np.random.Generator, count: int, size: tuple[int, int], extent: tuple[int, int], base: Any
) -> list[list[int]]:
    """Rows of x, y, w, h, red, green, blue; the colors are within 100 of `base`."""
    place = rng.integers(0, [size[1], size[0]], (count, 2))
    span = rng.integers(extent[0], extent[1], (count, 2), endpoint=True)
    color = np.clip(base + rng.integers(-100, 101, (count, 3)), 0, 255)
    rows: list[list[int]] = np.concatenate([place, span, color], axis=1).tolist()
    return rows
