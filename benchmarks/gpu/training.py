"""What the training parts have in common: settings, the speed of a step, a run to its end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import interleaved, wall_clock
from benchmarks.gpu.detections import detections_on, scored
from benchmarks.gpu.results import Job, LeftOut
from focal.retinanet import PRESETS
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data import Batch, CocoDataset, Dataset, ShapesDataset, train_batches
from focal.retinanet.data.coco import find_splits
from focal.retinanet.detector import backend_module
from focal.retinanet.training.loop import train
from focal.retinanet.training.metrics import read_metrics
from focal.retinanet.training.stopping import Stopped

DRY_SIZE, DRY_STEPS = (64, 64), 3
MAX_STEPS = 20_000
RESERVE = 45
"""Seconds kept free after a run, for the detections."""


class Settings(NamedTuple):
    """What is trained, on what, and what it is measured on."""

    detector: RetinaNetConfig
    run: TrainConfig
    train: Dataset
    test: Dataset


def settings(job: Job) -> Settings:
    """The preset `r50` with batch norm, as it starts from random weights; dry, a small `tiny`."""
    detector, run = PRESETS["tiny" if job.dry else "r50"]
    sets = [dataset(job.data, splits, job.dry) for splits in (("train",), ("test", "val"))]
    detector = detector.replace(classes=sets[0].classes, norm="batch")
    run = run.replace(save_every=0, workers=min(8, os.cpu_count() or 1), batch_size=16)
    if job.dry:
        detector = detector.replace(image_size=DRY_SIZE, channels=16, head_depth=1)
        run = run.replace(batch_size=2, crop=None, workers=0, precision="float32")
        run = run.replace(steps=DRY_STEPS, warmup=0, log_every=1)
    return Settings(detector, run, *sets)


def dataset(folder: Path | None, splits: tuple[str, ...], dry: bool) -> Dataset:
    """The first of these splits that the folder has; without a folder, shapes."""
    if folder is None:
        size, count, objects = (DRY_SIZE, 4, (16, 48)) if dry else ((512, 512), 200, (40, 160))
        return ShapesDataset(splits[0], size, count, num_objects=6, object_size=objects)
    found = find_splits(folder)
    return CocoDataset(folder, next((split for split in splits if split in found), splits[-1]))


def first_batch(setting: Settings) -> Batch:
    """A batch of the training split."""
    batches = train_batches(setting.train, setting.detector, setting.run.replace(workers=0))
    with contextlib.closing(batches):
        return next(batches)


def step_of(backend: str, setting: Settings, device: str | None) -> Callable[[Batch], float]:
    """Training steps of a new detector, each of which is waited for."""
    library = backend_module(backend)
    model = library.build(setting.detector, setting.run.seed, device)
    trainer = library.Trainer(model, setting.run)
    number = 0

    def step(batch: Batch) -> float:
        nonlocal number
        number += 1
        # The norm is known after the backward pass. The optimizer's time is in the next step.
        return float(trainer.step(number, batch, 1e-4)["gradient_norm"])

    return step


def time_of_step(job: Job, backend: str) -> dict[str, Any]:
    """Time of a step on a batch that stays the same, and the memory."""
    setting = settings(job)
    batch, run = first_batch(setting), step_of(backend, setting, None)
    compiling = wall_clock(lambda: run(batch)) / 1e3
    repetitions, warm_up = (1, 1) if job.dry else (20, 3)
    times = interleaved({"focal": lambda: run(batch)}, repetitions, warm_up)["focal"]
    speed = round(setting.run.batch_size / times["median_ms"] * 1e3, 1)
    memory = peak_gib(backend, job.dry)
    return {
        "image_size": setting.detector.image_size,
        "batch_size": setting.run.batch_size,
        "precision": setting.run.precision,
        "first_step_s": round(compiling, 2),
        "sides": {"focal": {**times, "images_per_second": speed, "peak_memory_gib": memory}},
    }


def speed_with_loader(
    job: Job, setting: Settings, step: Callable[[Batch], float]
) -> dict[str, float]:
    """Images and steps a second of a training loop, and of its loader alone."""
    steps = 2 if job.dry else 20
    with contextlib.closing(train_batches(setting.train, setting.detector, setting.run)) as batches:
        begin = time.perf_counter()
        step(next(batches))
        first = time.perf_counter() - begin
        for _ in range(1 if job.dry else 10):
            step(next(batches))
        begin = time.perf_counter()
        for _ in range(steps):
            step(next(batches))
        seconds = (time.perf_counter() - begin) / steps
        for _ in range(2 * setting.run.workers):  # what is made already
            next(batches)
        begin = time.perf_counter()
        for _ in range(steps):
            next(batches)
        alone = (time.perf_counter() - begin) / steps
    size = setting.run.batch_size
    return {
        "first_step_s": round(first, 2),
        "step_s": round(seconds, 4),
        "images_per_second": round(size / seconds, 1),
        "loader_alone_images_per_second": round(size / alone, 1),
        "loader_threads": setting.run.workers,
    }


def train_to_the_end(
    job: Job,
    backend: str,
    setting: Settings,
    speed: dict[str, float],
    device: str | None,
    reserve: float = RESERVE,
) -> dict[str, Any]:
    """A run of as many steps as fit in 85 % of the time left; detections at its end."""
    run = setting.run
    if not job.dry:
        left = job.seconds_left() - reserve - 2 * speed["first_step_s"]
        steps = min(MAX_STEPS, int(0.85 * left / speed["step_s"]))
        if steps < 100:
            raise LeftOut(f"time for {max(0, steps)} steps only")
        log_every = max(1, steps // 40)
        run = run.replace(steps=steps, warmup=min(500, steps // 5), log_every=log_every)
    out = job.scratch / backend
    result: dict[str, Any] = {"backend": backend, "steps": run.steps}
    result["train"] = json.loads(run.to_json())
    result["detector"] = json.loads(setting.detector.to_json())
    begin = time.monotonic()
    try:
        with stopped_after(job.seconds_left() - reserve / 2):
            model = train(
                setting.detector, run, setting.train, None, out, backend=backend, device=device
            )
    except Stopped as stopped:
        model, result["stopped"] = None, str(stopped).partition(";")[0]
    result["seconds"] = round(time.monotonic() - begin, 1)
    result["peak_memory_gib"] = peak_gib(backend, job.dry)
    lines, _ = read_metrics(out / "metrics.jsonl")
    kept = ("step", "loss", "classification", "box", "images_per_second")
    result["log"] = [[line["step"], *(_plain(line.get(k)) for k in kept[1:])] for line in lines]
    result["log_columns"] = kept
    speeds = [line["images_per_second"] for line in lines[1:]]
    result["images_per_second"] = round(statistics.median(speeds), 1) if speeds else None
    if model is not None:
        begin = time.monotonic()
        found = detections_on(model, setting.test)
        result["detection_seconds"] = round(time.monotonic() - begin, 1)
        result |= {"split": setting.test.name, **scored(found, setting.test)}
    return result


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Stop a training run cleanly, as SIGTERM does, and anything else where it is."""

    def over(*_: object) -> None:
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            raise LeftOut("out of time")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_gib(backend: str, dry: bool) -> float | None:
    """The most memory that the framework has had in use on the GPU, in GiB."""
    if dry:
        return None
    if backend == "torch":
        import torch

        peak = torch.cuda.max_memory_allocated()
    elif backend == "jax":
        import jax

        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    else:
        import tensorflow as tf

        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return round(peak / 2**30, 2)


def _plain(value: Any) -> float | None:
    """Six digits; None for what is not finite."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
