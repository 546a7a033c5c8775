"""Training and inference in JAX, from NumPy batches.

Compiled functions take the static part of a model (`nnx.GraphDef`), its variables and a batch, so
that all models of one config share them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import focal.jax as F
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.loader import Batch
from focal.retinanet.jax.network import (
    RetinaNet,
    arrays,
    build_network,
    freeze,
    load_state,
    replaced,
    state,
    trained,
)
from focal.retinanet.objective import EMA_START, Losses, Targets, losses, normalizer, targets
from focal.retinanet.postprocess import detections
from focal.retinanet.replicas import Replicas
from focal.retinanet.weights import check_names, part

__all__ = [
    "Trainer",
    "build",
    "describe",
    "detect",
    "load_state",
    "raw_outputs",
    "replicas",
    "state",
]


def replicas(device: str | None = None) -> Replicas:
    """All devices of this kind, of all processes; "cuda:1" is that one alone.

    `jax.distributed` is initialized where JAX_COORDINATOR_ADDRESS is set and it is not yet;
    JAX_NUM_PROCESSES and JAX_PROCESS_ID go with it, where JAX does not find them by itself.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        numbers = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
        count, rank = (None if number is None else int(number) for number in numbers)
        jax.distributed.initialize(num_processes=count, process_id=rank)
    if ":" in (device or "") and jax.process_count() > 1:
        raise ValueError(
            f"device {device!r} cannot be used by several processes: "
            "expected a kind such as cpu or cuda, of which each process takes its own"
        )
    devices = _devices(device)
    if len(devices) == 1:
        return Replicas()
    processes = len({d.process_index for d in devices})
    return Replicas(
        jax.process_index(),
        processes,
        len(devices) // processes,
        Mesh(np.array(devices), ("replicas",)),
        lambda value: int(np.max(multihost_utils.process_allgather(np.int32(value)))),
    )


def _devices(device: str | None, local: bool = False) -> list[jax.Device]:
    """The devices of a kind, such as "cuda", or one of this process, such as "cuda:1"."""
    kind, colon, _ = (device or "").lower().partition(":")
    try:
        alike = jax.local_devices(backend=kind or None) if local or colon else jax.devices(kind)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
    if not colon:
        return alike
    named = {f"{kind}:{index}": x for index, x in enumerate(alike)}
    if str(device).lower() not in named:
        raise ValueError(f"device {device!r} cannot be used: JAX has {', '.join(named)} here")
    return [named[str(device).lower()]]


def build(config: RetinaNetConfig, seed: int, device: str | None = None) -> RetinaNet:
    """A network in evaluation mode, on JAX's default device: a GPU where there is one."""
    place = _devices(device, local=True)[0]
    with jax.default_device(place):
        network = build_network(config, seed)
    # Committed to the device, so that all results stay there.
    nnx.update(network, jax.device_put(nnx.state(network), place))
    network.eval()
    return network


def describe(model: RetinaNet) -> dict[str, Any]:
    """Device and versions, for the records of a run."""
    device = _device(model)
    name = platform.machine() if device.platform == "cpu" else device.device_kind
    versions = {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}
    return {
        "device": f"{device.platform} ({name})",
        "versions": {**versions, "python": platform.python_version()},
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
    }


def raw_outputs(model: RetinaNet, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class logits (B, N, K) and deltas (B, N, 4) of uint8 canvases (B, H, W, 3)."""
    logits, deltas = _raw_outputs(*nnx.split(model), images)
    return np.array(logits), np.array(deltas)


def detect(
    model: RetinaNet, images: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (B, D, 4) on the canvas, scores (B, D) and labels (B, D) of uint8 canvases."""
    boxes, scores, labels = _detections(*nnx.split(model), images, sizes)
    return np.array(boxes), np.array(scores), np.array(labels)


class _Run(NamedTuple):
    """The state that a training step updates."""

    parameters: nnx.State
    statistics: nnx.State
    """Of batch normalization, and the parameters that are frozen."""
    average: nnx.State
    """The moving average of both; empty where the run has none."""
    slots: optax.OptState
    mean_positives: Array
    healthy: Array
    """False from the first loss or gradient that is not finite; then no step changes anything."""


class Trainer:
    """One training run: the network, its optimizer, and the moving average of its weights.

    `model` always has the weights of the last step. To start from other weights, load them into
    it before the trainer is made.
    """

    def __init__(
        self, model: RetinaNet, train: TrainConfig, replicas: Replicas | None = None
    ) -> None:
        self.model = model
        self.train = train
        self.replicas = replicas or Replicas()
        mesh = self.replicas.handle
        self.place = NamedSharding(mesh, PartitionSpec()) if mesh else _device(model)
        self.precision: str = train.precision
        if train.precision == "auto":
            self.precision = _fast_precision(mesh.devices.flat if mesh else [_device(model)])
        self.static = nnx.graphdef(model), train.replace(precision=self.precision)
        parameters, statistics = _split(model, train)
        average = nnx.merge_state(parameters, statistics) if train.ema else nnx.State({})
        slots = _optimizer(train).init(parameters)
        run = _Run(parameters, statistics, average, slots, jnp.float32(EMA_START), jnp.bool(True))
        self.run = _own_copy(run, self.place)

    @property
    def healthy(self) -> Array:
        """False from the first loss or gradient that is not finite."""
        return self.run.healthy

    def step(self, number: int, batch: Batch, learning_rate: float) -> dict[str, Array]:
        """One step of the optimizer; the losses stay on the device.

        `batch` is this process's share; the losses are those of the whole batch.
        """
        decay = self.train.average_decay(number)
        share: Sequence[Any] = (batch.images, batch.boxes, batch.labels)
        if self.replicas.handle:
            rows = NamedSharding(self.replicas.handle, PartitionSpec("replicas"))
            share = [jax.make_array_from_process_local_data(rows, x) for x in share]
        self.run, found = _train_step(
            *self.static, self.replicas.count, self.run, *share, learning_rate, decay
        )
        nnx.update(self.model, self.run.parameters, self.run.statistics)
        names = "loss", "classification", "box", "positives", "gradient_norm"
        return dict(zip(names, found, strict=True))

    def weights(self) -> dict[str, np.ndarray]:
        """The weights to evaluate and to keep: the moving average where there is one."""
        return state(self.model) | arrays(self.run.average)

    def state(self) -> dict[str, np.ndarray]:
        """All state of the run, by name."""
        tensors = {f"model/{k}": v for k, v in state(self.model).items()}
        tensors |= {f"average/{k}": v for k, v in arrays(self.run.average).items()}
        tensors |= {f"optimizer/{k}": np.array(v) for k, v in _by_path(self.run.slots).items()}
        tensors["mean_positives"] = np.array(self.run.mean_positives)
        return tensors

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Continue from the result of `state`."""
        load_state(self.model, part(tensors, "model/"))
        slots, saved = _by_path(self.run.slots), part(tensors, "optimizer/")
        check_names(saved, {k: v.shape for k, v in slots.items()})
        leaves = [saved[k] for k in slots]
        run = _Run(
            *_split(self.model, self.train),
            replaced(self.run.average, part(tensors, "average/")),
            jax.tree.unflatten(jax.tree.structure(self.run.slots), leaves),
            jnp.asarray(tensors["mean_positives"]),
            self.run.healthy,
        )
        self.run = _own_copy(run, self.place)


@partial(jax.jit, static_argnums=0)
def _raw_outputs(
    graphdef: nnx.GraphDef[RetinaNet], variables: nnx.State, images: Array
) -> tuple[Array, Array]:
    model = nnx.merge(graphdef, variables)
    model.eval()  # this copy of it, whatever mode the caller's is in
    return model(_normalized(images, model.config))


@partial(jax.jit, static_argnums=0)
def _detections(
    graphdef: nnx.GraphDef[RetinaNet], variables: nnx.State, images: Array, sizes: Array
) -> tuple[Array, Array, Array]:
    config = nnx.merge(graphdef, variables).config
    logits, deltas = _raw_outputs(graphdef, variables, images)
    return detections(F, logits, deltas, _anchors(images, config), sizes, config)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _train_step(
    graphdef: nnx.GraphDef[RetinaNet],
    train: TrainConfig,
    replicas: int,
    run: _Run,
    images: Array,
    boxes: Array,
    labels: Array,
    learning_rate: float,
    decay: float,
) -> tuple[_Run, tuple[Array, ...]]:
    # Written for one device. Where the batch is sharded over replicas, the compiler distributes
    # the work, and sums are those of the whole batch.
    config = nnx.merge(graphdef, run.parameters, run.statistics).config
    anchors = _anchors(images, config)
    target = targets(F, anchors, boxes, labels, config)
    positives = F.num_positives(target.labels)
    divisor, mean_positives = normalizer(config, len(images), positives, run.mean_positives)

    @partial(jax.value_and_grad, has_aux=True)
    def gradient_of(
        parameters: nnx.State, statistics: nnx.State, images: Array, target: Targets
    ) -> tuple[Array, tuple[Losses, nnx.State]]:
        model = nnx.merge(graphdef, parameters, statistics, copy=True)
        # The type is that of the layers; the weights are float32.
        precision = lax.Precision.HIGHEST if train.precision == "float32" else None
        model.train(
            dtype=jnp.dtype(train.precision), precision=precision, recompute=train.recompute
        )
        freeze(model, train.freeze)
        parts = losses(F, *model(_normalized(images, config)), anchors, target, config, divisor)
        return parts.classification + parts.box, (parts, _split(model, train)[1])

    def accumulate(carry: Any, piece: tuple[Array, Targets]) -> tuple[Any, None]:
        """One gradient-accumulation step."""
        sums, statistics = carry
        (_, (parts, statistics)), gradient = gradient_of(run.parameters, statistics, *piece)
        return (jax.tree.map(jnp.add, sums, (parts, gradient)), statistics), None

    if train.accumulate == 1:  # without a loop, in which XLA's convolutions are slow on a CPU
        (_, (parts, statistics)), gradient = gradient_of(
            run.parameters, run.statistics, images, target
        )
    else:
        zeros = Losses(*jnp.zeros(2)), jax.tree.map(jnp.zeros_like, run.parameters)
        pieces = _pieces((images, target), replicas, train.accumulate)
        ((parts, gradient), statistics), _ = lax.scan(accumulate, (zeros, run.statistics), pieces)

    updates, slots = _optimizer(train).update(gradient, run.slots, run.parameters)
    # The optimizer has learning rate 1: with a rate of its own each would be compiled again.
    updates = optax.tree.scale(learning_rate, updates)
    parameters = optax.apply_updates(run.parameters, updates)
    average = run.average
    if train.ema:
        current = nnx.merge_state(parameters, statistics)
        average = optax.incremental_update(current, average, 1 - decay)
    loss, norm = parts.classification + parts.box, optax.tree.norm(gradient)
    healthy = run.healthy & jnp.isfinite(loss) & jnp.isfinite(norm)
    new = _Run(parameters, statistics, average, slots, mean_positives, healthy)
    # `optax.apply_if_finite` looks at gradients alone, and lets statistics and average go on.
    kept = jax.tree.map(lambda x, old: jnp.where(healthy, x, old), new, run)
    return kept._replace(healthy=healthy), (loss, *parts, positives, norm)


def _split(model: RetinaNet, train: TrainConfig) -> tuple[nnx.State, nnx.State]:
    """The parameters that are trained, and all else."""
    own = trained(train.freeze)
    return nnx.state(model, own), nnx.state(model, nnx.Not(own))


def _optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """PyTorch's rule of that name, with learning rate 1."""
    clip = optax.identity()
    if train.clip_norm is not None:
        clip = optax.clip_by_global_norm(train.clip_norm)
    if train.optimizer == "adamw":
        return optax.chain(clip, optax.adamw(1.0, weight_decay=train.weight_decay))
    decay = optax.add_decayed_weights(train.weight_decay)
    return optax.chain(clip, decay, optax.sgd(1.0, train.momentum))


def _pieces(batch: Any, replicas: int, count: int) -> Any:
    """(B, ...) to (count, B / count, ...): equal parts of the share of every replica."""

    def split(x: Array) -> Array:
        shares = x.reshape(replicas, count, -1, *x.shape[1:])
        return jnp.moveaxis(shares, 1, 0).reshape(count, -1, *x.shape[1:])

    return jax.tree.map(split, batch)


def _own_copy(run: _Run, place: Any) -> _Run:
    """A copy at this place: the step donates its buffers, so they must not be shared."""
    # By way of the host: arrays of this process cannot be moved to devices of another.
    return jax.device_put(jax.tree.map(np.array, run), place)


def _device(model: RetinaNet) -> jax.Device:
    """The device of the model; with several replicas, the first."""
    return min(jax.tree.leaves(nnx.state(model))[0].devices(), key=lambda device: device.id)


def _fast_precision(devices: Iterable[jax.Device]) -> str:
    """bfloat16 where all of these devices multiply it, else float32."""
    return "bfloat16" if all(map(_multiplies_bfloat16, devices)) else "float32"


def _multiplies_bfloat16(device: jax.Device) -> bool:
    """TPUs and NVIDIA's GPUs from Ampere on; XLA's convolutions on a CPU do not use it."""
    # "8.0"; AMD's GPUs have a name there, such as "gfx90a".
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform == "tpu" or (major.isdecimal() and int(major) >= 8)


def _normalized(images: Array, config: RetinaNetConfig) -> Array:
    """uint8 to float32 with the config's mean and standard deviation."""
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return images.astype(jnp.float32) * (1 / (255 * std)) - mean / std


def _anchors(images: Array, config: RetinaNetConfig) -> Array:
    _, height, width, _ = images.shape
    return F.anchors((height, width), config.anchors)


def _by_path(tree: Any) -> dict[str, Array]:
    """The arrays of a nested structure by their paths."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
