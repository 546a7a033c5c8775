"""What a training run leaves on the disk, whole at every moment.

config.json, metrics.jsonl, weights.safetensors (what to use) and checkpoint.safetensors (what to
resume from); `curves.py` and `report.py` add pictures and report.html.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from focal.retinanet.weights import read_tensors, write_atomically, write_tensors

__all__ = ["RunFolder", "plain_json"]

CHECKPOINT_FORMAT = "focal.checkpoint"


def plain_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, indent=indent, allow_nan=False)


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; made if it does not exist.
        facts: What a checkpoint must have in common with the run that goes on from it.
        writes: False in all but one of several processes, which only read.
    """

    def __init__(self, path: Path, facts: Mapping[str, str], writes: bool = True) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._writes = writes
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.json"
        self.weights = path / "weights.safetensors"
        self.checkpoint = path / "checkpoint.safetensors"
        self._facts = dict(facts)

    def start(self) -> None:
        """Begin anew: no metrics yet."""
        if self._writes:
            write_atomically(self.metrics, b"")

    def resume(self) -> tuple[dict[str, np.ndarray], int, float]:
        """Go on from the checkpoint: the tensors, the steps done, the seconds they took.

        Metrics written after the checkpoint are dropped, since the run writes them again.
        """
        tensors, found = read_tensors(self.checkpoint, CHECKPOINT_FORMAT)
        for name, value in self._facts.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.checkpoint}: is of a run with another {name}; "
                    f"expected {value}, found {found.get(name)}"
                )
        steps = int(found["step"])
        if not self._writes:
            return tensors, steps, float(found["seconds"])
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a kill
                if json.loads(line)["step"] <= steps:
                    lines.append(line + "\n")
        write_atomically(self.metrics, "".join(lines).encode())
        return tensors, steps, float(found["seconds"])

    def save_checkpoint(
        self, tensors: Mapping[str, np.ndarray], steps: int, seconds: float
    ) -> None:
        """Write what `resume` reads."""
        if not self._writes:
            return
        metadata = {"step": str(steps), "seconds": str(seconds), **self._facts}
        write_tensors(self.checkpoint, tensors, CHECKPOINT_FORMAT, metadata)

    def log(self, entry: Mapping[str, Any]) -> None:
        """One more line of metrics, on the disk before training goes on."""
        if not self._writes:
            return
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(plain_json(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_config(self, record: Mapping[str, Any]) -> None:
        """Write config.json."""
        if not self._writes:
            return
        write_atomically(self.config, json.dumps(record, indent=2).encode())
