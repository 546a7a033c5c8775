"""A formula of the core as a differentiable JAX function.

The value and the slope are each a `jax.custom_jvp`: the tangent of one is the next formula,
and what lies beyond the second derivative is left to JAX. A derivative in the targets is only
formed where someone asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from focal.core import checks
from focal.core.namespace import Formula, Namespace
from focal.jax import _ops

__all__ = ["pointwise", "pointwise_sum"]

xp = cast(Namespace, _ops)
Targets = Array | float


def pointwise(formula: Formula, x: Array, t: Targets) -> Array:
    """`formula.value` in the type of x, with its registered derivative."""
    return _value(formula, *_wide_pair(x, t)).astype(x.dtype)


def pointwise_sum(formula: Formula, x: Array, t: Targets) -> Array:
    """The sum of `formula.value`, in float32 or better."""
    return jnp.sum(_value(formula, *_wide_pair(x, t)))


# Compiled, so that outside of `jit` too a loss is one pass over the logits.
_compiled = partial(jax.jit, static_argnums=0, inline=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@_compiled
def _value(formula: Formula, x: Array, t: Targets) -> Array:
    """FL(x, t) of each logit."""
    return formula.value(xp, x, t)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@_compiled
def _value_and_slope(formula: Formula, x: Array, t: Targets) -> tuple[Array, Array]:
    """FL(x, t) and dFL/dx."""
    return formula.value_and_grad(xp, x, t)


@_compiled
def _hess(formula: Formula, x: Array, t: Targets) -> Array:
    return formula.hess(xp, x, t)


@partial(_value.defjvp, symbolic_zeros=True)
def _value_jvp(
    formula: Formula, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    value, slope = _value_and_slope(formula, *primals)
    by_t = _by_t(formula.value, primals, tangents)
    return value, _total(slope, tangents, by_t)


@partial(_value_and_slope.defjvp, symbolic_zeros=True)
def _value_and_slope_jvp(
    formula: Formula, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    value, slope = _value_and_slope(formula, *primals)
    by_t = _by_t(formula.value_and_grad, primals, tangents)
    value_by_t, slope_by_t = (None, None) if by_t is None else by_t
    return (value, slope), (
        _total(slope, tangents, value_by_t),
        _total(_hess(formula, *primals), tangents, slope_by_t),
    )


def _by_t(function: Callable[..., Any], primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> Any:
    """What the tangent of the targets adds, by autodiff of the formula; None if there is none."""
    (x, t), (_, dt) = primals, tangents
    if isinstance(dt, SymbolicZero):
        return None
    return jax.jvp(partial(function, xp, x), (t,), (dt,))[1]


def _total(slope: Array, tangents: tuple[Any, Any], by_t: Array | None) -> Array:
    """The sum slope * dx + by_t, less what is not there."""
    dx = tangents[0]
    if isinstance(dx, SymbolicZero):
        return jnp.zeros_like(slope) if by_t is None else by_t
    return slope * dx if by_t is None else slope * dx + by_t


def _wide_pair(x: Array, t: Targets) -> tuple[Array, Targets]:
    """Logits and dense targets in the type to compute in; labels and numbers as they are."""
    x = checks.wide(xp, x)
    return x, t.astype(x.dtype) if isinstance(t, Array) and t.shape == x.shape else t
