"""The interface of a dataset, for the loader and the evaluation."""

from __future__ import annotations

import contextlib
import operator
import reprlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.data.images import DataError

__all__ = [
    "Dataset",
    "Example",
    "Transformed",
    "category_ids",
    "class_names",
    "coco_annotation",
    "dataset_name",
    "image_name",
    "read_example",
]


class Example(NamedTuple):
    """One image and its objects.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes: (M, 4) numbers, `(x1, y1, x2, y2)` in pixels of `image`, with x1 < x2 and y1 < y2.
            What extends beyond the image is cut off.
        labels: (M,) integers, the class index in [0, K) of each box.
        image_id: the id of the image in the ground truth; None: the index of the example.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    image_id: int | None = None


class Dataset(Protocol):
    """Images with boxes, by index: all that your own class needs for training.

    Examples are read anew in every epoch, by several threads. Your class may also have

    - `name`, for logs and tables; default: the name of the class;
    - `category_ids`, K integers, the ids of the classes in results; default: 1 to K;
    - `max_boxes`, the largest number of boxes of an example. Without it, batches are padded to 8,
      16, 32, ... boxes; JAX and TensorFlow compile for each, and several processes need it;
    - `ground_truth()`: `images`, one per example in the same order, `annotations` and `categories`
      in the COCO format; default: made of the examples;
    - `constant`: True if an index always gives the same example, which may then be cached.

    Attributes:
        classes: K names; label k is `classes[k]`.
    """

    @property
    def classes(self) -> Sequence[str]: ...  # noqa: D102

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """An `Example`, or the tuple (image, boxes, labels)."""
        ...


class Transformed:
    """A `Dataset` with your own augmentation, which comes before that of `TrainConfig`.

    Args:
        dataset: any `Dataset`.
        transform: called as `transform(image=image, bboxes=boxes, labels=labels)` by one thread at
            a time, with arrays as in `Example`; returns a mapping with the same names, as
            `albumentations.Compose` does. Boxes that it left without area, or moved out of the
            image, are dropped.

    Example:
        >>> from focal.retinanet.data import ShapesDataset
        >>> def invert(image, bboxes, labels):
        ...     return {"image": 255 - image, "bboxes": bboxes, "labels": labels}
        >>> shapes = ShapesDataset("train")
        >>> Transformed(shapes, invert)[0].image[0, 0] + shapes[0].image[0, 0]
        array([255, 255, 255], dtype=uint8)
    """

    def __init__(self, dataset: Dataset, transform: Callable[..., Mapping[str, Any]]) -> None:
        self.name = dataset_name(dataset)
        self.classes = class_names(dataset)
        self.category_ids = category_ids(dataset)
        self.max_boxes: int = getattr(dataset, "max_boxes", 0)
        self._dataset, self._transform = dataset, transform
        self._lock = threading.Lock()  # transforms keep state during a call

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        """Read and transform one example."""
        image, boxes, labels, image_id = read_example(self._dataset, index)
        with self._lock:
            out = self._transform(image=image.copy(), bboxes=boxes, labels=labels)
        image, boxes, labels = (np.asarray(out[key]) for key in ("image", "bboxes", "labels"))
        if image.ndim == 3 and boxes.shape == (*labels.shape, 4):  # else the reader says so
            height, width = image.shape[:2]
            low, high = np.split(np.clip(boxes, 0, [width, height] * 2), 2, axis=1)
            kept = ~(low >= high).any(axis=1)
            boxes, labels = boxes[kept], labels[kept]
        return Example(image, boxes, labels, image_id)


def dataset_name(dataset: Dataset) -> str:
    """The name of a dataset in logs and tables."""
    return str(getattr(dataset, "name", type(dataset).__name__))


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """The names of the classes, by label."""
    names = getattr(dataset, "classes", None)
    if names is None or isinstance(names, str):
        wanted = "a Dataset, such as CocoDataset(folder, 'train'), whose classes are several names"
        raise TypeError(f"data must be {wanted}; got {dataset!r} with classes {names!r}")
    return tuple(names)


def category_ids(owner: Dataset | RetinaNetConfig) -> tuple[int, ...]:
    """The ids of the classes in results, by label, of a dataset or of a detector."""
    return tuple(getattr(owner, "category_ids", ())) or tuple(range(1, len(owner.classes) + 1))


def image_name(dataset: Dataset, index: int) -> str:
    """How messages name an image: its file, where the dataset has one."""
    with contextlib.suppress(Exception):
        return str(dataset.ground_truth()["images"][index]["file_name"])  # type: ignore[attr-defined]
    return f"image {index}"


def read_example(dataset: Dataset, index: int) -> Example:
    """The example at `index`, with boxes in float32, cut off at the image, and labels in int64.

    Raises:
        DataError: an example that is not as `Example` says.
    """

    def require(holds: Any, wanted: str, got: Any) -> None:
        if not holds:
            where = f"{dataset_name(dataset)}: {image_name(dataset, index)}"
            raise DataError(f"{where}: {wanted}; got {reprlib.repr(got)}", "wrong example")

    found, count = dataset[index], len(dataset.classes)
    is_tuple = isinstance(found, tuple) and len(found) in (3, 4)
    require(is_tuple, "expected an Example or (image, boxes, labels)", type(found))
    image, boxes, labels, image_id = Example(*found)
    image, boxes, labels = np.asarray(image), np.asarray(boxes), np.asarray(labels)
    shaped = image.ndim == 3 and image.shape[2] == 3 and image.size and image.dtype == np.uint8
    require(shaped, "image must be (H, W, 3) uint8", (image.shape, str(image.dtype)))
    boxes = boxes if boxes.size else np.zeros((0, 4))
    labels = labels if labels.size else np.zeros(0, np.int64)
    shaped = boxes.shape == (len(boxes), 4) and boxes.dtype.kind in "iuf"
    require(shaped, "boxes must be (M, 4) numbers", (boxes.shape, str(boxes.dtype)))
    shaped = labels.shape == (len(boxes),) and labels.dtype.kind in "iu"
    wanted = f"labels must be {len(boxes)} integers, one for each box"
    require(shaped, wanted, (labels.shape, str(labels.dtype)))
    wrong = labels[(labels < 0) | (labels >= count)]
    require(not wrong.size, f"labels must be in [0, {count})", wrong.tolist())
    with np.errstate(over="ignore"):
        boxes = boxes.astype(np.float32)
    wrong = boxes[~(np.isfinite(boxes).all(axis=1) & (boxes[:, :2] < boxes[:, 2:]).all(axis=1))]
    wanted = "boxes must be finite (x1, y1, x2, y2) with x1 < x2 and y1 < y2"
    require(not wrong.size, wanted, wrong.tolist())
    height, width = image.shape[:2]
    inside = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
    wrong = boxes[(inside[:, :2] >= inside[:, 2:]).any(axis=1)]
    wanted = f"boxes must overlap the image, which is {width}x{height} pixels"
    require(not wrong.size, wanted, wrong.tolist())
    image_id = index if image_id is None else operator.index(image_id)
    return Example(image, inside, labels.astype(np.int64), image_id)


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
