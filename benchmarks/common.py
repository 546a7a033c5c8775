"""Timing two sides fairly, and describing the machine that was measured."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import focal

Case = Callable[[], object]
Summary = dict[str, float]


def interleaved(
    sides: Mapping[str, Case], repetitions: int = 21, warm_up: int = 4
) -> dict[str, Summary]:
    """Wall-clock milliseconds of each side.

    The sides take turns, and swap who goes first, so that a busy machine slows all of them.
    """
    for _ in range(warm_up):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides.items())
    for _ in range(repetitions):
        for name, run in order:
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
        order.reverse()
    return {name: summary(values) for name, values in times.items()}


def summary(milliseconds: list[float]) -> Summary:
    """Median, minimum and number of repetitions."""
    return {
        "median_ms": round(statistics.median(milliseconds), 3),
        "min_ms": round(min(milliseconds), 3),
        "repetitions": len(milliseconds),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory and how busy it was when the measurement began."""
    return {
        "processor": _cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of everything that takes part."""
    return {
        "focal": focal.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


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
