"""Where the time of the dense loss goes: operations in eager PyTorch, passes in XLA.

`python -m benchmarks.profile_cpu` writes results/profile_cpu.json.
"""

from __future__ import annotations

import re

import jax
import torch

from benchmarks import bench_jax
from benchmarks.bench_torch import forward_backward, ours
from benchmarks.common import SETTING, Case, example, record, table

REPETITIONS = 20
SLOW = ("sigmoid", "log1p")


def operations(run: Case) -> dict[str, dict[str, float]]:
    """Milliseconds and calls of one run, by operation, the slowest first."""
    for _ in range(4):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(REPETITIONS):
            run()
    total: dict[str, dict[str, float]] = {}
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::").rstrip("_")
        entry = total.setdefault(name, {"ms": 0.0, "calls": 0.0})
        entry["ms"] += event.self_cpu_time_total / 1e3 / REPETITIONS
        entry["calls"] += event.count / REPETITIONS
    rounded = {
        name: {key: round(value, 3) for key, value in entry.items()}
        for name, entry in total.items()
        if entry["ms"] >= 0.01
    }
    return dict(sorted(rounded.items(), key=lambda item: -item[1]["ms"]))


def transcendentals() -> dict[str, int]:
    """Number of exponentials and logarithms in the compiled program of loss and gradient."""
    x, _, y = map(jax.numpy.asarray, example())
    compiled = jax.jit(jax.value_and_grad(bench_jax.dense)).lower(x, y).compile()
    text = compiled.as_text()
    names = ("exponential", "log-plus-one", "logistic", "fusion")
    return {name: len(re.findall(rf"= \S+ {name}\(", text)) for name in names}


def main() -> None:
    """Measure, write, print."""
    x, _, y = map(torch.from_numpy, example())
    eager = operations(forward_backward(ours, x, y))
    slow = sum(eager[name]["ms"] for name in SLOW)
    whole = sum(entry["ms"] for entry in eager.values())
    xla = transcendentals()
    record(
        "profile_cpu",
        "python -m benchmarks.profile_cpu",
        setting=f"dense, sum, forward and backward; {SETTING}",
        torch_eager=eager,
        share_of_sigmoid_and_log1p=round(slow / whole, 3),
        xla=xla,
    )
    rows = [("operation", "ms", "calls")]
    rows += [(name, f"{e['ms']:.2f}", f"{e['calls']:.0f}") for name, e in eager.items()]
    print(table(rows))
    print(f"\nsigmoid and log1p: {slow / whole:.0%} of {whole:.1f} ms; in XLA: {xla}")


if __name__ == "__main__":
    main()
