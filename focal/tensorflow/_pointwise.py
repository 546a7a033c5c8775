"""A formula of the core as a differentiable TensorFlow operation.

The value and the slope are each a `tf.custom_gradient` whose gradient is the next formula;
derivatives beyond the second are left to autodiff. Both save logits and targets and recompute the
rest. In a graph on a CPU each is a program that XLA makes one loop of, where XLA is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import tensorflow as tf
from tensorflow import Tensor

from focal.core import parameters, softmax
from focal.core.logarithm import log1p_from_minus_half
from focal.core.namespace import Formula, Namespace
from focal.tensorflow import _ops

__all__ = ["label_margin", "pointwise", "pointwise_sum"]


@tf.custom_gradient
def _log1p(x: Tensor) -> Any:
    value = log1p_from_minus_half(x) if x.dtype == tf.float32 else tf.math.log1p(x)
    return value, lambda upstream: upstream / (1 + x)


xp = cast(Namespace, _ops)
loop_xp = cast(Namespace, SimpleNamespace(**{**vars(_ops), "log1p": _log1p}))
"""For formulas alone: their log1p is of [-1/2, 0]."""

Targets: TypeAlias = Tensor | float
Function = Callable[[Formula, Tensor, Targets], Tensor]


def pointwise(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """`formula.value` in the type of x, with its registered derivative."""
    return tf.cast(_value(formula, *parameters.wide_operands(xp, x, t)), x.dtype)


def pointwise_sum(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """The sum of `formula.value`, in float32 or better."""
    operands = parameters.wide_operands(xp, x, t)
    return _registered(_apply_sum, _slope, formula, *operands)


def label_margin(x: Tensor, at: Tensor, valid: Tensor) -> Tensor:
    """`focal.core.softmax.margin`, with its derivative, also where classes are masked."""

    @tf.custom_gradient
    def of_logits(x: Tensor) -> Any:
        def grad(upstream: Tensor) -> Tensor:
            return softmax.margin_grad(xp, softmax.margin(xp, x, at, valid)[1], at, upstream)

        return softmax.margin(xp, x, at, valid)[0], grad

    return of_logits(x)


def _value(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """FL(x, t) of each logit."""
    return _registered(_apply_value, _slope, formula, x, t)


def _slope(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """dFL/dx of each logit."""
    return _registered(_apply_slope, _apply_hess, formula, x, t)


def _apply_value(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    with _one_loop(x, t) as xp:
        return formula.value(xp, x, t)


def _apply_sum(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    return tf.reduce_sum(_apply_value(formula, x, t))


def _apply_slope(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    with _one_loop(x, t) as xp:
        return formula.value_and_grad(xp, x, t)[1]


def _apply_hess(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    return formula.hess(xp, x, t)


@contextmanager
def _one_loop(x: Tensor, t: Targets) -> Iterator[Namespace]:
    """What to compute with: in a graph on a CPU, what XLA shall make one loop of."""
    shapes = [x.shape, tf.TensorShape(getattr(t, "shape", ()))]
    if (
        tf.executing_eagerly()
        or not all(shape.is_fully_defined() for shape in shapes)
        or tf.config.get_visible_devices("GPU")
    ):
        yield xp
        return
    # A hint, which a saved graph does without: where XLA is absent, operations run one by one.
    with tf.xla.experimental.jit_scope():
        yield loop_xp


def _registered(
    function: Function, derivative: Function, formula: Formula, x: Tensor, t: Targets
) -> Tensor:
    """function(formula, x, t), with its derivative in x as given.

    Those in dense targets and in parameters that are tensors are left to autodiff.
    """
    template, numbers = parameters.split(formula)
    dense = isinstance(t, Tensor) and t.dtype.is_floating
    others = [t, *numbers] if dense else list(numbers)

    def filled(*values: Tensor) -> tuple[Formula, Targets]:
        own, rest = (values[0], values[1:]) if dense else (t, values)
        return parameters.fill(template, tuple(rest)), own

    # A tape also follows what a custom gradient only captures.
    fixed_formula, fixed_t = filled(*map(tf.stop_gradient, others))

    @tf.custom_gradient
    def by_x(x: Tensor) -> Any:
        value = function(fixed_formula, x, fixed_t)
        return value, lambda upstream: upstream * derivative(formula, x, t)

    @tf.custom_gradient
    def by_others(*others: Tensor) -> Any:
        def grad(upstream: Tensor) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(others)
                own_formula, own_t = filled(*others)
                result = function(own_formula, x, own_t)
            return tape.gradient(result, others, upstream)

        return tf.zeros_like(value), grad

    # Two functions: one of all operands would compute all derivatives, but those in the others
    # are rarely needed.
    value = by_x(x)
    return value + by_others(*others) if others else value
