"""TensorFlow on a CPU, in graphs with and without XLA: the losses against Keras."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

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
from focal.tensorflow import sigmoid_focal_loss, sparse_sigmoid_focal_loss

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


def forward_backward(
    loss: Callable[..., tf.Tensor], x: tf.Tensor, t: tf.Tensor, jit_compile: bool
) -> Case:
    @tf.function(jit_compile=jit_compile)
    def run(x: tf.Tensor, t: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x, t)
        return value, tape.gradient(value, x)

    return lambda: [result.numpy() for result in run(x, t)]


def main() -> None:
    """Measure, write, print."""
    x, labels, y = map(tf.constant, example())
    pairs = {
        "dense, sum": (dense, keras_dense, y),
        "sparse, sum": (sparse, keras_from_labels, labels),
        "sparse against our dense": (sparse, dense_from_labels, labels),
    }
    losses = {}
    for compiled in (False, True):
        for name, (own, other, t) in pairs.items():
            sides = {
                "focal": forward_backward(own, x, t, compiled),
                "other": forward_backward(other, x, t, compiled),
            }
            slopes = [run()[1] for run in sides.values()]  # type: ignore[index]
            np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-6)
            losses[name + (", jit_compile" if compiled else "")] = compare(sides)
    record("tensorflow_cpu", "python -m benchmarks", setting=SETTING, losses=losses)
    print(f"TensorFlow and Keras, {SETTING}; tf.function, median (least) in ms\n")
    print(times_table(losses))


if __name__ == "__main__":
    main()
