"""What the replicas of tests/test_replicas.py run: a program for each framework.

`python tests/sharing.py FRAMEWORK FILE` writes gradients to an .npz file. PyTorch's is started by
torchrun, the other two make two devices of the processor.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

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


def with_torch(out: Path) -> None:
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from focal.torch import num_positives, sparse_sigmoid_focal_loss

    distributed.init_process_group("gloo")
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
    if rank == 0:
        np.savez(out, **found)
    distributed.destroy_process_group()


def with_jax(out: Path) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={REPLICAS}"
    import jax
    from jax.sharding import PartitionSpec as P

    from focal.jax import num_positives, sparse_sigmoid_focal_loss

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
    np.savez(out, **found)


def with_tensorflow(out: Path) -> None:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(REPLICAS)]
    )
    from focal.tensorflow import num_positives, sparse_sigmoid_focal_loss

    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)])
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
    np.savez(out, **found)


if __name__ == "__main__":
    framework, file = sys.argv[1:]
    {"torch": with_torch, "jax": with_jax, "tensorflow": with_tensorflow}[framework](Path(file))
