"""Training in JAX: the speed of a step, and a run to its end."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.gpu.losses_jax import on_gpu
from benchmarks.gpu.results import Job, Plan
from benchmarks.gpu.training import (
    settings,
    speed_with_loader,
    step_of,
    time_of_step,
    train_to_the_end,
)


def plan(job: Job) -> Plan:
    return {
        "step": lambda: step(job),
        "speed with the loader": lambda: speed(job),
        "training": lambda: training(job),
    }


def step(job: Job) -> dict[str, Any]:
    """Time and memory."""
    on_gpu(job)
    return time_of_step(job, "jax")


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
