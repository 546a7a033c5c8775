"""Training and inference in TensorFlow, from NumPy batches."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

import focal.tensorflow as F
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.loader import Batch
from focal.retinanet.objective import EMA_START, Targets, losses, normalizer, targets
from focal.retinanet.postprocess import Detections, detections
from focal.retinanet.replicas import Replicas
from focal.retinanet.tensorflow.network import (
    BatchNorm,
    RetinaNet,
    arrays,
    assign,
    build_network,
    freeze,
    load_state,
    named_layers,
    named_variables,
    recompute,
    state,
)
from focal.retinanet.weights import part

__all__ = [
    "Trainer",
    "build",
    "describe",
    "detect",
    "detections_of",
    "load_state",
    "raw_outputs",
    "replicas",
    "state",
]

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


class _FullFloat32:
    """A context in which float32 is multiplied as float32: a GPU's default is TF32.

    TensorFlow reads its switch when it launches a kernel or compiles with XLA. Both are done when a
    call returns, unless execution is asynchronous. The switch is that of the whole process: the
    first thread to enter saves its value, and the last to leave restores it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = tf.config.experimental.tensor_float_32_execution_enabled()
                tf.config.experimental.enable_tensor_float_32_execution(False)
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                tf.config.experimental.enable_tensor_float_32_execution(self.before)


FULL_FLOAT32 = _FullFloat32()


def replicas(device: str | None = None) -> Replicas:
    """All devices of this kind ("gpu:1" is that one alone), and those of the workers of TF_CONFIG.

    Must be called before anything else of TensorFlow where there are several workers.
    """
    settings = json.loads(os.environ.get("TF_CONFIG", "{}"))
    cluster = settings.get("cluster", {})
    processes = [
        (kind, i) for kind in ("chief", "worker") for i in range(len(cluster.get(kind, [])))
    ]
    if len(processes) > 1:
        if ":" in (device or ""):
            raise ValueError(
                f"device {device!r} cannot be used by several processes: "
                "expected a kind such as cpu or gpu, of which each process takes its own"
            )
        strategy = _strategy(())
        rank = processes.index((settings["task"]["type"], int(settings["task"]["index"])))
    else:
        place, rank = _place(device), 0
        alike = [name for name in _places() if name.split(":")[0] == place.split(":")[0]]
        if len(alike) == 1 or ":" in (device or ""):
            return Replicas()
        strategy = _strategy(tuple(alike))

    def maximum(value: int) -> int:
        all_of_them = strategy.run(
            lambda: tf.distribute.get_replica_context().all_gather(tf.constant([value]), axis=0)
        )
        return int(tf.reduce_max(strategy.experimental_local_results(all_of_them)[0]))

    count = max(1, len(processes))
    return Replicas(rank, count, strategy.num_replicas_in_sync // count, strategy, maximum)


@functools.cache
def _strategy(places: tuple[str, ...]) -> tf.distribute.Strategy:
    """Over these devices, or those of all workers.

    One for each process: a strategy numbers its collective operations from 1, and those of two
    strategies would be taken for each other.
    """
    if places:
        return tf.distribute.MirroredStrategy(places)
    return tf.distribute.MultiWorkerMirroredStrategy()


def build(config: RetinaNetConfig, seed: int, device: str | None = None) -> RetinaNet:
    """A network with its compiled inference, on the GPU where there is one."""
    place = _place(device)
    with tf.device(place):
        model = build_network(config, seed)

    def raw(images: Tensor) -> tuple[Tensor, Tensor]:
        return model(_normalized(config, images), training=False)

    # An attribute of the model, so that its graphs are freed with the model.
    model.raw_outputs = tf.function(raw, autograph=False, reduce_retracing=True)
    model.device = place
    return model


def describe(model: RetinaNet) -> dict[str, Any]:
    """Device and versions, for the records of a run."""
    kind = model.device.split(":")[0]
    name = _details(model.device).get("device_name", platform.machine())
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
    with tf.device(model.device), FULL_FLOAT32:
        logits, deltas = model.raw_outputs(tf.constant(images))
        return logits.numpy()[:count], deltas.numpy()[:count]


def detect(
    model: RetinaNet, images: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (B, D, 4) on the canvas, scores (B, D) and labels (B, D) of uint8 canvases."""
    with tf.device(model.device), FULL_FLOAT32:
        found = detections_of(model, tf.constant(images), tf.constant(sizes))
        return tuple(part.numpy() for part in found)


def detections_of(model: RetinaNet, images: Tensor, sizes: Tensor) -> Detections:
    """`detect` on tensors, which may be those of a graph that is being traced."""
    logits, deltas = model.raw_outputs(images)
    return _postprocess(model.config)(logits, deltas, sizes)


@functools.lru_cache(maxsize=8)
def _postprocess(config: RetinaNetConfig) -> Callable[[Tensor, Tensor, Tensor], Detections]:
    """The compiled post-processing.

    One for all models of a config: TensorFlow never frees a graph with custom gradients, and a
    graph for each model would keep the weights of each.
    """

    def found(logits: Tensor, deltas: Tensor, sizes: Tensor) -> Detections:
        anchors = F.anchors(config.image_size, config.anchors)
        return detections(F, logits, deltas, anchors, sizes, config)

    return tf.function(found, autograph=False, reduce_retracing=True)


class SGD(keras.optimizers.SGD):
    """Stochastic gradient descent as in PyTorch.

    Weight decay is added to the gradient, and the velocity does not contain the learning rate. In
    Keras's own it does: a schedule would act with a delay.
    """

    def __init__(self, decay: float, **options: Any) -> None:
        super().__init__(**options)
        self.decay = decay

    def build(self, variables: list[keras.Variable]) -> None:
        """One velocity for each variable, by the identity of what `update_step` gets."""
        super().build(variables)
        local = tf.distribute.get_strategy().experimental_local_results
        self.velocity_of = {
            id(part): velocity
            for variable, velocity in zip(variables, self.momentums, strict=False)
            for part in local(variable.value)
        }

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        """One step of one variable."""
        step = gradient + self.decay * variable
        if self.momentum:
            velocity = self.velocity_of[id(variable)]
            velocity.assign(self.momentum * velocity + step)
            step = velocity
        variable.assign_sub(learning_rate * step)


class Trainer:
    """One training run: the network, its optimizer, and the moving average of its weights.

    Several replicas have a network of their own, a copy of the one that is given.
    """

    def __init__(
        self, model: RetinaNet, train: TrainConfig, replicas: Replicas | None = None
    ) -> None:
        self.train = train
        self.replicas = replicas or Replicas()
        self.precision: str = train.precision
        if train.precision == "auto":
            self.precision = _fast_precision(_details(model.device))
        # The default strategy is one replica, wherever it is asked to be.
        self.strategy = self.replicas.handle or tf.distribute.get_strategy()
        several = self.replicas.count > 1
        self.place = self.strategy.scope if several else functools.partial(tf.device, model.device)
        with self.place():
            if several:
                given = model
                with tf.variable_creator_scope(_own_statistics):
                    model = build_network(given.config, train.seed)
                load_state(model, state(given))
            self.model = model
            freeze(model, train.freeze)
            if train.recompute:
                recompute(model)
            # A skipped step must leave them unchanged.
            self.statistics = [
                x
                for _, layer in named_layers(model)
                if isinstance(layer, BatchNorm) and layer.learns
                for x in (layer.moving_mean, layer.moving_variance)
            ]
            self.optimizer = _optimizer(train)
            self.optimizer.build(model.trainable_variables)
            current = named_variables(model) if train.ema else {}
            self.average = {name: tf.Variable(x.value) for name, x in current.items()}
            self.mean_positives = tf.Variable(EMA_START)
            # False from the first loss or gradient that is not finite; then no step has an effect.
            self._healthy = tf.Variable(True)
        self._compiled = tf.function(self._step, autograph=False)
        self._gradient = self._slope
        if train.compile:  # on a CPU no faster, and 30 s of compilation
            self._gradient = tf.function(self._slope, autograph=False, jit_compile=True)

    @property
    def healthy(self) -> Tensor:
        """False from the first loss or gradient that is not finite."""
        return self._healthy.read_value()  # the variable of several replicas is always true

    def step(self, number: int, batch: Batch, learning_rate: float) -> dict[str, Tensor]:
        """One step of the optimizer; the losses stay on the device.

        `batch` is this process's share; the losses are those of the whole batch.
        """
        decay = self.train.average_decay(number)
        share = batch.images, batch.boxes, batch.labels
        full = FULL_FLOAT32 if self.precision == "float32" else contextlib.nullcontext()
        with self.place(), full:
            return self._compiled(
                [self._shared(x) for x in share],
                tf.constant(learning_rate, tf.float32),
                tf.constant(decay, tf.float32),
            )

    def _shared(self, x: np.ndarray) -> Any:
        """This process's share of an array, split among its replicas."""
        local = self.replicas.local
        if self.replicas.count == 1:
            return tf.constant(x)
        parts = np.split(x, local)
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group % local])
        )

    def _step(self, share: Any, learning_rate: Tensor, decay: Tensor) -> dict[str, Tensor]:
        """One step on all replicas."""
        mean = self.mean_positives.read_value()
        found, gradients, before = self.strategy.run(self._replica_step, args=(*share, mean))
        # The same on all replicas.
        parts = {k: self.strategy.experimental_local_results(v)[0] for k, v in found.items()}
        mean = parts.pop("mean_positives")
        finite = tf.math.is_finite(parts["loss"]) & tf.math.is_finite(parts["gradient_norm"])
        healthy = self.healthy & finite
        self._healthy.assign(healthy)

        def update() -> None:
            self.mean_positives.assign(mean)
            self.optimizer.learning_rate.assign(learning_rate)
            self.strategy.run(self._apply, args=(gradients,))
            current = named_variables(self.model)
            for name, average in self.average.items():
                average.assign_add((1 - decay) * (current[name] - average))

        def restore() -> None:
            self.strategy.run(self._restore, args=(before,))

        tf.cond(healthy, update, restore)
        return parts

    def _replica_step(
        self, images: Tensor, boxes: Tensor, labels: Tensor, mean_positives: Tensor
    ) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        """On one replica: what to log, the gradients, and the statistics before them."""
        config = self.model.config
        anchors = F.anchors(tuple(images.shape[1:3]), config.anchors)
        target = targets(F, anchors, boxes, labels, config)
        positives = F.num_positives(target.labels)
        count = images.shape[0] * self.replicas.count
        divisor, mean = normalizer(config, count, positives, mean_positives)
        divisor = tf.cast(divisor, tf.float32)

        before = [v.value.read_value() for v in self.statistics]
        (classification, box), gradients = self._accumulated(images, target, anchors, divisor)
        context = tf.distribute.get_replica_context()
        total = functools.partial(context.all_reduce, tf.distribute.ReduceOp.SUM)
        norm = tf.linalg.global_norm(total(gradients) if self.replicas.count > 1 else gradients)
        if self.train.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self.train.clip_norm, norm)
        classification, box = total([classification, box])
        told = {
            "loss": classification + box,
            "classification": classification,
            "box": box,
            "positives": positives,
            "gradient_norm": norm,
            "mean_positives": mean,
        }
        return told, gradients, before

    def _accumulated(
        self, images: Tensor, target: Targets, anchors: Tensor, divisor: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Both losses and the gradients, over all gradient-accumulation steps."""
        count = self.train.accumulate
        if count == 1:
            return self._gradient(images, *target, anchors, divisor)
        pieces = [tf.reshape(x, (count, -1, *x.shape[1:])) for x in (images, *target)]

        def add(number: Tensor, *sums: Any) -> tuple[Any, ...]:
            images, labels, deltas = (piece[number] for piece in pieces)
            more = self._gradient(images, labels, deltas, anchors, divisor)
            return number + 1, *tf.nest.map_structure(tf.add, sums, more)

        zeros = [0.0, 0.0], [tf.zeros(w.shape) for w in self.model.trainable_variables]
        # A loop: a graph of all the steps would compute them at the same time.
        _, *found = tf.while_loop(
            lambda number, *_: number < count, add, [0, *zeros], parallel_iterations=1
        )
        return tuple(found)

    def _apply(self, gradients: list[Tensor]) -> None:
        """One step of the optimizer on one replica, with the sum over all of them."""
        self.optimizer.apply(gradients, self.model.trainable_variables)

    def _restore(self, before: list[Tensor]) -> None:
        """The running statistics of one replica, as they were before the step."""
        for variable, value in zip(self.statistics, before, strict=True):
            variable.value.assign(value)

    def _slope(
        self, images: Tensor, labels: Tensor, deltas: Tensor, anchors: Tensor, divisor: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Both losses, and the gradient of their sum in each weight."""
        model, config = self.model, self.model.config
        weights = [w.value for w in model.trainable_variables]
        with _computing(model, self.precision):
            with tf.GradientTape() as tape:
                logits, found = model(_normalized(config, images), training=True)
                target = Targets(labels, deltas)
                parts = losses(F, logits, found, anchors, target, config, divisor)
                loss = parts.classification + parts.box
            gradients = tape.gradient(loss, weights)  # which may compute layers again
        return list(parts), gradients

    def weights(self) -> dict[str, np.ndarray]:
        """The weights to evaluate and to keep: the moving average where there is one."""
        return arrays(self.average) or state(self.model)

    def state(self) -> dict[str, np.ndarray]:
        """All state of the run, by name."""
        tensors = {f"model/{name}": x for name, x in state(self.model).items()}
        tensors |= {f"average/{name}": x for name, x in arrays(self.average).items()}
        for index, variable in enumerate(self.optimizer.variables):
            tensors[f"optimizer/{index}"] = np.array(variable)
        tensors["mean_positives"] = self.mean_positives.numpy()
        return tensors

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Continue from the result of `state`."""
        load_state(self.model, part(tensors, "model/"))
        assign(self.average, part(tensors, "average/"))
        for index, variable in enumerate(self.optimizer.variables):
            variable.assign(tensors[f"optimizer/{index}"])
        self.mean_positives.assign(tensors["mean_positives"])


def _optimizer(train: TrainConfig) -> keras.optimizers.Optimizer:
    # Keras takes no integer.
    rate, decay = float(train.learning_rate), float(train.weight_decay)
    if train.optimizer == "sgd":
        return SGD(decay, learning_rate=rate, momentum=float(train.momentum))
    return keras.optimizers.AdamW(rate, weight_decay=decay, epsilon=1e-8)


def _own_statistics(create: Callable[..., Any], **options: Any) -> Any:
    """Each replica has its own running statistics; their mean is read."""
    if not options["trainable"] and tf.as_dtype(options["dtype"]).is_floating:
        options["synchronization"] = tf.VariableSynchronization.ON_READ
        options["aggregation"] = tf.VariableAggregation.MEAN
    return create(**options)


def _places() -> list[str]:
    """Such as "CPU:0"; with several workers TensorFlow lists the devices of all."""
    names = (d.name.rpartition("/device:")[2] for d in tf.config.list_logical_devices())
    return list(dict.fromkeys(names))


def _place(device: str | None) -> str:
    """TensorFlow's name of a device; a GPU if there is one."""
    found = _places()
    if device is None:
        return next((name for name in found if name.startswith("GPU")), "CPU:0")
    kind, _, index = device.upper().replace("CUDA", "GPU").partition(":")
    place = f"{kind}:{index or 0}"
    if place not in found:
        raise ValueError(
            f"device {device!r} cannot be used: TensorFlow has {', '.join(found)} here"
        )
    return place


def _details(place: str) -> dict[str, Any]:
    """What is known of the GPU behind a name, such as "GPU:1"; nothing of a CPU."""
    kind, index = place.split(":")
    if kind != "GPU":
        return {}
    # A GPU can be split into several devices, and some GPUs can be hidden from TensorFlow.
    behind = [
        gpu
        for gpu in tf.config.get_visible_devices("GPU")
        for _ in tf.config.get_logical_device_configuration(gpu) or (None,)
    ]
    details: dict[str, Any] = tf.config.experimental.get_device_details(behind[int(index)])
    return details


def _fast_precision(details: Mapping[str, Any]) -> str:
    """bfloat16 on NVIDIA's GPUs from Ampere on; older ones and CPUs do not multiply it."""
    return "bfloat16" if details.get("compute_capability", (0, 0)) >= (8, 0) else "float32"


def _normalized(config: RetinaNetConfig, images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to float32."""
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return tf.cast(images, tf.float32) * (1 / (255 * std)) - mean / std


@contextlib.contextmanager
def _computing(model: RetinaNet, precision: str) -> Iterator[None]:
    """Layers compute in this precision in here; variables stay float32."""
    layers = [layer for _, layer in named_layers(model)]
    before = [layer.dtype_policy for layer in layers]
    try:
        for layer in layers:
            layer.dtype_policy = POLICIES[precision]
        yield
    finally:
        for layer, policy in zip(layers, before, strict=True):
            layer.dtype_policy = policy
