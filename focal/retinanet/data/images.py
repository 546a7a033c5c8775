"""Reads image files of any mode into (H, W, 3) uint8 RGB arrays."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from focal.retinanet.data.paths import is_file

__all__ = ["DataError", "exif_turns", "from_pil", "printable", "read_image", "resize"]

_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM")


class DataError(ValueError):
    """A file of a dataset cannot be used; one sentence says which record and why.

    Attributes:
        kind: The kind of error, in a few words.
    """

    def __init__(self, sentence: str, kind: str = "broken image") -> None:
        super().__init__(sentence)
        self.kind = kind


def read_image(path: str | os.PathLike[str], max_size: tuple[int, int] | None = None) -> np.ndarray:
    """Read the first frame of an image file as a viewer shows it.

    EXIF rotation is applied and transparency is composited over white. 16-bit grayscale is divided
    by 257, so that full scale stays full scale. 32-bit integers and floats have no fixed scale:
    values within [0, 255] (floats: [0, 1]) are taken as that range, integers up to 65535 as 16
    bits, and anything else is stretched from its minimum to its maximum.

    Only formats that Pillow decodes by itself are read: it would pass an EPS file, whatever its
    name, to Ghostscript. Images of more than 179 million pixels, Pillow's limit, are refused.

    Args:
        path: a JPEG, PNG, TIFF, WebP, BMP, GIF, JPEG 2000 or PPM file, with any suffix.
        max_size: (height, width) above which the caller does not need the resolution. A JPEG may
            then be decoded at 1/2, 1/4 or 1/8 scale, never below this size, which is several times
            faster. None decodes every pixel.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        DataError: the file is missing, empty, truncated, too large, or no image.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if max_size is not None:
                height, width = max_size[::-1] if _is_turned(image) else max_size
                image.draft(None, (width, height))
            image.load()
            return from_pil(image)
    except Exception as error:  # Pillow's decoders raise many kinds on bad bytes
        sentence = f"{printable(str(path), 200)}: not a readable image ({_reason(path, error)})"
        raise DataError(sentence) from error


def from_pil(image: Image.Image) -> np.ndarray:
    """An image of Pillow as `read_image` would read it from a file: (H, W, 3) uint8."""
    with contextlib.suppress(Exception):  # damaged EXIF is ignored
        image = ImageOps.exif_transpose(image)
    return np.array(_to_rgb(image))


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Scale an image, or a part of it, bilinearly; antialiased where it shrinks.

    Args:
        image: (H, W, 3) uint8.
        size: (height, width) of the result.
        box: the `(x1, y1, x2, y2)` part of `image` to scale, in fractional pixels; None: all.

    >>> resize(np.zeros((40, 60, 3), np.uint8), (20, 30)).shape
    (20, 30, 3)
    """
    scaled = Image.fromarray(np.ascontiguousarray(image)).resize(
        size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=3.0
    )
    return np.array(scaled)


def exif_turns(path: str | os.PathLike[str]) -> bool:
    """Whether the EXIF orientation swaps width and height."""
    with Image.open(path, formats=_FORMATS) as image:
        return _is_turned(image)


def printable(text: str, limit: int = 80) -> str:
    """Text from a file for a message: one short line without control characters."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # Pillow raises many kinds on damaged EXIF, too
        return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_divide_by_257(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_guess_scale(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _divide_by_257(values: np.ndarray) -> np.ndarray:
    return np.asarray((values.astype(np.uint32) + 128) // 257, np.uint8)


def _guess_scale(values: np.ndarray) -> np.ndarray:
    """32-bit integers or floats to 8 bits, as `read_image` says."""
    integers = values.dtype.kind != "f"
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if integers and low >= 0 and 255 < high <= 65535:
        return _divide_by_257(values)
    if low < 0 or high > 255:
        values = (values - low) / max(high - low, 1e-300) * 255
    elif not integers and high <= 1:
        values = values * 255
    return np.asarray(np.rint(values), np.uint8)


def _reason(path: Path, error: Exception) -> str:
    """One line on why a file could not be read, without repeating its path."""
    if not is_file(path):
        return "no such file"
    if path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "unknown or damaged format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(" ".join(str(error).split()), 200) or type(error).__name__
