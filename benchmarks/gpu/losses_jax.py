"""The losses in JAX, jitted, beside optax."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

from benchmarks.common import CLASSES, POSITIVES, Case, add_share_of_copy, interleaved
from benchmarks.gpu.losses import ANCHORS, BATCH, DRY_ROWS, bytes_per_second, needed_bytes
from benchmarks.gpu.results import Job, LeftOut, Plan

DTYPES, KINDS = ("float32", "bfloat16"), ("dense", "sparse")


def plan(job: Job) -> Plan:
    return {
        f"JAX, {dtype}, {kind}": partial(times_of, job, dtype, kind)
        for dtype in DTYPES
        for kind in KINDS
    }


def on_gpu(job: Job) -> None:
    """Leave the measurement out where JAX is not to be had, or has no GPU."""
    for package in ("jax", "optax"):
        if importlib.util.find_spec(package) is None:
            raise LeftOut(f"{package} is not installed")
    import jax

    if not job.dry and jax.default_backend() != "gpu":
        raise LeftOut(f"JAX sees no GPU, only {jax.default_backend()}")


def times_of(job: Job, dtype: str, kind: str) -> dict[str, Any]:
    """Time, share of a copy and memory of both sides in every phase."""
    on_gpu(job)
    import jax
    import jax.numpy as jnp

    from benchmarks import bench_jax

    rows = DRY_ROWS if job.dry else BATCH * ANCHORS
    keys = jax.random.split(jax.random.key(0), 3)
    x = (jax.random.normal(keys[0], (rows, CLASSES)) * 2 - 3).astype(dtype)
    chosen = jax.random.randint(keys[1], (rows,), 0, CLASSES)
    labels = jnp.where(jax.random.uniform(keys[2], (rows,)) < POSITIVES, chosen, -1)
    if kind == "dense":
        t = jax.nn.one_hot(labels, CLASSES, dtype=x.dtype)
        losses = {"focal": bench_jax.dense, "optax": bench_jax.optax_dense}
    else:
        t = labels
        losses = {"focal": bench_jax.sparse, "optax": bench_jax.optax_from_labels}
    repetitions = 3 if job.dry else 41

    def compiled(function: Any) -> tuple[Case, int]:
        """The compiled function, and the bytes that it allocates."""
        run = jax.jit(function).lower(x, t).compile()
        memory = run.memory_analysis()
        nbytes = memory.temp_size_in_bytes + memory.output_size_in_bytes
        return lambda: jax.block_until_ready(run(x, t)), nbytes

    copy = interleaved({"copy": compiled(lambda x, t: x + 1)[0]}, repetitions)["copy"]
    bandwidth = bytes_per_second(x, copy)
    found: dict[str, Any] = {"copy_gb_per_s": round(bandwidth / 1e9, 1)}
    for phase, change in (
        ("both", jax.value_and_grad),
        ("forward", lambda loss: loss),
        ("backward", jax.grad),
    ):
        both = {side: compiled(change(loss)) for side, loss in losses.items()}
        times = interleaved({side: run for side, (run, _) in both.items()}, repetitions)
        add_share_of_copy(times, needed_bytes(phase, x, t), bandwidth)
        for side, (_, nbytes) in both.items():
            times[side]["extra_memory_in_logits"] = round(nbytes / x.nbytes, 3)
        found[phase] = times
    return found
