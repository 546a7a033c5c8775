"""JAX on a CPU, jitted: the losses against optax."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from benchmarks.common import (
    ALPHA,
    CLASSES,
    GAMMA,
    SETTING,
    Case,
    compare,
    example,
    record,
    times_table,
)
from focal.jax import sigmoid_focal_loss, sparse_sigmoid_focal_loss


def dense(x: Array, y: Array) -> Array:
    return sigmoid_focal_loss(x, y, ALPHA, GAMMA, "sum")


def dense_from_labels(x: Array, labels: Array) -> Array:
    return dense(x, jax.nn.one_hot(labels, CLASSES))


def sparse(x: Array, labels: Array) -> Array:
    return sparse_sigmoid_focal_loss(x, labels, ALPHA, GAMMA, "sum")


def optax_dense(x: Array, y: Array) -> Array:
    return optax.losses.sigmoid_focal_loss(x, y, alpha=ALPHA, gamma=GAMMA).sum()


def optax_from_labels(x: Array, labels: Array) -> Array:
    return optax_dense(x, jax.nn.one_hot(labels, CLASSES))


def forward_backward(loss: Callable[..., Array], x: Array, t: Array) -> Case:
    run = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(run(x, t))


def main() -> None:
    """Measure, write, print."""
    x, labels, y = map(jnp.asarray, example())
    pairs = {
        "dense, sum": (dense, optax_dense, y),
        "sparse, sum": (sparse, optax_from_labels, labels),
        "sparse against our dense": (sparse, dense_from_labels, labels),
    }
    losses = {}
    for name, (own, other, t) in pairs.items():
        sides = {"focal": forward_backward(own, x, t), "other": forward_backward(other, x, t)}
        slopes = [np.asarray(run()[1]) for run in sides.values()]  # type: ignore[index]
        np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-6)
        losses[name] = compare(sides)
    record("jax_cpu", "python -m benchmarks", setting=SETTING, losses=losses)
    print(f"JAX and optax, {SETTING}; jitted value_and_grad, median (least) in ms\n")
    print(times_table(losses))


if __name__ == "__main__":
    main()
