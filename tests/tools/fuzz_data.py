"""Thousands of damaged COCO folders: each must end in a clear error, or do no harm.

    python -m tests.tools.fuzz_data --count 6000 --out docs/results/fuzz.json

Every case is a small folder with one kind of damage, or several. It is read as in training, then by
`focal check`, and the two must agree on whether there is an error. The outcome is

    error   one printable line that names the file, from the library and from the command line
    skip    the data is read, and a line of the log counts what was dropped
    fine    the data is read and valid: boxes inside their images, labels that are classes; batches
            and an evaluation can be made
    other   anything else: another exception, a hang, a program started, a connection made, a file
            opened that does not belong to the dataset

Each kind of damage has its allowed outcomes; any other is unexplained.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import io
import json
import logging
import os
import platform
import random
import shlex
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

import focal
from focal.cli import main as command_line
from focal.files import write_atomically
from focal.retinanet import PRESETS
from focal.retinanet.data import CocoDataset, DataError, eval_batches, train_batches
from focal.retinanet.report.check import check_data, read_boxes
from focal.retinanet.report.check_report import check_record, check_text
from focal.retinanet.training.evaluate import coco_metrics

WIDTH, HEIGHT = 48, 32
FILE = "instances_train.json"
NAMES = ("a.jpg", "b.jpg", "sub/c.png")
SECONDS = 30  # a case that takes longer hangs
ERROR, SKIP, FINE = "error", "skip", "fine"
NAN, INF = float("nan"), float("inf")
DETECTOR = PRESETS["tiny"].detector.replace(image_size=(32, 48))
RUN = PRESETS["tiny"].train.replace(batch_size=2, workers=0, crop=None)
JUNK = [
    *(None, True, False, -1, 0, 7, 1.5, 2**40, 2**70, 10**400, NAN, INF, -1e308),
    *("", "text", "1", "x" * 5000, "\u202e\n\x1b[2J\x00", "\ud800", "細胞"),
    *([], {}, [None], {"id": 1}),
    functools.reduce(lambda inner, _: [inner], range(300), []),
    [1e308] * 4,
    ["1", "2", "3", "4"],
]


@functools.cache
def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """An image file."""
    rng = np.random.default_rng(number)
    small = rng.integers(256, size=(4, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize(size).save(data, kind)
    return data.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of any size in the header, with few pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + chunk(b"IEND", b"")


def annotations() -> dict[str, Any]:
    """The JSON of a valid folder."""
    boxes = [[2, 3, 20, 10], [10.5, 8, 12, 20.25], [0, 0, 48, 32], [30, 20, 18, 12], [5, 5, 8, 8]]
    return {
        "images": [
            {"id": 10 + k, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for k, name in enumerate(NAMES)
        ],
        "annotations": [
            {
                "id": k,
                "image_id": 10 + k % 3,
                "category_id": 1 + k % 2,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for k, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "plate"}],
    }


class Case:
    """A folder to be damaged; `outside` must not be read."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.rng = random.Random(seed)
        self.root, self.outside = folder / "set", folder / "outside"
        self.images, self.file = self.root / "images", self.root / FILE
        self.allowed = [self.root]
        self.data = annotations()
        self.text: bytes | None = None  # in place of `data`
        self.keep = False  # do not write the JSON
        (self.images / "sub").mkdir(parents=True)
        self.outside.mkdir()
        for number, name in enumerate(NAMES):
            kind = "PNG" if name.endswith("png") else "JPEG"
            (self.images / name).write_bytes(picture(number, kind))
        (self.outside / "secret.png").write_bytes(picture(9, "PNG"))
        (self.outside / "secret.json").write_text(json.dumps(self.data))
        (self.root / "instances_val.json").write_text(json.dumps(self.data))

    def write(self) -> None:
        """Write the JSON, damaged or not."""
        if not self.keep:
            text = json.dumps(self.data).encode() if self.text is None else self.text
            self.file.write_bytes(text)

    def pick(self, *values: Any) -> Any:
        """A copy of one of the values."""
        return copy.deepcopy(self.rng.choice(values) if len(values) > 1 else values[0])

    def image(self) -> Path:
        """One of the image files."""
        path = self.images / self.rng.choice(NAMES)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("a pipe or a device of other damage; reading it would not end")
        return path

    def without_image(self) -> Path:
        """The path of an image that is deleted."""
        path = self.image()
        path.unlink()
        return path

    def record(self, key: str) -> dict[str, Any]:
        """One of the entries of a list."""
        return self.rng.choice(self.data[key])


# ---------------------------------------------------------------- damage to any record

Damage = Callable[[Case], Any]


def image_of(*contents: bytes) -> Damage:
    """Other bytes in place of an image."""
    return lambda case: case.image().write_bytes(case.pick(*contents))


def value_of(key: str, fields: str, *values: Any) -> Damage:
    """Another value in one of the fields of a record."""

    def damage(case: Case) -> None:
        field, value = case.pick(*fields.split()), case.pick(*values)
        case.record(key)[field] = value

    return damage


def side_of_bbox(*values: float) -> Damage:
    """Another width or height of a bbox."""

    def damage(case: Case) -> None:
        value = case.pick(*values)
        case.record("annotations")["bbox"][case.pick(2, 3)] = value

    return damage


# ---------------------------------------------------------------- damage to images


def truncated_image(case: Case) -> None:
    path = case.image()
    data = path.read_bytes()
    path.write_bytes(data[: case.rng.randrange(1, len(data) - 40)])


def flipped_bytes(case: Case) -> None:
    path = case.image()
    data = bytearray(path.read_bytes())
    for _ in range(case.pick(1, 1, 2, 8, 64)):
        data[case.rng.randrange(len(data))] ^= 1 << case.rng.randrange(8)
    path.write_bytes(data)


def zeroed_bytes(case: Case) -> None:
    path = case.image()
    data = bytearray(path.read_bytes())
    start = case.rng.randrange(len(data))
    end = min(len(data), start + case.pick(4, 64, 1000))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def noise_for_an_image(case: Case) -> None:
    start = case.pick(b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM")
    case.image().write_bytes(start + case.rng.randbytes(case.rng.randrange(2000)))


def another_format(case: Case) -> None:
    kind = case.pick("PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
    case.image().write_bytes(picture(case.rng.randrange(3), kind))


def another_size(case: Case) -> None:
    sides = case.pick((HEIGHT, WIDTH), (1, 1), (WIDTH + 1, HEIGHT), (WIDTH, 2 * HEIGHT))
    case.image().write_bytes(picture(0, "PNG", sides))


def bomb(case: Case) -> None:
    side = case.pick(20_000, 60_000, 2**31 - 1)
    header = struct.pack("<6sHHBBB", b"GIF89a", 65535, 65535, 0, 0, 0)
    data = case.pick(png(side, side), header + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;")
    record = case.record("images")
    (case.images / record["file_name"]).write_bytes(data)
    if case.rng.random() < 0.5:
        record.update(width=side, height=side)


def pipe_for_an_image(case: Case) -> None:
    path = case.without_image()
    if case.rng.random() < 0.5:
        os.mkfifo(path)
    else:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
            with contextlib.chdir(path.parent):  # the name of a socket has at most 107 letters
                server.bind(path.name)


def unreadable_json(case: Case) -> None:
    case.write()
    case.keep = True
    case.file.chmod(0)


# ---------------------------------------------------------------- paths and links


def path_that_climbs(case: Case) -> None:
    secret = str(case.outside / "secret.png")
    names = f"../../outside/secret.png sub/../../../outside/secret.png {secret} /etc/passwd "
    names += r"../../../../../../../../etc/passwd .. ../ sub/.. ..\..\outside\secret.png "
    names += r"C:\secret.png \\host\share\a.jpg / //a ./../../outside/secret.png "
    names += "../instances_val.json /dev/zero /proc/self/mem"
    case.record("images")["file_name"] = case.pick(*names.split())


NOWHERE = "file:///etc/passwd https://example.com/a.jpg ~/a.jpg $HOME/a.jpg a.jpg\0 A.JPEG".split()
NOWHERE += ["a.jpg ", "*.jpg", ".", "sub", "a.jpg/b.jpg", "x" * 300, "x/" * 3000 + "y"]
NOWHERE += ["\ud800.jpg", "\udc80.jpg", "\u202egpj.a", "a\nb.jpg", "\x1b[2J.jpg", "細胞.jpg"]


def unusual_name(case: Case) -> None:
    record = case.record("images")
    stems = "%2e%2e", "..a", "a..", "'\"$`", "a\nb"
    name = case.pick("細胞 é ℵ", "\U0001f9ab", "x" * 200, "a b", "-rf", *stems) + ".jpg"
    (case.images / record["file_name"]).rename(case.images / name)
    record["file_name"] = case.pick("", "./") + name
    other = case.root / "instances_val.json"
    validation = json.loads(other.read_text())
    for entry in validation["images"]:
        if entry["id"] == record["id"]:
            entry["file_name"] = name
    other.write_text(json.dumps(validation))


def link_outside(case: Case) -> None:
    path = case.without_image()
    path.symlink_to(case.pick(case.outside / "secret.png", "/etc/passwd", "/dev/zero"))
    if case.rng.random() < 0.3:  # by way of a second link
        path.rename(case.root / "second")
        path.symlink_to(case.root / "second")


def linked_subfolder(case: Case) -> None:
    """A folder inside the image folder that is a link to another place."""
    (case.outside / "c.png").write_bytes(picture(2, "PNG"))
    shutil.rmtree(case.images / "sub")
    (case.images / "sub").symlink_to(case.outside)


def link_inside(case: Case) -> None:
    path = case.image()
    store = case.root / case.pick("store", "images/store")
    store.mkdir()
    path.rename(store / path.name)
    path.symlink_to(os.path.relpath(store / path.name, path.parent))


def link_in_a_circle(case: Case) -> None:
    path = case.without_image()
    path.symlink_to(case.pick(path, case.images / "back"))
    (case.images / "back").symlink_to(path)


def linked_image_folder(case: Case) -> None:
    case.images.rename(case.outside / "images")
    case.images.symlink_to(case.outside / "images")
    case.allowed.append(case.outside / "images")


def missing_image_folder(case: Case) -> None:
    shutil.rmtree(case.images)
    if case.rng.random() < 0.5:
        case.images.write_bytes(b"a file")


def json_that_is_no_file(case: Case) -> None:
    case.keep = True
    kind = case.pick("folder", "pipe", case.file, "nowhere")
    if kind == "folder":
        case.file.mkdir()
    elif kind == "pipe":
        os.mkfifo(case.file)
    else:
        case.file.symlink_to(kind)


def json_linked_outside(case: Case) -> None:
    case.keep = True
    case.file.symlink_to(case.pick(case.outside / "secret.json", "/etc/passwd", "/dev/zero"))


# ---------------------------------------------------------------- damage to the JSON


def truncated_json(case: Case) -> None:
    text = json.dumps(case.data).encode()
    case.text = text[: case.rng.randrange(len(text))]


def flipped_json(case: Case) -> None:
    text = bytearray(json.dumps(case.data, indent=case.pick(None, 1)).encode())
    for _ in range(case.pick(1, 1, 2, 5)):
        byte = case.pick(case.rng.randrange(256), 0, 34, 44, 48)
        text[case.rng.randrange(len(text))] = byte
    case.text = bytes(text)


def not_json(case: Case) -> None:
    texts = [b"", b"\0" * 100, b"<xml/>", b"[]", b"3", b"null", b'"text"', b"\xff\xfe", b"{}{}"]
    texts += [b"{'a': 1}", b"NaN", b"9" * 5000, b'{"images": ' + b"9" * 5000 + b"}"]
    case.text = case.pick(*texts, case.rng.randbytes(500))


def deep_json(case: Case) -> None:
    start, end = case.pick((b"[", b"]"), (b'{"a":', b"}"))
    depth = case.pick(300, 900, 5_000, 100_000)
    deep = start * depth + b"1" + (end * depth if case.rng.random() < 0.7 else b"")
    text = json.dumps(case.data).encode()
    where = case.pick(b'"bbox": ', b'"name": ', b'"file_name": ', b'"images": ', b'"id": ')
    case.text = case.pick(deep, text.replace(where, where + deep + b', "x": ', 1))


def other_encoding(case: Case) -> None:
    name = case.pick("utf-8-sig", "utf-16", "utf-32", "utf-16-be", "latin-1")
    case.data["categories"][0]["name"] = "Zellkörper"
    (case.root / "instances_val.json").write_text(json.dumps(case.data))
    case.text = json.dumps(case.data, ensure_ascii=False).encode(name)


def missing_key(case: Case) -> None:
    record = case.rng.choice([case.data, *(case.record(key) for key in case.data)])
    del record[case.pick(*record)]


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in nested lists and dicts, as container and key."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def junk_anywhere(case: Case) -> None:
    for _ in range(case.pick(1, 1, 1, 2, 4)):
        node, key = case.rng.choice(list(places(case.data)))
        node[key] = case.pick(*JUNK)


def extra_keys(case: Case) -> None:
    for _ in range(3):
        record = case.record(case.pick(*case.data))
        value = case.pick(*JUNK)
        record[case.pick("x", "", "score", "license", "\ud800")] = value


def duplicate_id(case: Case) -> None:
    first, second = case.rng.sample(case.data[case.pick(*case.data)], 2)
    second["id"] = first["id"]


def bbox_that_is_none(case: Case) -> None:
    bbox = case.record("annotations")["bbox"]
    if case.pick(None, None, bbox) is None:
        bad = None, "1 2 3 4", [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3, 4]], {"x": 1}, 5
        value = case.pick(*bad)
        case.record("annotations")["bbox"] = value
    else:
        value = case.pick(NAN, INF, -INF, "5", None, True, [5], 10**400, {})
        bbox[case.rng.randrange(4)] = value


def repeated_entry(case: Case) -> None:
    """An image file in two records, or a duplicate box."""
    key = case.pick("images", "annotations")
    case.data[key].append({**case.record(key), "id": 77})


def several(case: Case) -> None:
    kinds = [kind for name, (kind, _) in KINDS.items() if name not in ALONE]
    for kind in case.rng.sample(kinds, case.rng.randrange(2, 5)):
        with contextlib.suppress(LookupError, TypeError, AttributeError, OSError, ValueError):
            kind(case)


TEXTS = (
    b"<svg onload='x'/>",
    b"<html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\n",
)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n%%EndComments\nshowpage\n%%EOF\n"
TEXT_BOMB = png(WIDTH, HEIGHT, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000), 9)))
OUTSIDE = [100, 5, 9, 9], [-50, 5, 9, 9], [5, 1e300, 1, 1], [5, -1e308, 1, 1], [48, 0, 5, 5]
BEYOND = [
    *([40, 20, 99, 99], [-5, -5, 20, 20], [1, 1, 1e308, 1e308], [0.1, 0.1, 1e-3, 1e-3]),
    *([-1e308, -1e308, 1.7e308, 1.7e308], [0, 0, 10**300, 10**300], [-(10**308), 0, 10**307, 9]),
]
IDS = 0, 99, -1, 2**62, "1", 1.0, None, [1], True
SIZES = 0, -1, 1, 47, 1.5, "48", None, True, 2**31, 10**400, NAN, [48], 2**30
AREAS = "9", -1, NAN, INF, [], {}, True, 10**400, 0, 1e300, None, 1.5
CROWDS = 1, True, 2, -1, "0", None, [], {}, 0.5, 1.0, NAN
CLASSES = ["", "plate", "a\nb", "\x1b[2J", "\ud800", 5, None, [], "x" * 5000]
CLASSES += ["<script>", "細胞", "Cell "]

KINDS: dict[str, tuple[Damage, set[str]]] = {
    "truncated image": (truncated_image, {ERROR}),
    "empty image file": (image_of(b""), {ERROR}),
    "bytes of an image flipped": (flipped_bytes, {ERROR, FINE}),
    "bytes of an image set to zero": (zeroed_bytes, {ERROR, FINE}),
    "noise in place of an image": (noise_for_an_image, {ERROR}),
    "text in place of an image": (image_of(*TEXTS), {ERROR}),
    "PostScript in place of an image": (image_of(POSTSCRIPT), {ERROR}),
    "image in another format than its name says": (another_format, {FINE}),
    "image of another size than the JSON says": (another_size, {ERROR}),
    "decompression bomb": (bomb, {ERROR}),
    "decompression bomb in a text chunk": (image_of(TEXT_BOMB), {ERROR}),
    "missing image": (Case.without_image, {ERROR}),
    "folder in place of an image": (lambda case: case.without_image().mkdir(), {ERROR}),
    "pipe or socket in place of an image": (pipe_for_an_image, {ERROR}),
    "image without permission to read": (lambda case: case.image().chmod(0), {ERROR}),
    "annotation file without permission to read": (unreadable_json, {ERROR}),
    "path that climbs out": (path_that_climbs, {ERROR}),
    "path that leads nowhere": (value_of("images", "file_name", *NOWHERE), {ERROR}),
    "unusual file name that exists": (unusual_name, {FINE}),
    "link to a file outside": (link_outside, {ERROR}),
    "subfolder that is a link to outside": (linked_subfolder, {ERROR}),
    "link inside the data folder": (link_inside, {FINE}),
    "link in a circle": (link_in_a_circle, {ERROR}),
    "image folder that is a link": (linked_image_folder, {FINE}),
    "missing image folder": (missing_image_folder, {ERROR}),
    "annotation file that is a folder, pipe or broken link": (json_that_is_no_file, {ERROR}),
    "annotation file that is a link to outside": (json_linked_outside, {ERROR}),
    "truncated JSON": (truncated_json, {ERROR}),
    "bytes of the JSON changed": (flipped_json, {ERROR, SKIP, FINE}),
    "no JSON, or no object": (not_json, {ERROR}),
    "JSON nested 300 to 100,000 deep": (deep_json, {ERROR}),
    "JSON in another encoding": (other_encoding, {ERROR, FINE}),
    "missing key": (missing_key, {ERROR, FINE}),
    "wrong type or value anywhere": (junk_anywhere, {ERROR, SKIP, FINE}),
    "keys that are not in the format": (extra_keys, {FINE}),
    "duplicate id": (duplicate_id, {ERROR}),
    "unknown category or image": (value_of("annotations", "category_id image_id", *IDS), {ERROR}),
    "bbox of NaN, infinity, text, null, ...": (bbox_that_is_none, {ERROR}),
    "negative width or height of a bbox": (side_of_bbox(-1, -1e-9, -1e300), {ERROR}),
    "bbox without area": (side_of_bbox(0, 0.0, -0.0, 1e-30), {SKIP}),
    "bbox outside its image": (value_of("annotations", "bbox", *OUTSIDE), {SKIP}),
    "bbox that reaches out of its image": (value_of("annotations", "bbox", *BEYOND), {FINE, SKIP}),
    "wrong size in the JSON": (value_of("images", "width height", *SIZES), {ERROR}),
    "strange area": (value_of("annotations", "area", *AREAS), {ERROR, FINE}),
    "strange iscrowd": (value_of("annotations", "iscrowd", *CROWDS), {ERROR, FINE, SKIP}),
    "strange class name": (value_of("categories", "name", *CLASSES), {ERROR, FINE}),
    "empty list": (lambda case: case.data[case.pick(*case.data)].clear(), {ERROR, FINE}),
    "file or box that is listed twice": (repeated_entry, {FINE}),
    "several of these": (several, {ERROR, SKIP, FINE}),
}
ALONE = {
    "image without permission to read",
    "annotation file without permission to read",
    "annotation file that is a folder, pipe or broken link",
    "annotation file that is a link to outside",
    "several of these",
}
"""Damage that is not combined with others."""


def reads_everything() -> bool:
    """Whether this process ignores permissions, as root does."""
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0)
        return os.access(file.name, os.R_OK)


SKIPPED = [name for name in KINDS if "permission" in name] if reads_everything() else []
"""Kinds of damage that are not possible here."""


# ---------------------------------------------------------------- one case


class Outcome(NamedTuple):
    """How a case ended; `text` is the error, or what is unexplained."""

    word: str
    text: str


FORBIDDEN = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"),
    *("socket.connect", "socket.getaddrinfo", "urllib.Request"),
}


_watching: list[list[str]] = []  # the list that `_audit` writes to, if there is one


def _audit(
    event: str, arguments: tuple[Any, ...], watching: Sequence[list[str]] = _watching
) -> None:
    # The hook outlives the globals of this module.
    for found in watching:
        if event == "open" and isinstance(arguments[0], str | bytes):
            found.append(os.fsdecode(arguments[0]))
        elif event in FORBIDDEN:
            found.append(f"{event} {arguments[0]}")


@functools.cache
def _install_audit() -> None:
    """Watch files for the rest of the process, after all that the command line imports."""
    with contextlib.redirect_stderr(io.StringIO()):
        command_line(["train", "--data", os.devnull])
    sys.addaudithook(_audit)


@contextlib.contextmanager
def _watch() -> Iterator[list[str]]:
    """The files opened, programs started and connections made meanwhile."""
    _install_audit()
    _watching.append([])
    try:
        yield _watching[0]
    finally:
        _watching.clear()


PYTHON = tuple(
    os.path.realpath(path)
    for path in (sys.prefix, sys.base_prefix, Path(focal.__file__).parents[1])
)


def strangers(opened: list[str], allowed: list[Path]) -> list[str]:
    """What was opened and belongs neither to the dataset nor to Python."""
    homes = (*PYTHON, *(os.path.realpath(path) for path in allowed))
    return [path for path in opened if not os.path.realpath(path).startswith(homes)]


def run_case(kind: str, seed: str) -> Outcome:
    """Make a case, read it in every way, and return how it ended."""
    with tempfile.TemporaryDirectory(prefix="focal-fuzz-") as folder:
        case = Case(Path(folder).resolve(), seed)
        KINDS[kind][0](case)
        with contextlib.suppress(IsADirectoryError, FileNotFoundError):
            case.write()
        with warnings.catch_warnings(), _alarm(), _watch() as opened:
            warnings.simplefilter("ignore")
            try:
                outcome = _read(case)
            except Exception as error:
                outcome = Outcome("other", f"{type(error).__name__}: {error}"[:500])
        outside = strangers(opened, [*case.allowed, Path(folder) / "run"])
        if outside:
            return Outcome("other", f"opened {outside[:3]}")
        return outcome._replace(text=outcome.text.replace(str(case.root), "set"))


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _read(case: Case) -> Outcome:
    outcome = _train(case)
    checked = _check(case)
    if (outcome.word == ERROR) != bool(checked):
        return Outcome("other", f"read: {outcome}; check: {checked[:3]}")
    return outcome


def _train(case: Case) -> Outcome:
    """Read the data as training does."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("focal")
    logger.addHandler(handler)
    opened = False
    try:
        data = CocoDataset(case.root, "train")
        opened = True
        for example in (data[index] for index in range(len(data))):
            _sound(example, data.classes)
    except DataError as error:
        sentence = str(error)
        _clear(sentence)
        if not opened:
            _one_line(case, sentence)
        return Outcome(ERROR, sentence)
    finally:
        logger.removeHandler(handler)
    next(train_batches(data, DETECTOR, RUN))
    list(eval_batches(data, DETECTOR, 2, workers=0))
    truth = data.ground_truth()
    json.dumps(truth, allow_nan=False)
    coco_metrics(truth, [], data.category_ids)
    dropped = [line for line in lines if "dropped 0" not in line]
    return Outcome(SKIP, dropped[0]) if dropped else Outcome(FINE, "")


def _check(case: Case) -> list[str]:
    """The errors that `focal check` finds in the training split."""
    try:
        findings, splits = check_data(case.root)
    except DataError as error:
        _clear(str(error))
        return [str(error)]
    record = check_record(findings, splits, read_boxes(splits, DETECTOR), DETECTOR, {})
    json.dumps(record, allow_nan=False)
    check_text(record).encode()
    for finding in findings:
        if not finding.sentence.isprintable() or len(finding.sentence) > 500:
            raise AssertionError(f"not one clear line: {finding.sentence[:500]!r}")
    return [f.sentence for f in findings if f.level == "error" and f.split == "train"]


def _clear(sentence: str) -> None:
    if not sentence.isprintable() or len(sentence) > 500 or "instances_train" not in sentence:
        raise AssertionError(f"not a clear sentence: {sentence[:500]!r}")


def _one_line(case: Case, sentence: str) -> None:
    """The command line says the same, in one line, and leaves no run folder."""
    out, error = case.root.parent / "run", io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = command_line(["train", "--data", str(case.root), "--out", str(out)])
    if (status, error.getvalue(), out.exists()) != (2, f"focal: {sentence}\n", False):
        raise AssertionError(f"status {status}: {error.getvalue()[:500]!r}")


def _sound(example: Any, classes: tuple[str, ...]) -> None:
    """Whether an example is what `Example` promises."""
    image, boxes, labels, _ = example
    x1, y1, x2, y2 = boxes.T
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert boxes.dtype == np.float32 and labels.dtype == np.int64 and len(boxes) == len(labels)
    assert (0 <= x1).all() and (x1 < x2).all() and (x2 <= image.shape[1]).all()
    assert (0 <= y1).all() and (y1 < y2).all() and (y2 <= image.shape[0]).all()
    assert ((labels >= 0) & (labels < len(classes))).all()


# ---------------------------------------------------------------- many cases


def run(seed: int, count: int) -> dict[str, Any]:
    """Run `count` cases, the kinds in turn, and count the outcomes."""
    logging.getLogger().addHandler(logging.NullHandler())  # or the command line would add one
    names = [name for name in KINDS if name not in SKIPPED]
    kinds: dict[str, Counter[str]] = {name: Counter() for name in names}
    examples: dict[str, str] = {}
    unexplained = []
    for number in range(count):
        name = names[number % len(names)]
        outcome = run_case(name, f"{seed}/{number}")
        kinds[name][outcome.word] += 1
        if outcome.word not in KINDS[name][1]:
            unexplained.append({"kind": name, "case": f"{seed}/{number}", "what": outcome.text})
        elif outcome.text:
            examples.setdefault(name, outcome.text)
    return {
        "seed": seed,
        "cases": count,
        "kinds": {
            name: {
                "cases": found.total(),
                "clear error": found[ERROR],
                "counted skip": found[SKIP],
                "fine": found[FINE],
                "example": examples.get(name, ""),
            }
            for name, found in kinds.items()
        },
        "not made here": SKIPPED,
        "unexplained": unexplained,
    }


def main() -> int:
    """Run the cases and write the record; 1 if anything is unexplained."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=6000, help="cases")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "CASE"), help="one case, to look at it")
    options = parser.parse_args()
    if options.case:
        print(run_case(*options.case))
        return 0
    begin = time.monotonic()
    found = run(options.seed, options.count)
    record = {
        "command": shlex.join(["python", "-m", "tests.tools.fuzz_data", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "architecture": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
        },
        "versions": {
            "focal": focal.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "seconds": round(time.monotonic() - begin, 1),
        **found,
    }
    if options.out is not None:
        write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())
    for name, counts in found["kinds"].items():
        cells = (counts[key] for key in ("cases", "clear error", "counted skip", "fine"))
        print(f"| {name} |" + "".join(f" {cell} |" for cell in cells))
    for entry in found["unexplained"]:
        print("UNEXPLAINED", entry)
    print(f"{options.count} cases, {len(found['unexplained'])} unexplained, {record['seconds']} s")
    return 1 if found["unexplained"] else 0


if __name__ == "__main__":
    sys.exit(main())
