"""What it takes to start: imports, `focal --help`, and `focal predict` of one image.

    python -m benchmarks.bench_startup

Each time is that of a whole process. The other side imports what ours stands on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import Case, compare, record, table, times_table
from focal.retinanet import PRESETS, build, save

IMPORTS = {
    "torch": "import torch",
    "jax": "import jax, flax.nnx, optax",
    "tensorflow": "import tensorflow, keras",
}
"""What the detector imports of each framework."""


def main() -> None:
    """Measure, write, print."""
    with tempfile.TemporaryDirectory() as folder:
        weights, image = Path(folder, "tiny.safetensors"), Path(folder, "image.png")
        save(build(PRESETS["tiny"].detector.replace(classes=("cell",)), device="cpu"), weights)
        Image.effect_noise((640, 480), 50).convert("RGB").save(image)
        command = ["-m", "focal", "predict", str(weights), str(image), "--out", f"{folder}/found"]
        pairs = {
            "focal --help; Python alone": (["-m", "focal", "--help"], ["-c", "pass"]),
            "import focal; numpy": (["-c", "import focal"], ["-c", "import numpy"]),
            "import focal.torch; torch": (["-c", "import focal.torch"], ["-c", "import torch"]),
            "import focal.jax; jax": (["-c", "import focal.jax"], ["-c", "import jax"]),
            "import focal.tensorflow; tensorflow": (
                ["-c", "import focal.tensorflow"],
                ["-c", "import tensorflow"],
            ),
        }
        for name, imports in IMPORTS.items():
            key = f"focal predict, {name}; {imports.replace('import ', '')}"
            pairs[key] = [*command, "--backend", name], ["-c", imports]
        times = {
            name: compare(
                {"focal": _process(own), "other": _process(other)}, repetitions=5, warm_up=1
            )
            for name, (own, other) in pairs.items()
        }
        shares = {name: _shares([*command, "--backend", name]) for name in IMPORTS}
    record("startup_cpu", "python -m benchmarks.bench_startup", times=times, predict_ms=shares)
    print(times_table(times))
    print(table(share_rows(shares)))


def _environment() -> dict[str, str]:
    """Compiled modules are kept, as where the package is installed."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "TF_CPP_MIN_LOG_LEVEL": "3"}


def _process(arguments: list[str]) -> Case:
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, check=True, env=_environment(), **quiet)


def _shares(arguments: list[str]) -> dict[str, float]:
    """Milliseconds by what is imported, and of what is not an import, in one process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        check=True,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    whole = (time.perf_counter() - start) * 1e3
    found = dict.fromkeys(("framework and its packages", "numpy", "pillow", "focal"), 0.0)
    own = {"numpy": "numpy", "PIL": "pillow", "focal": "focal"}
    for microseconds, package in re.findall(
        r"^import time:\s*(\d+) \|\s*\d+ \|\s*(\w+)", done.stderr, re.MULTILINE
    ):
        found[own.get(package, "framework and its packages")] += int(microseconds) / 1e3
    found["the work itself"] = whole - sum(found.values())
    return {name: round(value, 1) for name, value in found.items()}


def share_rows(shares: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """One row for each framework."""
    rows: list[tuple[str, ...]] = [("focal predict, ms", *next(iter(shares.values())))]
    rows += [(name, *(f"{x:.0f}" for x in found.values())) for name, found in shares.items()]
    return rows


if __name__ == "__main__":
    main()
