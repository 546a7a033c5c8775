"""The core's array namespace on NumPy."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy import (  # noqa: F401  (the standard part of the namespace)
    abs,
    any,
    argsort,
    clip,
    concat,
    exp,
    finfo,
    float32,
    isdtype,
    log,
    log1p,
    max,
    maximum,
    minimum,
    moveaxis,
    reshape,
    shape,
    sqrt,
    stack,
    sum,
    take,
    take_along_axis,
    where,
    zeros_like,
)
from numpy import int64 as index_type  # noqa: F401
from numpy.typing import ArrayLike, NDArray

from focal.core import softmax
from focal.core.namespace import Array, Formula, Framework, Namespace
from focal.core.parameters import wide_operands
from focal.kernels import numpy_boxes

input_type, array_type = ArrayLike, np.ndarray
xp = cast(Framework[ArrayLike, NDArray[Any]], sys.modules[__name__])

array_name = "array-like"


def to_array(value: object) -> Array | None:
    """Arrays, numbers and nested sequences of numbers."""
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        return None
    return None if array.dtype.kind in "OSUMmV" else array


def astype(x: Array, dtype: Any) -> Array:
    """In another type; NumPy 2.0's own function refuses its scalars."""
    return np.asarray(x).astype(dtype)


def constant(value: Any, like: Array) -> Array:
    """NumPy arrays are arrays already."""
    return value


def to_numpy(x: Array) -> Array:
    """It is one."""
    return x


def stop_gradient(x: Array) -> Array:
    """NumPy has no autodiff."""
    return x


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def logsumexp(x: Array) -> Array:
    """Over the last axis."""
    top = np.max(x, axis=-1, keepdims=True)
    return np.squeeze(top, -1) + np.log(np.sum(np.exp(x - top), axis=-1))


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The k greatest of the last axis and where they are, greatest first."""
    indices = np.argsort(-x, axis=-1, stable=True)[..., :k]
    return np.take_along_axis(x, indices, axis=-1), indices


def take_rows(x: Array, indices: Array) -> Array:
    """x[..., indices[..., n], :] of each n."""
    *lead, count, width = x.shape
    start = count * np.arange(math.prod(lead)).reshape(*lead, 1)
    return np.take(x.reshape(-1, width), start + indices, axis=0)  # copies whole rows


def step(x: Array) -> Array:
    """1 where x >= 0, else 0."""
    return np.asarray(x >= 0).astype(x.dtype)


def addcmul(a: Array, b: Array, c: Array) -> Array:
    """A + b * c."""
    return a + b * c


def put_along_axis(x: Array, indices: Array, values: Array) -> Array:
    """A copy of x with one value replaced in each row."""
    result = np.array(x)
    np.put_along_axis(result, indices, values, axis=-1)
    return result


def keep_rows(x: Array, keep: Array) -> Array:
    """Rows that are not kept become exact zeros."""
    return np.where(keep[..., None], x, np.zeros_like(x))


def pointwise(formula: Formula, x: Array, t: Array) -> Array:
    """NumPy has no autodiff: the value itself."""
    return np.asarray(formula.value(xp, *wide_operands(xp, x, t))).astype(x.dtype)


def pointwise_sum(formula: Formula, x: Array, t: Array) -> Array:
    """The sum of the values, in float32 or better."""
    return np.sum(formula.value(xp, *wide_operands(xp, x, t)))


def label_margin(x: Array, at: Array, valid: Array) -> Array:
    """NumPy has no autodiff: the value itself."""
    return softmax.margin(xp, x, at, valid)[0]


def fori_loop(n: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """A plain loop."""
    for i in range(n):
        state = body(i, state)
    return state


def while_loop(
    condition: Callable[..., Array], body: Callable[..., Any], state: tuple[Array, ...]
) -> tuple[Array, ...]:
    """A plain loop."""
    while condition(*state):
        state = body(*state)
    return state


def fixed_point(step: Callable[[Array], Array], start: Array) -> Array:
    """Repeat until nothing changes."""
    while True:
        following = step(start)
        if np.array_equal(following, start):
            return following
        start = following


def take_box(boxes: Array, i: int) -> tuple[Array, ...]:
    """x1, y1, x2, y2 of box i of each list."""
    return tuple(boxes[..., i, k : k + 1] for k in range(4))


def boxes_at_once(boxes: Array) -> int:
    """One fits the cache."""
    return 1


def box_kernels(boxes: Array, others: Array | None) -> ModuleType | None:
    """Those of NumPy; a batch is faster in large steps."""
    there = boxes.size and (others is None or others.size)
    return numpy_boxes if there and boxes.ndim == 2 else None


sweep = None
softmax_pass = None


def compress(rows: Sequence[Array], keep: Array) -> Sequence[Array]:
    """A batch must stay rectangular, and one list has a kernel."""
    return rows


def compiled(function: Callable[..., Any], xp: Namespace, *arrays: Any) -> Any:
    """NumPy has no compiler."""
    return function(xp, *arrays)


def select(function: Callable[..., tuple[Array, Array]], xp: Namespace, *arrays: Any) -> Array:
    """The kept ones."""
    order, keep = function(xp, *arrays)
    return order[keep]


def random(like: Array) -> Array:
    """From a generator with a seed of the operating system."""
    return np.random.default_rng().random(like.shape, np.float32)
