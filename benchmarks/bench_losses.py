"""The losses against the textbook composition, import time, and the parts of a training step.

Every comparison runs both sides in turn in this process: a ratio is worth more than a time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import Case, interleaved, machine, summary, table, versions
from focal.retinanet import backend_torch
from focal.retinanet.data import train_batches
from focal.retinanet.data.shapes import ShapesDataset
from focal.retinanet.presets import PRESETS
from focal.torch import sigmoid_focal_loss, sparse_sigmoid_focal_loss

ROWS, CLASSES, POSITIVES = 40_000, 80, 0.01
ALPHA, GAMMA = 0.25, 2.0
RESULTS = Path(__file__).parent / "results" / "cpu.json"
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
    return textbook(x, functional.one_hot(labels + 1, CLASSES + 1)[:, 1:].to(x.dtype))


def ours(x: Tensor, y: Tensor) -> Tensor:
    return sigmoid_focal_loss(x, y, ALPHA, GAMMA, "sum")


def ours_each(x: Tensor, y: Tensor) -> Tensor:
    return sigmoid_focal_loss(x, y, ALPHA, GAMMA).sum()


def ours_sparse(x: Tensor, labels: Tensor) -> Tensor:
    return sparse_sigmoid_focal_loss(x, labels, ALPHA, GAMMA, "sum")


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, dense targets with 1 % of positives, and labels with as many positives."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, CLASSES, generator=rng) * 2 - 3
    y = (torch.rand(ROWS, CLASSES, generator=rng) < POSITIVES).float()
    labels = torch.randint(0, CLASSES, (ROWS,), generator=rng)
    background = torch.rand(ROWS, generator=rng) >= POSITIVES * CLASSES
    return x, y, torch.where(background, -1, labels)


def forward_backward(loss: Any, x: Tensor, t: Tensor) -> Case:
    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        loss(leaf, t).backward()
        assert leaf.grad is not None
        return leaf.grad

    return run


def compare_losses() -> dict[str, Any]:
    """Forward and backward of each case, both sides."""
    x, y, labels = example()
    cases = {
        "dense, sum": (ours, textbook, y),
        "dense, none().sum()": (ours_each, textbook, y),
        "sparse, sum": (ours_sparse, textbook_sparse, labels),
        "dense, sum, compiled": (torch.compile(ours), torch.compile(textbook), y),
    }
    result = {}
    for name, (own, other, t) in cases.items():
        sides = {"focal": forward_backward(own, x, t), "textbook": forward_backward(other, x, t)}
        torch.testing.assert_close(sides["focal"](), sides["textbook"](), rtol=1e-3, atol=1e-6)
        times = interleaved(sides)
        ratio = times["textbook"]["median_ms"] / times["focal"]["median_ms"]
        memory = {side: peak_memory(run) / (4 * x.numel()) for side, run in sides.items()}
        result[name] = {
            **times,
            "ratio_of_medians": round(ratio, 2),
            "peak_memory_in_logits": {side: round(value, 2) for side, value in memory.items()},
        }
    return result


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


class SplitTrainer(backend_torch.Trainer):
    """A trainer whose network and optimiser note when they run."""

    def watch(self) -> dict[str, float]:
        """Start measuring; the seconds of network forward and optimiser add up in the result.

        The network's backward runs from the moment the gradient reaches its outputs to the end
        of `backward`, which is where clipping, the optimiser's first part, begins.
        """
        spent = dict.fromkeys(("forward", "backward", "optimiser"), 0.0)
        marks: dict[str, float] = {}

        def now(name: str) -> None:
            marks[name] = time.perf_counter()

        def reached(grad: Tensor) -> None:
            now("backward")  # of the last output to be reached

        def after_forward(_module: Any, _args: Any, outputs: tuple[Tensor, ...]) -> None:
            spent["forward"] += time.perf_counter() - marks["forward"]
            for output in outputs:
                output.register_hook(reached)

        self.model.register_forward_pre_hook(lambda *_: now("forward"))
        self.model.register_forward_hook(after_forward)
        clip, update = torch.nn.utils.clip_grad_norm_, self._update_average

        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Tensor:
            now("optimiser")
            spent["backward"] += marks["optimiser"] - marks["backward"]
            return clip(*args, **kwargs)

        def update_average(number: int) -> None:
            update(number)
            spent["optimiser"] += time.perf_counter() - marks["optimiser"]

        torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
        self._update_average = update_average  # type: ignore[method-assign]
        return spent


def training_step(repetitions: int = 30, warm_up: int = 12) -> dict[str, Any]:
    """Median milliseconds of the parts of a step of the preset `tiny`, 240x240, batch of 8."""
    preset = PRESETS["tiny"]
    assert preset.train.crop == (240, 240) and preset.train.batch_size == 8
    # As many objects an image as the blood cells have, few enough images that the loader keeps
    # them all decoded after the warm-up, as it does in a run of several epochs.
    dataset = ShapesDataset("train", size=preset.detector.canvas, num_images=32, num_objects=14)
    model = backend_torch.build(preset.detector.replace(classes=dataset.classes), 0, "cpu")
    trainer = SplitTrainer(model, preset.train)
    batches = train_batches(dataset, model.config, preset.train)
    clip = torch.nn.utils.clip_grad_norm_
    steps: list[dict[str, float]] = []
    try:
        spent = trainer.watch()
        for number in range(warm_up + repetitions):
            spent.update(dict.fromkeys(spent, 0.0))
            start = time.perf_counter()
            trainer.step(number, next(batches), 1e-4)
            whole = time.perf_counter() - start
            steps.append({**spent, "the rest": whole - sum(spent.values()), "step": whole})
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
        batches.close()  # type: ignore[attr-defined]
    parts = {name: [step[name] * 1e3 for step in steps[warm_up:]] for name in steps[0]}
    shares = [step["the rest"] / step["step"] for step in steps[warm_up:]]
    return {
        **{name: summary(values) for name, values in parts.items()},
        "share_of_the_rest": round(statistics.median(shares), 3),
        "precision": trainer.precision,
    }


def main() -> None:
    """Measure, print, write."""
    report: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": "python -m benchmarks",
        "machine": machine(),
        "versions": versions(),
        "setting": f"float32 {ROWS} x {CLASSES}, 1 % positives, gamma {GAMMA}, alpha {ALPHA}",
        "import_focal": import_time(),
        "losses": compare_losses(),
        "training_step": training_step(),
    }
    print(f"{report['setting']}; forward and backward, median (least) in ms; memory in logits\n")
    rows = [("case", "focal", "textbook", "ratio", "memory", "textbook's")]
    for name, case in report["losses"].items():
        memory = case["peak_memory_in_logits"]
        times = (f"{case[s]['median_ms']:.1f} ({case[s]['min_ms']:.1f})" for s in memory)
        used = (f"{memory[s]:.2f}" for s in memory)
        rows.append((name, *times, f"{case['ratio_of_medians']:.2f}", *used))
    print(table(rows))
    loading = report["import_focal"]["median_ms"]
    print(f"\nimport focal beyond NumPy: {loading:.1f} ms, no framework")
    step = report["training_step"]
    print(f"\nTraining step of the preset tiny, 240x240, batch of 8, {step['precision']}, in ms\n")
    names = ("forward", "backward", "optimiser", "the rest", "step")
    print(table([(n, f"{step[n]['median_ms']:.1f} ({step[n]['min_ms']:.1f})") for n in names]))
    print(f"Data, targets and losses are {step['share_of_the_rest']:.1%} of a step.")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
