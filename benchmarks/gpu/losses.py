"""The losses in PyTorch: time, share of a copy and memory, beside what others have."""

from __future__ import annotations

import functools
import importlib.util
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_torch import (
    Loss,
    backward,
    forward,
    forward_backward,
    ours,
    ours_sparse,
    peak_memory,
    textbook,
    textbook_sparse,
)
from benchmarks.common import (
    ALPHA,
    CLASSES,
    GAMMA,
    POSITIVES,
    Case,
    add_share_of_copy,
    interleaved,
    wall_clock,
)
from benchmarks.gpu.results import Again, Job, LeftOut, Plan
from focal.torch import sigmoid_focal_loss

BATCH, ANCHORS = 16, 100_000
DRY_ROWS = 100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("dense", "sparse")
PHASES: Mapping[str, Callable[[Loss, Tensor, Tensor], Case]] = {
    "both": forward_backward,
    "forward": forward,
    "backward": backward,
}
SMALL_GAMMAS = (0.0, 0.5, 1.0, 2.0)


def plan(job: Job) -> Plan:
    times = {
        f"{dtype}, {kind}, {phase}": partial(times_of, job, dtype, kind, phase)
        for phase in PHASES
        for dtype in DTYPES
        for kind in KINDS
    }
    return {**times, "NaN gradients": lambda: nan_gradients(job)}


def times_of(job: Job, dtype: str, kind: str, phase: str) -> dict[str, Any]:
    """Time, share of a copy and extra memory of every side."""
    x, labels, y = example(job.device, DRY_ROWS if job.dry else BATCH * ANCHORS, dtype)
    t = y if kind == "dense" else labels
    made = PHASES[phase]
    runs = {}
    for side, loss in sides(kind, job.dry).items():
        name = f"{dtype}, {kind}: {side}"
        if name in job.report.content["failed"]:
            continue
        try:
            check_gradient(loss, x, t, kind)
        except LeftOut as reason:
            job.report.content["left_out"][name] = str(reason)
        except Exception as error:
            job.report.fail(name, f"{type(error).__name__}: {error}", traceback.format_exc())
            raise Again from error
        else:
            runs[side] = made(loss, x, t)
    timer, repetitions = (wall_clock, 3) if job.dry else (on_the_device, 41)
    times = interleaved(runs, repetitions, timer=timer)
    target = torch.empty_like(x)
    copy = interleaved({"copy": lambda: target.copy_(x)}, repetitions, timer=timer)["copy"]
    bandwidth = bytes_per_second(x, copy)
    add_share_of_copy(times, needed_bytes(phase, x, t), bandwidth)
    if phase != "backward":
        for side, run in runs.items():
            memory = extra_memory(run, job.dry) / x.nbytes
            times[side]["extra_memory_in_logits"] = round(memory, 3)
    return {"copy_gb_per_s": round(bandwidth / 1e9, 1), "sides": times}


def bytes_per_second(x: Any, copy: Mapping[str, float]) -> float:
    """What a copy of the logits reads and writes in a second."""
    milliseconds = max(copy["median_ms"], 1e-3)  # 0 in a dry run
    return 2 * x.nbytes / milliseconds * 1e3


def needed_bytes(phase: str, x: Any, t: Any) -> int:
    """Logits and targets are read in each pass, and the gradient is written."""
    forward, backward = x.nbytes + t.nbytes, 2 * x.nbytes + t.nbytes
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


@functools.lru_cache(maxsize=1)
def example(device: str, rows: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (-1 is background), and the dense targets that say the same."""
    generator = torch.Generator(device).manual_seed(0)
    options: Any = {"generator": generator, "device": device}
    x = torch.randn(rows, CLASSES, dtype=DTYPES[dtype], **options).mul_(2).sub_(3)
    chosen = torch.randint(0, CLASSES, (rows,), **options)
    labels = torch.where(torch.rand(rows, **options) < POSITIVES, chosen, -1)
    y = torch.zeros_like(x)
    y.scatter_(1, labels.clamp(min=0)[:, None], (labels >= 0).to(x.dtype)[:, None])
    return x, labels, y


def torchvision_loss(x: Tensor, y: Tensor, gamma: float = GAMMA) -> Tensor:
    if importlib.util.find_spec("torchvision") is None:
        raise LeftOut("torchvision is not installed")
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(x, y, ALPHA, gamma, "sum")


def usual_loss(x: Tensor, y: Tensor, gamma: float = GAMMA) -> Tensor:
    if importlib.util.find_spec("triton") is None:
        raise LeftOut("Triton is not installed")
    from benchmarks.gpu.usual_kernel import UsualFocal

    return UsualFocal.apply(x, y, ALPHA, gamma)


@functools.cache
def sides(kind: str, dry: bool) -> dict[str, Loss]:
    """All that is compared, the eager ones first. A dry run does not wait for the compiler."""
    compiled = partial(torch.compile, backend="eager" if dry else "inductor")
    if kind == "sparse":
        eager: dict[str, Loss] = {"focal": ours_sparse, "textbook": textbook_sparse}
        return eager | {f"{name}, compiled": compiled(loss) for name, loss in eager.items()}
    eager = {"focal": ours, "textbook": textbook, "torchvision": torchvision_loss}
    sides = eager | {"usual Triton kernel": usual_loss}
    if importlib.util.find_spec("torchvision") is None:
        del eager["torchvision"]
    return sides | {f"{name}, compiled": compiled(loss) for name, loss in eager.items()}


def check_gradient(loss: Loss, x: Tensor, t: Tensor, kind: str) -> None:
    """In float32 the gradient is that of the textbook; in half types theirs differ too much."""
    got = forward_backward(loss, x, t)()
    if x.dtype == torch.float32:
        expected = forward_backward(textbook if kind == "dense" else textbook_sparse, x, t)()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def on_the_device(run: Case) -> float:
    """Milliseconds between two events in the stream around a case."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return begin.elapsed_time(end)


def extra_memory(run: Case, dry: bool) -> int:
    """Greatest number of bytes allocated at once beyond those before, the gradient included."""
    if dry:
        return peak_memory(run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def nan_gradients(job: Job) -> dict[str, Any]:
    """How many of the gradients at float32 logits from -120 to 120 are not finite."""
    x = torch.linspace(-120, 120, 4801, device=job.device).repeat(2)
    y = torch.arange(2.0, device=job.device).repeat_interleave(4801)
    losses: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
        "focal": lambda x, y, gamma: sigmoid_focal_loss(x, y, ALPHA, gamma, "sum"),
        "torchvision": torchvision_loss,
        "usual Triton kernel": usual_loss,
    }
    found: dict[str, Any] = {"logits": len(x)}
    for side, loss in losses.items():
        try:
            found[side] = {
                f"gamma {gamma:g}": int((~gradient(loss, x, y, gamma).isfinite()).sum())
                for gamma in SMALL_GAMMAS
            }
        except LeftOut as reason:
            found[side] = str(reason)
    return found


def gradient(loss: Callable[..., Tensor], x: Tensor, y: Tensor, gamma: float) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, y, gamma), leaf)[0]
