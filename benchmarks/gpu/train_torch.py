"""Training in PyTorch beside torchvision's RetinaNet, a profile of a step, and a run to its end."""

from __future__ import annotations

import functools
import gc
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import Case, interleaved, wall_clock
from benchmarks.gpu.results import Job, LeftOut, Plan
from benchmarks.gpu.training import (
    RESERVE,
    Settings,
    first_batch,
    peak_gib,
    settings,
    speed_with_loader,
    step_of,
    train_to_the_end,
)
from focal.files import write_atomically
from focal.retinanet.data import Batch

Step = Callable[[Batch], float]
PROFILE = "profile.txt"
ROWS = 30
COMPILING = 150
"""Seconds kept free after the run for the compiled step."""


def plan(job: Job) -> Plan:
    return {
        "step": lambda: steps(job, {"focal": ours, "torchvision": theirs}),
        "profile": lambda: profile(job),
        "step, variants": lambda: steps(
            job,
            {
                "focal, frozen batch norm": frozen,
                "torchvision, channels last": functools.partial(theirs, layout=torch.channels_last),
            },
        ),
        "speed with the loader": lambda: speed(job),
        "training": lambda: training(job),
        "step, compiled": lambda: compiled(job),
    }


def ours(setting: Settings, device: str) -> Step:
    return step_of("torch", setting, device)


def frozen(setting: Settings, device: str) -> Step:
    return ours(setting._replace(detector=setting.detector.replace(norm="frozen_batch")), device)


def ours_compiled(setting: Settings, device: str) -> Step:
    return ours(setting._replace(run=setting.run.replace(compile=True)), device)


def theirs(
    setting: Settings, device: str, layout: torch.memory_format = torch.contiguous_format
) -> Step:
    """Steps of torchvision's RetinaNet: same batch, canvas, optimizer and precision."""
    if importlib.util.find_spec("torchvision") is None:
        raise LeftOut("torchvision is not installed")
    from torchvision.models.detection import retinanet_resnet50_fpn

    height, width = setting.detector.image_size
    model = retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=setting.detector.num_classes,
        min_size=min(height, width),
        max_size=max(height, width),
        _skip_resize=True,
    )
    model = model.to(device, memory_format=layout).train()
    run = setting.run
    optimizer = torch.optim.SGD(
        model.parameters(), 1e-4, run.momentum, weight_decay=run.weight_decay, fused=True
    )
    half = run.precision == "bfloat16"

    def step(batch: Batch) -> float:
        images = torch.as_tensor(batch.images, device=device).permute(0, 3, 1, 2).float() / 255
        targets = []
        for boxes, labels in zip(batch.boxes, batch.labels, strict=True):
            real = labels >= 0
            fields = {"boxes": boxes[real], "labels": labels[real]}
            targets.append({k: torch.as_tensor(v, device=device) for k, v in fields.items()})
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = sum(model(list(images), targets).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))

    return step


def own_settings(job: Job) -> Settings:
    """As in `training`, with the precision named, so that both sides have the same."""
    setting = settings(job)
    precision = "float32" if job.dry else "bfloat16"
    return setting._replace(run=setting.run.replace(precision=precision))


def steps(job: Job, sides: dict[str, Callable[[Settings, str], Step]]) -> dict[str, Any]:
    """Time of a step on a batch that stays the same, in turn, and the memory of each side."""
    setting = own_settings(job)
    batch = first_batch(setting)
    runs: dict[str, Case] = {}
    found: dict[str, Any] = {
        "image_size": setting.detector.image_size,
        "batch_size": setting.run.batch_size,
        "precision": setting.run.precision,
        "boxes": int((batch.labels >= 0).sum()),
        "sides": {},
    }
    for side, make in sides.items():
        clean(job)
        before = 0 if job.dry else torch.cuda.memory_allocated()
        try:
            step = make(setting, job.device)
        except LeftOut as reason:
            found["sides"][side] = str(reason)
            continue
        runs[side] = functools.partial(step, batch)
        for _ in range(1 if job.dry else 3):
            runs[side]()
        used = peak_gib("torch", job.dry)
        memory = None if used is None else round(used - before / 2**30, 2)
        found["sides"][side] = {"peak_memory_gib": memory}
    repetitions, warm_up = (1, 0) if job.dry else (20, 3)
    for side, times in interleaved(runs, repetitions, warm_up, synchronized).items():
        speed = setting.run.batch_size / times["median_ms"] * 1e3
        found["sides"][side] |= {**times, "images_per_second": round(speed, 1)}
    return found


def compiled(job: Job) -> dict[str, Any]:
    """The step with `torch.compile`, which takes minutes to compile."""
    if job.dry:
        raise LeftOut("not in a dry run, which does not wait for the compiler")
    if job.seconds_left() < COMPILING / 2:
        raise LeftOut("out of time")
    return steps(job, {"focal, compiled": ours_compiled})


def synchronized(run: Case) -> float:
    """Milliseconds of a case on an idle device until it is idle again."""

    def all_of_it() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return wall_clock(all_of_it)


def clean(job: Job) -> None:
    """Free what is no longer used, and start counting memory again."""
    gc.collect()
    if not job.dry:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(job: Job) -> dict[str, Any]:
    """The operations of one step by time, in their own file, and how many kernels it starts."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    setting = own_settings(job)
    batch = first_batch(setting)
    step = ours(setting, job.device)
    for _ in range(1 if job.dry else 4):
        step(batch)
    milliseconds = synchronized(lambda: step(batch))
    activities = [ProfilerActivity.CPU]
    if not job.dry:
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        synchronized(lambda: step(batch))
    averages = profiled.key_averages()
    order = "self_cpu_time_total" if job.dry else "self_cuda_time_total"
    table = averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=90)
    kernels = [
        e
        for e in averages
        if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]
    launches = {
        e.key: e.count for e in averages if e.key.startswith(("cudaLaunch", "cuLaunch", "cudaMem"))
    }
    waits = {e.key: e.count for e in averages if "Synchronize" in e.key}
    size = "x".join(map(str, setting.detector.image_size))
    head = f"One training step in PyTorch, {setting.run.batch_size} x {size}, {milliseconds:.1f} ms"
    write_atomically(job.out / PROFILE, f"{head}\n\n{table}\n".encode())
    return {
        "file": PROFILE,
        "step_ms": round(milliseconds, 2),
        "kernel_ms": round(sum(e.self_device_time_total for e in kernels) / 1e3, 2),
        "kernels": sum(e.count for e in kernels),
        "calls": launches,
        "waits": waits,
    }


@functools.cache
def speed(job: Job) -> dict[str, Any]:
    """Images a second with the loader."""
    clean(job)
    setting = own_settings(job)
    return speed_with_loader(job, setting, ours(setting, job.device))


def training(job: Job) -> dict[str, Any]:
    """A run to its end."""
    setting, measured = own_settings(job), speed(job)
    clean(job)
    return train_to_the_end(job, "torch", setting, measured, job.device, RESERVE + COMPILING)
