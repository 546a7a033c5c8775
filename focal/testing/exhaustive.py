"""A sweep over a whole type: cut into pieces, shared among processes, resumed after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from focal.files import write_atomically
from focal.testing.sweep import Settings, Tally, patterns, sweep
from focal.testing.ulp import allowed_ulp

__all__ = ["exhaustive", "summary"]

PIECE = 1 << 26
"""Patterns between two savings: several seconds of work."""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
DISTRIBUTIONS = ("focal-losses", "numpy", "torch", "jax", "jaxlib", "tensorflow", "tensorflow-cpu")

Results = list[tuple[Tally, Tally]]


def exhaustive(settings: Settings, jobs: int, out: Path | None, command: str) -> dict[str, Any]:
    """Sweep, or finish the sweep that a killed run left, and write the record.

    Args:
        settings: What to sweep.
        jobs: Processes, each with one thread; 1 is this process itself.
        out: Where to write the record as JSON. Beside it, in `out` + ".part", stands what is
            done, until all is done. None writes nothing.
        command: The command, for the record.

    Returns:
        The record: for each gamma what was seen of loss and gradient, and whether the bound is
        kept; with date, machine, versions and command.
    """
    count = patterns(settings)
    pieces = [(first, min(first + PIECE, count)) for first in range(0, count, PIECE)]
    part = None if out is None else out.with_name(out.name + ".part")
    state = _State(settings, part)
    begin = time.monotonic() - state.seconds
    pending = [i for i in range(len(pieces)) if i not in state.done]
    finished = sum(pieces[i][1] - pieces[i][0] for i in state.done)
    with _workers(jobs) as run, _bar(count, finished) as advance:
        for i, results in run(functools.partial(_piece, settings, pieces), pending):
            state.add(i, results, time.monotonic() - begin)
            advance(pieces[i][1] - pieces[i][0])
    record = _record(settings, state, jobs, command)
    if out is not None and part is not None:
        _write(out, record)
        part.unlink(missing_ok=True)
    return record


def summary(record: dict[str, Any]) -> str:
    """The record as a table."""
    lines = [
        "gamma  what      bound  ULP    at logit         target  NaN/inf  NaN lost  limits missed"
        "  beyond  flushed"
    ]
    for gamma, found in record["gammas"].items():
        for what in ("loss", "gradient"):
            t = Tally(**found[what])
            lines.append(
                f"{gamma:5}  {what:8}  {found['bound']:5g}  {t.ulp:5.2f}  {t.logit:<15.9g}  "
                f"{t.target:6}  {t.not_finite:7}  {t.nan_lost:8}  {t.limit_missed:13}  "
                f"{t.beyond:6}  {t.flushed:7}"
            )
    name = f"{record['backend']}, {record['dtype']}"
    verdict = "kept" if record["kept"] else "NOT KEPT"
    lines.append(
        f"{name}: {record['logits']} logits with target 0 and 1 in {record['seconds']:.0f} s, "
        f"bound {verdict}"
    )
    return "\n".join(lines)


class _State:
    """What is done so far, on the disk too; a sweep with other settings begins anew."""

    def __init__(self, settings: Settings, path: Path | None) -> None:
        self.path = path
        self.facts = json.loads(json.dumps({**settings._asdict(), "piece": PIECE}))
        self.done: set[int] = set()
        self.seconds = 0.0
        self.results: Results = [(Tally(), Tally()) for _ in settings.gammas]
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found["facts"] == self.facts:
                self.done, self.seconds = set(found["done"]), found["seconds"]
                self.results = [(Tally(**a), Tally(**b)) for a, b in found["results"]]

    def add(self, piece: int, results: Results, seconds: float) -> None:
        for mine, other in zip(self.results, results, strict=True):
            mine[0].add(other[0])
            mine[1].add(other[1])
        self.done.add(piece)
        self.seconds = seconds
        if self.path is not None:
            pairs = [[dataclasses.asdict(t) for t in pair] for pair in self.results]
            found = {"facts": self.facts, "done": sorted(self.done), "seconds": seconds}
            _write(self.path, found | {"results": pairs})


def _piece(settings: Settings, pieces: list[tuple[int, int]], i: int) -> tuple[int, Results]:
    return i, sweep(settings, *pieces[i])


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Any]:
    """How to map a function over pieces, in any order."""
    if jobs == 1:
        yield map
        return
    # Spawned, because frameworks with threads do not survive a fork; what they inherit of the
    # environment holds each of them to one thread.
    saved = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            yield pool.imap_unordered
    finally:
        for name, value in saved.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _bar(total: int, initial: int) -> Iterator[Any]:
    """A progress bar where tqdm is installed."""
    try:
        tqdm: Any = importlib.import_module("tqdm")
    except ModuleNotFoundError:
        yield lambda n: None
        return
    with tqdm.tqdm(total=total, initial=initial, unit="logit", unit_scale=True) as bar:
        yield bar.update


def _record(settings: Settings, state: _State, jobs: int, command: str) -> dict[str, Any]:
    gammas = {}
    for gamma, (loss, gradient) in zip(settings.gammas, state.results, strict=True):
        bound = allowed_ulp(settings.dtype, gamma)
        gammas[f"{gamma:g}"] = {
            "bound": bound,
            "kept": loss.kept(bound) and gradient.kept(bound),
            "loss": dataclasses.asdict(loss),
            "gradient": dataclasses.asdict(gradient),
        }
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": _processor(),
            "architecture": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "backend": settings.backend,
        "dtype": settings.dtype,
        "alpha": settings.alpha,
        "stride": settings.stride,
        "logits": patterns(settings),
        "jobs": jobs,
        "seconds": round(state.seconds, 1),
        "kept": all(found["kept"] for found in gammas.values()),
        "gammas": gammas,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
