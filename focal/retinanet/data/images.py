"""Image files into (H, W, 3) uint8 RGB arrays, whatever they hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from focal.retinanet.data.paths import is_file

__all__ = ["DataError", "exif_turns", "printable", "read_image", "resize"]

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {  # what undoes each orientation; 5 to 8 swap width and height
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM")


class DataError(ValueError):
    """A file of a dataset cannot be used; one sentence says which record and why.

    Attributes:
        kind: The sort of fault, in a few words, the same for all of its sort.
    """

    def __init__(self, sentence: str, kind: str = "broken image") -> None:
        super().__init__(sentence)
        self.kind = kind


def read_image(path: str | os.PathLike[str], max_size: tuple[int, int] | None = None) -> np.ndarray:
    """Read the first frame of an image file as a viewer shows it.

    EXIF rotation is applied and transparency is laid over white. 16-bit greyscale is divided by
    257, so that full scale stays full scale. 32-bit integers and floats carry no scale of their
    own: values within [0, 255] (floats: [0, 1]) are taken to be that range, integers up to 65535
    to be 16 bits, and anything else is stretched from its minimum to its maximum.

    Only formats that Pillow decodes by itself are read: it would hand an EPS file, whatever its
    name, to Ghostscript. Images of more than 179 million pixels, Pillow's limit, are refused.

    Args:
        path: a JPEG, PNG, TIFF, WebP, BMP, GIF, JPEG 2000 or PPM file; the name's ending is no
            matter.
        max_size: (height, width) beyond which the caller has no use for the pixels. A JPEG may
            then be decoded at 1/2, 1/4 or 1/8, never below this size, which is several times
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
                height, width = max_size[::-1] if _orientation(image) >= 5 else max_size
                image.draft(None, (width, height))
            image.load()
            upright = _UPRIGHT.get(_orientation(image))  # asked after load, which turns a TIFF
            return np.array(_to_rgb(image.transpose(upright) if upright is not None else image))
    except Exception as error:  # Pillow's decoders raise many kinds on bad bytes
        sentence = f"{printable(str(path), 200)}: not a readable image ({_reason(path, error)})"
        raise DataError(sentence) from error


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
    """Whether EXIF has the file shown on its side, so that width and height change places."""
    with Image.open(path, formats=_FORMATS) as image:
        return _orientation(image) >= 5


def printable(text: str, limit: int = 80) -> str:
    """Text from a file as a part of a message: one line, no control characters, no novel."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where EXIF is missing or damaged, which does not spoil the pixels."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds here, too
        return 1
    return orientation if orientation in _UPRIGHT else 1


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
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _guess_scale(values: np.ndarray) -> np.ndarray:
    """32-bit integers or floats to 8 bits, as `read_image` says."""
    whole = values.dtype.kind != "f"
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if low >= 0 and high <= 65535 and whole:
        return values.astype(np.uint8) if high <= 255 else _divide_by_257(values)
    if low >= 0 and high <= 255:
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    return np.rint((values - low) / max(high - low, 1e-300) * 255).astype(np.uint8)


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
