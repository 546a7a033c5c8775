"""Training for long: memory stays flat, and nothing of a run is left when it ends.

test_survival.py does it for seconds. For longer, with a record:

    python -m tests.tools.soak --backend torch --steps 20000 --out soak.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from focal.core.anchors import AnchorConfig
from focal.retinanet import PRESETS, TrainConfig
from focal.retinanet.data import ShapesDataset
from focal.retinanet.training.loop import train

CONFIG = PRESETS["tiny"].detector.replace(
    classes=("circle", "square", "triangle"),
    image_size=(64, 64),
    channels=16,
    head_depth=1,
    candidates=50,
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(12.0, 24.0, 48.0)),
)
MEASUREMENTS = 20


def resident_megabytes() -> float:
    """What of this process lies in memory; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status: no VmRSS")


def soak(backend: str, steps: int, out: Path) -> dict[str, Any]:
    """Train, with checkpoints and evaluations as they are in a real run, and watch.

    Returns:
        `memory_mb`, measured `MEASUREMENTS` times in the course of the run, `growth_mb`: the
        greatest of its last half less the greatest of the second quarter, and what is left.
    """
    run = TrainConfig(
        steps=steps,
        batch_size=2,
        optimizer="adamw",
        learning_rate=1e-3,
        precision="float32",
        ema=0.99,
        zoom=(0.8, 1.25),
        flips="d4",
        jitter=0.2,
        workers=2,
        log_every=10,
        save_every=max(1, steps // 20),
        eval_every=max(1, steps // 10),
    )
    threads = set(threading.enumerate())
    memory: list[float] = []
    validation = ShapesDataset("val", size=(64, 64), num_images=4)
    data = ShapesDataset("train", size=(64, 64), num_images=64)
    trainer = importlib.import_module(f"focal.retinanet.{backend}.trainer").Trainer
    whole = trainer.step

    def watched(self: Any, number: int, *arguments: Any) -> Any:
        if number % max(1, steps // MEASUREMENTS) == 0:
            memory.append(round(resident_megabytes(), 1))
        return whole(self, number, *arguments)

    trainer.step = watched
    try:
        train(CONFIG, run, data, validation, out, backend=backend, device="cpu")
    finally:
        trainer.step = whole
    half = len(memory) // 2
    return {
        "steps": steps,
        "memory_mb": memory,
        "growth_mb": round(max(memory[half:]) - max(memory[half // 2 : half]), 1),
        "threads_left": [t.name for t in threading.enumerate() if t not in threads],
        "processes_left": [p.name for p in multiprocessing.active_children()],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.common import machine, versions

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="write a record to this JSON file")
    options = parser.parse_args(arguments)
    begin, where = time.monotonic(), machine()
    with tempfile.TemporaryDirectory() as out:
        found = soak(options.backend, options.steps, Path(out))
    record = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"python -m tests.tools.soak --backend {options.backend} "
        f"--steps {options.steps}",
        "machine": where,
        "versions": versions(),
        "seconds": round(time.monotonic() - begin),
        **found,
    }
    print(json.dumps(record, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
