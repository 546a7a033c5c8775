"""All argument checks and their messages.

Only static facts are checked (types, shapes, Python numbers), never values on a device: nothing
here synchronizes with one or breaks a trace. Each message names the function, the parameter, what
was expected and what came.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from focal.core.namespace import Array, Namespace

INFINITY = math.inf
REDUCTIONS = ("none", "mean", "sum")
SPARSE_REDUCTIONS = (*REDUCTIONS, "positives")


def check_number(
    function: str, parameter: str, value: Any, low: float = -INFINITY, high: float = INFINITY
) -> float:
    """A finite real number in [low, high], as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {parameter} must be a number; got {_kind(value)}")
    # Converted, a float that PyTorch traces would become a constant.
    number = value if isinstance(value, float) else float(value)
    # The difference is 0 for finite numbers alone; `math.isfinite` is not for traced ones.
    if not (number - number == 0 and low <= number <= high):
        raise ValueError(
            f"{function}: {parameter} must be a finite number{_range(low, high)}; got {value!r}"
        )
    return number


def check_scalar(
    xp: Namespace,
    function: str,
    parameter: str,
    value: Any,
    like: Array,
    low: float = -INFINITY,
    high: float = INFINITY,
) -> float | Array:
    """A number as in `check_number`, or an array without axes, cast to the compute type.

    The value of such an array is not checked: it may be traced.
    """
    value = as_number(value)
    if not is_array(value):
        return check_number(function, parameter, value, low, high)
    array = xp.to_array(value)
    if array is None or not xp.isdtype(array.dtype, ("integral", "real floating")):
        raise TypeError(
            f"{function}: {parameter} must be a number or {xp.array_name} without axes, of a real "
            f"type; got {_kind(value)}"
        )
    if tuple(array.shape) != ():
        raise ValueError(
            f"{function}: {parameter} must be a number or an array without axes; "
            f"got shape {tuple(array.shape)}"
        )
    return xp.astype(xp.constant(array, like), wide_type(xp, like))


def check_integer(
    function: str, parameter: str, value: Any, low: int, high: int | None = None
) -> int:
    """An integer in [low, high]; None: without an upper limit."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{function}: {parameter} must be an integer; got {_kind(value)}")
    number = int(value)
    if number < low or (high is not None and number > high):
        wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{function}: {parameter} must be {wanted}; got {value}")
    return number


def check_alpha(function: str, alpha: Any) -> float | None:
    """The weight of positives in [0, 1]; None and -1 turn it off."""
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"{function}: alpha must be a number or None; got {_kind(alpha)}")
    if alpha == -1:
        return None
    if not 0 <= float(alpha) <= 1:
        raise ValueError(
            f"{function}: alpha must lie in [0, 1], or be None or -1 to turn it off; got {alpha!r}"
        )
    return float(alpha)


def check_alpha_scalar(xp: Namespace, function: str, alpha: Any, like: Array) -> Any:
    """As `check_alpha`, or an array without axes."""
    alpha = as_number(alpha)
    if isinstance(alpha, np.ndarray) or not is_array(alpha):
        return check_alpha(function, alpha)
    return check_scalar(xp, function, "alpha", alpha, like)


def as_number(value: Any) -> Any:
    """A NumPy array without axes as its NumPy scalar; anything else as it is."""
    return value[()] if isinstance(value, np.ndarray) else value


def is_array(value: Any) -> bool:
    """Whether a parameter is an array (of any framework) rather than a number."""
    return not isinstance(value, (float, numbers.Number)) and hasattr(value, "shape")


def is_sequence(value: Any) -> bool:
    """Whether a parameter is a list, a tuple or an array with axes rather than one number."""
    return isinstance(value, (list, tuple)) or (is_array(value) and tuple(value.shape) != ())


def check_class_alphas(
    xp: Namespace, function: str, alpha: Any, classes: int, like: Array, high: float = INFINITY
) -> Array:
    """One number in [0, high] per class, in the compute type; only a list's values are checked."""
    if isinstance(alpha, (list, tuple)):
        alpha = np.array([check_number(function, "alpha", a, 0, high) for a in alpha], np.float64)
    if isinstance(alpha, np.ndarray):
        alpha = xp.constant(alpha, like)
    alpha = xp.constant(check_real(xp, function, "alpha", alpha), like)
    check_shape(function, "alpha", alpha, (classes,), "(K,)")
    return xp.astype(alpha, wide_type(xp, like))


def check_class_axis(function: str, axis: Any, inputs: Array) -> int:
    """The axis of the classes, counted from the front."""
    shape = tuple(inputs.shape)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"{function}: axis must be an integer; got {axis!r}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{function}: axis must be an axis of inputs {shape}; got {axis}")
    return axis % len(shape)


def check_classes(function: str, inputs: Array, axis: int) -> None:
    """Logits with a class axis of at least one class."""
    if not len(inputs.shape) or inputs.shape[axis] == 0:
        raise ValueError(
            f"{function}: inputs must have at least one class on their class axis; "
            f"got shape {tuple(inputs.shape)}"
        )


def check_labels_fit(function: str, labels: Array, inputs: Array, axis: int) -> None:
    """Labels of the shape of the logits without the class axis."""
    shape = tuple(inputs.shape)
    expected = shape[:axis] + shape[axis + 1 :]
    check_shape(function, "labels", labels, expected, "inputs.shape without axis")


def check_label_values(
    xp: Namespace,
    function: str,
    labels: Array,
    is_wrong: Callable[[Array], Array],
    ignored: int,
    expected: str,
) -> Array:
    """The labels; one that is out of range must not be used to index another class or row.

    It is an error on a CPU. Where reading the values would synchronize with a device or break a
    trace, it becomes `ignored`.
    """
    values = xp.to_numpy(labels)
    if values is None:
        return xp.where(is_wrong(labels), ignored, labels)
    wrong = is_wrong(values)
    if wrong.any():
        raise ValueError(f"{function}: labels must {expected}; got {values[wrong][0]}")
    return labels


def as_factor(xp: Namespace, size: Any, dtype: Any) -> Any:
    """A size to compute with: an array where it is not known while tracing."""
    return xp.astype(size, dtype) if is_array(size) else size


def check_gamma(function: str, gamma: Any) -> float:
    """A finite number >= 0."""
    return check_number(function, "gamma", gamma, low=0)


def check_choice(function: str, parameter: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        words = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{function}: {parameter} must be one of {words}; got {value!r}")
    return value


def check_array(xp: Namespace, function: str, parameter: str, value: Any) -> Array:
    """An array of the bound framework."""
    array = xp.to_array(value)
    if array is None:
        raise TypeError(f"{function}: {parameter} must be {xp.array_name}; got {_kind(value)}")
    return array


def check_floating(xp: Namespace, function: str, parameter: str, value: Any) -> Array:
    """An array of a real floating-point type."""
    array = check_array(xp, function, parameter, value)
    return _check_type(xp, function, parameter, array, ("real floating",), "a floating-point type")


def check_real(xp: Namespace, function: str, parameter: str, value: Any) -> Array:
    """An array of a real or boolean type."""
    kinds = ("bool", "integral", "real floating")
    array = check_array(xp, function, parameter, value)
    return _check_type(xp, function, parameter, array, kinds, "a real or boolean type")


def check_labels(xp: Namespace, function: str, parameter: str, value: Any) -> Array:
    """An array of an integer type, as signed integers: an unsigned -1 would be a large class."""
    array = check_array(xp, function, parameter, value)
    array = _check_type(xp, function, parameter, array, ("integral",), "an integer type")
    return xp.astype(array, xp.index_type)


def check_boxes(
    xp: Namespace, function: str, parameter: str, value: Any, at_least_2d: bool = False
) -> Array:
    """Boxes (..., 4), or (..., N, 4) where they must form a list; integers become float32."""
    array = check_array(xp, function, parameter, value)
    if xp.isdtype(array.dtype, "integral"):
        array = xp.astype(array, xp.float32)
    _check_type(xp, function, parameter, array, ("real floating",), "a floating-point type")
    check_coordinates(function, parameter, array, at_least_2d)
    return array


def check_coordinates(
    function: str, parameter: str, array: Array, at_least_2d: bool = False
) -> None:
    """The shape of boxes or deltas."""
    shape = tuple(array.shape)
    if len(shape) < 1 + at_least_2d or shape[-1] not in (4, None):
        expected = "(..., N, 4)" if at_least_2d else "(..., 4)"
        raise ValueError(f"{function}: {parameter} must have shape {expected}; got {shape}")


def check_image_size(function: str, image_size: Any) -> tuple[int, int]:
    """(height, width) in whole pixels, of any real type."""
    try:
        height, width = image_size
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: image_size must be (height, width); got {image_size!r}"
        ) from None
    return _whole(function, "image_size[0]", height), _whole(function, "image_size[1]", width)


def check_margin(function: str, parameter: str, value: Any) -> float:
    """The margin of the asymmetric loss, in [0, 1)."""
    margin = check_number(function, parameter, value, 0, 1)
    if margin == 1:
        raise ValueError(f"{function}: {parameter} must be < 1; got {value!r}")
    return margin


def check_slope(function: str, parameter: str, value: Any) -> float:
    """The gamma of FL*, > 0."""
    slope = check_number(function, parameter, value, low=0)
    if slope == 0:
        raise ValueError(
            f"{function}: {parameter} must be > 0, the loss is divided by it; got {value!r}"
        )
    return slope


def check_same_shape(
    function: str, parameter: str, array: Array, other: str, other_array: Array
) -> None:
    """Shapes that must be equal; nothing broadcasts."""
    if not _agree(tuple(array.shape), tuple(other_array.shape)):
        raise ValueError(
            f"{function}: {parameter} must have the shape of {other}; "
            f"got {other} {tuple(other_array.shape)}, {parameter} {tuple(array.shape)}"
        )


def check_shape(
    function: str, parameter: str, array: Array, shape: tuple[int, ...], source: str
) -> None:
    """A shape that follows from another argument, described by `source`."""
    if not _agree(tuple(array.shape), shape):
        raise ValueError(
            f"{function}: {parameter} must have shape {source} = {shape}; got {tuple(array.shape)}"
        )


def check_broadcasts(
    function: str, parameter: str, array: Array, other: str, shape: tuple[int, ...]
) -> None:
    """A shape that broadcasts to `shape`, which must not grow."""
    own = tuple(array.shape)
    padded = (1,) * (len(shape) - len(own)) + own
    if len(own) > len(shape) or not all(
        a == 1 or _agree((a,), (b,)) for a, b in zip(padded, shape, strict=True)
    ):
        raise ValueError(
            f"{function}: {parameter} must broadcast to the shape of {other}; "
            f"got {other} {shape}, {parameter} {own}"
        )


def check_weights(function: str, weights: Any) -> tuple[float, float, float, float]:
    """Four positive numbers (wx, wy, ww, wh)."""
    try:
        wx, wy, ww, wh = weights
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: weights must be four numbers (wx, wy, ww, wh); got {weights!r}"
        ) from None
    checked = tuple(check_number(function, "weights", w) for w in (wx, wy, ww, wh))
    if min(checked) <= 0:
        raise ValueError(f"{function}: weights must be > 0; got {weights!r}")
    return checked[0], checked[1], checked[2], checked[3]


def wide_type(xp: Namespace, array: Array) -> Any:
    """The compute type: float32 for the half types, else the array's own."""
    return xp.float32 if xp.finfo(array.dtype).bits < 32 else array.dtype


def wide(xp: Namespace, array: Array) -> Array:
    """The array in its compute type."""
    return xp.astype(array, wide_type(xp, array))


def wide_pair(xp: Namespace, a: Array, b: Array) -> tuple[Array, Array]:
    """Two arrays in the wider of their compute types."""
    one, other = wide_type(xp, a), wide_type(xp, b)
    wider = one if xp.finfo(one).bits >= xp.finfo(other).bits else other
    return xp.astype(a, wider), xp.astype(b, wider)


def count(xp: Namespace, array: Array, dtype: Any) -> Any:
    """The number of elements, at least 1: what the sum of a mean is divided by."""
    size = math.prod(xp.shape(array))
    return as_factor(xp, xp.maximum(size, 1) if is_array(size) else max(1, size), dtype)


def check_leading_axes(
    function: str, parameter: str, array: Array, other: str, other_array: Array, trailing: int
) -> None:
    """Leading axes that are equal, or absent on one side."""
    a, b = tuple(array.shape[:-trailing]), tuple(other_array.shape[:-trailing])
    if a and b and not _agree(a, b):
        raise ValueError(
            f"{function}: {parameter} must have the leading axes of {other} or none; "
            f"got {other} {tuple(other_array.shape)}, {parameter} {tuple(array.shape)}"
        )


def _agree(shape: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool:
    """Whether shapes are equal; None, a size that is not known while tracing, may be any."""
    return len(shape) == len(other) and all(
        a is None or b is None or a == b for a, b in zip(shape, other, strict=True)
    )


def _range(low: float, high: float) -> str:
    if low == -INFINITY and high == INFINITY:
        return ""
    if high == INFINITY:
        return f" >= {low:g}"
    return f" in [{low:g}, {high:g}]"


def _check_type(
    xp: Namespace, function: str, parameter: str, array: Array, kinds: tuple[str, ...], words: str
) -> Array:
    if not xp.isdtype(array.dtype, kinds):
        name = getattr(array.dtype, "name", array.dtype)
        raise TypeError(f"{function}: {parameter} must have {words}; got {name}")
    return array


def _whole(function: str, parameter: str, value: Any) -> int:
    number = check_number(function, parameter, value)
    if not number.is_integer():
        raise ValueError(f"{function}: {parameter} must be a whole number; got {value!r}")
    return check_integer(function, parameter, int(number), 1)


def _kind(value: Any) -> str:
    """How a message shows a value: numbers and strings as they are, the rest by type."""
    if value is None or isinstance(value, (bool, numbers.Number, str)):
        return repr(value)
    return type(value).__name__
