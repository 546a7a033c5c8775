"""The core's array namespace on array_api_strict: proof that the core asks for no more.

The standard part is that of array_api_strict. What focal/core/namespace.py adds is written in
standard functions. Anything else that the core uses raises an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import array_api_strict as xp
import numpy as np
from array_api_strict import (  # noqa: F401
    abs,
    any,
    argsort,
    astype,
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
    sqrt,
    stack,
    sum,
    take,
    take_along_axis,
    where,
    zeros_like,
)
from array_api_strict import int64 as index_type  # noqa: F401

from focal.core import softmax
from focal.core.namespace import Formula, Namespace

Array = Any
input_type = array_type = type(xp.zeros(0))
array_name = "an array_api_strict array"
_self = cast(Namespace, sys.modules[__name__])


def to_array(value: object) -> Array | None:
    return value if isinstance(value, type(xp.zeros(0))) else None


def constant(value: Any, like: Array) -> Array:
    return xp.asarray(value)


def shape(x: Array) -> tuple[int, ...]:
    return tuple(x.shape)


def to_numpy(x: Array) -> Any:
    return np.asarray(x)


def stop_gradient(x: Array) -> Array:
    return x


def sigmoid(x: Array) -> Array:
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1.0, e) / (1.0 + e)


def softplus(x: Array) -> Array:
    return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))


def logsumexp(x: Array) -> Array:
    top = xp.max(x, axis=-1, keepdims=True)
    return xp.squeeze(top, axis=-1) + xp.log(xp.sum(xp.exp(x - top), axis=-1))


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    indices = xp.argsort(-x, axis=-1, stable=True)[..., :k]
    return xp.take_along_axis(x, indices, axis=-1), indices


def take_rows(x: Array, indices: Array) -> Array:
    columns = [xp.take_along_axis(x[..., i], indices, axis=-1) for i in range(x.shape[-1])]
    return xp.stack(columns, axis=-1)


def step(x: Array) -> Array:
    return xp.astype(x >= 0, x.dtype)


def addcmul(a: Array, b: Array, c: Array) -> Array:
    return a + b * c


def put_along_axis(x: Array, indices: Array, values: Array) -> Array:
    here = xp.arange(x.shape[-1], dtype=indices.dtype) == indices
    return xp.where(here, values, x)


def keep_rows(x: Array, keep: Array) -> Array:
    return xp.where(keep[..., None], x, 0.0)


def pointwise(formula: Formula, x: Array, t: Any) -> Array:
    return formula.value(_self, x, _same_type(x, t))


def pointwise_sum(formula: Formula, x: Array, t: Any) -> Array:
    return xp.sum(pointwise(formula, x, t))


def label_margin(x: Array, at: Array, valid: Array) -> Array:
    return softmax.margin(_self, x, at, valid)[0]


def fori_loop(n: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    for i in range(n):
        state = body(i, state)
    return state


def while_loop(
    condition: Callable[..., Array], body: Callable[..., Any], state: tuple[Array, ...]
) -> tuple[Array, ...]:
    while condition(*state):
        state = body(*state)
    return state


def fixed_point(step: Callable[[Array], Array], start: Array) -> Array:
    following = step(start)
    while bool(xp.any(following != start)):
        start, following = following, step(following)
    return following


def take_box(boxes: Array, i: int) -> tuple[Array, ...]:
    return tuple(boxes[..., i, k : k + 1] for k in range(4))


def boxes_at_once(boxes: Array) -> int:
    return 1


def box_kernels(boxes: Array, others: Array | None) -> None:
    return None


sweep = None
softmax_pass = None


def compress(rows: Sequence[Array], keep: Array) -> Sequence[Array]:
    return rows


def compiled(function: Callable[..., Any], xp: Any, *arrays: Any) -> Any:
    return function(xp, *arrays)


def select(function: Callable[..., tuple[Array, Array]], xp: Any, *arrays: Any) -> Array:
    order, keep = function(xp, *arrays)
    return order[keep]


def random(like: Array) -> Array:
    return xp.asarray(np.random.default_rng().random(like.shape, np.float32))


def _same_type(x: Array, t: Any) -> Any:
    """Dense targets in the type of the logits; numbers and labels as they are."""
    dense = to_array(t) is not None and t.shape == x.shape
    return xp.astype(t, x.dtype) if dense else t
