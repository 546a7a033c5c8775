"""A COCO JSON file into plain records, or one sentence on each thing that is wrong with it."""

from __future__ import annotations

import json
import logging
import math
import reprlib
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from focal.retinanet.data.images import DataError, printable
from focal.retinanet.data.paths import PathRule, is_file

__all__ = [
    "Dropped",
    "ImageRecord",
    "Objects",
    "Report",
    "is_area",
    "log_dropped",
    "read_categories",
    "read_images",
    "read_json",
    "read_objects",
    "stop",
]

THINNEST = 1e-3
"""Boxes of a width or height below this many pixels are taken for empty: 1e-30 is above 0, too."""
_log = logging.getLogger("focal")
_KINDS = {"images": "image id", "annotations": "annotation", "categories": "category"}

Report = Callable[[DataError], None]
"""What is done with a fault: `stop` raises it; a check collects it, and the reader goes on with
the next record, leaving out the faulty one."""

Dropped = dict[str, list[int]]
"""The annotations without a box that could be learnt, by the reason."""


def stop(fault: DataError) -> NoReturn:
    """Raise the first fault."""
    raise fault


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
        if not is_file(path):
            raise DataError(f"{path.name}: not a file", "annotation file")
        data = json.loads(path.read_bytes())
    except DataError:
        raise
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno} column {error.colno}"
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except ValueError as error:  # an integer of thousands of digits
        reason = str(error)
    except RecursionError:
        reason = "nested too deeply"
    except OSError as error:
        raise DataError(f"{path.name}: {error.strerror}", "annotation file") from error
    else:
        if isinstance(data, dict):
            return data
        raise DataError(
            f"{path.name}: expected an object at the top, got {type(data).__name__}",
            "annotation file",
        )
    raise DataError(f"{path.name}: not valid JSON ({reason})", "annotation file")


def _records(
    data: dict[str, Any], key: str, file: str, report: Report
) -> dict[int, dict[str, Any]]:
    """The list `data[key]` by id."""
    if key not in data:
        report(DataError(f"{file}: missing key {key!r}", "missing key"))
        return {}
    if not isinstance(data[key], list):
        found = type(data[key]).__name__
        report(DataError(f"{file}: {key!r} must be a list, got {found}", "wrong type"))
        return {}
    records: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(data[key]):
        number = record.get("id") if isinstance(record, dict) else None
        if not _is_id(number):
            where = f"{file}: {key}[{position}]"
            report(DataError(f"{where}: not an object with an integer id", "no id"))
        elif number in records:
            report(DataError(f"{file}: duplicate {_KINDS[key]} {number}", "duplicate id"))
        else:
            records[number] = record
    return records


def _ids(data: dict[str, Any], key: str) -> set[int]:
    """The ids of all entries, faulty ones too."""
    entries = data.get(key)
    found = [e.get("id") for e in entries if isinstance(e, dict)] if type(entries) is list else []
    return {number for number in found if _is_id(number)}


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _value(
    record: dict[str, Any],
    key: str,
    where: str,
    report: Report,
    valid: Callable[[Any], bool],
    wanted: str,
) -> Any:
    """The checked value of a key; None where it is at fault."""
    if key not in record:
        report(DataError(f"{where}: missing key {key!r}", "missing key"))
        return None
    if not valid(record[key]):
        found = reprlib.repr(record[key])  # short, however long or deep the value is
        report(DataError(f"{where}: {key} must be {wanted}, got {found}", f"wrong {key}"))
        return None
    return record[key]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_name(value: Any) -> bool:
    """Class names are printed, and written as UTF-8."""
    return _is_text(value) and not any(unicodedata.category(c) in ("Cc", "Cs") for c in value)


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def read_categories(data: dict[str, Any], file: str, report: Report = stop) -> dict[int, str]:
    """The class names by category id, each checked and distinct."""
    names: dict[int, str] = {}
    wanted = "text without control characters"
    for number, record in _records(data, "categories", file, report).items():
        where = f"{file}: category {number}"
        name = _value(record, "name", where, report, _is_name, wanted)
        if name is None:
            continue
        if name in names.values():
            text = f"{where}: duplicate name {reprlib.repr(name)}"
            report(DataError(text, "duplicate category name"))
        names[number] = name
    if data.get("categories") == []:
        report(DataError(f"{file}: no categories", "empty list"))
    return names


def read_images(
    data: dict[str, Any], file: str, rule: PathRule, report: Report = stop
) -> list[ImageRecord]:
    """The images in the order of the file; each is looked for, none is opened."""
    images = []
    for number, record in _records(data, "images", file, report).items():
        where = f"{file}: image id {number}"
        name = _value(record, "file_name", where, report, _is_text, "text")
        if name is not None:
            where += f" ({printable(name)})"
            fault = rule.fault(name)
            if fault is not None:
                report(DataError(f"{where}: {fault[1]}", fault[0]))
        height, width = (
            _value(record, key, where, report, _is_side, "a positive integer")
            for key in ("height", "width")
        )
        if name is not None and height is not None and width is not None:
            images.append(ImageRecord(number, name, height, width))
    if data.get("images") == []:
        report(DataError(f"{file}: no images", "empty list"))
    return images


def read_objects(
    data: dict[str, Any],
    file: str,
    images: list[ImageRecord],
    category_ids: tuple[int, ...],
    report: Report = stop,
) -> tuple[Objects, Dropped]:
    """The boxes to keep, and what is dropped."""
    index_of = {image.id: index for index, image in enumerate(images)}
    label_of = {category: label for label, category in enumerate(category_ids)}
    known = {"image_id": _ids(data, "images"), "category_id": _ids(data, "categories")}
    rows = []
    dropped: Dropped = {}
    for number, record in _records(data, "annotations", file, report).items():
        where = f"{file}: annotation {number}"
        for key, ids in known.items():
            if key not in record:
                report(DataError(f"{where}: missing key {key!r}", "missing key"))
            elif type(record[key]) is not int or record[key] not in ids:
                found = reprlib.repr(record[key])
                report(DataError(f"{where}: unknown {key} {found}", f"unknown {key}"))
        if "iscrowd" in record:
            _value(record, "iscrowd", where, report, lambda v: v in (0, 1), "0 or 1")
        if record.get("area") is not None:
            _value(record, "area", where, report, is_area, "a finite number of 0 or more")
        bbox = _value(record, "bbox", where, report, _is_bbox, "four finite numbers")
        if bbox is not None and (bbox[2] < 0 or bbox[3] < 0):
            wanted = "bbox must have a width and height of 0 or more"
            report(DataError(f"{where}: {wanted}, got {reprlib.repr(bbox)}", "wrong bbox"))
            bbox = None
        index, label = _known(index_of, record, "image_id"), _known(label_of, record, "category_id")
        if bbox is None or index is None or label is None:
            continue
        box, reason = _box(bbox, images[index])
        if reason:
            dropped.setdefault(reason, []).append(number)
            continue
        area, crowd = record.get("area"), record.get("iscrowd", 0)
        if not is_area(area):
            area = (box[2] - box[0]) * (box[3] - box[1])
        rows.append((number, index, label, box, area, crowd in (1,)))
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
    return objects, dropped


def _known(table: dict[int, int], record: dict[str, Any], key: str) -> int | None:
    return table.get(record[key]) if _is_id(record.get(key)) else None


def _box(bbox: list[float], image: ImageRecord) -> tuple[tuple[float, ...], str]:
    """The bbox as x1, y1, x2, y2 inside the image, and why it must be dropped, if it must."""
    x, y, width, height = bbox
    x1, x2 = (float(min(max(v, 0), image.width)) for v in (x, x + width))
    y1, y2 = (float(min(max(v, 0), image.height)) for v in (y, y + height))
    if width > 0 and height > 0 and not (x1 < x2 and y1 < y2):
        return (), "outside the image"
    thin = min(x2 - x1, y2 - y1) < THINNEST
    if thin or not (np.float32(x1) < np.float32(x2) and np.float32(y1) < np.float32(y2)):
        return (), "zero-area"
    return (x1, y1, x2, y2), ""


def _is_bbox(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def is_area(value: Any) -> bool:
    """Whether this can be the area of an annotation."""
    return _is_number(value) and value >= 0


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def log_dropped(file: str, objects: Objects, dropped: Dropped) -> None:
    """One line, and none where there is nothing to say."""
    crowd, gone = int(objects.crowd.sum()), sum(map(len, dropped.values()))
    if not gone and not crowd:
        return
    kinds = ", ".join(f"{len(ids)} {kind}" for kind, ids in sorted(dropped.items(), reverse=True))
    text = f"dropped {gone} of {gone + len(objects.id)} boxes" + (f" ({kinds})" if kinds else "")
    text += f", {crowd} crowd" if crowd else ""
    _log.log(logging.WARNING if dropped else logging.INFO, "%s: %s", file, text)
