"""COCO JSON with a folder of images, validated before the first image is read."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focal.retinanet.data.coco_json import (
    ImageRecord,
    choose_held_out,
    entries,
    group_names,
    integer_ids,
    log_dropped,
    read_categories,
    read_images,
    read_json,
    read_objects,
)
from focal.retinanet.data.dataset import Example, coco_annotation
from focal.retinanet.data.images import DataError, exif_turns, printable, read_image
from focal.retinanet.data.paths import LINK_FAULT, PathRule, is_file, leads_out

__all__ = ["CocoDataset", "OpenedSplit", "find_splits", "open_split", "read_record"]

_log = logging.getLogger("focal")


class CocoDataset:
    """One split of a detection set in the COCO format; a `Dataset`.

    These layouts are recognized, the last two as the split "train"; `valid` and `validation` are
    the split "val":

        root/instances_{split}.json                   root/images/
        root/annotations/instances_{split}2017.json   root/{split}2017/
        root/annotations/instances_{split}.json       root/{split}/, images/{split}/ or images/
        root/{split}/_annotations.coco.json           root/{split}/
        root/*.json, a single file                    root/images/, images/default/ or root/
        root/annotations/instances_default.json       the same

    Where there is no split "val", some images of "train", chosen at random, are "val" instead.

    Classes are the file's categories, sorted by id, without one that only names the group of others
    and has no boxes in any split, as Roboflow writes it. Boxes are clipped to their image; those
    without area (a side below a thousandth of a pixel), or entirely outside, are dropped, also from
    the ground truth, and counted in one line of the log. Crowd boxes are in the ground truth (where
    detections on them are ignored), but not in the examples.

    Args:
        root: the data folder, or a single annotation file.
        split: such as "train", "val" or "test".
        hold_out: the share of the images in [0, 1) that is "val" where there is no such split, at
            least one. With 0, all are "train".
        seed: of their choice, an integer >= 0.

    Raises:
        DataError: a folder, split, file, key, id or number is missing or wrong.
        ValueError: `hold_out` or `seed` is out of range.
    """

    constant = True

    def __init__(
        self, root: str | os.PathLike[str], split: str, hold_out: float = 0.1, seed: int = 0
    ) -> None:
        opened = open_split(Path(root), split, hold_out, seed)
        data, file, self._folder = opened.data, opened.file, opened.folder
        if split == "train" and opened.left_out:
            count = f"{len(opened.left_out)} of {len(integer_ids(data, 'images'))} images"
            text = "%s: no split 'val'; held out %s for it (hold_out=%g, seed=%d)"
            _log.info(text, file, count, hold_out, seed)
        if opened.groups:
            text = "%s: not among the classes, having no boxes and only grouping others: %s"
            _log.info(text, file, opened.groups)
        self._file = file
        self.name = f"{opened.root.resolve().name}/{split}"
        categories = read_categories(data, file)
        self.category_ids = tuple(sorted(categories))
        self.classes = tuple(categories[c] for c in self.category_ids)
        images = read_images(data, file, opened.rule)
        self._images = [image for image in images if image.id not in opened.left_out]
        self._objects, dropped = read_objects(data, file, self._images, self.category_ids)
        log_dropped(file, self._objects, dropped)
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


class OpenedSplit(NamedTuple):
    """The annotation file of a split, and what of it belongs to the split."""

    root: Path  # the data folder
    file: str  # the annotation file, as messages name it
    folder: Path  # the image folder
    rule: PathRule  # for the names of the images
    data: dict[str, Any]  # what is in the file
    left_out: set[int]  # the ids of its images that belong to another split
    groups: str  # the names of the categories that were taken out of `data`


Splits = dict[str, tuple[Path, list[Path]]]
"""The annotation file of each split, and the folders in which its images may be."""
_LAYOUTS = (
    "instances_*.json",
    "annotations/instances_*2017.json",
    "annotations/instances_*.json",
    "*/_annotations.coco.json",
)
_SINGLE = "[!.]*.json"
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def find_splits(root: Path) -> Splits:
    """The splits of a data folder, or of a single annotation file; empty if there are none."""
    home, found, single = _home(root), Splits(), [root]
    images = home / "images"
    if not is_file(root):
        if not root.is_dir():
            raise DataError(f"{root}: no such folder or file", "no data")
        for path in (path for layout in _LAYOUTS for path in sorted(root.glob(layout))):
            name = path.stem.removeprefix("instances_")
            folders = [images] if path.parent == root else [root / name, images / name, images]
            if name == "_annotations.coco":
                name, folders = path.parent.name, [path.parent]
            if name.strip("."):  # "." and ".." would be other folders
                split = name.removesuffix("2017")
                found.setdefault(_SPLITS.get(split.lower(), split), (path, folders))
        # CVAT writes "default" for all there is.
        single = [found["default"][0]] if [*found] == ["default"] else []
        single = single if found else sorted(root.glob(_SINGLE))
    if len(single) == 1:
        return {"train": (single[0], [images, images / "default", home, single[0].parent])}
    return found


def open_split(root: Path, split: str, hold_out: float = 0.1, seed: int = 0) -> OpenedSplit:
    """Find and read the annotation file of a split, as `CocoDataset` describes it."""
    if not 0 <= hold_out < 1 or type(seed) is not int or seed < 0:
        wanted = "hold_out in [0, 1) and seed an integer >= 0"
        raise ValueError(f"CocoDataset: expected {wanted}; got {hold_out!r} and {seed!r}")
    found, home = find_splits(root), _home(root)
    shared = "train" in found and "val" not in found and hold_out > 0
    source = "train" if shared and split == "val" else split
    if source not in found:
        raise DataError(_no_split(root, split, found, hold_out), "missing split")
    path, folders = found[source]
    # Roboflow gives the same name to the file of each split.
    file = f"{path.parent.name}/{path.name}" if path.parent == folders[0] else path.name
    there = [(folder, PathRule(home, folder)) for folder in folders if folder.is_dir()]
    data = _read(home, path, file)
    if not there:
        raise DataError(f"{file}: its image folder {folders[0]} does not exist", "no data")
    first = next(iter(entries(data, "images")), {}).get("file_name")
    folder, rule = next((x for x in there if x[1].fault(str(first)) is None), there[0])
    left_out: set[int] = set()
    if shared and source == "train":
        held = choose_held_out(data, file, hold_out, seed)
        left_out = held if split == "train" else integer_ids(data, "images") - held
    groups = group_names(data)
    for other, _ in found.values() if groups else ():
        with contextlib.suppress(DataError):  # of another split; said where that is opened
            own = data if other == path else _read(home, other, other.name)
            for entry in entries(own, "annotations"):
                if type(entry.get("category_id")) is int:
                    groups.pop(entry["category_id"], None)
    if groups:
        kept = [c for c in data["categories"] if not (type(c) is dict and c.get("id") in [*groups])]
        data = data | {"categories": kept}
    names = printable(", ".join(groups.values()))
    return OpenedSplit(home, file, folder, rule, data, left_out, names)


def _read(home: Path, path: Path, file: str) -> dict[str, Any]:
    """The content of an annotation file, which must not lead out of the data folder."""
    if leads_out(path, home, path.parent):
        raise DataError(f"{file}: {LINK_FAULT}", "path leads out")
    return read_json(path, file)


def _home(root: Path) -> Path:
    """The data folder; of a single annotation file, the one around it or its `annotations`."""
    if not is_file(root):
        return root
    return root.parent.parent if root.parent.name == "annotations" else root.parent


def _no_split(root: Path, split: str, found: Splits, hold_out: float) -> str:
    """The sentence for a split that is not there."""
    text = printable(", ".join(sorted(found)))
    if "train" in found and "val" not in found:
        text += ", with val held out of train" if hold_out else "; hold_out=0 holds nothing out"
    if not found:
        text = "no instances_*.json, no folder with _annotations.coco.json and no single JSON file"
        if files := ", ".join(path.name for path in sorted(root.glob(_SINGLE))):
            text += f", but {printable(files)}: name one of them"
    return f"{printable(str(root), 200)}: no split {split!r}; found {text}"
