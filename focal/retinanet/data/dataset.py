"""The interface of a dataset, for the loader and the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

__all__ = ["Dataset", "Example", "category_ids", "coco_annotation", "dataset_name"]


class Example(NamedTuple):
    """One image and its objects.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes: (M, 4) float32, `(x1, y1, x2, y2)` in pixels of `image`, inside it, never empty.
        labels: (M,) int64, the class index in [0, K) of each box.
        image_id: the id of the image in the ground truth.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    image_id: int


class Dataset(Protocol):
    """Images with boxes, by index: all that your own class needs for training.

    Attributes:
        name: used in logs and tables.
        classes: K names; label k is `classes[k]`.
        category_ids: the K ids that `ground_truth` uses, by label.
        max_boxes: the largest number of boxes of any example.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def category_ids(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def max_boxes(self) -> int: ...  # noqa: D102

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """The example at `index`, always the same; must be thread-safe."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """`images`, `annotations` and `categories` in the COCO format, as `evaluate` reads them.

        `images` has one entry per example, in the same order.
        """
        ...


def dataset_name(dataset: Dataset) -> str:
    """The attribute `name`, or else the name of the class."""
    return str(getattr(dataset, "name", type(dataset).__name__))


def category_ids(dataset: Dataset) -> tuple[int, ...]:
    """The attribute `category_ids`, or else 1 to K."""
    return tuple(getattr(dataset, "category_ids", range(1, len(dataset.classes) + 1)))


def coco_annotation(
    number: int,
    image_id: int,
    category_id: int,
    box: Sequence[float],
    area: float | None = None,
    iscrowd: int = 0,
) -> dict[str, Any]:
    """One annotation in the COCO format, from an `(x1, y1, x2, y2)` box.

    >>> coco_annotation(1, 7, 3, (10, 20, 15, 40))["bbox"]
    [10.0, 20.0, 5.0, 20.0]
    """
    x1, y1, x2, y2 = (float(v) for v in box)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1) if area is None else float(area),
        "iscrowd": iscrowd,
    }
