"""The checks of boxes and image sizes, beside those of `focal.core.checks`."""

from __future__ import annotations

from typing import Any

from focal.core import checks
from focal.core.namespace import Array, Namespace

__all__ = ["check_boxes", "check_image_size"]


def check_boxes(
    xp: Namespace, function: str, parameter: str, value: Any, at_least_2d: bool = False
) -> Array:
    """Boxes (..., 4), or (..., N, 4) where they must form a list; integers become float32."""
    array = checks.check_array(xp, function, parameter, value)
    if xp.isdtype(array.dtype, "integral"):
        array = xp.astype(array, xp.float32)
    array = checks.check_floating(xp, function, parameter, array)
    shape = tuple(array.shape)
    if len(shape) < 1 + at_least_2d or shape[-1] not in (4, None):
        expected = "(..., N, 4)" if at_least_2d else "(..., 4)"
        raise ValueError(f"{function}: {parameter} must have shape {expected}; got {shape}")
    return array


def check_image_size(function: str, image_size: Any) -> tuple[int, int]:
    """(height, width) in whole pixels, of any real type."""
    try:
        height, width = image_size
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: image_size must be (height, width); got {image_size!r}"
        ) from None
    return _whole(function, "image_size[0]", height), _whole(function, "image_size[1]", width)


def _whole(function: str, parameter: str, value: Any) -> int:
    number = checks.check_number(function, parameter, value)
    if not number.is_integer():
        raise ValueError(f"{function}: {parameter} must be a whole number; got {value!r}")
    return checks.check_integer(function, parameter, int(number), 1)
