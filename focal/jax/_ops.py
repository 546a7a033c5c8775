"""The operations of the core's array namespace on JAX (all but `pointwise`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.lax import stop_gradient  # noqa: F401
from jax.nn import sigmoid, softplus  # noqa: F401
from jax.numpy import (  # noqa: F401  (the part that has the standard's names)
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
    convert = getattr(value, "__jax_array__", None)  # such as nnx.Param has
    return None if convert is None else _asarray(convert())


def constant(value: Any, like: Array | None) -> Array:
    """A NumPy array, not committed to a device, so that it goes where `like` is."""
    return _asarray(value)


def to_numpy(x: Array) -> Any | None:
    """Where it is not traced, on a CPU."""
    on_cpu = not _is_traced(x) and {device.platform for device in x.devices()} == {"cpu"}
    return np.asarray(x) if on_cpu else None


# The standard part, where JAX's own function has another gradient or is less exact


# Compiled, so that outside of `jit` too each is one operation.
_operation = partial(jax.jit, inline=True)


@jax.custom_jvp
def abs(x: Array) -> Array:
    """|x|, of slope 0 at 0; JAX's own has 1 there."""
    return jax.numpy.abs(x)


abs.defjvps(lambda dx, _, x: dx * jax.numpy.sign(x))


def maximum(x: Array, y: Array | float) -> Array:
    """At equality with an array both share the gradient; with a number, x gets all of it."""
    return _at_least(x, y) if isinstance(y, Real) else jax.numpy.maximum(x, y)


def minimum(x: Array, y: Array | float) -> Array:
    """At equality with an array both share the gradient; with a number, x gets all of it."""
    return _at_most(x, y) if isinstance(y, Real) else jax.numpy.minimum(x, y)


@_operation
def _at_least(x: Array, y: float) -> Array:
    return where(x < y, y, x)


@_operation
def _at_most(x: Array, y: float) -> Array:
    return where(x > y, y, x)


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


def take_rows(x: Array, indices: Array) -> Array:
    """x[..., indices[..., n], :] of each n."""
    return take_along_axis(x, indices[..., None], axis=-2)


# Operations that XLA fuses with their neighbors


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


# Loops and selections, which depend on values: JAX's control flow where they are traced

BLOCK, CPU_BLOCK = 128, 32
"""Boxes per block of `sweep`: few steps for accelerators, few overlaps for a CPU's cache."""

SHORTEST = 256
"""Least length that `select` pads to."""


def fori_loop(n: Any, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """A plain loop over values; over tracers, which the first step shows, a loop of JAX."""
    if not isinstance(n, int):  # symbolic
        return lax.fori_loop(0, n, body, state)
    for i in range(n):
        state = body(i, state)
        if i == 0 and _is_traced(state[0]):
            return lax.fori_loop(1, n, body, state)
    return state


def while_loop(
    condition: Callable[..., Array], body: Callable[..., Any], state: tuple[Array, ...]
) -> tuple[Array, ...]:
    """A loop of JAX."""
    return lax.while_loop(lambda state: condition(*state), lambda state: body(*state), state)


def fixed_point(step: Callable[[Array], Array], start: Array) -> Array:
    """Repeat until nothing changes."""

    def advance(state: tuple[Array, Array]) -> tuple[Array, Array]:
        following = step(state[0])
        return following, any(following != state[0])

    return lax.while_loop(lambda state: state[1], advance, (start, any(start == start)))[0]


def take_box(boxes: Array, i: Array | int) -> tuple[Array, ...]:
    """x1, y1, x2, y2 of box i of each list."""
    box = lax.dynamic_index_in_dim(boxes, i, axis=-2, keepdims=False)
    return tuple(box[..., k : k + 1] for k in range(4))


def boxes_at_once(boxes: Array) -> int:
    """One fits the cache."""
    return 1


def box_kernels(boxes: Array, others: Array | None) -> None:
    """There are none."""


softmax_pass = None


def sweep(
    drop: Callable[[Sequence[Array], Sequence[Array]], Array],
    settle: Callable[[Sequence[Array]], Array],
    rows: Sequence[Array],
) -> Array:
    """Blocks of one size in compiled loops: the program does not grow with the number of boxes."""
    of_size = partial(_sweep, drop, settle)
    return lax.platform_dependent(
        *rows, cpu=partial(of_size, CPU_BLOCK), default=partial(of_size, BLOCK)
    )


def _sweep(
    drop: Callable[[Sequence[Array], Sequence[Array]], Array],
    settle: Callable[[Sequence[Array]], Array],
    length: int,
    *rows: Array,
) -> Array:
    areas, *others = rows
    size = areas.shape[-1]
    count = -(-size // length) or 1
    areas = _in_blocks(areas, count, length, np.inf)
    others = [_in_blocks(row, count, length, 0) for row in others]

    def block(i: Any, areas: Array) -> list[Array]:
        return [
            lax.dynamic_index_in_dim(row, i, axis=-2, keepdims=False) for row in (areas, *others)
        ]

    def resolve(i: Any, areas: Array) -> Array:
        area, *corners = block(i, areas)

        def after(earlier: Any, area: Array) -> Array:
            return drop([area, *corners], block(earlier, areas))

        area = settle([lax.fori_loop(0, i, after, area), *corners])
        return lax.dynamic_update_index_in_dim(areas, area, i, axis=areas.ndim - 2)

    areas = lax.fori_loop(0, count, resolve, areas)
    return reshape(areas, (*areas.shape[:-2], count * length))[..., :size]


def _in_blocks(row: Array, count: int, length: int, fill: float) -> Array:
    """(..., N) padded to (..., count, length)."""
    more = count * length - row.shape[-1]
    padding = [(0, 0)] * (row.ndim - 1) + [(0, more)]
    padded = jax.numpy.pad(row, padding, constant_values=fill)
    return reshape(padded, (*row.shape[:-1], count, length))


@partial(jax.jit, static_argnums=(0, 1))
def compiled(function: Callable[..., Any], xp: Any, *arrays: Any) -> Any:
    """Once for all arrays of the same shapes."""
    return function(xp, *arrays)


def select(function: Callable[..., tuple[Array, Array]], xp: Any, *arrays: Any) -> Array:
    """The kept ones; while tracing, padded with -1 to a static shape.

    Inputs are padded to a power of two, so that similar numbers of boxes share a compiled program.
    """
    try:
        values = [np.asarray(a) if isinstance(a, Array) else a for a in arrays]
    except jax.errors.TracerArrayConversionError:
        order, keep = function(xp, *arrays)
        first = argsort(~keep, stable=True)
        return where(take(keep, first), take(order, first), -1)
    with jax.default_device(next(iter(arrays[0].devices()))):
        order, keep = compiled(function, xp, *map(_lengthened, values))
        return jax.device_put(np.asarray(order)[np.asarray(keep)])  # which compiles nothing


def _lengthened(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    length = SHORTEST
    while length < len(value):
        length *= 2
    padding = [(0, length - len(value))] + [(0, 0)] * (value.ndim - 1)
    fill = 0 if value.dtype.kind in "iu" else np.nan
    return np.pad(value, padding, constant_values=fill)


def random(like: Array) -> Array | None:
    """From a generator with a seed of the operating system; traced, there are keys instead."""
    if _is_traced(like + 0):  # inside of `jit` every result is traced
        return None
    return _asarray(np.random.default_rng().random(like.shape, np.float32))


def _is_traced(x: Array) -> bool:
    try:
        x.devices()
    except jax.errors.ConcretizationTypeError:
        return True
    return False
