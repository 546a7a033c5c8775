"""What the replicas of test_replicas.py run: a program for each framework.

`python sharing.py FRAMEWORK FILE` writes gradients to an .npz file. PyTorch's is started by
torchrun, the other two make two devices of the processor.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from focal.core.anchors import AnchorConfig
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.loader import Batch
from focal.retinanet.presets import PRESETS
from focal.retinanet.replicas import Replicas

REPLICAS = 2
ROWS, FEATURES, CLASSES = 8, 5, 3
_RNG = np.random.default_rng(7)
INPUTS = _RNG.normal(0, 2, (ROWS, FEATURES)).astype(np.float32)
KERNEL = _RNG.normal(0, 1, (FEATURES, CLASSES)).astype(np.float32)
LABELS = {  # half of the rows for each replica
    "unequal": np.array([-1, 2, -1, -2, 0, 2, 1, -1]),
    "one without": np.array([-1, -2, -1, -1, 0, -1, 2, 1]),
    "none at all": np.array([-1, -2, -1, -1, -1, -1, -2, -1]),
}
"""Positives: 1 and 3, 0 and 3, 0 and 0."""


LEARNING_RATE = 1000.0
"""So large that the weights of a step are their change."""


def trainer_cases() -> dict[str, tuple[RetinaNetConfig, TrainConfig]]:
    """Detector and run of each case, by name."""
    detector = PRESETS["tiny"].detector.replace(
        classes=("circle", "square"),
        image_size=(32, 32),
        norm="group",
        channels=8,
        head_depth=1,
        anchors=AnchorConfig(strides=(8, 16, 32), sizes=(12.0, 24.0, 48.0), scales=(1.0,)),
    )
    run = TrainConfig(
        steps=1,
        batch_size=8,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        precision="float32",
    )
    image, ema = (detector.replace(normalizer=word) for word in ("image", "ema"))
    return {
        "batch": (detector, run),
        "image": (image, run),
        "image, accumulated": (image, run.replace(accumulate=2)),
        "ema, clipped": (ema, run.replace(clip_norm=0.5, ema=0.5, freeze=2)),
        "ema, clipped, accumulated, recomputed": (
            ema,
            run.replace(clip_norm=0.5, ema=0.5, accumulate=4, recompute=True, freeze=2),
        ),
    }


MOST = "ema, clipped, accumulated, recomputed"
CASES = {"torch": tuple(trainer_cases()), "jax": (MOST,), "tensorflow": ("image", MOST)}
"""Few for those that take seconds to compile each of them."""


def batch(first: int, last: int) -> Batch:
    """Images `first` to `last` of the batch of 8; only the second half of it has boxes."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    boxes, labels = np.zeros((8, 8, 4), np.float32), np.full((8, 8), -1)
    for image, count in enumerate((0, 0, 0, 0, 1, 3, 0, 2)):
        corner = rng.uniform(0, 16, (count, 2))
        boxes[image, :count] = np.concatenate([corner, corner + rng.uniform(8, 16, (count, 2))], 1)
        labels[image, :count] = rng.integers(0, 2, count)
    sizes, scales, ids = np.full((8, 2), 32), np.ones(8), np.arange(8)
    return Batch(*(x[first:last] for x in (images, boxes, labels, sizes, scales, ids, sizes)))


def after_a_step(
    backend: ModuleType, name: str, replicas: Replicas | None = None
) -> dict[str, np.ndarray]:
    """Weights and loss parts after one step of this process's share of the batch."""
    config, run = trainer_cases()[name]
    model = backend.build(config, 0, "cpu")
    replicas = replicas or Replicas()
    size = run.batch_size // replicas.processes
    trainer = backend.Trainer(model, run, replicas)
    share = batch(replicas.rank * size, (replicas.rank + 1) * size)
    parts = trainer.step(0, share, LEARNING_RATE)
    found = {f"part/{k}": np.array(v, np.float32) for k, v in parts.items()}
    found |= trainer.state() | {f"kept/{k}": v for k, v in trainer.weights().items()}
    if name == MOST:
        check_overflow(trainer, share)
    return found


def check_overflow(trainer: Any, share: Batch) -> None:
    """On every replica: numbers that are not finite are noticed, and change nothing."""
    assert trainer.healthy
    trainer.step(1, share, 1e30)
    before = trainer.state()
    trainer.step(2, share, LEARNING_RATE)
    assert not trainer.healthy
    for key, x in trainer.state().items():
        np.testing.assert_array_equal(x, before[key], err_msg=key)


def all_cases(backend: ModuleType, replicas: Replicas) -> dict[str, np.ndarray]:
    """What the cases leave, by the names of the case and of the tensor."""
    return {
        f"trainer/{name}/{key}": x
        for name in CASES[backend.__name__.split(".")[-2]]
        for key, x in after_a_step(backend, name, replicas).items()
    }


def with_torch(out: Path) -> None:
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from focal.retinanet.torch import trainer as backend_torch
    from focal.torch import num_positives, sparse_sigmoid_focal_loss

    replicas = backend_torch.replicas("cpu")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    assert world == REPLICAS
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    found = {}
    for name, labels in LABELS.items():
        linear = torch.nn.Linear(FEATURES, CLASSES, bias=False)
        linear.weight.data.copy_(torch.tensor(KERNEL.T))
        share = torch.tensor(labels[mine])
        network = DistributedDataParallel(linear)  # it adds the gradients up while it lives
        logits = network(torch.tensor(INPUTS[mine]))
        total = sparse_sigmoid_focal_loss(logits, share, reduction="sum")
        (world * total / num_positives(share)).backward()
        found[f"loss/{name}"] = linear.weight.grad.numpy().T
    found |= all_cases(backend_torch, replicas)
    if rank == 0:
        np.savez(out, **found)


def with_jax(out: Path) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={REPLICAS}"
    import jax
    from jax.sharding import PartitionSpec as P

    from focal.jax import num_positives, sparse_sigmoid_focal_loss
    from focal.retinanet.jax import trainer as backend_jax

    mesh = jax.sharding.Mesh(jax.devices(), ("replicas",))
    found = {}

    def gradient(kernel, inputs, labels, axis_name):
        def loss(kernel):
            total = sparse_sigmoid_focal_loss(inputs @ kernel, labels, reduction="sum")
            return total / num_positives(labels, axis_name)

        return jax.grad(loss)(kernel)

    def of_a_share(kernel, inputs, labels):
        # Each replica its own copy of the kernel: the sum over them is written out.
        kernel = jax.lax.pcast(kernel, "replicas", to="varying")
        return jax.lax.psum(gradient(kernel, inputs, labels, "replicas"), "replicas")

    shared = jax.jit(
        jax.shard_map(
            of_a_share, mesh=mesh, in_specs=(P(), P("replicas"), P("replicas")), out_specs=P()
        )
    )
    whole = jax.jit(gradient, static_argnums=3)
    rows = jax.sharding.NamedSharding(mesh, P("replicas"))
    for name, labels in LABELS.items():
        found[f"loss/{name}"] = shared(KERNEL, INPUTS, labels)
        sharded = jax.device_put((INPUTS, labels), rows)
        found[f"loss/{name}, jit of a sharded array"] = whole(KERNEL, *sharded, None)
    replicas = backend_jax.replicas("cpu")
    assert replicas.count == REPLICAS
    np.savez(out, **found, **all_cases(backend_jax, replicas))


def with_tensorflow(out: Path) -> None:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(REPLICAS)]
    )
    from focal.retinanet.tensorflow import trainer as backend_tensorflow
    from focal.tensorflow import num_positives, sparse_sigmoid_focal_loss

    replicas = backend_tensorflow.replicas("cpu")
    assert replicas.count == REPLICAS
    strategy = replicas.handle
    found = {}

    @tf.function(autograph=False)
    def gradient(kernel, inputs, labels):
        def of_a_share(inputs, labels):
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                logits = inputs @ kernel
                total = sparse_sigmoid_focal_loss(logits, labels, reduction="sum")
                loss = total / num_positives(labels)
            slope = tape.gradient(loss, kernel)
            return tf.distribute.get_replica_context().all_reduce("SUM", slope)

        return strategy.run(of_a_share, args=(inputs, labels))

    def shares(x):
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(np.split(x, REPLICAS)[context.replica_id_in_sync_group])
        )

    for name, labels in LABELS.items():
        slope = gradient(tf.constant(KERNEL), shares(INPUTS), shares(labels))
        found[f"loss/{name}"], other = (x.numpy() for x in slope.values)
        assert (other == found[f"loss/{name}"]).all()
    with strategy.scope():
        try:
            num_positives(tf.constant([1]))
        except RuntimeError as error:
            assert "between the replicas" in str(error)
        else:
            raise AssertionError("num_positives did not object")
    np.savez(out, **found, **all_cases(backend_tensorflow, replicas))


if __name__ == "__main__":
    framework, file = sys.argv[1:]
    {"torch": with_torch, "jax": with_jax, "tensorflow": with_tensorflow}[framework](Path(file))
