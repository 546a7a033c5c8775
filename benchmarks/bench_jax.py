"""JAX on a CPU, jitted: the losses against optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from benchmarks.common import (
    ALPHA,
    CLASSES,
    GAMMA,
    SETTING,
    SMALL,
    Case,
    compare,
    compare_cases,
    example,
    losses_in_fresh_processes,
    print_losses,
    record,
    small_example,
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


def one_pass(x: Array, t: Array) -> Array:
    """The least that any of the losses needs: an exponential, a logarithm, one array written."""
    return jnp.log1p(jnp.exp(-jnp.abs(x))) + t


def jitted(function: Callable[..., Any], x: Array, t: Array) -> Case:
    run = jax.jit(function)
    return lambda: jax.block_until_ready(run(x, t))


def forward_backward(loss: Callable[..., Array], x: Array, t: Array) -> Case:
    return jitted(jax.value_and_grad(loss), x, t)


def compare_losses() -> dict[str, Any]:
    """Forward, backward and both of each case, both sides."""
    x, labels, y = map(jnp.asarray, example())
    pairs = {
        "dense, sum": (dense, optax_dense, y),
        "sparse, sum": (sparse, optax_from_labels, labels),
        "sparse against our dense": (sparse, dense_from_labels, labels),
    }
    return compare_cases(
        x,
        pairs,
        {
            "both": forward_backward,
            "forward": jitted,
            "backward": lambda loss, x, t: jitted(jax.grad(loss), x, t),
        },
        gradient=lambda result: result[1],
        least={"dense, sum": jitted(one_pass, x, y)},
    )


def small_calls() -> dict[str, Any]:
    """A call outside of `jit`, and tracing a step with the loss and its gradient."""
    found = {}
    for shape in SMALL:
        x, y = map(jnp.asarray, small_example(shape))

        def call(loss: Callable[..., Array], x: Array = x, y: Array = y) -> Case:
            return lambda: jax.block_until_ready(loss(x, y))

        def trace(loss: Callable[..., Array], x: Array = x, y: Array = y) -> Case:
            return lambda: jax.jit(lambda x, y: jax.value_and_grad(loss)(x, y)).trace(x, y)

        timed = {
            "a call": call,
            "a call, with gradient": lambda loss, call=call: call(jax.value_and_grad(loss)),
            "tracing, with gradient": trace,
        }
        for name, case in timed.items():
            sides = {"focal": case(dense), "other": case(optax_dense)}
            found[f"{' x '.join(map(str, shape))} logits: {name}"] = compare(sides)
    return found


def main() -> None:
    """Measure, write, print."""
    losses = losses_in_fresh_processes("benchmarks.bench_jax")
    small = small_calls()
    record("jax_cpu", "python -m benchmarks", setting=SETTING, losses=losses, small_calls=small)
    print_losses("JAX and optax, jitted", losses)
    print(times_table(small))


if __name__ == "__main__":
    main()
