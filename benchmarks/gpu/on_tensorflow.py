"""TensorFlow, where it is installed and sees a GPU: losses, agreement, training."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np

from benchmarks.common import CLASSES, POSITIVES, interleaved
from benchmarks.gpu import agree
from benchmarks.gpu.losses import ANCHORS, BATCH, DRY_ROWS
from benchmarks.gpu.results import Job, LeftOut, Plan
from benchmarks.gpu.training import time_of_step

KINDS = ("dense", "sparse")


def plan(job: Job) -> Plan:
    losses = {f"float32, {kind}": functools.partial(losses_of, job, kind) for kind in KINDS}
    gpu = "cpu" if job.dry else "gpu:0"
    return {**losses, "outputs": lambda: outputs_of(job, gpu), "step": lambda: step(job)}


def on_gpu(job: Job) -> None:
    """Leave the measurement out where TensorFlow is not installed, or has no GPU."""
    if importlib.util.find_spec("tensorflow") is None:
        raise LeftOut("TensorFlow is not installed")
    import tensorflow as tf

    if not job.dry and not tf.config.list_physical_devices("GPU"):
        raise LeftOut("TensorFlow sees no GPU")


def losses_of(job: Job, kind: str) -> dict[str, Any]:
    """Forward and backward beside Keras, compiled by XLA."""
    on_gpu(job)
    import tensorflow as tf

    from benchmarks import bench_tensorflow as cases

    rows = DRY_ROWS if job.dry else BATCH * ANCHORS
    x = tf.random.stateless_normal((rows, CLASSES), (0, 0), -3.0, 2.0)
    rng = np.random.default_rng(0)
    labels = tf.constant(np.where(rng.random(rows) < POSITIVES, rng.integers(0, CLASSES, rows), -1))
    if kind == "dense":
        t, losses = tf.one_hot(labels, CLASSES), (cases.dense, cases.keras_dense)
    else:
        t, losses = labels, (cases.sparse, cases.keras_from_labels)

    def waiting(loss: Any) -> Any:
        run = tf.function(cases.value_and_grad(loss), jit_compile=True)
        return lambda: float(run(x, t)[0])  # the gradient is of the same kernels

    sides = dict(zip(("focal", "Keras"), map(waiting, losses), strict=True))
    return {"sides": interleaved(sides, 3 if job.dry else 21)}


def outputs_of(job: Job, device: str) -> dict[str, Any]:
    """How far from PyTorch on the CPU."""
    on_gpu(job)
    return agree.compare(job, "tensorflow", device)


def step(job: Job) -> dict[str, Any]:
    """Time and memory of a training step."""
    on_gpu(job)
    if job.dry:
        raise LeftOut("not in a dry run, where its compilation takes too long")
    return time_of_step(job, "tensorflow")
