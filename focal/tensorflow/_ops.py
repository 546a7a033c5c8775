"""The operations of the core's array namespace on TensorFlow (all but `pointwise`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow import (  # noqa: F401  (the part that has the standard's names)
    Tensor,
    abs,
    concat,
    exp,
    float32,
    reshape,
    sqrt,
    stack,
    stop_gradient,
    zeros_like,
)
from tensorflow import cast as astype
from tensorflow import clip_by_value as clip  # noqa: F401
from tensorflow import int64 as index_type
from tensorflow.math import log, log1p  # noqa: F401

array_name = "a tf.Tensor or what converts to one"


def to_array(value: Any) -> Tensor | None:
    """What TensorFlow's functions take: tensors, variables, arrays, numbers and lists of them."""
    if not isinstance(value, Tensor):
        try:
            value = tf.convert_to_tensor(value)
        except (TypeError, ValueError):
            return None
    kinds = ("bool", "integral", "real floating", "complex floating")
    return value if isdtype(value.dtype, kinds) else None


def constant(value: Any, like: Tensor | None) -> Tensor:
    """An array as a tensor; TensorFlow places it."""
    return tf.convert_to_tensor(value)


def to_numpy(x: Tensor) -> Any | None:
    """In eager mode, on a CPU."""
    return x.numpy() if tf.executing_eagerly() and "CPU" in x.device else None


# The standard part, where TensorFlow has other names


class finfo(NamedTuple):
    """Limits of a floating-point type, as Python numbers, which take the type of a tensor."""

    dtype: tf.DType

    @property
    def bits(self) -> int:
        return 8 * int(self.dtype.size)

    @property
    def max(self) -> float:
        return float(self.dtype.max)

    @property
    def min(self) -> float:
        return float(self.dtype.min)

    @property
    def eps(self) -> float:
        return float(np.finfo(self.dtype.as_numpy_dtype).eps)

    @property
    def smallest_normal(self) -> float:
        return float(np.finfo(self.dtype.as_numpy_dtype).smallest_normal)


def isdtype(dtype: tf.DType, kind: str | tuple[str, ...]) -> bool:
    """Whether a type is of one of the array API's kinds."""
    own = {
        "bool": dtype.is_bool,
        "integral": dtype.is_integer,
        "real floating": dtype.is_floating,
        "complex floating": dtype.is_complex,
    }
    kinds = (kind,) if isinstance(kind, str) else kind
    return True in [own[k] for k in kinds]


def shape(x: Tensor) -> tuple[Any, ...]:
    """Sizes as integers, or as scalar tensors while tracing with a size that is not known."""
    traced: Any = None if x.shape.is_fully_defined() else tf.shape(x, index_type)
    return tuple(traced[i] if n is None else n for i, n in enumerate(x.shape))


def argsort(x: Tensor, axis: int = -1, stable: bool = True) -> Tensor:
    """Rising order; equal values keep theirs. NaN goes to the end, as in NumPy."""
    if x.dtype.is_floating:  # the sort would not be defined with NaN in it
        x = tf.where(tf.math.is_nan(x), tf.constant(math.inf, x.dtype), tf.minimum(x, x.dtype.max))
    return astype(tf.argsort(x, axis=axis, stable=stable), index_type)


def any(x: Tensor, axis: int) -> Tensor:
    """Over one axis."""
    return tf.reduce_any(x, axis=axis)


def max(x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
    """Over one axis."""
    return tf.reduce_max(x, axis=axis, keepdims=keepdims)


def sum(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Over one axis or all."""
    return tf.reduce_sum(x, axis=axis, keepdims=keepdims)


def maximum(x: Tensor, y: Tensor | float) -> Tensor:
    """At equality with a tensor both share the gradient; with a number, x gets all of it."""
    return _extremum(tf.maximum, tf.greater, x, y) if isinstance(y, Tensor) else tf.maximum(x, y)


def minimum(x: Tensor, y: Tensor | float) -> Tensor:
    """At equality with a tensor both share the gradient; with a number, x gets all of it."""
    return _extremum(tf.minimum, tf.less, x, y) if isinstance(y, Tensor) else tf.minimum(x, y)


def _extremum(
    function: Callable[..., Tensor], wins: Callable[..., Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """tf.maximum and tf.minimum give the whole gradient of equal values to the first."""

    @tf.custom_gradient
    def shared(x: Tensor, y: Tensor) -> Any:
        def grad(upstream: Tensor) -> tuple[Tensor, Tensor]:
            won, lost = astype(wins(x, y), x.dtype), astype(wins(y, x), x.dtype)
            by_x = upstream * (0.5 * (won + (1 - lost)))
            by_y = upstream * (0.5 * (lost + (1 - won)))
            axes = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(x), s1=tf.shape(y))
            by_x, by_y = tf.reduce_sum(by_x, axes[0]), tf.reduce_sum(by_y, axes[1])
            return tf.reshape(by_x, tf.shape(x)), tf.reshape(by_y, tf.shape(y))

        return function(x, y), grad

    return shared(x, y)


def where(condition: Tensor, x: Tensor | float, y: Tensor) -> Tensor:
    """A number takes the type of y."""
    return tf.where(condition, tf.convert_to_tensor(x, y.dtype), y)


def moveaxis(x: Tensor, source: int, destination: int) -> Tensor:
    """One axis to another place."""
    axes = list(range(x.shape.rank))
    axes.insert(destination % len(axes), axes.pop(source))
    return x if axes == sorted(axes) else tf.transpose(x, axes)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of the last axis and where they are, greatest first."""
    values, indices = tf.math.top_k(x, k)
    return values, astype(indices, index_type)


def take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """The slices at one-dimensional `indices`."""
    return tf.gather(x, indices, axis=axis)


def take_along_axis(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """One element per index, on the last axis."""
    return tf.gather(x, indices, axis=axis, batch_dims=indices.shape.rank - 1)


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """x[..., indices[..., n], :] of each n."""
    return tf.gather(x, indices, axis=-2, batch_dims=indices.shape.rank - 1)


# Stable primitives: TensorFlow's own err by up to 7 ULP where they are small


@tf.custom_gradient
def sigmoid(x: Tensor) -> Any:
    """1 / (1 + exp(-x))."""
    e = tf.exp(tf.minimum(x, -x))
    value = where(x >= 0, 1.0, e) / (1 + e)
    return value, lambda upstream: upstream * (sigmoid(x) * sigmoid(-x))


@tf.custom_gradient
def softplus(x: Tensor) -> Any:
    """log(1 + exp(x))."""
    value = tf.maximum(x, 0) + tf.math.log1p(tf.exp(-tf.abs(x)))
    return value, lambda upstream: upstream * sigmoid(x)


def logsumexp(x: Tensor) -> Tensor:
    """Over the last axis."""
    return tf.reduce_logsumexp(x, axis=-1)


# Fused operations: XLA fuses them by itself


def step(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0."""
    return astype(x >= 0, x.dtype)


def addcmul(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor | float:
    """A + b * c."""
    return a + b * c


def put_along_axis(x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """One value replaced in each row; XLA fuses a comparison, but not a scatter."""
    here = tf.range(tf.shape(x, indices.dtype)[-1]) == indices
    return tf.where(here, values, x)


def keep_rows(x: Tensor, keep: Tensor) -> Tensor:
    """Rows that are not kept become exact zeros."""
    return tf.where(keep[..., None], x, tf.zeros((), x.dtype))


# Loops and selections: the graph's own where they are traced


def fori_loop(n: Any, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """A plain loop over values, one `tf.while_loop` while tracing."""
    if tf.executing_eagerly():
        for i in range(n):
            state = body(i, state)
        return state
    # TensorFlow promotes no types, so i counts in that of the state.
    dtype = state[0].dtype

    stop = astype(n, dtype)

    def advance(i: Tensor, state: Any) -> Any:
        return i + 1, body(i, state)

    return tf.while_loop(lambda i, _: i < stop, advance, (tf.zeros_like(stop), state))[1]


def while_loop(
    condition: Callable[..., Tensor], body: Callable[..., Any], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A plain loop over values, one of the graph while tracing."""
    return tf.while_loop(condition, body, state)


def fixed_point(step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Repeat until nothing changes."""

    def advance(current: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        following = step(current)
        return following, tf.reduce_any(following != current)

    return tf.while_loop(lambda _, changed: changed, advance, advance(start, None))[0]


def take_box(boxes: Tensor, i: Tensor | int) -> Sequence[Tensor]:
    """x1, y1, x2, y2 of box i of each list."""
    return tf.split(tf.gather(boxes, astype(i, tf.int32), axis=-2), 4, axis=-1)


def boxes_at_once(boxes: Tensor) -> int:
    """One fits the cache."""
    return 1


def box_kernels(boxes: Tensor, others: Tensor | None) -> None:
    """There are none; AutoGraph needs a statement to convert."""
    return


sweep = None
softmax_pass = None


def compress(rows: Sequence[Tensor], keep: Tensor) -> Sequence[Tensor]:
    """The kept ones; a batch must stay rectangular, and XLA must know its shapes."""
    if keep.shape.rank > 1 or not tf.executing_eagerly():
        return rows
    return [tf.boolean_mask(row, keep) for row in rows]


def compiled(function: Callable[..., Any], xp: Any, *arrays: Any) -> Any:
    """Eager operations are compiled already."""
    return function(xp, *arrays)


def select(function: Callable[..., tuple[Tensor, Tensor]], xp: Any, *arrays: Any) -> Tensor:
    """The kept ones; a graph need not know how many."""
    order, keep = function(xp, *arrays)
    return tf.boolean_mask(order, keep)


def random(like: Tensor) -> Tensor:
    """From TensorFlow's own generator, which `tf.random.set_seed` seeds; a graph draws anew."""
    return tf.random.uniform(tf.shape(like))
