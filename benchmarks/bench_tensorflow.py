"""TensorFlow on a CPU, in graphs with and without XLA: the losses against Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.common import (
    ALPHA,
    CLASSES,
    GAMMA,
    PHASES,
    SETTING,
    Case,
    add_share_of_copy,
    compare,
    copy_bandwidth,
    example,
    losses_in_fresh_processes,
    record,
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
    return keras_loss(y, x) * CLASSES  # Keras takes the mean over the last axis


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
    bandwidth = copy_bandwidth(x.numpy().nbytes)
    losses: dict[str, Any] = {"copy_gb_per_s": round(bandwidth / 1e9, 1)}
    phases = {"both": value_and_grad, "forward": lambda loss: loss, "backward": grad}
    for phase, timed in phases.items():
        losses[phase] = {}
        for compiled in (False, True):
            for name, (own, other, t) in pairs.items():
                sides = {
                    "focal": in_graph(timed(own), x, t, compiled),
                    "other": in_graph(timed(other), x, t, compiled),
                }
                if phase == "both":
                    slopes = [run()[1] for run in sides.values()]  # type: ignore[index]
                    np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-6)
                if name == "dense, sum" and phase == "both":
                    sides["exp and log1p alone"] = in_graph(one_pass, x, t, compiled)
                case = compare(sides)
                if phase == "both":
                    nbytes = 2 * x.numpy().nbytes + t.numpy().nbytes
                    add_share_of_copy(case, nbytes, bandwidth)
                losses[phase][name + (", jit_compile" if compiled else "")] = case
    return losses


def main() -> None:
    """Measure, write, print."""
    losses = losses_in_fresh_processes("benchmarks.bench_tensorflow")
    record("tensorflow_cpu", "python -m benchmarks", setting=SETTING, losses=losses)
    print(f"TensorFlow and Keras, {SETTING}; tf.function, median (least) in ms\n")
    for phase in PHASES:
        print(f"{phase}\n{times_table(losses[phase])}\n")


if __name__ == "__main__":
    main()
