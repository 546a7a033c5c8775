"""A formula of the core as a differentiable JAX function.

The value and the slope are each a `jax.custom_jvp` whose tangent is the next formula; derivatives
beyond the second are left to JAX. Derivatives in the targets and in parameters that are arrays
are computed only where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from focal.core import parameters, softmax
from focal.core.logarithm import log1p_from_minus_half
from focal.core.namespace import Formula, Namespace
from focal.jax import _ops

__all__ = ["label_margin", "pointwise", "pointwise_sum"]


@jax.custom_jvp
def _log1p(x: Array) -> Array:
    return log1p_from_minus_half(x) if x.dtype == jnp.float32 else _ops.log1p(x)


_log1p.defjvps(lambda dx, _, x: dx / (1 + x))

xp = cast(Namespace, _ops)
loop_xp = cast(Namespace, SimpleNamespace(**{**vars(_ops), "log1p": _log1p}))
"""For formulas alone: their log1p is of [-1/2, 0]."""

Targets = Array | float
MIN_ROW, MAX_ROW = 8, 1024
Numbers = tuple[Array, ...]
"""The parameters of a formula that are arrays."""


def pointwise(formula: Formula, x: Array, t: Targets) -> Array:
    """`formula.value` in the type of x, with its registered derivative."""
    formula, numbers = parameters.split(formula)
    return _each(formula, x, t, numbers)


def pointwise_sum(formula: Formula, x: Array, t: Targets) -> Array:
    """The sum of `formula.value`, in float32 or better."""
    formula, numbers = parameters.split(formula)
    return _total(formula, x, t, numbers)


# Compiled, so that outside of `jit` too a loss is one program, and called as fast as one.
_compiled = partial(jax.jit, static_argnums=0, inline=True)


@_compiled
def _each(formula: Formula, x: Array, t: Targets, numbers: Numbers) -> Array:
    return _value(formula, *parameters.wide_operands(xp, x, t), numbers).astype(x.dtype)


@_compiled
def _total(formula: Formula, x: Array, t: Targets, numbers: Numbers) -> Array:
    return _sum(_value(formula, *parameters.wide_operands(xp, x, t), numbers))


@jax.custom_jvp
def _sum(values: Array) -> Array:
    """Of a loop that ends in a mere sum, XLA for CPUs makes several, with arrays between them."""
    return lax.platform_dependent(values, cpu=_times_ones, default=jnp.sum)


_sum.defjvps(lambda tangent, _, values: jnp.sum(tangent))


def _times_ones(values: Array) -> Array:
    """The sum as a product, which XLA does not turn into a sum while it does not see the ones.

    In rows that are short, as their numbers are added one after the other, but not too short.
    """
    last = values.shape[-1] if values.ndim else 1
    if not (isinstance(last, int) and MIN_ROW <= last <= MAX_ROW):
        width = math.gcd(values.size, MAX_ROW) if isinstance(values.size, int) else 1
        if width < MIN_ROW or any(jax.typeof(values).sharding.spec):  # these cannot be reshaped
            return jnp.sum(values)
        values = values.reshape(-1, width)
    ones = lax.optimization_barrier(jnp.ones(values.shape[-1:], values.dtype))
    return jnp.sum(jnp.matmul(values, ones, precision=lax.Precision.HIGHEST))


@jax.custom_jvp
def label_margin(x: Array, at: Array, valid: Array) -> Array:
    """`focal.core.softmax.margin`, with its derivative, also where classes are masked."""
    return softmax.margin(xp, x, at, valid)[0]


@label_margin.defjvp
def _label_margin_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    z, odds = softmax.margin(xp, *primals)
    slopes = softmax.margin_grad(xp, odds, primals[1], jnp.ones_like(z))
    return z, jnp.sum(slopes * tangents[0], axis=-1)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(formula: Formula, x: Array, t: Targets, numbers: Numbers) -> Array:
    """FL(x, t) of each logit."""
    return parameters.fill(formula, numbers).value(loop_xp, x, t)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value_and_slope(
    formula: Formula, x: Array, t: Targets, numbers: Numbers
) -> tuple[Array, Array]:
    """FL(x, t) and dFL/dx."""
    return parameters.fill(formula, numbers).value_and_grad(loop_xp, x, t)


def _hess(formula: Formula, x: Array, t: Targets, numbers: Numbers) -> Array:
    return parameters.fill(formula, numbers).hess(loop_xp, x, t)


@partial(_value.defjvp, symbolic_zeros=True)
def _value_jvp(
    formula: Formula, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    value, slope = _value_and_slope(formula, *primals)
    by_others = _by_others(_value.fun, formula, primals, tangents)
    return value, _tangent(slope, tangents, by_others)


@partial(_value_and_slope.defjvp, symbolic_zeros=True)
def _value_and_slope_jvp(
    formula: Formula, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    value, slope = _value_and_slope(formula, *primals)
    by_others = _by_others(_value_and_slope.fun, formula, primals, tangents)
    value_by_others, slope_by_others = (None, None) if by_others is None else by_others
    return (value, slope), (
        _tangent(slope, tangents, value_by_others),
        _tangent(_hess(formula, *primals), tangents, slope_by_others),
    )


def _by_others(
    function: Callable[..., Any],
    formula: Formula,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> Any:
    """What the tangents of targets and parameters add, by autodiff; None if there are none."""
    x, *others = primals
    _, *others_tangents = tangents
    leaves, tree = jax.tree.flatten(others)
    directions = jax.tree.leaves(others_tangents, is_leaf=lambda a: isinstance(a, SymbolicZero))
    moving = [i for i, d in enumerate(directions) if not isinstance(d, SymbolicZero)]
    if not moving:
        return None

    def of_moving(*values: Array) -> Any:
        given = dict(zip(moving, values, strict=True))
        filled = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(formula, x, *jax.tree.unflatten(tree, filled))

    return jax.jvp(
        of_moving, tuple(leaves[i] for i in moving), tuple(directions[i] for i in moving)
    )[1]


def _tangent(slope: Array, tangents: tuple[Any, ...], by_others: Array | None) -> Array:
    """The sum of slope * dx and by_others, either of which may be absent."""
    dx = tangents[0]
    if isinstance(dx, SymbolicZero):
        return jnp.zeros_like(slope) if by_others is None else by_others
    return slope * dx if by_others is None else slope * dx + by_others
