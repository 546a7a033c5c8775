"""The example, the comparison of two sides, and the record with machine and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from focal.files import write_atomically

Case = Callable[[], object]
Summary = dict[str, float]


@dataclass(frozen=True)
class Staged:
    """A case of which only the second half is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]

    def __call__(self) -> object:
        """Both halves."""
        return self.run(self.prepare())


ROWS, CLASSES, POSITIVES = 40_000, 80, 0.01
ALPHA, GAMMA = 0.25, 2.0
SMALL = (100,), (32, 10)
"""Shapes of which a call costs more than the arithmetic in it."""
SETTING = f"float32 {ROWS} x {CLASSES}, {POSITIVES:.0%} positive rows, gamma {GAMMA}, alpha {ALPHA}"
RESULTS = Path(__file__).parent / "results"
PHASES = ("both", "forward", "backward")
PROCESSES = 5
PACKAGES = (
    "focal", "numpy", "torch", "torchvision", "triton", "jax", "jaxlib", "flax", "optax",
    "tensorflow", "keras", "lightgbm", "xgboost", "sklearn",
)  # fmt: skip


def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels (-1 is background), and the dense targets that say the same."""
    rng = np.random.default_rng(0)
    x = rng.normal(-3, 2, (ROWS, CLASSES)).astype(np.float32)
    positive = rng.random(ROWS) < POSITIVES
    labels = np.where(positive, rng.integers(0, CLASSES, ROWS), -1)
    return x, labels, (labels[:, None] == np.arange(CLASSES)).astype(np.float32)


def small_example(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A few logits with targets."""
    x = np.random.default_rng(0).normal(-3, 2, shape).astype(np.float32)
    return x, (x > -1).astype(np.float32)


def compare(
    sides: Mapping[str, Case], repetitions: int = 41, warm_up: int | None = None
) -> dict[str, Any]:
    """Times of all sides, ours first, and the ratio of the second to ours."""
    times = interleaved(
        sides, repetitions, min(4, repetitions // 2) if warm_up is None else warm_up
    )
    ours, other, *_ = times.values()
    return {**times, "ratio_of_medians": round(other["median_ms"] / ours["median_ms"], 2)}


def compare_calls(sides: Mapping[str, Case], calls: int = 200) -> dict[str, Any]:
    """As `compare`, for cases of microseconds: the mean of so many calls in a row."""

    def repeated(run: Case) -> Case:
        def all_calls() -> None:
            for _ in range(calls):
                run()

        return all_calls

    times = interleaved({name: repeated(run) for name, run in sides.items()})
    for side in times.values():
        for key in ("median_ms", "min_ms"):
            side[key] = round(side[key] / calls, 5)
    ours, other, *_ = times.values()
    return {**times, "ratio_of_medians": round(other["median_ms"] / ours["median_ms"], 2)}


def compare_cases(
    x: Any,
    cases: Mapping[str, tuple[Any, Any, Any]],
    phases: Mapping[str, Callable[[Any, Any, Any], Case]],
    *,
    gradient: Callable[[Any], Any],
    least: Mapping[str, Case],
    other: str = "other",
    memory: Callable[[Case], int] | None = None,
) -> dict[str, Any]:
    """Forward, backward and both of each case, both sides.

    Args:
        x: The logits.
        cases: By name: our loss, the other, and their targets.
        phases: By name: what is timed of a loss, its logits and its targets.
        gradient: The gradient in the result of the phase "both".
        least: By case: the least that any loss needs, timed beside it.
        other: Name of the other side.
        memory: Peak memory of a case in bytes.
    """
    nbytes = np.asarray(x).nbytes
    bandwidth = copy_bandwidth(nbytes)
    found: dict[str, Any] = {"copy_gb_per_s": round(bandwidth / 1e9, 1)}
    for phase, timed in phases.items():
        found[phase] = {}
        for name, (own, theirs, t) in cases.items():
            sides = {"focal": timed(own, x, t), other: timed(theirs, x, t)}
            case: dict[str, Any]
            if phase != "both":
                case = compare(sides)
            else:
                slopes = (np.asarray(gradient(run())) for run in sides.values())
                np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-6)
                if name in least:
                    sides["exp and log1p alone"] = least[name]
                case = compare(sides)
                # One pass could do: logits and targets are read, the gradient is written.
                add_share_of_copy(case, 2 * nbytes + np.asarray(t).nbytes, bandwidth)
                if memory is not None:
                    peaks = {side: round(memory(run) / nbytes, 2) for side, run in sides.items()}
                    case["peak_memory_in_logits"] = peaks
            found[phase][name] = case
    return found


def print_losses(title: str, losses: Mapping[str, Any]) -> None:
    """The times of each phase."""
    print(f"{title}, {SETTING}; median (least) in ms\n")
    for phase in PHASES:
        print(f"{phase}\n{times_table(losses[phase])}\n")


def losses_in_fresh_processes(module: str) -> dict[str, Any]:
    """What `compare_losses` of a module finds: for each case the process of the median ratio.

    All repetitions in one process share the memory that malloc has kept mapped, which can change
    times by a factor of two.
    """
    program = (
        f"import json; from {module} import compare_losses; print(json.dumps(compare_losses()))"
    )
    runs = []
    for _ in range(PROCESSES):
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    found: dict[str, Any] = {
        "processes": PROCESSES,
        "copy_gb_per_s": statistics.median(run["copy_gb_per_s"] for run in runs),
    }
    for phase in PHASES:
        found[phase] = {}
        for name in runs[0][phase]:
            cases = sorted((run[phase][name] for run in runs), key=itemgetter("ratio_of_medians"))
            ratios = [case["ratio_of_medians"] for case in cases]
            found[phase][name] = {**cases[PROCESSES // 2], "ratios": ratios}
    return found


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per second by a copy of that many bytes, on all cores."""
    cores = os.cpu_count() or 1
    source, target = np.ones((2, cores, nbytes // cores), np.uint8)
    with ThreadPoolExecutor(cores) as pool:
        pairs = list(zip(target, source, strict=True))
        copy = interleaved({"copy": lambda: list(pool.map(lambda p: np.copyto(*p), pairs))})
    return 2 * nbytes / copy["copy"]["median_ms"] * 1e3


def add_share_of_copy(case: dict[str, Any], nbytes: int, bandwidth: float) -> None:
    """Add the ratio of the time of a copy of so many bytes to the time of each side."""
    for side in sides_of(case):
        side["share_of_copy"] = round(nbytes / bandwidth * 1e3 / side["median_ms"], 3)


def record(name: str, command: str, **measured: Any) -> dict[str, Any]:
    """Write what was measured to results/, with date, machine, versions and command."""
    report = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "versions": versions(),
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(report, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    return report


def write_lines(path: Path, results: Iterable[object]) -> None:
    """Write results as a JSON list with a line for each."""
    text = ",\n".join(map(json.dumps, results))
    write_atomically(path, f"[\n{text}\n]\n".encode())


def wall_clock(run: Case) -> float:
    """Milliseconds that a case takes; what it returns is released outside of them."""
    start = time.perf_counter()
    result = run()
    milliseconds = (time.perf_counter() - start) * 1e3
    del result
    return milliseconds


def interleaved(
    sides: Mapping[str, Case],
    repetitions: int = 41,
    warm_up: int = 4,
    timer: Callable[[Case], float] = wall_clock,
) -> dict[str, Summary]:
    """Milliseconds of each side.

    The sides take turns, so that other load slows all of them. No side runs twice in a row: the
    second run would find its memory still mapped, which is not so in a training step.
    """
    for _ in range(warm_up):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, case in sides.items():
            run: Case = case
            if isinstance(case, Staged):
                run = partial(case.run, case.prepare())
            times[name].append(timer(run))
    return {name: summary(values) for name, values in times.items()}


def summary(milliseconds: list[float]) -> Summary:
    """Median, minimum and number of repetitions."""
    return {
        "median_ms": round(statistics.median(milliseconds), 3),
        "min_ms": round(min(milliseconds), 3),
        "repetitions": len(milliseconds),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory and the load before the measurement."""
    return {
        "processor": _cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of the packages that this process has imported."""
    modules = {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
    found = {name: getattr(module, "__version__", "unknown") for name, module in modules.items()}
    return {"python": platform.python_version(), **found}


def times_table(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """Median (least) milliseconds of both sides, and the ratio."""
    rows = [("case", "focal", "other", "ratio")]
    for name, case in cases.items():
        cells = (f"{side['median_ms']:.1f} ({side['min_ms']:.1f})" for side in sides_of(case)[:2])
        rows.append((name, *cells, f"{case['ratio_of_medians']:.2f}"))
    return table(rows)


def sides_of(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The timed sides of a comparison, ours first."""
    return [value for value in case.values() if isinstance(value, dict) and "min_ms" in value]


def table(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns: names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        figures = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join((first.ljust(widths[0]), *figures)).rstrip())
    return "\n".join(lines)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory_bytes() -> int:
    if sys.platform == "win32":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
