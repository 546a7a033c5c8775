"""Data augmentation: pure functions of image, boxes and a random generator.

Images are (H, W, 3) uint8. Boxes are (M, 4) float32 `(x1, y1, x2, y2)` in pixels: pixel column
i covers [i, i + 1], so a box and the pixels under it go through the same affine map, exactly.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from focal.retinanet.data.dataset import Example
from focal.retinanet.data.images import resize

__all__ = [
    "augment",
    "color_jitter",
    "d4",
    "fit",
    "place",
    "random_crop_zoom",
]


def fit(
    image: np.ndarray, boxes: np.ndarray, canvas: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Scale an image, up or down, to the largest size that fits a canvas, keeping its aspect ratio.

    The scale is exactly `min(canvas_height / H, canvas_width / W)` on both axes. A fraction of a
    pixel at the far edge is cut off the image, but not off the boxes, so that a thin box does not
    become empty.

    Args:
        image: (H, W, 3) uint8.
        boxes: (M, 4), pixels of `image`.
        canvas: (height, width).

    Returns:
        The scaled image, the scaled boxes, and the scale in canvas pixels per image pixel.

    >>> image, boxes, scale = fit(np.zeros((480, 640, 3), np.uint8), np.zeros((0, 4)), (256, 320))
    >>> image.shape, scale
    ((240, 320, 3), 0.5)
    """
    scale = min(canvas[0] / image.shape[0], canvas[1] / image.shape[1])
    height, width = _scaled_size(image, scale)
    image = _window(image, scale, 0, 0, height, width)
    return image, (np.asarray(boxes, np.float64) * scale).astype(np.float32), scale


def place(image: np.ndarray, canvas: tuple[int, int], fill: ArrayLike) -> np.ndarray:
    """A (height, width, 3) canvas of color `fill` with `image` at its top-left corner."""
    out = np.empty((*canvas, 3), np.uint8)
    height, width = image.shape[:2]
    for channel in range(3):  # faster than pixels of 3 bytes where the image is turned
        out[:height, :width, channel] = image[..., channel]
    out[height:] = fill
    out[:height, width:] = fill
    return out


def random_crop_zoom(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    crop: tuple[int, int],
    zoom: tuple[float, float],
    rng: np.random.Generator,
    *,
    min_visible: float = 0.4,
    min_side: float = 2.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Scale by a random factor, then cut out a random window of at most `crop` pixels.

    Both in one resampling. A scaled image smaller than the crop is not padded here.

    Args:
        image: (H, W, 3) uint8.
        boxes: (M, 4), pixels of `image`.
        labels: (M,).
        crop: (height, width), the largest result.
        zoom: range of the scale, drawn log-uniformly.
        rng: random generator for the scale and the position.
        min_visible: boxes with a smaller fraction of their area inside the window are dropped.
        min_side: so are boxes with a side shorter than this, in pixels of the result.

    Returns:
        Image, boxes clipped to it, their labels, and the scale.
    """
    scale = zoom[0] if zoom[0] == zoom[1] else math.exp(rng.uniform(*np.log(zoom)))
    full = _scaled_size(image, scale)
    height, width = min(full[0], crop[0]), min(full[1], crop[1])
    top = int(rng.integers(full[0] - height + 1))
    left = int(rng.integers(full[1] - width + 1))
    image = _window(image, scale, top, left, height, width)

    moved = np.asarray(boxes, np.float64) * scale - np.array([left, top, left, top])
    clipped = np.clip(moved, 0, [width, height, width, height]).astype(np.float32)
    sides = clipped[:, 2:] - clipped[:, :2]
    whole = np.prod(moved[:, 2:] - moved[:, :2], axis=1)
    kept = (np.prod(sides, axis=1) >= min_visible * whole) & (sides >= min_side).all(axis=1)
    return image, clipped[kept], labels[kept], scale


def d4(image: np.ndarray, boxes: np.ndarray, symmetry: int) -> tuple[np.ndarray, np.ndarray]:
    """One of the 8 symmetries of the square (the dihedral group D4); the image is a view.

    Args:
        image: (H, W, 3).
        boxes: (M, 4).
        symmetry: 0 to 7, three bits: 1 mirrors x, 2 mirrors y, 4 then swaps the axes, which
            makes the image (W, H, 3).

    >>> image, boxes = d4(np.zeros((20, 30, 3), np.uint8), np.array([[1, 2, 5, 9]]), 4)
    >>> image.shape, boxes.tolist()
    ((30, 20, 3), [[2, 1, 9, 5]])
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = boxes.T
    if symmetry & 1:
        image, x1, x2 = image[:, ::-1], width - x2, width - x1
    if symmetry & 2:
        image, y1, y2 = image[::-1], height - y2, height - y1
    if symmetry & 4:
        image, x1, y1, x2, y2 = image.swapaxes(0, 1), y1, x1, y2, x2
    return image, np.stack([x1, y1, x2, y2], axis=1)


def color_jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation, each by a factor in [1 - s, 1 + s].

    All three are affine in the color, so together they are one 3 x 4 matrix: `saturation` blends
    with the pixel's gray value, `contrast` scales about the image's mean gray value, `brightness`
    scales everything.
    """
    if strength == 0:
        return image
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    gray = np.array([0.299, 0.587, 0.114])
    mean = gray @ image[::4, ::4].mean(axis=(0, 1))  # every 16th pixel is enough for a mean
    matrix = np.empty((3, 4))
    matrix[:, :3] = saturation * np.eye(3) + (1 - saturation) * gray
    matrix[:, :3] *= brightness * contrast
    matrix[:, 3] = brightness * (1 - contrast) * mean
    colored = Image.fromarray(np.ascontiguousarray(image)).convert("RGB", matrix.ravel().tolist())
    return np.array(colored)


def augment(
    example: Example,
    crop: tuple[int, int],
    zoom: tuple[float, float],
    flips: Literal["none", "horizontal", "d4"],
    jitter: float,
    rng: np.random.Generator,
) -> tuple[Example, float]:
    """Random zoom, crop, flip and color jitter, as in the fields of `TrainConfig`.

    Where a symmetry swaps the axes, the window is cut with its sides swapped, so that the result
    is at most `crop` in any case.

    Returns:
        The new example, at most `crop` in size, and its scale relative to the old one.
    """
    symmetry = int(rng.integers({"none": 1, "horizontal": 2, "d4": 8}[flips]))
    window = crop[::-1] if symmetry & 4 else crop
    image, boxes, labels, scale = random_crop_zoom(
        example.image, example.boxes, example.labels, window, zoom, rng
    )
    image = color_jitter(image, jitter, rng)
    image, boxes = d4(image, boxes, symmetry)
    return Example(image, boxes, labels, example.image_id), scale


def _scaled_size(image: np.ndarray, scale: float) -> tuple[int, int]:
    """Whole pixels that the scaled image covers; 1e-6 absorbs rounding errors."""
    height, width = (max(1, math.floor(n * scale + 1e-6)) for n in image.shape[:2])
    return height, width


def _window(
    image: np.ndarray, scale: float, top: int, left: int, height: int, width: int
) -> np.ndarray:
    """Rows [top, top + height) and columns [left, left + width) of `image` times `scale`."""
    if scale == 1:
        return image[top : top + height, left : left + width]
    y1, x1 = top / scale, left / scale
    y2 = min((top + height) / scale, image.shape[0])
    x2 = min((left + width) / scale, image.shape[1])
    # Only the pixels under the window are passed on; the box is relative to them.
    y0, x0 = int(y1), int(x1)
    part = image[y0 : math.ceil(y2), x0 : math.ceil(x2)]
    return resize(part, (height, width), (x1 - x0, y1 - y0, x2 - x0, y2 - y0))
