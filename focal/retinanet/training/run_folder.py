"""The files of a training run, each complete at any time.

config.json, metrics.jsonl, weights.safetensors (what to use) and the last few
checkpoint-NNNNNN.safetensors (what to resume from). `focal.retinanet.report` adds pictures and
report.html.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from focal.files import PARTIAL, sync_folder, write_atomically
from focal.retinanet.training.metrics import read_lines
from focal.retinanet.weights import read_tensors, write_tensors

__all__ = ["RunFolder", "plain_json", "read_checkpoint"]

CHECKPOINT_FORMAT = "focal.checkpoint"

_log = logging.getLogger(__name__)


def plain_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, indent=indent, allow_nan=False)


def read_checkpoint(folder: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, str]]:
    """The newest checkpoint of a run folder that is whole: its path, tensors and metadata.

    Raises:
        FileNotFoundError: there is none.
        ValueError: none of them is whole.
    """
    paths = _checkpoints(folder)
    if not paths:
        raise FileNotFoundError(f"{folder}: expected a checkpoint-*.safetensors; found none")
    damage = []
    for path in reversed(paths):
        try:
            tensors, metadata = read_tensors(path, CHECKPOINT_FORMAT)
        except ValueError as error:
            damage.append(str(error))
            continue
        for text in damage:
            _log.warning("%s; taking %s", text, path.name)
        return path, tensors, metadata
    raise ValueError("; ".join(damage))


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = {}
    for path in folder.glob("checkpoint-*.safetensors"):
        step = path.stem.removeprefix("checkpoint-")
        if step.isdecimal():
            found[int(step)] = path
    return [found[step] for step in sorted(found)]


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; made if it does not exist.
        facts: What a checkpoint must share with the run that resumes from it.
        keep: How many checkpoints to keep, >= 1.
        writes: False in all but one of several processes, which only read.
    """

    def __init__(
        self, path: Path, facts: Mapping[str, str], keep: int, writes: bool = True
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.json"
        self.weights = path / "weights.safetensors"
        self._facts = dict(facts)
        self._keep = keep
        self._writes = writes

    def start(self) -> None:
        """Begin anew: no checkpoints and no metrics yet."""
        if not self._writes:
            return
        self._remove_partial_files()
        # Checkpoints first: if the process is killed here, none may remain beside new metrics.
        for path in _checkpoints(self.path):
            path.unlink()
        sync_folder(self.path)
        write_atomically(self.metrics, b"")

    def resume(self, until: int) -> tuple[dict[str, np.ndarray], int, float]:
        """Resume from the newest whole checkpoint: its tensors, steps done, seconds they took.

        Metrics written after the checkpoint are dropped; the run writes them again.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: none is whole, or it is of another run, or of a step beyond `until`.
        """
        path, tensors, found = read_checkpoint(self.path)
        for name, value in self._facts.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{path}: is of a run with another {name}; "
                    f"expected {value}, found {found.get(name)}"
                )
        steps = int(found["step"])
        if steps > until:
            raise ValueError(f"{path}: is of step {steps}, and the run has {until} steps")
        if not self._writes:
            return tensors, steps, float(found["seconds"])
        self._remove_partial_files()
        self._remove_older(path)  # the process may have been killed before it could
        lines = [line for line in read_lines(self.metrics) if line["step"] <= steps]
        write_atomically(self.metrics, "".join(plain_json(x) + "\n" for x in lines).encode())
        _log.info("resuming from %s, after step %d", path, steps)
        return tensors, steps, float(found["seconds"])

    def save_checkpoint(
        self, tensors: Mapping[str, np.ndarray], steps: int, seconds: float
    ) -> Path:
        """Write what `resume` reads, then remove what is older than the last few."""
        path = self.path / f"checkpoint-{steps:06d}.safetensors"
        if not self._writes:
            return path
        metadata = {"step": str(steps), "seconds": str(seconds), **self._facts}
        write_tensors(path, tensors, CHECKPOINT_FORMAT, metadata)
        self._remove_older(path)
        return path

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line of metrics, on disk before training continues."""
        if not self._writes:
            return
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(plain_json(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # when the disk is full it names no file
            raise OSError(error.errno, error.strerror, str(self.metrics)) from error

    def evaluated(self, step: int) -> bool:
        """Whether the metrics hold the evaluation after this step."""
        lines = read_lines(self.metrics)
        return any(x.get("kind") == "eval" and x["step"] == step for x in lines)

    def write_config(self, record: Mapping[str, Any]) -> None:
        """Write config.json."""
        if not self._writes:
            return
        write_atomically(self.config, json.dumps(record, indent=2).encode())

    def _remove_older(self, newest: Path) -> None:
        """Remove the checkpoints before the last few."""
        # Checkpoints of later steps are damaged; the run will overwrite them.
        until = _checkpoints(self.path)
        until = until[: until.index(newest) + 1]
        for old in until[: -self._keep]:
            old.unlink()

    def _remove_partial_files(self) -> None:
        """Remove the temporary files of a process that was killed."""
        for path in self.path.glob(f".*{PARTIAL}"):
            path.unlink()
