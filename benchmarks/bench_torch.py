"""PyTorch on a CPU: the losses against the textbook composition, and the time of an import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bench_step import training_steps
from benchmarks.common import (
    ALPHA,
    GAMMA,
    SETTING,
    Case,
    Staged,
    compare,
    compare_calls,
    compare_cases,
    example,
    losses_in_fresh_processes,
    print_losses,
    record,
    summary,
    table,
    times_table,
)
from focal.torch import sigmoid_focal_loss, softmax_focal_loss, sparse_sigmoid_focal_loss

Loss = Callable[[Tensor, Tensor], Tensor]
SMOOTHING = 0.1
SOFTMAX_SHAPES = ((20_000, 80), (4_096, 1_000))
FRAMEWORKS = ("torch", "jax", "tensorflow", "keras", "flax")


def textbook(x: Tensor, y: Tensor) -> Tensor:
    """Focal loss as it is usually typed, summed."""
    p = torch.sigmoid(x)
    ce = functional.binary_cross_entropy_with_logits(x, y, reduction="none")
    p_t = p * y + (1 - p) * (1 - y)
    alpha_t = ALPHA * y + (1 - ALPHA) * (1 - y)
    return (alpha_t * (1 - p_t) ** GAMMA * ce).sum()


def textbook_sparse(x: Tensor, labels: Tensor) -> Tensor:
    """The same from labels (-1 is background), with the one-hot targets it needs."""
    return textbook(x, functional.one_hot(labels + 1, x.shape[1] + 1)[:, 1:].to(x.dtype))


def ours(x: Tensor, y: Tensor) -> Tensor:
    return sigmoid_focal_loss(x, y, ALPHA, GAMMA, "sum")


def ours_each(x: Tensor, y: Tensor) -> Tensor:
    return sigmoid_focal_loss(x, y, ALPHA, GAMMA).sum()


def ours_sparse(x: Tensor, labels: Tensor) -> Tensor:
    return sparse_sigmoid_focal_loss(x, labels, ALPHA, GAMMA, "sum")


def ours_softmax(x: Tensor, labels: Tensor) -> Tensor:
    return softmax_focal_loss(x, labels, None, GAMMA, "sum")


def ours_smoothed(x: Tensor, labels: Tensor) -> Tensor:
    return softmax_focal_loss(x, labels, None, GAMMA, "sum", label_smoothing=SMOOTHING)


def cross_entropy(x: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(x, labels, reduction="sum")


def cross_entropy_smoothed(x: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(x, labels, reduction="sum", label_smoothing=SMOOTHING)


def one_pass(x: Tensor, t: Tensor) -> Tensor:
    """The least that any of the losses needs: an exponential, a logarithm, one array written."""
    return torch.log1p(torch.exp(-x.abs())) + t


def forward(loss: Loss, x: Tensor, t: Tensor) -> Case:
    def run() -> Tensor:
        with torch.no_grad():
            return loss(x, t)

    return run


def backward(loss: Loss, x: Tensor, t: Tensor) -> Case:
    return Staged(lambda: loss(x.detach().requires_grad_(), t), torch.Tensor.backward)


def forward_backward(loss: Loss, x: Tensor, t: Tensor) -> Case:
    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        loss(leaf, t).backward()
        assert leaf.grad is not None
        return leaf.grad

    return run


def compare_losses() -> dict[str, Any]:
    """Forward, backward and both of each case, both sides."""
    x, labels, y = map(torch.from_numpy, example())
    cases = {
        "dense, sum": (ours, textbook, y),
        "dense, none().sum()": (ours_each, textbook, y),
        "sparse, sum": (ours_sparse, textbook_sparse, labels),
        "dense, sum, compiled": (torch.compile(ours), torch.compile(textbook), y),
        "sparse, sum, compiled": (
            torch.compile(ours_sparse),
            torch.compile(textbook_sparse),
            labels,
        ),
    }
    return compare_cases(
        x,
        cases,
        {"both": forward_backward, "forward": forward, "backward": backward},
        gradient=lambda gradient: gradient,
        least={"dense, sum, compiled": forward(torch.compile(one_pass), x, y)},
        other="textbook",
        memory=peak_memory,
    )


def small_calls() -> dict[str, Any]:
    """Calls with few logits, whose time is that of Python and PyTorch, not of arithmetic."""
    found = {}
    for shape in ((100,), (32, 10)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator)
        y = (torch.rand(shape, generator=generator) < 0.1).float()
        size = " x ".join(map(str, shape))
        for phase, timed in (("forward", forward), ("both", forward_backward)):
            for name, own in (("none().sum()", ours_each), ("sum", ours)):
                sides = {"focal": timed(own, x, y), "textbook": timed(textbook, x, y)}
                found[f"{size}, {name}; {phase}"] = compare_calls(sides)
    labels = torch.arange(32) % 10
    for name, own, other in (
        ("sparse", ours_sparse, textbook_sparse),
        ("softmax and cross entropy", ours_softmax, cross_entropy),
    ):
        sides = {
            "focal": forward_backward(own, x, labels),
            "other": forward_backward(other, x, labels),
        }
        found[f"{size}, {name}, sum; both"] = compare_calls(sides)
    return found


def compare_softmax() -> dict[str, Any]:
    """The softmax focal loss beside cross entropy, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for rows, classes in SOFTMAX_SHAPES:
        x = torch.randn(rows, classes, generator=generator)
        labels = torch.randint(classes, (rows,), generator=generator)
        for how in ("", ", compiled"):
            losses = (ours_softmax, ours_smoothed, cross_entropy, cross_entropy_smoothed)
            runs = [
                forward_backward(torch.compile(loss) if how else loss, x, labels) for loss in losses
            ]
            for name, own, other in (
                ("softmax and cross entropy", runs[0], runs[2]),
                ("the same, both smoothed", runs[1], runs[3]),
                ("smoothed and not, both focal", runs[1], runs[0]),
            ):
                found[f"{name}, {rows} x {classes}{how}"] = compare({"focal": own, "other": other})
    return found


def peak_memory(run: Case) -> int:
    """Greatest number of bytes that PyTorch held at once beyond what it held before.

    The profiler reports each allocation (+) and release (-) of the CPU allocator in order; their
    running sum's maximum is exact, whereas resident memory depends on what malloc kept. The
    gradient itself is counted: it is 1.0 times the logits.
    """
    run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak


def import_time(repetitions: int = 11) -> dict[str, Any]:
    """What `import focal` takes in a fresh process where NumPy is there already."""
    program = (
        "import sys, time, numpy; start = time.perf_counter(); import focal;"
        "print((time.perf_counter() - start) * 1e3);"
        f"print([name for name in {FRAMEWORKS!r} if name in sys.modules])"
    )
    times, loaded = [], set()
    for _ in range(repetitions):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        elapsed, frameworks = done.stdout.splitlines()
        times.append(float(elapsed))
        loaded.add(frameworks)
    assert loaded == {"[]"}, f"import focal loads {loaded}"
    return {**summary(times), "frameworks_loaded": 0}


def main() -> None:
    """Measure, write, print."""
    report = record(
        "torch_cpu",
        "python -m benchmarks",
        setting=SETTING,
        threads=torch.get_num_threads(),
        import_focal=import_time(),
        small_calls=small_calls(),
        losses=losses_in_fresh_processes("benchmarks.bench_torch"),
        softmax=compare_softmax(),
        training_step=training_steps(),
    )
    print(f"PyTorch, small calls, in ms\n\n{times_table(report['small_calls'])}\n")
    print_losses("PyTorch", report["losses"])
    print(times_table(report["softmax"]))
    memory = [("peak memory in logits", "focal", "textbook")]
    for name, case in report["losses"]["both"].items():
        both = list(case["peak_memory_in_logits"].values())[:2]
        memory.append((name, *(f"{value:.2f}" for value in both)))
    print(f"\n{table(memory)}")
    loading = report["import_focal"]["median_ms"]
    print(f"\nimport focal beyond NumPy: {loading:.1f} ms, no framework")
    names = ("forward", "backward", "optimizer", "the rest", "step")
    for setting, step in report["training_step"].items():
        print(f"\nTraining step of the preset {setting}, {step['precision']}, in ms\n")
        print(table([(n, f"{step[n]['median_ms']:.1f} ({step[n]['min_ms']:.1f})") for n in names]))
        print(f"Data, targets and losses are {step['share_of_the_rest']:.1%} of a step.")


if __name__ == "__main__":
    main()
