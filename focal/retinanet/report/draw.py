"""Draws boxes, class names and scores on images, and arranges images side by side."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from focal.files import write_atomically
from focal.retinanet.data.images import resize

if TYPE_CHECKING:  # boxes are drawn without it: its import takes longer than a prediction
    from matplotlib.figure import Figure

__all__ = ["PALETTE", "class_color", "draw_boxes", "save_figure", "save_image", "side_by_side"]

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#56b4e9", "#d55e00", "#ffffff")
"""Okabe and Ito's colors, safe for color blindness, and white; class k has color k modulo 8."""

_Box = tuple[int, int, int, int]
_INK = "#1f2328"
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_PAD = 2  # left and right of a tag's text, in pixels


def class_color(label: int) -> str:
    """The color of a class, the same in every picture, as `#rrggbb`."""
    return PALETTE[label % len(PALETTE)]


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    scores: np.ndarray | None = None,
    scale: float = 1.0,
) -> np.ndarray:
    """Draw boxes on a copy of an image, each in the color of its class and with a tag.

    Args:
        image: (H, W, 3) uint8, RGB.
        boxes: (n, 4), `(x1, y1, x2, y2)` in pixels of `image`. Boxes outside it, or not finite,
            are skipped; those thinner than a pixel are drawn as one pixel.
        labels: (n,) class indices.
        classes: name of each class.
        scores: (n,), written after the name.
        scale: the result is this many times larger than the image.
    """
    height, width = (max(1, round(n * scale)) for n in image.shape[:2])
    canvas = Image.fromarray(image.copy() if scale == 1 else resize(image, (height, width)))
    draw, line = ImageDraw.Draw(canvas), max(1, round(min(height, width) / 160))
    font = _font(max(10, min(height, width) // 40))
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * scale
    ends = [""] * len(boxes) if scores is None else [f" {score:.2f}" for score in scores]
    items = [
        (_pixels(box, width, height), int(label), end)
        for box, label, end in zip(boxes, labels, ends, strict=True)
        if np.isfinite(box).all() and (box[2:] > 0).all() and (box[:2] < [width, height]).all()
    ]
    # Small boxes over large ones; halos first, so that they do not cut colored lines.
    items.sort(key=lambda item: _shared(item[0], item[0]), reverse=True)
    for halo in (1, 0):
        for box, label, _ in items:
            _frame(draw, box, line, class_color(label), halo)
    taken: list[_Box] = []
    for box, label, end in reversed(items):
        room = min(width - 2 * _PAD - font.getlength(end), 10 * font.size)
        text = _fit(classes[label], font, room) + end
        size = math.ceil(font.getlength(text)) + 2 * _PAD, sum(font.getmetrics())
        if not text or size[0] > width or size[1] > height:
            continue  # nothing to write, or no room for it
        x1, y1, x2, y2 = place = _place(box, size, (width, height), taken)
        taken.append(place)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=class_color(label))
        draw.text((x1 + _PAD, y1), text, _contrast(class_color(label)), font)
    return np.array(canvas)


def side_by_side(
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    titles: tuple[str, str] = ("ground truth", "detections"),
    legend: Sequence[tuple[int, str]] = (),
) -> np.ndarray:
    """Pairs of pictures in two columns with titles and a legend of the class colors.

    Args:
        rows: pairs of (H, W, 3) uint8, of any sizes.
        titles: of the two columns.
        legend: label and name of each class.
    """
    widths = [max([200, *(row[i].shape[1] for row in rows)]) for i in (0, 1)]
    size = max(14, min(widths) // 32)
    gap, title_font, font = size // 2, _font(size, bold=True), _font(round(size * 0.85))
    width = sum(widths) + 3 * gap
    places = _flow(legend, font, size, width)
    top = 2 * size + (places[-1][1] + 2 * size if places else 0)
    heights = [max(picture.shape[0] for picture in row) + gap for row in rows]
    page = Image.new("RGB", (width, top + sum(heights)), "white")
    draw, lefts = ImageDraw.Draw(page), (gap, 2 * gap + widths[0])
    for left, column, title in zip(lefts, widths, titles, strict=True):
        draw.text((left, size), _fit(title, title_font, column), _INK, title_font, anchor="lm")
    for x, y, label, name in places:
        middle, half = 3 * size + y, size * 0.35
        swatch = x, middle - half, x + 2 * half, middle + half
        draw.rectangle(swatch, class_color(label), _INK)
        draw.text((x + size, middle), name, _INK, font, anchor="lm")
    for pair, height in zip(rows, heights, strict=True):
        for left, column, picture in zip(lefts, widths, pair, strict=True):
            page.paste(Image.fromarray(picture), (left + (column - picture.shape[1]) // 2, top))
        top += height
    return np.array(page)


def save_image(path: str | os.PathLike[str], array: np.ndarray, optimize: bool = True) -> Path:
    """Write (H, W, 3) uint8 as PNG or JPEG, by the suffix, atomically.

    Without `optimize` a PNG file is a quarter larger and is written in a twentieth of the time.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"save_image: path must end in {', '.join(_FORMATS)}; got {path.name!r}")
    data, kind = io.BytesIO(), _FORMATS[path.suffix.lower()]
    effort = {"optimize": True} if optimize else {"compress_level": 1}
    Image.fromarray(np.ascontiguousarray(array)).save(data, kind, quality=90, **effort)
    write_atomically(path, data.getvalue())
    return path


def save_figure(path: str | os.PathLike[str], figure: Figure) -> Path:
    """Write a figure of matplotlib as `save_image` does."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return save_image(path, np.asarray(canvas.buffer_rgba())[..., :3])


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib includes; it covers more scripts than Pillow's own font."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    package = find_spec("matplotlib")
    origin = package.origin if package else None
    data = Path(origin).with_name("mpl-data") if origin else None
    if data is None or not data.is_dir():  # some distributions move it
        import matplotlib

        data = Path(matplotlib.get_data_path())
    return ImageFont.truetype(data / "fonts" / "ttf" / name, size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text as one line, truncated to at most `width` pixels."""
    short = text if len(text) < 80 else text[:79] + "…"
    short = "".join(c if c.isprintable() else " " for c in short)
    while short and font.getlength(short) > width:
        short = short.rstrip("…")[:-1] + "…" if len(short) > 2 else ""
    return short


def _contrast(color: str) -> str:
    """Black or white, whichever differs more from the color."""
    red, green, blue = bytes.fromhex(color[1:])
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 100 else "#ffffff"


def _pixels(box: np.ndarray, width: int, height: int) -> _Box:
    """The box in whole pixels of the picture, at least one; x2 and y2 are exclusive."""
    x1, y1, x2, y2 = np.rint(np.clip(box, 0, [width, height, width, height])).astype(int).tolist()
    x1, y1 = min(x1, width - 1), min(y1, height - 1)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _frame(draw: ImageDraw.ImageDraw, box: _Box, line: int, color: str, halo: int) -> None:
    """An outline inside the box, or its halo, which is wider on both sides."""
    x1, y1, x2, y2 = box
    side = min(x2 - x1, y2 - y1)
    # Pillow would draw a line of more than half the box's width beyond its other side.
    line = min(min(line, max(1, side // 4)) + 2 * halo, (side + 1) // 2 + halo)
    outer = x1 - halo, y1 - halo, x2 - 1 + halo, y2 - 1 + halo
    draw.rectangle(outer, outline=_contrast(color) if halo else color, width=line)


def _place(box: _Box, size: tuple[int, int], canvas: tuple[int, int], taken: list[_Box]) -> _Box:
    """The place of a tag: at a corner of its box, inside the picture, avoiding other tags."""
    (x1, y1, x2, y2), (width, height) = box, size
    corners = [(x1, y1 - height), (x2 - width, y1 - height), (x1, y2), (x2 - width, y2)]
    corners.insert(1 if y2 - y1 > 3 * height else 4, (x1, y1))  # it would hide a small object
    found: list[tuple[int, _Box]] = []
    for x, y in corners:
        left, top = min(max(x, 0), canvas[0] - width), min(max(y, 0), canvas[1] - height)
        place = left, top, left + width, top + height
        moved = abs(left - x) + abs(top - y)
        found.append((10 * moved + sum(_shared(place, tag) for tag in taken), place))
    return min(found, key=lambda item: item[0])[1]


def _shared(a: _Box, b: _Box) -> int:
    """The area that two boxes have in common."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _flow(
    legend: Sequence[tuple[int, str]], font: ImageFont.FreeTypeFont, size: int, width: int
) -> list[tuple[int, int, int, str]]:
    """Names in lines, wrapped like words: x, y, label and text of each."""
    places, x, y = [], size // 2, 0
    for label, name in legend:
        name = _fit(name, font, width - 2 * size)
        advance = math.ceil(font.getlength(name)) + 2 * size
        if x > size and x + advance > width:
            x, y = size // 2, y + round(1.5 * size)
        places.append((x, y, label, name))
        x += advance
    return places
