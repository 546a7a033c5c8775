"""Finds all errors in a COCO folder at once, and reads its boxes for the statistics."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from focal.numpy import box_area, box_iou
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.data.coco import find_splits, open_split, read_record
from focal.retinanet.data.coco_json import (
    ImageRecord,
    Objects,
    is_area,
    read_categories,
    read_images,
    read_objects,
)
from focal.retinanet.data.coverage import best_iou, scales
from focal.retinanet.data.images import DataError, printable, resize

__all__ = ["Boxes", "Finding", "Split", "all_classes", "check_data", "read_boxes"]

SIMILAR = 0.9
"""Two boxes of this IoU are near-duplicates, and so are two images of this correlation."""
MAX_COMPARED = 20_000
"""With more images than this, they are not compared for near-duplicates."""
MIN_COUNT = 20
"""Statistics of fewer boxes or images say nothing about what is unusual."""
UNUSUAL = 6.0
"""A box size is unusual if its logarithm is this many deviations from the class's median."""


class Finding(NamedTuple):
    """One thing that is wrong."""

    level: str  # "error" if it would stop training or evaluation, else "warning"
    kind: str
    split: str  # where it is; between splits, the second one
    sentence: str  # what is wrong, with file and record


class Split(NamedTuple):
    """What could be read of a split."""

    name: str  # such as "train"
    file: str  # the name of the annotation file
    folder: Path  # the image folder
    names: dict[int, str]  # class names by category id
    images: list[ImageRecord]  # those with valid records
    usable: np.ndarray  # (n,) bool: whether the image file may be opened
    objects: Objects  # the boxes that training would use, and the crowds
    raw: dict[int, dict[str, Any]]  # the annotations by id
    total: int  # entries in the list of annotations

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label."""
        return tuple(self.names[c] for c in sorted(self.names))

    def image(self, index: int) -> str:
        """An image as messages name it."""
        record = self.images[index]
        return f"image id {record.id} ({printable(record.file_name)})"

    def box(self, row: int) -> str:
        """A box as messages name it."""
        return f"annotation {self.objects.id[row]} of {self.image(self.objects.image[row])}"

    def warning(self, kind: str, text: str) -> Finding:
        """A warning about this split."""
        return Finding("warning", kind, self.name, f"{self.file}: {text}")


class Boxes(NamedTuple):
    """The boxes of all splits, without crowds, as columns of N rows."""

    split: np.ndarray  # (N,) index into the splits
    label: np.ndarray  # (N,) index into `all_classes`
    size: np.ndarray  # (N, 2) width and height in pixels of the image
    scale: np.ndarray  # (N,) canvas pixels per pixel of the image
    area: np.ndarray  # (N,) that COCO's evaluation uses for small, medium and large
    iou: np.ndarray  # (N,) with the best anchor


def check_data(
    root: str | os.PathLike[str], progress: bool = False
) -> tuple[list[Finding], list[Split]]:
    """Look for everything that is wrong with a COCO folder; each image is decoded once.

    Args:
        root: A folder or file as `CocoDataset` reads it.
        progress: Show a progress bar while images are decoded.

    Returns:
        The findings, errors first, and the splits as far as they could be read.

    Raises:
        DataError: there is no such folder, or no annotation file in it.
    """
    root = Path(root)
    found = set(find_splits(root))
    if not found:
        open_split(root, "train")  # raises
    if "train" in found:
        found.add("val")  # held out where there is none
    found |= {"train"}
    names = sorted(found, key=lambda s: (*(s != n for n in ("train", "val", "test")), s))
    findings: list[Finding] = []
    splits: list[Split] = []
    for name in names:
        own: list[Finding] = []
        splits.extend(_read(root, name, own))
        said = {finding.sentence for finding in findings}  # of a file that is two splits
        findings.extend(finding for finding in own if finding.sentence not in said)
    for split in splits:
        findings.extend(_warnings(split))
    findings.extend(_between(splits))
    findings.extend(_files(splits, progress))
    findings.extend(_unlisted(splits))
    return sorted(findings, key=lambda f: f.level), splits


def all_classes(splits: Sequence[Split]) -> list[str]:
    """The class names of all splits, which should be those of the first."""
    return list(dict.fromkeys(name for split in splits for name in split.classes))


def read_boxes(splits: Sequence[Split], config: RetinaNetConfig) -> Boxes:
    """The boxes of the splits, with their scale on a detector's canvas and their best anchor."""
    columns = [(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 2)), *[np.zeros(0)] * 3)]
    classes = all_classes(splits)
    for number, split in enumerate(splits):
        own = ~split.objects.crowd
        _, image, label, box, area, _ = (column[own] for column in split.objects)
        sizes = np.array([(i.height, i.width) for i in split.images], float).reshape(-1, 2)
        scale = scales(sizes[image], config.image_size)
        index = np.array([classes.index(name) for name in split.classes], int)
        size, iou = box[:, 2:] - box[:, :2], best_iou(box * scale[:, None], config)
        columns.append((np.full(len(box), number), index[label], size, scale, area, iou))
    return Boxes(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _read(root: Path, name: str, findings: list[Finding]) -> Iterable[Split]:
    """The split, if it can be read at all; its errors go to the findings."""

    def report(sentence: str, kind: str) -> None:
        findings.append(Finding("error", kind, name, sentence))

    try:
        opened = open_split(root, name)
    except DataError as error:
        report(str(error), error.kind)
        return
    file, data, rule = printable(opened.file), opened.data, opened.rule
    names = read_categories(data, file, report)
    images = read_images(data, file, rule, report)
    images = [image for image in images if image.id not in opened.left_out]
    usable = np.array([rule.fault(image.file_name) is None for image in images], bool)
    objects, dropped = read_objects(data, file, images, tuple(sorted(names)), report)
    listed = data.get("annotations")
    entries = listed if isinstance(listed, list) else []
    raw: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            raw.setdefault(entry["id"], entry)
    total = len(entries)
    if opened.left_out:  # the file has another split, too
        total = len(objects.id) + sum(map(len, dropped.values()))
    split = Split(name, file, opened.folder, names, images, usable, objects, raw, total)
    for kind, ids in dropped.items():
        for number in ids:
            text = f"annotation {number} of image id {raw[number]['image_id']}: "
            text += reprlib.repr(raw[number]["bbox"])
            findings.append(split.warning(f"box dropped: {kind}", text))
    yield split


def _warnings(split: Split) -> Iterable[Finding]:
    """What is suspicious within one split."""
    objects = split.objects
    counts = np.bincount(objects.image, minlength=len(split.images))
    for index in np.flatnonzero(counts == 0).tolist():
        yield split.warning("image without boxes", split.image(index))
    for label in set(range(len(split.names))) - set(objects.label[~objects.crowd].tolist()):
        yield split.warning("class without boxes", repr(printable(split.classes[label])))
    for row in np.flatnonzero(objects.crowd).tolist():
        yield split.warning("crowd box, used only to ignore detections", split.box(row))
    for name, number in Counter(image.file_name for image in split.images).items():
        if number > 1:
            text = f"{printable(name)}, {number} times"
            yield split.warning("file listed more than once", text)
    alike = defaultdict(list)
    for name in split.names.values():
        alike["".join(name.split()).casefold()].append(repr(printable(name)))
    for names in alike.values():
        if len(names) > 1:
            kind = "class names that differ only in case or spaces"
            yield split.warning(kind, ", ".join(names))
    for row, number in enumerate(objects.id.tolist()):
        x, y, width, height = map(float, split.raw[number]["bbox"])
        outside = np.abs(objects.box[row] - [x, y, x + width, y + height]).max()
        if outside > 1:
            text = f"{split.box(row)}: by {outside:.4g} pixels"
            yield split.warning("box that extends beyond its image, clipped", text)
        # COCO's area is that of the mask, which is not larger than the box.
        own, area = width * height, split.raw[number].get("area", 0)
        if is_area(area) and area > 1.01 * own + 1:
            text = f"{split.box(row)}: area {area:g}, box {width:g} x {height:g} = {own:g}"
            yield split.warning("area larger than the box", text)
    bounds = np.searchsorted(objects.image, np.arange(len(split.images) + 1))
    for low, high in itertools.pairwise(bounds.tolist()):
        ious = box_iou(objects.box[low:high], objects.box[low:high])
        for i, j in np.argwhere(np.triu(ious >= SIMILAR, 1)).tolist():
            iou, i, j = ious[i, j], low + i, low + j
            if objects.label[i] != objects.label[j]:
                kind = f"one object with two classes (IoU {SIMILAR:g} or more)"
            elif iou == 1:
                kind = "duplicate box"
            else:
                kind = f"two boxes for one object (IoU {SIMILAR:g} or more)"
            yield split.warning(kind, f"{split.box(i)}, and {objects.id[j]}: IoU {iou:.3f}")


def _between(splits: Sequence[Split]) -> Iterable[Finding]:
    """What only all splits together show."""
    named = [split for split in splits if split.names]
    for split in named[1:]:
        if split.classes != named[0].classes:
            text = f"{split.file}: its classes are not those of {named[0].file}"
            extra = [
                f"only in {a.file}: {printable(', '.join(sorted(set(a.classes) - set(b.classes))))}"
                for a, b in ((split, named[0]), (named[0], split))
                if set(a.classes) - set(b.classes)
            ]
            text += f" ({'; '.join(extra) or 'their order by id differs'})"
            yield Finding("error", "classes that differ between splits", split.name, text)
    if len({split.classes for split in named}) != 1:
        return  # no classes, or labels that mean something else in each split
    owner = np.concatenate([np.full(len(s.objects.id), n) for n, s in enumerate(named)])
    row = np.concatenate([np.arange(len(s.objects.id)) for s in named])
    columns = zip(*(s.objects for s in named), strict=True)
    _, image, label, box, _, crowd = map(np.concatenate, columns)
    side = np.log(box_area(box)) / 2
    pairs = list(zip(owner.tolist(), image.tolist(), strict=True))
    every = set(pairs)
    for number, name in enumerate(named[0].classes):
        own = np.flatnonzero((label == number) & ~crowd)
        if len(own) >= MIN_COUNT:
            middle = np.median(side[own])
            deviation = max(1.4826 * np.median(np.abs(side[own] - middle)), 0.05)
            for i in own[np.abs(side[own] - middle) > UNUSUAL * deviation].tolist():
                split = named[owner[i]]
                text = f"{split.box(row[i])}: {printable(name)!r} of {math.exp(side[i]):.0f} "
                text += f"pixels, the median is {math.exp(middle):.0f}"
                yield split.warning("box of a size unusual for its class", text)
        # Where nearly all images have a class, those without it may lack annotations.
        having = {pairs[i] for i in np.flatnonzero(label == number)}
        if len(every) >= MIN_COUNT and 0.9 * len(every) <= len(having):
            share = f"{len(having) / len(every):.1%}"
            kind = f"image without {printable(name)!r}, which {share} of the images have"
            for n, i in sorted(every - having):
                yield named[n].warning(kind, named[n].image(i))


def _files(splits: Sequence[Split], progress: bool) -> Iterable[Finding]:
    """What is wrong with the image files, and which of them are duplicates."""
    work = [(s, i) for s in splits for i in np.flatnonzero(s.usable).tolist()]
    seen: dict[bytes, tuple[Split, int]] = {}
    kept: list[tuple[Split, int, np.ndarray]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda item: _open(*item), work)
        hidden = None if progress else True  # None: shown on a terminal alone
        bar = tqdm(results, total=len(work), unit="image", leave=False, disable=hidden)
        for (split, index), (digest, thumbnail, error) in zip(work, bar, strict=True):
            if error is not None:
                yield Finding("error", error.kind, split.name, str(error))
            if digest is None:
                continue
            first, at = seen.setdefault(digest, (split, index))
            text = f"{split.image(index)} and {first.file}: {first.image(at)}"
            if first.name != split.name:
                yield split.warning("image in two splits", text)
            elif at != index and first.images[at].file_name != split.images[index].file_name:
                yield split.warning("duplicate image in a split", text)
            elif thumbnail is not None and at == index and len(work) <= MAX_COMPARED:
                kept.append((split, index, thumbnail))
    thumbnails = np.array([thumbnail for _, _, thumbnail in kept])
    for row, (split, index, thumbnail) in enumerate(kept):
        for other in np.flatnonzero(thumbnails[:row] @ thumbnail > SIMILAR):
            first, at, match = kept[other]
            if first.name != split.name:
                text = f"{split.image(index)} and {first.file}: {first.image(at)}: "
                text += f"correlation {match @ thumbnail:.3f}"
                yield split.warning("near-duplicate of an image in another split", text)


def _open(split: Split, index: int) -> tuple[bytes | None, np.ndarray | None, DataError | None]:
    """The hash of an image file, a gray thumbnail of mean 0 and length 1, and what is wrong."""
    record = split.images[index]
    try:
        digest = hashlib.sha256((split.folder / record.file_name).read_bytes()).digest()
    except OSError:
        digest = None  # reading it as an image will say why
    try:
        image = read_record(record, split.file, split.folder)
    except DataError as error:
        return digest, None, error
    gray = resize(image, (32, 32)).mean(axis=2).ravel().astype(np.float32)
    gray -= gray.mean()
    length = np.linalg.norm(gray)
    return digest, gray / length if length > 32 else None, None


def _unlisted(splits: Sequence[Split]) -> Iterable[Finding]:
    """Files in the image folders that no annotation file lists."""
    known = {os.path.normpath(s.folder / image.file_name) for s in splits for image in s.images}
    for folder in dict.fromkeys(split.folder for split in splits):
        for base, _, files in os.walk(folder):  # does not follow links
            for name in sorted(files):
                path = os.path.normpath(os.path.join(base, name))
                # Annotation files may lie beside the images.
                if path not in known and not name.startswith(".") and not name.endswith(".json"):
                    known.add(path)  # one folder may lie in another
                    text = printable(os.path.join(folder.name, os.path.relpath(path, folder)))
                    yield Finding("warning", "file not listed in any split", "", text)
