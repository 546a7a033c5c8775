"""A COCO JSON file into plain records, or one sentence on what is wrong with it."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from focal.retinanet.data.images import DataError

__all__ = [
    "ImageRecord",
    "Objects",
    "read_categories",
    "read_images",
    "read_json",
    "read_objects",
]

_log = logging.getLogger("focal")
_KINDS = {"images": "image id", "annotations": "annotation", "categories": "category"}


class ImageRecord(NamedTuple):
    """One entry of `images`; `file` is relative to the image folder, and there."""

    id: int
    file: str
    height: int
    width: int


class Objects(NamedTuple):
    """The boxes that are kept, as columns of A rows, grouped by image.

    Attributes:
        id: (A,) the annotation's id.
        image: (A,) index into the list of images.
        label: (A,) class index.
        box: (A, 4) float64, `(x1, y1, x2, y2)`, clipped to the image.
        area: (A,) the file's area, which COCO takes from the mask; else that of the box.
        crowd: (A,) bool.
    """

    id: np.ndarray
    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise DataError(f"{path.name}: not valid JSON ({where})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not valid JSON (not UTF-8 text)") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{path.name}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise DataError(f"{path.name}: not valid JSON (nested too deeply)") from error
    if not isinstance(data, dict):
        raise DataError(f"{path.name}: expected an object at the top, got {type(data).__name__}")
    return data


def _records(data: dict[str, Any], key: str, file: str) -> dict[int, dict[str, Any]]:
    """The list `data[key]` by id."""
    if key not in data:
        raise DataError(f"{file}: missing key {key!r}")
    if not isinstance(data[key], list):
        raise DataError(f"{file}: {key!r} must be a list, got {type(data[key]).__name__}")
    records: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(data[key]):
        number = record.get("id") if isinstance(record, dict) else None
        if type(number) is not int or abs(number) >= 2**63:
            raise DataError(f"{file}: {key}[{position}]: not an object with an integer id")
        if number in records:
            raise DataError(f"{file}: duplicate {_KINDS[key]} {number}")
        records[number] = record
    return records


def _value(record: dict[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise DataError(f"{where}: missing key {key!r}")
    return record[key]


def read_categories(data: dict[str, Any], file: str) -> dict[int, str]:
    """The class names by category id, each checked and distinct."""
    names: dict[int, str] = {}
    for number, record in _records(data, "categories", file).items():
        name = _value(record, "name", f"{file}: category {number}")
        if not isinstance(name, str) or not name:
            raise DataError(f"{file}: category {number}: name must be text, got {name!r}")
        if name in names.values():
            raise DataError(f"{file}: category {number}: duplicate name {name!r}")
        names[number] = name
    if not names:
        raise DataError(f"{file}: no categories")
    return names


def read_images(data: dict[str, Any], file: str, folder: Path) -> list[ImageRecord]:
    """The images in the order of the file; each is looked for in `folder`, none is opened."""
    images = []
    for number, record in _records(data, "images", file).items():
        where = f"{file}: image id {number}"
        name = _value(record, "file_name", where)
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: file_name must be text, got {name!r}")
        where += f" ({name})"
        # PureWindowsPath splits at both kinds of slash, so this holds on every system.
        parts = PureWindowsPath(name)
        if parts.anchor or ".." in parts.parts:
            raise DataError(f"{where}: file_name leads out of {folder.name}/")
        if not (folder / name).is_file():
            raise DataError(f"{where}: file not found in {folder.name}/")
        for key in ("height", "width"):
            side = _value(record, key, where)
            if type(side) is not int or side < 1:
                raise DataError(f"{where}: {key} must be a positive integer, got {side!r}")
        images.append(ImageRecord(number, name, record["height"], record["width"]))
    if not images:
        raise DataError(f"{file}: no images")
    return images


def read_objects(
    data: dict[str, Any], file: str, images: list[ImageRecord], category_ids: tuple[int, ...]
) -> Objects:
    """The boxes to keep; what is dropped goes into one line of the log."""
    index_of = {image.id: index for index, image in enumerate(images)}
    label_of = {category: label for label, category in enumerate(category_ids)}
    records = _records(data, "annotations", file)
    rows, dropped = [], Counter[str]()
    for number, record in records.items():
        where = f"{file}: annotation {number}"
        image_id = _value(record, "image_id", where)
        category_id = _value(record, "category_id", where)
        if type(image_id) is not int or image_id not in index_of:
            raise DataError(f"{where}: unknown image_id {image_id!r}")
        if type(category_id) is not int or category_id not in label_of:
            raise DataError(f"{where}: unknown category_id {category_id!r}")
        crowd = record.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{where}: iscrowd must be 0 or 1, got {crowd!r}")
        index = index_of[image_id]
        box, fault = _box(_value(record, "bbox", where), images[index], where)
        if fault:
            dropped[fault] += 1
            continue
        area = record.get("area")
        if area is None:
            area = (box[2] - box[0]) * (box[3] - box[1])
        if not _is_number(area):
            raise DataError(f"{where}: area must be a finite number, got {area!r}")
        rows.append((number, index, label_of[category_id], box, area, bool(crowd)))
    rows.sort(key=lambda row: row[1])
    ids, indices, labels, boxes, areas, crowds = zip(*rows, strict=True) if rows else [()] * 6
    objects = Objects(
        id=np.array(ids, np.int64),
        image=np.array(indices, np.int64),
        label=np.array(labels, np.int64),
        box=np.array(boxes, np.float64).reshape(-1, 4),
        area=np.array(areas, np.float64),
        crowd=np.array(crowds, bool),
    )
    _report(file, len(records), dropped, int(objects.crowd.sum()))
    return objects


def _box(bbox: Any, image: ImageRecord, where: str) -> tuple[tuple[float, ...], str]:
    """The bbox as x1, y1, x2, y2 inside the image, and why it must be dropped, if it must."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise DataError(f"{where}: bbox must be four finite numbers, got {bbox!r}")
    x, y, width, height = bbox
    if width < 0 or height < 0:
        raise DataError(f"{where}: bbox must have a width and height of 0 or more, got {bbox}")
    x1, x2 = (float(min(max(v, 0), image.width)) for v in (x, x + width))
    y1, y2 = (float(min(max(v, 0), image.height)) for v in (y, y + height))
    if width > 0 and height > 0 and not (x1 < x2 and y1 < y2):
        return (), "outside the image"
    if not (np.float32(x1) < np.float32(x2) and np.float32(y1) < np.float32(y2)):
        return (), "zero-area"
    return (x1, y1, x2, y2), ""


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _report(file: str, total: int, dropped: Counter[str], crowd: int) -> None:
    """One line, and none where there is nothing to say."""
    if not dropped and not crowd:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(dropped.items(), reverse=True))
    text = f"dropped {dropped.total()} of {total} boxes" + (f" ({kinds})" if kinds else "")
    text += f", {crowd} crowd" if crowd else ""
    _log.log(logging.WARNING if dropped else logging.INFO, "%s: %s", file, text)
