"""Reads a COCO JSON file into plain records, with one sentence for each error in it."""

from __future__ import annotations

import json
import logging
import math
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
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
    "choose_held_out",
    "entries",
    "group_names",
    "integer_ids",
    "is_area",
    "log_dropped",
    "read_categories",
    "read_images",
    "read_json",
    "read_objects",
    "stop",
]

MIN_SIDE = 1e-3
"""Boxes with a side below this many pixels count as empty: 1e-30 is above 0, too."""
_log = logging.getLogger("focal")

Report = Callable[[str, str], None]
"""What to do with an error, given as sentence and kind: `stop` raises it; `focal check` collects
it, and the reader goes on without the faulty record."""

Dropped = dict[str, list[int]]
"""Ids of the annotations whose box cannot be trained on, by the reason."""


def stop(sentence: str, kind: str) -> NoReturn:
    """Raise the first error."""
    raise DataError(sentence, kind)


class ImageRecord(NamedTuple):
    """One entry of `images`; the file name is relative to the image folder."""

    id: int
    file_name: str
    height: int
    width: int


class Objects(NamedTuple):
    """The boxes that are kept, as columns of A rows, grouped by image."""

    id: np.ndarray  # (A,) the annotation's id
    image: np.ndarray  # (A,) index into the list of images
    label: np.ndarray  # (A,) class index
    box: np.ndarray  # (A, 4) float64, (x1, y1, x2, y2), clipped to the image
    area: np.ndarray  # (A,) the file's, which COCO takes from the mask; else that of the box
    crowd: np.ndarray  # (A,) bool


def _is_integer(value: Any, low: int = -(2**63), high: int = 2**63) -> bool:
    return type(value) is int and low < value < high


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_name(value: Any) -> bool:
    """Class names are printed, and written as UTF-8."""
    return _is_text(value) and not any(unicodedata.category(c) in ("Cc", "Cs") for c in value)


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def is_area(value: Any) -> bool:
    """Whether this can be the area of an annotation."""
    return _is_number(value) and value >= 0


class _Field(NamedTuple):
    key: str
    is_valid: Callable[[Any], bool]
    wanted: str
    required: bool = True


_FIELDS = {
    "categories": (_Field("name", _is_name, "text without control characters"),),
    "images": (
        _Field("file_name", _is_text, "text"),
        _Field("height", lambda v: _is_integer(v, 0, 2**31), "a positive integer"),
        _Field("width", lambda v: _is_integer(v, 0, 2**31), "a positive integer"),
    ),
    "annotations": (
        _Field("iscrowd", lambda v: v in (0, 1), "0 or 1", required=False),
        _Field(
            "area",
            lambda v: v is None or is_area(v),
            "a finite number of 0 or more",
            required=False,
        ),
        _Field(
            "bbox",
            lambda v: type(v) is list and len(v) == 4 and all(map(_is_number, v)),
            "four finite numbers",
        ),
    ),
}
_KINDS = {"categories": "category", "images": "image id", "annotations": "annotation"}


def read_json(path: Path, file: str) -> dict[str, Any]:
    """The object in a JSON file, which messages call `file`."""
    try:
        if not is_file(path):
            raise OSError(0, "not a file")
        data = json.loads(path.read_bytes())
        if isinstance(data, dict):
            return data
        reason = f"expected an object at the top, got {type(data).__name__}"
    except OSError as error:
        reason = str(error.strerror)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON (line {error.lineno} column {error.colno})"
    except UnicodeDecodeError:
        reason = "not valid JSON (not UTF-8 text)"
    except ValueError as error:  # an integer of thousands of digits
        reason = f"not valid JSON ({error})"
    except RecursionError:
        reason = "not valid JSON (nested too deeply)"
    raise DataError(f"{file}: {reason}", "annotation file")


def _records(
    data: dict[str, Any], key: str, file: str, report: Report
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry of the list `data[key]` as messages name it, and without its invalid values."""
    if key not in data:
        report(f"{file}: missing key {key!r}", "missing key")
        return
    if not isinstance(data[key], list):
        found = type(data[key]).__name__
        report(f"{file}: {key!r} must be a list, got {found}", "wrong type")
        return
    seen = set()
    for position, record in enumerate(data[key]):
        number = record.get("id") if isinstance(record, dict) else None
        if not _is_integer(number):
            where = f"{file}: {key}[{position}]"
            report(f"{where}: not an object with an integer id", "no id")
            continue
        if number in seen:
            report(f"{file}: duplicate {_KINDS[key]} {number}", "duplicate id")
            continue
        seen.add(number)
        where, values = f"{file}: {_KINDS[key]} {number}", dict(record)
        if key == "images" and _is_text(record.get("file_name")):
            where += f" ({printable(record['file_name'])})"
        for name, is_valid, wanted, required in _FIELDS[key]:
            if name in record and not is_valid(record[name]):
                found = reprlib.repr(values.pop(name))  # short, however long or deep the value
                text = f"{where}: {name} must be {wanted}, got {found}"
                report(text, f"wrong {name}")
            elif name not in record and required:
                report(f"{where}: missing key {name!r}", "missing key")
        yield where, values


def read_categories(data: dict[str, Any], file: str, report: Report = stop) -> dict[int, str]:
    """The class names by category id, each valid and distinct."""
    names: dict[int, str] = {}
    for where, record in _records(data, "categories", file, report):
        if "name" in record:
            if record["name"] in names.values():
                text = f"{where}: duplicate name {reprlib.repr(record['name'])}"
                report(text, "duplicate category name")
            names[record["id"]] = record["name"]
    if data.get("categories") == []:
        report(f"{file}: no categories", "empty list")
    return names


def read_images(
    data: dict[str, Any], file: str, rule: PathRule, report: Report = stop
) -> list[ImageRecord]:
    """The images in the order of the file; each file must exist, none is opened."""
    images = []
    keys = ImageRecord._fields
    for where, record in _records(data, "images", file, report):
        if "file_name" in record and (fault := rule.fault(record["file_name"])):
            report(f"{where}: {fault[1]}", fault[0])
        if all(key in record for key in keys):
            images.append(ImageRecord(*(record[key] for key in keys)))
    if data.get("images") == []:
        report(f"{file}: no images", "empty list")
    return images


def read_objects(
    data: dict[str, Any],
    file: str,
    images: list[ImageRecord],
    category_ids: tuple[int, ...],
    report: Report = stop,
) -> tuple[Objects, Dropped]:
    """The boxes to keep, and what is dropped."""
    index_of: dict[Any, int] = {image.id: index for index, image in enumerate(images)}
    label_of: dict[Any, int] = {category: label for label, category in enumerate(category_ids)}
    pairs = ("image_id", "images"), ("category_id", "categories")
    known = {key: integer_ids(data, listed) for key, listed in pairs}
    rows = []
    dropped: Dropped = {}
    for where, record in _records(data, "annotations", file, report):
        for key, ids in known.items():
            if key not in record:
                report(f"{where}: missing key {key!r}", "missing key")
            elif type(record[key]) is not int or record[key] not in ids:
                found = reprlib.repr(record[key])
                report(f"{where}: unknown {key} {found}", f"unknown {key}")
                record[key] = None
        bbox = record.get("bbox")
        if bbox is not None and min(bbox[2:]) < 0:
            wanted = "bbox must have a width and height of 0 or more"
            report(f"{where}: {wanted}, got {reprlib.repr(bbox)}", "wrong bbox")
            bbox = None
        # An id may be that of a faulty record, which was left out.
        index, label = index_of.get(record.get("image_id")), label_of.get(record.get("category_id"))
        if bbox is None or index is None or label is None:
            continue
        box, reason = _box(bbox, images[index])
        if reason:
            dropped.setdefault(reason, []).append(record["id"])
            continue
        area = record.get("area")
        if area is None:
            area = (box[2] - box[0]) * (box[3] - box[1])
        rows.append((record["id"], index, label, box, area, bool(record.get("iscrowd"))))
    rows.sort(key=lambda row: row[1])
    types = np.int64, np.int64, np.int64, np.float64, np.float64, bool
    columns = zip(*rows, strict=True) if rows else [()] * 6
    objects = Objects(*(np.array(c, t) for c, t in zip(columns, types, strict=True)))
    return objects._replace(box=objects.box.reshape(-1, 4)), dropped


def entries(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects in the list `data[key]`, if it is one."""
    listed = data[key] if isinstance(data.get(key), list) else []
    return [entry for entry in listed if isinstance(entry, dict)]


def integer_ids(data: dict[str, Any], key: str) -> set[Any]:
    """The ids of all entries, including faulty ones."""
    return {entry["id"] for entry in entries(data, key) if _is_integer(entry.get("id"))}


def choose_held_out(data: dict[str, Any], file: str, share: float, seed: int) -> set[int]:
    """The ids of a share of the images, at least one and never all."""
    ids = sorted(integer_ids(data, "images"))
    if len(ids) == 1 == len(data["images"]):
        text = f"{file}: 1 image, of which none can be held out as val; expected 2, or hold_out=0"
        raise DataError(text, "no data")
    count = min(max(1, round(share * len(ids))), max(0, len(ids) - 1))
    return set(np.random.default_rng(seed).permutation(ids)[:count].tolist())


def group_names(data: dict[str, Any]) -> dict[int, str]:
    """The categories that are the supercategory of another one: id and name."""
    valid = [c for c in entries(data, "categories") if _is_integer(c.get("id"))]
    members = Counter(c["supercategory"] for c in valid if _is_text(c.get("supercategory")))
    return {
        c["id"]: c["name"]
        for c in valid
        if _is_text(c.get("name")) and members[c["name"]] > (c.get("supercategory") == c["name"])
    }


def _box(bbox: list[float], image: ImageRecord) -> tuple[tuple[float, ...], str]:
    """The bbox as x1, y1, x2, y2 inside the image, and why it must be dropped, if it must."""
    x, y, width, height = bbox
    x1, x2 = (float(min(max(v, 0), image.width)) for v in (x, x + width))
    y1, y2 = (float(min(max(v, 0), image.height)) for v in (y, y + height))
    if width > 0 and height > 0 and not (x1 < x2 and y1 < y2):
        return (), "outside the image"
    thin = min(x2 - x1, y2 - y1) < MIN_SIDE
    if thin or not (np.float32(x1) < np.float32(x2) and np.float32(y1) < np.float32(y2)):
        return (), "zero-area"
    return (x1, y1, x2, y2), ""


def log_dropped(file: str, objects: Objects, dropped: Dropped) -> None:
    """Log one line if boxes were dropped or are crowds."""
    crowd, gone = int(objects.crowd.sum()), sum(map(len, dropped.values()))
    if not gone and not crowd:
        return
    kinds = ", ".join(f"{len(ids)} {kind}" for kind, ids in sorted(dropped.items(), reverse=True))
    text = f"dropped {gone} of {gone + len(objects.id)} boxes" + (f" ({kinds})" if kinds else "")
    text += f", {crowd} crowd" if crowd else ""
    _log.log(logging.WARNING if dropped else logging.INFO, "%s: %s", file, text)
