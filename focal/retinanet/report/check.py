"""Everything that is wrong with a COCO folder at once, and how well anchors fit its boxes."""

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

from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.data.coco import find_split, find_splits, read_record
from focal.retinanet.data.coco_json import (
    ImageRecord,
    Objects,
    is_area,
    read_categories,
    read_images,
    read_json,
    read_objects,
)
from focal.retinanet.data.images import DataError, printable, resize
from focal.retinanet.data.paths import PathRule
from focal.retinanet.report.coverage import best_iou, scales

__all__ = ["Boxes", "Finding", "Split", "all_classes", "check_data", "read_boxes"]

NEEDED = ("train", "val")
"""The splits that training asks for."""
NEARLY = 0.9
"""From this IoU on two boxes are almost one; from this correlation on two images are."""
MANY = 20_000
"""Beyond this many images they are not all compared with each other."""
ENOUGH = 20
"""Boxes, or images, from which on something can be called usual."""
UNUSUAL = 6.0
"""A box is of unusual size if its logarithm is this many deviations from its class's median."""


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        level: "error" if training or evaluation would stop on it, else "warning".
        kind: The sort of fault, the same for all of its sort.
        split: Where it is; for a fault between splits the second of them.
        sentence: What is wrong, with file and record.
    """

    level: str
    kind: str
    split: str
    sentence: str


class Split(NamedTuple):
    """What could be read of a split.

    Attributes:
        name: Such as "train".
        file: The name of the annotation file.
        folder: The image folder.
        names: Class names by category id.
        images: The images with sound records; `usable` says which of them may be opened.
        usable: (n,) bool.
        objects: The boxes that a training run would see, and the crowds.
        raw: The annotations by id.
        total: Entries in the file's list of annotations.
    """

    name: str
    file: str
    folder: Path
    names: dict[int, str]
    images: list[ImageRecord]
    usable: np.ndarray
    objects: Objects
    raw: dict[int, dict[str, Any]]
    total: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label."""
        return tuple(self.names[c] for c in sorted(self.names))

    def image(self, index: int) -> str:
        """An image as messages name it."""
        record = self.images[index]
        return f"image id {record.id} ({printable(record.file)})"

    def box(self, row: int) -> str:
        """A box as messages name it."""
        where = self.image(self.objects.image[row])
        return f"{self.file}: annotation {self.objects.id[row]} of {where}"


class Boxes(NamedTuple):
    """The boxes of all splits, without crowds, as columns of N rows.

    Attributes:
        split: (N,) index into the splits.
        label: (N,) index into `all_classes`.
        size: (N, 2) width and height in pixels of the image.
        scale: (N,) canvas pixels per pixel of the image.
        area: (N,) as COCO's evaluation takes it for small, medium and large.
        iou: (N,) with the best anchor.
    """

    split: np.ndarray
    label: np.ndarray
    size: np.ndarray
    scale: np.ndarray
    area: np.ndarray
    iou: np.ndarray


def check_data(
    root: str | os.PathLike[str], progress: bool = False
) -> tuple[list[Finding], list[Split]]:
    """Look for all that is wrong with a COCO folder; each image is decoded once.

    Args:
        root: A folder as `CocoDataset` reads it.
        progress: Show a bar while images are decoded.

    Returns:
        The findings, errors first, and the splits as far as they could be read.

    Raises:
        DataError: there is no such folder, or no annotation file in it.
    """
    root = Path(root)
    names = sorted(find_splits(root), key=lambda s: (*(s != n for n in (*NEEDED, "test")), s))
    if not names:
        find_split(root, NEEDED[0])  # says so
    findings: list[Finding] = []
    for name in NEEDED:
        if name not in names:
            found = printable(", ".join(names))
            text = f"{printable(str(root))}: no split {name!r}; found {found}"
            findings.append(Finding("error", "missing split", name, text))
    splits = [split for name in names for split in _read(root, name, findings)]
    for split in splits:
        findings.extend(_warnings(split))
    findings.extend(_between(splits))
    findings.extend(_files(splits, progress))
    findings.extend(_unlisted(root, splits))
    return sorted(findings, key=lambda f: f.level), splits


def all_classes(splits: Sequence[Split]) -> list[str]:
    """The class names of all splits, which should be those of the first."""
    return list(dict.fromkeys(name for split in splits for name in split.classes))


def read_boxes(splits: Sequence[Split], config: RetinaNetConfig) -> Boxes:
    """The boxes of the splits, on the canvas and with the anchors of a detector."""
    columns = []
    classes = all_classes(splits)
    for number, split in enumerate(splits):
        images, objects = split.images, split.objects
        own = ~objects.crowd
        image, box = objects.image[own], objects.box[own]
        sizes = np.array([(i.height, i.width) for i in images], np.float64).reshape(-1, 2)[image]
        scale = scales(sizes, config.canvas)
        iou = best_iou(box * scale[:, None], config)
        size = box[:, 2:] - box[:, :2]
        label = np.array([classes.index(name) for name in split.classes], int)[objects.label[own]]
        owner = np.full(len(box), number)
        columns.append((owner, label, size, scale, objects.area[own], iou))
    empty = [(np.zeros(0, int),) * 2 + (np.zeros((0, 2)),) + (np.zeros(0),) * 3]
    return Boxes(*(np.concatenate(column) for column in zip(*(columns or empty), strict=True)))


def _read(root: Path, name: str, findings: list[Finding]) -> Iterable[Split]:
    """The split, if there is anything to be read; its faults go to the findings."""

    def report(fault: DataError) -> None:
        findings.append(Finding("error", fault.kind, name, str(fault)))

    try:
        path, folder = find_split(root, name)
        data = read_json(path)
    except DataError as fault:
        report(fault)
        return
    file = printable(path.name)
    names = read_categories(data, file, report)
    rule = PathRule(root, folder)
    images = read_images(data, file, rule, report)
    usable = np.array([rule.fault(image.file) is None for image in images], bool)
    objects, dropped = read_objects(data, file, images, tuple(sorted(names)), report)
    listed = data.get("annotations")
    entries = listed if isinstance(listed, list) else []
    raw: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            raw.setdefault(entry["id"], entry)
    for kind, ids in dropped.items():
        for number in ids:
            image = raw[number]["image_id"]
            text = f"{file}: annotation {number} of image id {image}: "
            text += reprlib.repr(raw[number]["bbox"])
            findings.append(Finding("warning", f"box dropped: {kind}", name, text))
    yield Split(name, file, folder, names, images, usable, objects, raw, len(entries))


def _warnings(split: Split) -> Iterable[Finding]:
    """What is odd within one split, though it can be trained on."""

    def warn(kind: str, sentence: str) -> Finding:
        return Finding("warning", kind, split.name, sentence)

    objects, file = split.objects, split.file
    counts = np.bincount(objects.image, minlength=len(split.images))
    for index in np.flatnonzero(counts == 0):
        yield warn("image without boxes", f"{file}: {split.image(index)}")
    for label in set(range(len(split.names))) - set(objects.label[~objects.crowd].tolist()):
        yield warn("class without boxes", f"{file}: {printable(split.classes[label])!r}")
    for row in np.flatnonzero(objects.crowd):
        yield warn("crowd box, excuses detections only", split.box(row))
    for name, number in Counter(image.file for image in split.images).items():
        if number > 1:
            yield warn("file listed more than once", f"{file}: {printable(name)}, {number} times")
    alike = defaultdict(list)
    for name in split.names.values():
        alike["".join(name.split()).casefold()].append(name)
    for names in alike.values():
        if len(names) > 1:
            text = f"{file}: {', '.join(repr(printable(n)) for n in names)}"
            yield warn("class names that differ by case or spaces only", text)
    for row, number in enumerate(objects.id.tolist()):
        x, y, width, height = map(float, split.raw[number]["bbox"])
        outside = np.abs(objects.box[row] - [x, y, x + width, y + height]).max()
        if outside > 1:
            text = f"{split.box(row)}: by {outside:.4g} pixels"
            yield warn("box that reaches out of its image, clipped", text)
        # COCO's area is that of the mask, which is no larger than the box.
        area, own = split.raw[number].get("area"), width * height
        masked = bool(split.raw[number].get("segmentation"))
        area = float(area) if is_area(area) else own
        if area > 1.01 * own + 1 or (area < 0.99 * own - 1 and not masked):
            text = f"{split.box(row)}: area {area:g}, box {width:g} x {height:g} = {own:g}"
            yield warn("area that is not that of the box", text)
    bounds = np.searchsorted(objects.image, np.arange(len(split.images) + 1))
    for low, high in itertools.pairwise(bounds.tolist()):
        for i, j, iou in _pairs(objects.box[low:high]):
            i, j = low + i, low + j
            text = f"{split.box(i)}, and {objects.id[j]}: IoU {iou:.3f}"
            if objects.label[i] != objects.label[j]:
                yield warn(f"one place with two classes (IoU {NEARLY:g} or more)", text)
            elif iou == 1:
                yield warn("box that is there twice", text)
            else:
                yield warn(f"two boxes for one object (IoU {NEARLY:g} or more)", text)


def _pairs(boxes: np.ndarray) -> Iterable[tuple[int, int, float]]:
    """Pairs of boxes, (n, 4), that are nearly one, with their IoU."""
    low = np.maximum(boxes[:, None, :2], boxes[:, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    iou = shared / (area[:, None] + area - shared)
    for i, j in np.argwhere(np.triu(iou >= NEARLY, 1)):
        yield int(i), int(j), float(iou[i, j])


def _between(splits: Sequence[Split]) -> Iterable[Finding]:
    """What can be seen only where all splits are looked at together."""
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
        return  # there are none, or labels of one split are others in the next
    owner = np.concatenate([np.full(len(s.objects.id), n) for n, s in enumerate(named)])
    row = np.concatenate([np.arange(len(s.objects.id)) for s in named])
    columns = zip(*(s.objects for s in named), strict=True)
    _, image, label, box, _, crowd = map(np.concatenate, columns)
    side = np.log(np.prod(box[:, 2:] - box[:, :2], axis=1)) / 2
    for number, name in enumerate(named[0].classes):
        own = np.flatnonzero((label == number) & ~crowd)
        if len(own) < ENOUGH:
            continue
        middle = np.median(side[own])
        deviation = max(1.4826 * np.median(np.abs(side[own] - middle)), 0.05)
        for i in own[np.abs(side[own] - middle) > UNUSUAL * deviation]:
            split = named[owner[i]]
            text = f"{split.box(row[i])}: {printable(name)!r} of {math.exp(side[i]):.0f} pixels, "
            text += f"the median is {math.exp(middle):.0f}"
            yield Finding("warning", "box of a size unusual for its class", split.name, text)
    # Where nearly all images have a class, those without it may have been left unlabelled.
    place = np.stack([owner, image], axis=1)
    every = {(n, i) for n, i in place.tolist()}
    for number, name in enumerate(named[0].classes):
        having = {(n, i) for n, i in place[label == number].tolist()}
        if len(every) >= ENOUGH and 0.9 * len(every) <= len(having):
            for n, i in sorted(every - having):
                text = f"{named[n].file}: {named[n].image(i)}"
                share = f"{len(having) / len(every):.1%}"
                kind = f"image without {printable(name)!r}, which {share} of the images have"
                yield Finding("warning", kind, named[n].name, text)


def _files(splits: Sequence[Split], progress: bool) -> Iterable[Finding]:
    """What is wrong with the image files, and which of them are the same."""
    work = [(s, i) for s in splits for i in np.flatnonzero(s.usable)]
    seen: dict[bytes, tuple[Split, int]] = {}
    kept = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda item: _open(*item), work)
        for (split, index), (digest, thumbnail, fault) in zip(
            work,
            tqdm(results, total=len(work), unit="image", leave=False, disable=not progress),
            strict=True,
        ):
            if fault is not None:
                yield Finding("error", fault.kind, split.name, str(fault))
            if digest is None:
                continue
            first, at = seen.setdefault(digest, (split, index))
            text = f"{split.file}: {split.image(index)} and {first.file}: {first.image(at)}"
            if first.name != split.name:
                yield Finding("warning", "image that is in two splits", split.name, text)
            elif at != index and first.images[at].file != split.images[index].file:
                yield Finding("warning", "image that is in a split twice", split.name, text)
            elif thumbnail is not None and at == index and len(work) <= MANY:
                kept.append((split, index, thumbnail))
    if not kept:
        return
    thumbnails = np.stack([thumbnail for _, _, thumbnail in kept])
    owner = np.array([splits.index(split) for split, _, _ in kept])
    for row, (split, index, thumbnail) in enumerate(kept):
        for other in np.flatnonzero(thumbnails[:row] @ thumbnail > NEARLY):
            if owner[other] != owner[row]:
                first, at, match = kept[other]
                text = f"{split.file}: {split.image(index)} and {first.file}: {first.image(at)}: "
                text += f"correlation {match @ thumbnail:.3f}"
                kind = "image that is nearly one of another split"
                yield Finding("warning", kind, split.name, text)


def _open(split: Split, index: int) -> tuple[bytes | None, np.ndarray | None, DataError | None]:
    """The hash of an image file, a grey thumbnail of mean 0 and length 1, and what is wrong."""
    record = split.images[index]
    try:
        digest = hashlib.sha256((split.folder / record.file).read_bytes()).digest()
    except OSError:
        digest = None  # the sentence comes from reading it as an image
    try:
        image = read_record(record, split.file, split.folder)
    except DataError as fault:
        return digest, None, fault
    grey = resize(image, (32, 32)).mean(axis=2).ravel().astype(np.float32)
    grey -= grey.mean()
    length = np.linalg.norm(grey)
    return digest, grey / length if length > 32 else None, None


def _unlisted(root: Path, splits: Sequence[Split]) -> Iterable[Finding]:
    """Files beside the images that no annotation file names."""
    listed: dict[Path, set[str]] = defaultdict(set)
    for split in splits:
        listed[split.folder].update(os.path.normpath(image.file) for image in split.images)
    for folder, names in listed.items():
        for base, _, files in os.walk(folder):  # does not go where links lead
            for name in sorted(files):
                file = os.path.relpath(os.path.join(base, name), folder)
                if file not in names and not name.startswith("."):
                    text = f"{printable(str(folder.relative_to(root) / file))}"
                    yield Finding("warning", "file that no split lists", "", text)
