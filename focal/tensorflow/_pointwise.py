"""A formula of the core as a differentiable TensorFlow operation.

The value and the slope are each a `tf.custom_gradient`: the gradient of one is the next formula,
and what lies beyond the second derivative is left to autodiff. Both keep logits and targets and
recompute the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import tensorflow as tf
from tensorflow import Tensor

from focal.core import checks
from focal.core.namespace import Formula, Namespace
from focal.tensorflow import _ops

__all__ = ["pointwise", "pointwise_sum"]

xp = cast(Namespace, _ops)
Targets = Tensor | float
Function = Callable[[Tensor, Targets], Tensor]


def pointwise(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """`formula.value` in the type of x, with its registered derivative."""
    return tf.cast(_value(formula, *_wide_pair(x, t)), x.dtype)


def pointwise_sum(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """The sum of `formula.value`, in float32 or better."""
    return tf.reduce_sum(_value(formula, *_wide_pair(x, t)))


def _value(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """FL(x, t) of each logit."""
    return _registered(
        lambda x, t: formula.value(xp, x, t), lambda x, t: _slope(formula, x, t), x, t
    )


def _slope(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """dFL/dx of each logit."""
    return _registered(
        lambda x, t: formula.value_and_grad(xp, x, t)[1],
        lambda x, t: formula.hess(xp, x, t),
        x,
        t,
    )


def _registered(function: Function, derivative: Function, x: Tensor, t: Targets) -> Tensor:
    """function(x, t), with its derivative in x as given and in dense targets by autodiff."""
    dense = isinstance(t, Tensor) and t.dtype.is_floating
    # A tape also follows what a custom gradient only captures.
    fixed = tf.stop_gradient(t) if dense else t

    @tf.custom_gradient
    def by_x(x: Tensor) -> Any:
        return function(x, fixed), lambda upstream: upstream * derivative(x, t)

    @tf.custom_gradient
    def by_t(t: Tensor) -> Any:
        def grad(upstream: Tensor) -> Tensor:
            with tf.GradientTape() as tape:
                tape.watch(t)
                result = function(x, t)
            return tape.gradient(result, t, upstream)

        return tf.zeros_like(t), grad

    # Two functions of one argument, because one of two would work out both derivatives although
    # that in the targets is hardly ever wanted.
    return by_x(x) + by_t(t) if dense else by_x(x)


def _wide_pair(x: Tensor, t: Targets) -> tuple[Tensor, Targets]:
    """Logits and dense targets in the type to compute in; labels and numbers as they are."""
    x = checks.wide(xp, x)
    dense = isinstance(t, Tensor) and t.shape.rank == x.shape.rank
    return x, tf.cast(t, x.dtype) if dense else t
