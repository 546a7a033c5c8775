"""Anchor boxes, computed with NumPy: they depend on shapes only, not on data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from focal.core import checks
from focal.core.namespace import Framework, In, Out

__all__ = ["AnchorConfig", "anchors", "level_shapes", "level_steps"]


@dataclass(frozen=True)
class AnchorConfig:
    """The anchors of a feature pyramid; the paper's by default.

    Attributes:
        strides: Pixels between neighboring cells of each level, P3 to P7.
        sizes: Side in pixels of the square anchor at scale 1, one per level.
        scales: Multipliers of the size, in every cell.
        ratios: Height / width, in every cell; the area does not change with the ratio.
        offset: Where in its cell an anchor is centered, as a fraction of the stride.
        rounded: Truncate the sizes and round the half-sides to whole pixels, as torchvision
            does.
        stretched: Spread the cells over the image as torchvision does: `image size // cells`
            pixels apart in each axis, instead of the stride.

    Raises:
        TypeError: a field is not numeric.
        ValueError: a field is empty or not positive, or `sizes` and `strides` differ in length.

    Example:
        >>> import focal
        >>> focal.AnchorConfig().per_cell
        9

    Source: Lin et al. 2017, section 4, "Anchors"; `rounded` and `stretched`: torchvision's
    `AnchorGenerator`.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    scales: tuple[float, ...] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    ratios: tuple[float, ...] = field(default=(0.5, 1.0, 2.0))
    offset: float = 0.5
    rounded: bool = False
    stretched: bool = False

    def __post_init__(self) -> None:
        name = "AnchorConfig"
        for parameter in ("strides", "sizes", "scales", "ratios"):
            values = getattr(self, parameter)
            if not isinstance(values, Iterable) or isinstance(values, str):
                raise TypeError(f"{name}: {parameter} must be a tuple of numbers; got {values!r}")
            values = tuple(values)
            if not values:
                raise ValueError(f"{name}: {parameter} must not be empty")
            for value in values:
                if checks.check_number(name, parameter, value) <= 0:
                    raise ValueError(f"{name}: {parameter} must be > 0; got {value!r}")
            object.__setattr__(self, parameter, values)
        checks.check_number(name, "offset", self.offset)
        if len(self.sizes) != len(self.strides):
            raise ValueError(
                f"{name}: sizes must have one number per stride ({len(self.strides)}); "
                f"got {len(self.sizes)}"
            )

    @property
    def per_cell(self) -> int:
        """Anchors in one cell, A in the paper."""
        return len(self.scales) * len(self.ratios)


def anchors(
    xp: Framework[In, Out], image_size: tuple[int, int], config: AnchorConfig | None = None
) -> Out:
    r"""The anchor boxes of an image.

    A level of stride s has ceil(height / s) x ceil(width / s) cells. An anchor of scale k and
    ratio r (height / width) at a level of size S has sides

    .. math:: w = S k / \sqrt{r}, \qquad h = S k \sqrt{r}

    and its center `offset` of a stride into the cell. With `stretched`, cells are
    floor(height / rows) by floor(width / columns) pixels.

    Args:
        image_size: (height, width) in whole pixels, each >= 1.
        config: Strides, sizes, scales, ratios. Default: `AnchorConfig()`, the paper's.

    Returns:
        (N, 4) float32 boxes (x1, y1, x2, y2) in pixels. Order: levels from fine to coarse,
        rows, columns, then in each cell all scales of the first ratio, of the second, ...

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is below 1 or no whole number.

    Example:
        >>> from focal.numpy import anchors
        >>> anchors((800, 1333)).shape
        (200700, 4)

    Source: Lin et al. 2017, section 4; the order within a cell is torchvision's.
    """
    name = "anchors"
    height, width = checks.check_image_size(name, image_size)
    config = AnchorConfig() if config is None else config
    if not isinstance(config, AnchorConfig):
        raise TypeError(f"{name}: config must be a focal.AnchorConfig; got {config!r}")
    levels = []
    shapes, steps = level_shapes((height, width), config), level_steps((height, width), config)
    for size, (rows, columns), (down, right) in zip(config.sizes, shapes, steps, strict=True):
        y = (np.arange(rows) + config.offset) * down
        x = (np.arange(columns) + config.offset) * right
        centers = np.stack(np.meshgrid(x, y, indexing="xy") * 2, axis=-1)
        boxes = centers[:, :, None, :] + _cell(size, config)
        levels.append(boxes.reshape(-1, 4))
    return xp.constant(np.concatenate(levels).astype(np.float32), None)


def level_shapes(image_size: tuple[int, int], config: AnchorConfig) -> list[tuple[int, int]]:
    """(rows, columns) of each level."""
    height, width = image_size
    return [(-(-height // s), -(-width // s)) for s in config.strides]


def level_steps(image_size: tuple[int, int], config: AnchorConfig) -> list[tuple[int, int]]:
    """Pixels between neighboring (rows, columns) of each level."""
    if not config.stretched:
        return [(s, s) for s in config.strides]
    height, width = image_size
    return [
        (height // rows, width // columns) for rows, columns in level_shapes(image_size, config)
    ]


def _cell(size: float, config: AnchorConfig) -> np.ndarray[Any, Any]:
    """The anchors of one cell around the origin, ratio-major: (A, 4)."""
    sides = np.asarray([size * scale for scale in config.scales])
    if config.rounded:
        sides = np.trunc(sides)
    root = np.sqrt(np.asarray(config.ratios))[:, None]
    w, h = (sides / root).reshape(-1) / 2, (sides * root).reshape(-1) / 2
    boxes = np.stack([-w, -h, w, h], axis=-1)
    return np.round(boxes) if config.rounded else boxes
