"""The TensorFlow side of the detector: everything between NumPy batches and the network."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from focal.core.anchors import anchors as core_anchors
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.loader import Batch
from focal.retinanet.network_tensorflow import (
    RetinaNet,
    arrays,
    assign,
    build_network,
    load_state,
    named_layers,
    named_variables,
    state,
)
from focal.retinanet.objective import EMA_START, objective, running_mean, targets
from focal.retinanet.postprocess import Detections, detections
from focal.retinanet.weights import part
from focal.tensorflow._namespace import xp

__all__ = ["Trainer", "build", "describe", "detect", "load_state", "raw_outputs", "state"]

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def build(config: RetinaNetConfig, seed: int, device: str | None = None) -> RetinaNet:
    """A network with its compiled inference, on the GPU where there is one."""
    place = _place(device)
    with tf.device(place):
        model = build_network(config, seed)

    def raw(images: Tensor) -> tuple[Tensor, Tensor]:
        return model(_normalised(config, images), training=False)

    # It belongs to the model, so that its graphs go when the model goes.
    model.raw_outputs = tf.function(raw, autograph=False, reduce_retracing=True)
    model.device = place
    return model


def describe(model: RetinaNet) -> dict[str, Any]:
    """Device and versions, for the records of a run."""
    kind, index = model.device.split(":")
    name = platform.machine()
    if kind == "GPU":
        physical = tf.config.list_physical_devices("GPU")[int(index)]
        name = tf.config.experimental.get_device_details(physical).get("device_name", name)
    threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count()
    return {
        "device": f"{kind.lower()} ({name}, {threads} threads)",
        "versions": {
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "python": platform.python_version(),
        },
        "parameters": sum(v.shape.num_elements() for v in model.trainable_variables),
    }


def raw_outputs(model: RetinaNet, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class logits (B, N, K) and deltas (B, N, 4) of uint8 canvases (B, H, W, 3)."""
    count = len(images)
    if count == 0:  # TensorFlow's convolutions fail without an image
        images = np.zeros((1, *images.shape[1:]), np.uint8)
    with tf.device(model.device):
        logits, deltas = model.raw_outputs(tf.constant(images))
    return logits.numpy()[:count], deltas.numpy()[:count]


def detect(
    model: RetinaNet, images: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (B, D, 4) on the canvas, scores (B, D) and labels (B, D) of uint8 canvases."""
    with tf.device(model.device):
        logits, deltas = model.raw_outputs(tf.constant(images))
        found = _postprocess(model.config)(logits, deltas, tf.constant(sizes))
    return tuple(part.numpy() for part in found)


@functools.lru_cache(maxsize=8)
def _postprocess(config: RetinaNetConfig) -> Callable[[Tensor, Tensor, Tensor], Detections]:
    """The compiled way from raw outputs to detections.

    One for all models of a config: TensorFlow remembers the custom gradients in a graph forever,
    and the graph with them, so a graph for each model would keep the weights of each.
    """

    def found(logits: Tensor, deltas: Tensor, sizes: Tensor) -> Detections:
        anchors = core_anchors(xp, config.canvas, config.anchors)
        return detections(xp, logits, deltas, anchors, sizes, config)

    return tf.function(found, autograph=False, reduce_retracing=True)


class SGD(keras.optimizers.SGD):
    """Stochastic gradient descent as in PyTorch.

    Weight decay is a part of the gradient, and the velocity is free of the learning rate: in
    Keras's own a change of the rate reaches the steps only as old velocity fades.
    """

    def __init__(self, decay: float, **options: Any) -> None:
        super().__init__(**options)
        self.decay = decay

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        """One step of one variable."""
        step = gradient + self.decay * variable
        if self.momentum:
            velocity = self.momentums[self._get_variable_index(variable)]
            velocity.assign(self.momentum * velocity + step)
            step = velocity
        variable.assign_sub(learning_rate * step)


class Trainer:
    """One training run: the network, its optimiser, and the moving average of its weights."""

    def __init__(self, model: RetinaNet, train: TrainConfig) -> None:
        self.model = model
        self.train = train
        self.precision = train.precision
        if train.precision == "auto":
            self.precision = "bfloat16" if "GPU" in model.device else "float32"
        with tf.device(model.device):
            self.optimizer = _optimizer(train)
            self.optimizer.build(model.trainable_variables)
            current = named_variables(model) if train.ema else {}
            self.average = {name: tf.Variable(x.value) for name, x in current.items()}
            self.mean_positives = tf.Variable(EMA_START)
            # False from the first loss or gradient that is not finite; no step then changes a thing
            self.healthy = tf.Variable(True)
        # Not `jit_compile=True`: on a CPU it is no faster, and compiles for half a minute.
        self._compiled = tf.function(self._step, autograph=False)

    def step(self, number: int, batch: Batch, learning_rate: float) -> dict[str, Tensor]:
        """One step of the optimiser; the loss parts stay on the device."""
        decay = self.train.average_decay(number)
        with tf.device(self.model.device):
            return self._compiled(
                tf.constant(batch.images),
                tf.constant(batch.boxes),
                tf.constant(batch.labels),
                tf.constant(learning_rate, tf.float32),
                tf.constant(decay, tf.float32),
            )

    def _step(
        self, images: Tensor, boxes: Tensor, labels: Tensor, learning_rate: Tensor, decay: Tensor
    ) -> dict[str, Tensor]:
        model, config = self.model, self.model.config
        anchors = core_anchors(xp, tuple(images.shape[1:3]), config.anchors)
        target = targets(xp, anchors, boxes, labels, config)
        normaliser, mean_positives = None, self.mean_positives.read_value()
        if config.normaliser == "ema":
            positives = tf.reduce_sum(tf.cast(target.labels >= 0, tf.float32))
            normaliser = mean_positives = running_mean(mean_positives, positives)
        statistics = [v.value for v in model.non_trainable_variables]
        before = [v.read_value() for v in statistics]

        with tf.GradientTape() as tape:
            with _computing(model, self.precision):
                logits, deltas = model(_normalised(config, images), training=True)
            logits, deltas = tf.cast(logits, tf.float32), tf.cast(deltas, tf.float32)
            parts = objective(xp, logits, deltas, anchors, target, config, normaliser)
            loss = parts.classification + parts.box
        weights = model.trainable_variables
        gradients = tape.gradient(loss, [w.value for w in weights])

        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        healthy = self.healthy.read_value() & finite
        self.healthy.assign(healthy)

        def update() -> None:
            self.mean_positives.assign(mean_positives)
            self.optimizer.learning_rate.assign(learning_rate)
            self.optimizer.apply(gradients, weights)
            current = named_variables(model)
            for name, average in self.average.items():
                average.assign_add((1 - decay) * (current[name] - average))

        def restore() -> None:
            for variable, value in zip(statistics, before, strict=True):
                variable.assign(value)

        tf.cond(healthy, update, restore)
        return {
            "loss": loss,
            "classification": parts.classification,
            "box": parts.box,
            "positives": parts.positives,
            "gradient_norm": norm,
        }

    def weights(self) -> dict[str, np.ndarray]:
        """The weights to evaluate and to keep: the moving average where there is one."""
        return arrays(self.average) or state(self.model)

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, by name."""
        tensors = {f"model/{name}": x for name, x in state(self.model).items()}
        tensors |= {f"average/{name}": x for name, x in arrays(self.average).items()}
        for index, variable in enumerate(self.optimizer.variables):
            tensors[f"optimizer/{index}"] = np.array(variable)
        tensors["mean_positives"] = self.mean_positives.numpy()
        return tensors

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        load_state(self.model, part(tensors, "model/"))
        assign(self.average, part(tensors, "average/"))
        for index, variable in enumerate(self.optimizer.variables):
            variable.assign(tensors[f"optimizer/{index}"])
        self.mean_positives.assign(tensors["mean_positives"])


def _optimizer(train: TrainConfig) -> keras.optimizers.Optimizer:
    common = {"learning_rate": train.learning_rate, "global_clipnorm": train.clip_norm}
    if train.optimizer == "sgd":
        return SGD(train.weight_decay, momentum=float(train.momentum), **common)
    return keras.optimizers.AdamW(weight_decay=train.weight_decay, epsilon=1e-8, **common)


def _place(device: str | None) -> str:
    """TensorFlow's name of a device; a GPU if there is one."""
    found = [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices()]
    if device is None:
        return next((name for name in found if name.startswith("GPU")), "CPU:0")
    kind, _, index = device.upper().replace("CUDA", "GPU").partition(":")
    place = f"{kind}:{index or 0}"
    if place not in found:
        raise ValueError(
            f"device {device!r} cannot be used: TensorFlow has {', '.join(found)} here"
        )
    return place


def _normalised(config: RetinaNetConfig, images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to float32."""
    mean, std = np.float32(config.mean), np.float32(config.std)
    return tf.cast(images, tf.float32) * (1 / (255 * std)) - mean / std


@contextlib.contextmanager
def _computing(model: RetinaNet, precision: str) -> Iterator[None]:
    """What is traced in here computes in this precision; variables stay float32."""
    layers = [layer for _, layer in named_layers(model)]
    before = [layer.dtype_policy for layer in layers]
    try:
        for layer in layers:
            layer.dtype_policy = POLICIES[precision]
        yield
    finally:
        for layer, policy in zip(layers, before, strict=True):
            layer.dtype_policy = policy
