"""Training in JAX: the speed of a step, and a run to its end."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.common import interleaved, wall_clock
from benchmarks.gpu.losses_jax import on_gpu
from benchmarks.gpu.results import Job, Plan
from benchmarks.gpu.training import (
    first_batch,
    peak_gib,
    settings,
    speed_with_loader,
    step_of,
    train_to_the_end,
)


def plan(job: Job) -> Plan:
    return {
        "step": lambda: step(job),
        "speed with the loader": lambda: speed(job),
        "training": lambda: training(job),
    }


def step(job: Job) -> dict[str, Any]:
    """Time of a step on a batch that stays the same, and the memory."""
    on_gpu(job)
    setting = settings(job)
    batch, run = first_batch(setting), step_of("jax", setting, None)
    compiling = wall_clock(lambda: run(batch)) / 1e3
    repetitions, warm_up = (1, 1) if job.dry else (20, 3)
    times = interleaved({"focal": lambda: run(batch)}, repetitions, warm_up)["focal"]
    side = {
        **times,
        "images_per_second": round(setting.run.batch_size / times["median_ms"] * 1e3, 1),
        "peak_memory_gib": peak_gib("jax", job.dry),
    }
    return {
        "image_size": setting.detector.image_size,
        "batch_size": setting.run.batch_size,
        "precision": setting.run.precision,
        "first_step_s": round(compiling, 2),
        "sides": {"focal": side},
    }


@functools.cache
def speed(job: Job) -> dict[str, Any]:
    """Images a second with the loader."""
    on_gpu(job)
    setting = settings(job)
    return speed_with_loader(job, setting, step_of("jax", setting, None))


def training(job: Job) -> dict[str, Any]:
    """A run to its end."""
    measured = speed(job)
    before = job.report.content["measured"].get("step", measured)  # compiled there, if it was made
    compiling = max(measured["first_step_s"], before["first_step_s"])
    return train_to_the_end(
        job, "jax", settings(job), {**measured, "first_step_s": compiling}, None
    )
