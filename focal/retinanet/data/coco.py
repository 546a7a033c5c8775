"""COCO JSON with a folder of images, validated before the first image is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from focal.retinanet.data.coco_json import (
    ImageRecord,
    log_dropped,
    read_categories,
    read_images,
    read_json,
    read_objects,
)
from focal.retinanet.data.dataset import Example, coco_annotation
from focal.retinanet.data.images import DataError, exif_turns, printable, read_image
from focal.retinanet.data.paths import LINK_FAULT, PathRule, leads_out

__all__ = ["CocoDataset", "find_split", "find_splits", "read_record"]


class CocoDataset:
    """One split of a detection set in the COCO format; a `Dataset`.

    Two layouts are recognized:

        root/instances_{split}.json              root/images/
        root/annotations/instances_{split}2017.json   root/{split}2017/

    Classes are the file's categories, sorted by id. Boxes are clipped to their image; those
    without area (a side below a thousandth of a pixel), or entirely outside, are dropped, also from
    the ground truth, and counted in one line of the log. Crowd boxes are in the ground truth (where
    detections on them are ignored), but not in the examples.

    Raises:
        DataError: a folder, split, file, key, id or number is missing or wrong.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        root = Path(root)
        path, self._folder = find_split(root, split)
        data = read_json(path)
        self._file = path.name
        self.name = f"{root.resolve().name}/{split}"
        categories = read_categories(data, path.name)
        self.category_ids = tuple(sorted(categories))
        self.classes = tuple(categories[c] for c in self.category_ids)
        self._images = read_images(data, path.name, PathRule(root, self._folder))
        self._objects, dropped = read_objects(data, path.name, self._images, self.category_ids)
        log_dropped(path.name, self._objects, dropped)
        rows = np.arange(len(self._images) + 1)
        self._first = np.searchsorted(self._objects.image, rows)
        seen = self._objects.image[~self._objects.crowd]
        self.max_boxes = int(np.bincount(seen).max()) if len(seen) else 0

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        """Decode one image.

        Raises:
            DataError: the file is not a readable image, or not of the size in the JSON.
        """
        index = range(len(self))[index]
        record = self._images[index]
        image = read_record(record, self._file, self._folder)
        own = slice(self._first[index], self._first[index + 1])
        kept = ~self._objects.crowd[own]
        boxes = self._objects.box[own][kept].astype(np.float32)
        return Example(image, boxes, self._objects.label[own][kept], record.id)

    def ground_truth(self) -> dict[str, Any]:
        """The boxes for COCO's evaluation: clipped, with crowds, with the ids of the file."""
        columns = [column.tolist() for column in self._objects]
        return {
            "images": [image._asdict() for image in self._images],
            "annotations": [
                coco_annotation(
                    number, self._images[image].id, self.category_ids[label], box, area, int(crowd)
                )
                for number, image, label, box, area, crowd in zip(*columns, strict=True)
            ],
            "categories": [
                {"id": c, "name": n} for c, n in zip(self.category_ids, self.classes, strict=True)
            ],
        }


def read_record(record: ImageRecord, file: str, folder: Path) -> np.ndarray:
    """Decode an image, which must have the size in the JSON `file`."""
    path = folder / record.file_name
    try:
        image = read_image(path)
    except DataError as error:
        raise DataError(f"{file}: image id {record.id}: {error}", error.kind) from error
    height, width = image.shape[:2]
    if (height, width) == (record.height, record.width):
        return image
    text = (
        f"{file}: image id {record.id} ({printable(record.file_name)}): width x height is "
        f"{record.width}x{record.height} in the JSON but {width}x{height} in the file"
    )
    if (height, width) == (record.width, record.height) and exif_turns(path):
        text += ", swapped by the EXIF orientation, which is applied"
    raise DataError(text, "wrong size")


def find_splits(root: Path) -> dict[str, tuple[Path, Path]]:
    """The annotation file and the image folder of each split."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", "no data")
    found = {}
    for path in sorted(root.glob("annotations/instances_*2017.json")):
        year = path.stem.removeprefix("instances_")
        found[year.removesuffix("2017")] = (path, root / year)
    for path in sorted(root.glob("instances_*.json")):
        found[path.stem.removeprefix("instances_")] = (path, root / "images")
    return found


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split."""
    found = find_splits(root)
    if split not in found:
        splits = printable(", ".join(sorted(found))) or "no instances_*.json"
        raise DataError(f"{root}: no split {split!r}; found {splits}", "no data")
    path, folder = found[split]
    if leads_out(path, root, path.parent):
        raise DataError(f"{path.name}: {LINK_FAULT}", "path leads out")
    if not folder.is_dir():
        raise DataError(f"{path.name}: its image folder {folder} does not exist", "no data")
    return path, folder
