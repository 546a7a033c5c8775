"""The lines of a run's metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Lines", "number", "read_lines", "read_metrics"]

Lines = list[dict[str, Any]]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines: a crash may have cut the last one short. None if there is no file."""
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and math.isfinite(number(line, "step")):
            yield line


def read_metrics(path: Path) -> tuple[Lines, dict[str, Lines]]:
    """The training lines, and the evaluation lines of each split.

    Where a resumed run repeated steps, the later line counts.
    """
    train: dict[float, dict[str, Any]] = {}
    evals: dict[str, dict[float, dict[str, Any]]] = {}
    for line in read_lines(path):
        if line.get("kind") == "train":
            train[line["step"]] = line
        elif line.get("kind") == "eval":
            evals.setdefault(str(line.get("split", "val")), {})[line["step"]] = line
    return _by_step(train), {split: _by_step(lines) for split, lines in evals.items()}


def _by_step(lines: dict[float, dict[str, Any]]) -> Lines:
    return [lines[step] for step in sorted(lines)]


def number(line: Mapping[str, Any], key: str) -> float:
    """A number of a line; NaN where there is none."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) else math.nan
