"""The files of a training run, each complete at any time.

config.json, metrics.jsonl, weights.safetensors (of the newest checkpoint), best.safetensors (of
the evaluation with the greatest AP) and the last few checkpoint-NNNNNN.safetensors (what to resume
from). `focal.retinanet.report` adds pictures and report.html.
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

from focal.files import PARTIAL, write_atomically
from focal.retinanet.training.metrics import read_lines
from focal.retinanet.weights import (
    CHECKPOINT_FORMAT,
    checkpoints,
    read_checkpoint,
    write_tensors,
)

__all__ = ["RunFolder", "new_folder", "plain_json", "refuse_run"]

_log = logging.getLogger(__name__)


def plain_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, indent=indent, allow_nan=False)


def refuse_run(folder: Path) -> None:
    """Raise a FileExistsError if a new run would replace what another left in the folder."""
    names = "weights.safetensors", "best.safetensors"
    if (
        checkpoints(folder)
        or any((folder / name).exists() for name in names)
        or any(read_lines(folder / "metrics.jsonl"))
    ):
        raise FileExistsError(
            f"{folder}: holds a run already; continue it with --resume (resume=True), or choose "
            "another folder with --out (out=...)"
        )


def new_folder(parent: Path) -> Path:
    """Make a folder after the last of parent/1, parent/2, ..., which no other run has chosen."""
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
    while True:
        number += 1
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:  # of a run that began meanwhile
            continue
        return parent / str(number)


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; made if it does not exist.
        facts: What a checkpoint must share with the run that resumes from it.
        notes: What else a checkpoint tells of the run.
        keep: How many checkpoints to keep, >= 1.
        writes: False in all but one of several processes, which only read.
    """

    def __init__(
        self,
        path: Path,
        facts: Mapping[str, str],
        notes: Mapping[str, str],
        keep: int,
        writes: bool = True,
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.json"
        self.weights = path / "weights.safetensors"
        self.best = path / "best.safetensors"
        self._facts = dict(facts)
        self._notes = dict(notes)
        self._keep = keep
        self._writes = writes

    def start(self) -> None:
        """Begin a run, where there is none.

        Raises:
            FileExistsError: the folder holds a run; it is left as it is.
        """
        if not self._writes:
            return
        refuse_run(self.path)
        self._remove_partial_files()
        write_atomically(self.metrics, b"")

    def resume(self, until: int) -> tuple[dict[str, np.ndarray], int, float] | None:
        """Resume from the newest whole checkpoint: its tensors, steps done, seconds they took.

        Metrics written after the checkpoint are dropped; the run writes them again. None: the run
        was killed before its first checkpoint.

        Raises:
            FileNotFoundError: there is no run.
            ValueError: no checkpoint is whole, or it is of another run, or of a step beyond
                `until`.
        """
        if not checkpoints(self.path) and self.metrics.is_file():
            if self._writes:
                self._remove_partial_files()
                write_atomically(self.metrics, b"")
            return None
        path, tensors, found = read_checkpoint(self.path)
        for name, value in self._facts.items():
            own = found.get(name, "0" if name == "freeze" else None)  # which older ones lack
            if own != value:
                raise ValueError(
                    f"{path}: is of a run with another {name}; expected {value}, found {own}"
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
        metadata = {"step": str(steps), "seconds": str(seconds), **self._facts, **self._notes}
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

    def evaluations(self) -> dict[int, float]:
        """The AP of each evaluation by its step; -1 where there was no object."""
        lines = (line for line in read_lines(self.metrics) if line.get("kind") == "eval")
        return {line["step"]: -1.0 if line["AP"] is None else line["AP"] for line in lines}

    def write_config(self, record: Mapping[str, Any]) -> None:
        """Write config.json."""
        if not self._writes:
            return
        write_atomically(self.config, json.dumps(record, indent=2).encode())

    def _remove_older(self, newest: Path) -> None:
        """Remove the checkpoints before the last few."""
        # Checkpoints of later steps are damaged; the run will overwrite them.
        until = checkpoints(self.path)
        until = until[: until.index(newest) + 1]
        for old in until[: -self._keep]:
            old.unlink()

    def _remove_partial_files(self) -> None:
        """Remove the temporary files of a process that was killed."""
        for path in self.path.glob(f".*{PARTIAL}"):
            path.unlink()
