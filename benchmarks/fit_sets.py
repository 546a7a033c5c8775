"""Generated detection sets of very different object sizes, written as COCO folders.

python -m benchmarks.fit_sets plates build/fit/plates

| set | images | objects |
|---|---|---|
| `plates` | 300 of 640x640, brushed metal | 1 to 5 faint defects of 28 to 54 pixels, 3 classes |
| `nuclei` | 100 of 256x256 | 50 to 100 nuclei of 8 to 20 pixels, touching, 1 class |
| `objects` | 400 of 480x360, cluttered | 1 or 2 of 40 to 90 % of the image, 4 classes |
| `digits` | 400 of 640x480, cluttered | 3 to 9 handwritten digits of 16 to 200 pixels, 10 classes |

The digits are scikit-learn's `load_digits`; those of one split are in no other. An image depends on
set, split and number alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from focal.retinanet.data.dataset import coco_annotation

__all__ = ["SETS", "write"]

Objects = list[tuple[tuple[float, float, float, float], int]]
"""Boxes (x1, y1, x2, y2) and labels."""
Draw = Callable[[np.random.Generator, str], tuple[np.ndarray, Objects]]


class Set(NamedTuple):
    """What is drawn, and how many of it."""

    draw: Draw
    classes: tuple[str, ...]
    images: dict[str, int]


def noise(
    rng: np.random.Generator, height: int, width: int, cells: tuple[tuple[float, float], ...]
) -> np.ndarray:
    """Smooth noise of about unit deviation: a sum over (rows, columns) of pixels per cell."""
    total = np.zeros((height, width), np.float32)
    for rows, columns in cells:
        shape = math.ceil(height / rows) + 3, math.ceil(width / columns) + 3
        coarse = Image.fromarray(rng.normal(size=shape).astype(np.float32))
        full = coarse.resize((int(shape[1] * columns), int(shape[0] * rows)), Image.BICUBIC)
        top, left = int(rng.integers(rows + 1)), int(rng.integers(columns + 1))
        total += np.asarray(full)[top : top + height, left : left + width]
    return total / math.sqrt(len(cells))


def mask(size: tuple[int, int], shape: str, points: list[tuple[float, float]], blur: float = 0):
    """(H, W) in [0, 1] of an ellipse or polygon, drawn with soft edges."""
    image = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "ellipse" else draw.polygon)(points, fill=255)
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(image, np.float32) / 255


def place(
    rng: np.random.Generator, taken: Objects, side: tuple[float, float], size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """A place for a (width, height) box that touches no other; None if 50 trials find none."""
    width, height = (round(x) for x in side)
    for _ in range(50):
        x, y = int(rng.integers(size[1] - width + 1)), int(rng.integers(size[0] - height + 1))
        box = x, y, x + width, y + height
        if not any(
            x < b[2] + 2 and b[0] < box[2] + 2 and y < b[3] + 2 and b[1] < box[3] + 2
            for b, _ in taken
        ):
            return box
    return None


def clipped(values: np.ndarray) -> np.ndarray:
    """To 8 bits."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def plates(rng: np.random.Generator, split: str) -> tuple[np.ndarray, Objects]:
    """Pits, scratches and rough spots on brushed metal, little above its texture."""
    size = 640, 640
    gray = 130 + 12 * noise(rng, *size, ((160, 160), (60, 200)))
    gray += 9 * noise(rng, *size, ((1, 40), (2, 90), (3, 12)))
    found: Objects = []
    for _ in range(int(rng.integers(1, 6))):
        label = int(rng.integers(3))
        side = rng.uniform(28, 54, 2) if label == 1 else np.repeat(rng.uniform(28, 54), 2)
        box = place(rng, found, tuple(side), size)
        if box is None:
            continue
        x1, y1, x2, y2 = box
        area = gray[y1:y2, x1:x2]
        shape = area.shape
        sign = rng.choice([-1, 1])
        if label == 0:  # a pit: dark on one side, light on the other
            inside = mask(shape, "ellipse", [(1, 1), (shape[1] - 2, shape[0] - 2)], 1.5)
            slope = np.linspace(-1, 1, shape[1])[None, :] * sign
            area += inside * (22 * slope - 8)
        elif label == 1:  # a scratch from corner to corner
            ends = [(0, 1), (2, 0), (shape[1] - 1, shape[0] - 2), (shape[1] - 3, shape[0] - 1)]
            line = mask(shape, "polygon", ends, 0.7)
            area += (
                (line if sign > 0 else line[:, ::-1]) * rng.uniform(25, 45) * rng.choice([-1, 1])
            )
        else:  # a spot where the brushing is gone
            inside = mask(shape, "ellipse", [(0, 0), (shape[1] - 1, shape[0] - 1)], 2)
            rough = area.mean() + 12 * noise(rng, *shape, ((2, 2), (5, 5)))
            area += inside * (rough - area)
        found.append((box, label))
    gray += rng.normal(0, 3, size)
    return clipped(np.repeat(gray[..., None], 3, 2)), found


def nuclei(rng: np.random.Generator, split: str) -> tuple[np.ndarray, Objects]:
    """Violet nuclei, dark to pale, on tissue with stains; they touch and overlap a little."""
    size = 256, 256
    tissue = np.array([215, 165, 195]) + 14 * noise(rng, *size, ((40, 40), (9, 9)))[..., None]
    tissue += 8 * noise(rng, *size, ((3, 3),))[..., None] * [1, 1.4, 0.8]
    for _ in range(40):  # stain without an edge, and specks
        x, y, r = *rng.uniform(0, 256, 2), rng.uniform(1, 9)
        soft = mask(size, "ellipse", [(x - r, y - r), (x + r, y + r)], 2.5 if r > 3 else 0.5)
        tissue -= soft[..., None] * [70, 60, 35]
    image = Image.fromarray(clipped(tissue))
    found: Objects = []
    centers = np.zeros((0, 3))
    for _ in range(int(rng.integers(50, 101))):
        a = rng.uniform(4.5, 10)
        b = a * rng.uniform(0.75, 1)
        for _ in range(30):
            x, y = rng.uniform(a, 256 - a, 2)
            if (np.hypot(*(centers[:, :2] - [x, y]).T) > 0.8 * (centers[:, 2] + a)).all():
                break
        else:
            continue
        centers = np.vstack([centers, [x, y, a]])
        angle, t = rng.uniform(0, math.pi), np.linspace(0, 2 * math.pi, 40, endpoint=False)
        radius = 1 + 0.08 * np.sin(3 * t + rng.uniform(0, 6))
        u, v = a * radius * np.cos(t), b * radius * np.sin(t)
        px = x + u * math.cos(angle) - v * math.sin(angle)
        py = y + u * math.sin(angle) + v * math.cos(angle)
        cover = mask(size, "polygon", list(zip(px, py, strict=True)), 0.6)[..., None]
        dark = np.array([135, 95, 160]) + rng.uniform(-25, 60)
        grain = 14 * noise(rng, *size, ((3, 3),))[..., None]
        values = np.asarray(image, np.float32)
        image = Image.fromarray(clipped(values + cover * (dark + grain - values)))
        box = np.clip([px.min(), py.min(), px.max(), py.max()], 0, 256)
        found.append((tuple(box.tolist()), 0))
    return clipped(np.asarray(image) + rng.normal(0, 5, (*size, 3))), found


def clutter(rng: np.random.Generator, size: tuple[int, int], pieces: int) -> np.ndarray:
    """Colored noise with random polygons in it."""
    height, width = size
    base = rng.uniform(60, 190, 3) + 30 * np.stack(
        [noise(rng, *size, ((90, 90), (25, 25), (6, 6))) for _ in range(3)], -1
    )
    image = Image.fromarray(clipped(base))
    draw = ImageDraw.Draw(image)
    for _ in range(pieces):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(5, 60)
        angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 7))))
        color = tuple(int(c) for c in rng.integers(20, 236, 3))
        points = [(x + r * math.cos(t), y + r * math.sin(t)) for t in angles]
        if rng.random() < 0.5:
            draw.polygon(points, fill=color)
        else:
            draw.line(points, fill=color, width=int(rng.integers(1, 6)))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), np.float32)


def outline(label: int, turn: float) -> list[tuple[float, float]]:
    """A star, a cross, an arrow or an egg, around the origin."""
    if label == 0:
        t = np.arange(10) * math.pi / 5
        points = np.stack([np.cos(t), np.sin(t)], 1) * np.where(np.arange(10) % 2, 0.45, 1)[:, None]
    elif label == 1:
        k = 0.35
        quarter = np.array([(k, 1), (-k, 1), (-k, k)])
        quarters = [quarter, quarter[:, ::-1] * [-1, 1], -quarter, quarter[:, ::-1] * [1, -1]]
        points = np.concatenate(quarters)
    elif label == 2:
        points = np.array(
            [(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)]
        )
    else:
        t = np.linspace(0, 2 * math.pi, 40)
        points = np.stack([np.cos(t) * (1 + 0.25 * np.sin(t)), 1.1 * np.sin(t)], 1)
    c, s = math.cos(turn), math.sin(turn)
    return [tuple(p) for p in (points @ np.array([[c, s], [-s, c]])).tolist()]


def objects(rng: np.random.Generator, split: str) -> tuple[np.ndarray, Objects]:
    """One or two large patterned silhouettes, the second partly over the first."""
    size = 360, 480
    image = clutter(rng, size, 40)
    found: Objects = []
    for trial in range(int(rng.choice([1, 20]))):
        label = int(rng.integers(4))
        points = np.array(outline(label, rng.uniform(-0.6, 0.6)))
        points -= points.min(0)
        points *= 480 * rng.uniform(0.4, 0.9 if trial == 0 else 0.6) / points.max()
        points *= [1, min(1, 0.9 * size[0] / points[:, 1].max())]
        extent = points.max(0)
        points += rng.uniform(0, [size[1], size[0]] - extent)
        box = (*points.min(0).tolist(), *points.max(0).tolist())
        if found:  # most of each must be seen
            a = found[0][0]
            over = max(0, min(a[2], box[2]) - max(a[0], box[0]))
            over *= max(0, min(a[3], box[3]) - max(a[1], box[1]))
            if len(found) == 2 or over > 0.3 * (a[2] - a[0]) * (a[3] - a[1]):
                continue
        cover = mask(size, "polygon", [tuple(p) for p in points.tolist()], 1)[..., None]
        pattern = rng.uniform(40, 215, 3) + 35 * noise(rng, *size, ((60, 60), (8, 8)))[..., None]
        image += cover * (pattern - image)
        found.append((box, label))
    return clipped(image + rng.normal(0, 6, image.shape)), found


@functools.cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The 8x8 digits of a split, in [0, 1], and what they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    part = np.arange(len(data.images)) % 5
    own = {"train": part < 3, "val": part == 3, "test": part == 4}[split]
    return data.images[own] / 16, data.target[own]


def digits(rng: np.random.Generator, split: str) -> tuple[np.ndarray, Objects]:
    """Digits of any color, darker or lighter than what is under them."""
    size = 480, 640
    image = clutter(rng, size, 60)
    images, labels = handwriting(split)
    found: Objects = []
    for _ in range(int(rng.integers(3, 10))):
        side = math.exp(rng.uniform(math.log(16), math.log(200)))
        which = int(rng.integers(len(labels)))
        ink = images[which]
        rows, columns = np.flatnonzero(ink.max(1) > 0.25), np.flatnonzero(ink.max(0) > 0.25)
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        width, height = max(5, side * ink.shape[1] / ink.shape[0]), side
        box = place(rng, found, (width, height), size)
        if box is None:
            continue
        x1, y1, x2, y2 = box
        scaled = Image.fromarray(np.asarray(255 * ink, np.uint8)).resize(
            (x2 - x1, y2 - y1), Image.BICUBIC
        )
        cover = np.clip(np.asarray(scaled, np.float32) / 255 * 2 - 0.5, 0, 1)[..., None]
        under = image[y1:y2, x1:x2]
        level = under.mean()
        color = rng.uniform(0, 60, 3) if level > 127 else rng.uniform(195, 255, 3)
        under += cover * (color - under)
        found.append((box, int(labels[which])))
    return clipped(image + rng.normal(0, 5, image.shape)), found


SETS = {
    "plates": Set(plates, ("pit", "scratch", "spot"), {"train": 200, "val": 50, "test": 50}),
    "nuclei": Set(nuclei, ("nucleus",), {"train": 60, "val": 20, "test": 20}),
    "objects": Set(
        objects, ("star", "cross", "arrow", "egg"), {"train": 280, "val": 60, "test": 60}
    ),
    "digits": Set(digits, tuple("0123456789"), {"train": 280, "val": 60, "test": 60}),
}


def write(name: str, root: Path) -> None:
    """Write a set as a COCO folder; its JSON files come last, so that a cut is seen."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    draw, classes, counts = SETS[name]
    for part, (split, count) in enumerate(counts.items()):
        truth = {
            "images": [],
            "annotations": [],
            "categories": [{"id": k, "name": c} for k, c in enumerate(classes, 1)],
        }
        for number in range(1, count + 1):
            rng = np.random.default_rng([list(SETS).index(name), part, number])
            image, found = draw(rng, split)
            file = f"{split}_{number:03}.png"
            Image.fromarray(image).save(root / "images" / file, compress_level=1)
            height, width = image.shape[:2]
            record = {"id": number, "file_name": file, "height": height, "width": width}
            truth["images"].append(record)
            for box, label in found:
                row = len(truth["annotations"]) + 1
                truth["annotations"].append(coco_annotation(row, number, label + 1, box))
        (root / f"instances_{split}.json").write_text(json.dumps(truth))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SETS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.name, options.folder)
