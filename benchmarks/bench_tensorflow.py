"""TensorFlow on a CPU, in graphs with and without XLA: the losses against Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

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
from focal.tensorflow import sigmoid_focal_loss, sparse_sigmoid_focal_loss

Loss = Callable[[tf.Tensor, tf.Tensor], Any]
keras_loss = keras.losses.BinaryFocalCrossentropy(
    apply_class_balancing=True, alpha=ALPHA, gamma=GAMMA, from_logits=True, reduction="sum"
)


def dense(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return sigmoid_focal_loss(x, y, ALPHA, GAMMA, "sum")


def dense_from_labels(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    return dense(x, tf.one_hot(labels, CLASSES))


def sparse(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    return sparse_sigmoid_focal_loss(x, labels, ALPHA, GAMMA, "sum")


def keras_dense(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return keras_loss(y, x) * x.shape[-1]  # Keras takes the mean over the last axis


def keras_from_labels(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    return keras_dense(x, tf.one_hot(labels, CLASSES))


def one_pass(x: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    """The least that any of the losses needs: an exponential, a logarithm, one array written."""
    return tf.math.log1p(tf.exp(-tf.abs(x))) + t


def in_graph(function: Loss, x: tf.Tensor, t: tf.Tensor, jit_compile: bool) -> Case:
    run = tf.function(function, jit_compile=jit_compile)
    return lambda: [result.numpy() for result in tf.nest.flatten(run(x, t))]


def value_and_grad(loss: Loss) -> Loss:
    def both(x: tf.Tensor, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x, t)
        return value, tape.gradient(value, x)

    return both


def grad(loss: Loss) -> Loss:
    both = value_and_grad(loss)
    return lambda x, t: both(x, t)[1]


def compare_losses() -> dict[str, Any]:
    """Forward, backward and both of each case, both sides."""
    x, labels, y = map(tf.constant, example())
    pairs = {
        "dense, sum": (dense, keras_dense, y),
        "sparse, sum": (sparse, keras_from_labels, labels),
        "sparse against our dense": (sparse, dense_from_labels, labels),
    }
    timed = {"both": value_and_grad, "forward": lambda loss: loss, "backward": grad}

    def measured(compiled: bool) -> dict[str, Any]:
        def phase(change: Callable[[Loss], Loss]) -> Callable[..., Case]:
            return lambda loss, x, t: in_graph(change(loss), x, t, compiled)

        return compare_cases(
            x,
            pairs,
            {name: phase(change) for name, change in timed.items()},
            gradient=lambda result: result[1],
            least={"dense, sum": in_graph(one_pass, x, y, compiled)},
        )

    losses, compiled = measured(False), measured(True)
    for name in timed:
        losses[name] |= {f"{case}, jit_compile": found for case, found in compiled[name].items()}
    return losses


def small_calls() -> dict[str, Any]:
    """A call in eager mode, one of a graph, and tracing a step with loss and gradient."""
    found = {}
    for shape in SMALL:
        x, y = map(tf.constant, small_example(shape))

        def call(function: Loss, x: tf.Tensor = x, y: tf.Tensor = y) -> Case:
            return lambda: [result.numpy() for result in tf.nest.flatten(function(x, y))]

        def trace(loss: Loss, x: tf.Tensor = x, y: tf.Tensor = y) -> Case:
            return lambda: tf.function(value_and_grad(loss)).get_concrete_function(x, y)

        timed = {
            "a call": call,
            "a call, with gradient": lambda loss, call=call: call(value_and_grad(loss)),
            "a graph, with gradient": lambda loss, call=call: call(
                tf.function(value_and_grad(loss))
            ),
            "tracing, with gradient": trace,
        }
        for name, case in timed.items():
            sides = {"focal": case(dense), "other": case(keras_dense)}
            found[f"{' x '.join(map(str, shape))} logits: {name}"] = compare(sides)
    return found


def main() -> None:
    """Measure, write, print."""
    losses = losses_in_fresh_processes("benchmarks.bench_tensorflow")
    small = small_calls()
    record(
        "tensorflow_cpu", "python -m benchmarks", setting=SETTING, losses=losses, small_calls=small
    )
    print_losses("TensorFlow and Keras, tf.function", losses)
    print(times_table(small))


if __name__ == "__main__":
    main()
