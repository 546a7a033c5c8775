"""The operations of the core's array namespace on JAX (all but `pointwise`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.nn import sigmoid, softplus  # noqa: F401
from jax.numpy import (  # noqa: F401  (the part that has the standard's names)
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
from jax.numpy import asarray as _asarray

array_name = "a JAX or NumPy array"

index_type = int
"""int32, or int64 under `jax_enable_x64`: JAX reads Python's type that way."""


def to_array(value: object) -> Array | None:
    """What `jax.numpy` functions take for an array; no lists, as there."""
    if isinstance(value, Array):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return None if value.dtype.kind in "OSUMm" else _asarray(value)
    return _asarray(value) if hasattr(value, "__jax_array__") else None  # such as nnx.Param


def constant(value: Any, like: Array | None) -> Array:
    """A NumPy array, not committed to a device, so that it goes where `like` is."""
    return _asarray(value)


def to_numpy(x: Array) -> Any | None:
    """Where it is not traced, on a CPU."""
    on_cpu = not _is_traced(x) and {device.platform for device in x.devices()} == {"cpu"}
    return np.asarray(x) if on_cpu else None


def stop_gradient(x: Array) -> Array:
    """A constant in the eyes of autodiff."""
    return lax.stop_gradient(x)


def log1p(x: Array) -> Array:
    """log(1 + x); XLA's own, on a CPU in float64, errs by 129 ULP near -0.41 (jax#39707)."""
    if x.dtype != np.float64:
        return jax.numpy.log1p(x)
    return where(x < -0.25, log(1 + x), jax.numpy.log1p(x))


def logsumexp(x: Array) -> Array:
    """Over the last axis."""
    return jax.nn.logsumexp(x, axis=-1)


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The k greatest of the last axis and where they are, greatest first."""
    values, indices = lax.top_k(x, k)
    return values, indices


# Operations that XLA fuses with their neighbours


def step(x: Array) -> Array:
    """1 where x >= 0, else 0."""
    return (x >= 0).astype(x.dtype)


def addcmul(a: Array | float, b: Array | float, c: Array | float) -> Array | float:
    """A + b * c."""
    return a + b * c


def put_along_axis(x: Array, indices: Array, values: Array) -> Array:
    """One value replaced in each row; XLA fuses the comparison but would not fuse a scatter."""
    here = lax.broadcasted_iota(indices.dtype, x.shape, x.ndim - 1) == indices
    return where(here, values, x)


def keep_rows(x: Array, keep: Array) -> Array:
    """Rows that are not kept become exact zeros."""
    return where(keep[..., None], x, zeros_like(x))


# Loops and selections, which depend on values: JAX's own control flow where they are traced


def fori_loop(n: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """A plain loop over values; one compiled step over tracers, which the first step reveals."""
    for i in range(n):
        state = body(i, state)
        if i == 0 and _is_traced(state):
            return lax.fori_loop(1, n, body, state)
    return state


def fixed_point(step: Callable[[Array], Array], start: Array) -> Array:
    """Repeat until nothing changes."""

    def advance(state: tuple[Array, Array]) -> tuple[Array, Array]:
        following = step(state[0])
        return following, any(following != state[0])

    state = advance((start, start))
    if _is_traced(state):
        return lax.while_loop(lambda state: state[1], advance, state)[0]
    while state[1]:
        state = advance(state)
    return state[0]


def take_box(boxes: Array, i: Array | int) -> tuple[Array, ...]:
    """x1, y1, x2, y2 of box i of each list."""
    box = lax.dynamic_index_in_dim(boxes, i, axis=-2, keepdims=False)
    return tuple(box[..., k : k + 1] for k in range(4))


def select_kept(order: Array, keep: Array) -> Array:
    """The kept ones; while their number is not known, padded with -1 to a static shape."""
    if not _is_traced((order, keep)):
        return order[keep]
    first = argsort(~keep, stable=True)
    return where(take(keep, first), take(order, first), -1)


def _is_traced(state: Any) -> bool:
    return not all(not isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state))
