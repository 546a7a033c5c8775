"""The losses on a GPU: forward and backward, memory, and the time relative to a plain copy.

A batch of 16 images with 100,000 anchors and 80 classes. `make bench-gpu` writes
results/gpu.json; it has no result in this repository until it has run on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_torch import (
    forward_backward,
    ours,
    ours_sparse,
    textbook,
    textbook_sparse,
)
from benchmarks.common import (
    ALPHA,
    CLASSES,
    GAMMA,
    POSITIVES,
    Case,
    Summary,
    interleaved,
    record,
    table,
)

BATCH, ANCHORS = 16, 100_000


def example(device: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (-1 is background), and the dense targets that say the same."""
    generator = torch.Generator(device).manual_seed(0)
    options: Any = {"generator": generator, "device": device}
    x = torch.randn(rows, CLASSES, dtype=dtype, **options).mul_(2).sub_(3)
    chosen = torch.randint(0, CLASSES, (rows,), **options)
    labels = torch.where(torch.rand(rows, **options) < POSITIVES, chosen, -1)
    y = torch.zeros_like(x)
    y.scatter_(1, labels.clamp(min=0)[:, None], (labels >= 0).to(dtype)[:, None])
    return x, labels, y


def torchvision_loss(x: Tensor, y: Tensor) -> Tensor:
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(x, y, ALPHA, GAMMA, "sum")


def until_done(run: Case, device: str) -> Case:
    """The case, with a wait until its kernels have run."""

    def waiting() -> object:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return waiting


def copy_bandwidth(like: Tensor, device: str) -> float:
    """Bytes read and written per second by a copy of a tensor as large as the logits."""
    target = torch.empty_like(like)
    times = interleaved({"copy": until_done(lambda: target.copy_(like), device)})["copy"]
    return 2 * like.nbytes / times["median_ms"] * 1e3


def extra_memory(run: Case) -> int:
    """Greatest number of bytes allocated at once beyond those before, the gradient included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(device: str, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every side, dense and sparse, for one type of logits."""
    x, labels, y = example(device, rows, dtype)
    dense: dict[str, Callable[..., Tensor]] = {"focal": ours, "textbook": textbook}
    sparse: dict[str, Callable[..., Tensor]] = {"focal": ours_sparse, "textbook": textbook_sparse}
    for losses in (dense, sparse):
        losses.update({f"{name}, compiled": torch.compile(f) for name, f in losses.items()})
    if importlib.util.find_spec("torchvision"):
        dense["torchvision"] = torchvision_loss

    bandwidth = copy_bandwidth(x, device)
    report: dict[str, Any] = {"copy_gb_per_s": round(bandwidth / 1e9, 1)}
    for kind, losses, t in (("dense", dense, y), ("sparse", sparse, labels)):
        runs = {
            name: until_done(forward_backward(loss, x, t), device) for name, loss in losses.items()
        }
        if dtype == torch.float32:  # in half precision the others' gradients differ too much
            expected = runs["textbook"]()
            for run in runs.values():
                torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-6)
            del expected
        sides: dict[str, Any] = {**interleaved(runs)}
        # Logits and targets are read forward and backward, and the gradient is written.
        needed = 3 * x.nbytes + 2 * t.nbytes
        for name, side in sides.items():
            side["share_of_copy"] = round(needed / side["median_ms"] * 1e3 / bandwidth, 3)
            if device == "cuda":
                side["extra_memory_in_logits"] = round(extra_memory(runs[name]) / x.nbytes, 3)
        report[kind] = sides
    return report


def measure_jax(rows: int) -> dict[str, dict[str, Summary]] | None:
    """The same in JAX against optax, jitted, in float32; None where JAX sees no GPU."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch has memory too
    if importlib.util.find_spec("jax") is None or importlib.util.find_spec("optax") is None:
        return None
    import jax

    from benchmarks import bench_jax

    if jax.default_backend() != "gpu":
        return None
    x, labels, y = (jax.numpy.asarray(a.numpy()) for a in example("cpu", rows, torch.float32))
    cases = {
        "dense": {"focal": (bench_jax.dense, y), "optax": (bench_jax.optax_dense, y)},
        "sparse": {
            "focal": (bench_jax.sparse, labels),
            "optax": (bench_jax.optax_from_labels, labels),
        },
    }
    return {
        kind: interleaved(
            {name: bench_jax.forward_backward(f, x, t) for name, (f, t) in sides.items()}
        )
        for kind, sides in cases.items()
    }


def print_report(measured: dict[str, dict[str, Any]]) -> None:
    """One table for each type and kind of targets."""
    for dtype, report in measured.items():
        print(f"\n{dtype}: a copy moves {report['copy_gb_per_s']} GB/s")
        for kind in ("dense", "sparse"):
            rows = [(kind, "ms", "share of copy", "extra memory in logits")]
            for name, side in report[kind].items():
                memory = side.get("extra_memory_in_logits", "")
                rows.append((name, *map(str, (side["median_ms"], side["share_of_copy"], memory))))
            print(table(rows))


def main() -> None:
    """Measure, write, print."""
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: PyTorch sees no CUDA GPU on this machine; nothing was measured")
    rows = BATCH * ANCHORS
    measured = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        measured[str(dtype).removeprefix("torch.")] = measure("cuda", rows, dtype)
    torch.cuda.empty_cache()
    record(
        "gpu",
        "make bench-gpu",
        setting=f"{BATCH} x {ANCHORS} x {CLASSES} logits, gamma {GAMMA}, alpha {ALPHA}, sum",
        gpu=torch.cuda.get_device_name(),
        cuda=torch.version.cuda,
        losses=measured,
        jax=measure_jax(rows),
    )
    print_report(measured)


if __name__ == "__main__":
    main()
