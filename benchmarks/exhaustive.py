"""The sigmoid focal loss at every number of a type, against float64.

python -m benchmarks.exhaustive --backend torch --gamma 0 0.5 2 --out torch.json

The bit patterns are cut into pieces and shared among processes. What is done is saved after each
piece, so a run that was killed resumes where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, table, versions
from benchmarks.sweep import Settings, Tally, patterns, sweep
from focal.core import checks
from focal.files import write_atomically
from focal.testing.frameworks import FRAMEWORKS
from focal.testing.ulp import allowed_ulp

NAME = "exhaustive"
PIECE = 1 << 26
"""Bit patterns between two saves: several seconds of work."""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
HEADER = ("gamma", "what", "bound", "ULP", "at logit", "target")
COUNTS = ("not_finite", "nan_lost", "limit_missed", "beyond", "flushed")

Results = list[tuple[Tally, Tally]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all errors are within the bound, 1 if not."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    try:
        settings = _settings(options)
        jobs = checks.check_integer(NAME, "jobs", options.jobs, low=1)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "benchmarks.exhaustive", *given])
    record = exhaustive(settings, jobs, options.out, command)
    print(summary(record))
    return 0 if record["passed"] else 1


def exhaustive(settings: Settings, jobs: int, out: Path | None, command: str) -> dict[str, Any]:
    """Sweep, or finish the sweep of a run that was killed, and write the record.

    Args:
        settings: What to sweep.
        jobs: Processes, each with one thread; 1 is this process itself.
        out: Where to write the record as JSON; the state of an unfinished run is in `out` +
            ".part". None writes nothing.
        command: The command, for the record.

    Returns:
        The record: the errors of loss and gradient for each gamma, and whether they are within
        the bound; with date, machine, versions and command.
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
    rows: list[tuple[str, ...]] = [(*HEADER, *(name.replace("_", " ") for name in COUNTS))]
    for gamma, found in record["gammas"].items():
        for what in ("loss", "gradient"):
            t = Tally(**found[what])
            numbers = (f"{found['bound']:g}", f"{t.ulp:.2f}", f"{t.logit:.9g}", str(t.target))
            counts = (str(getattr(t, name)) for name in COUNTS)
            rows.append((gamma, what, *numbers, *counts))
    return (
        f"{table(rows)}\n{record['backend']}, {record['dtype']}: {record['logits']} logits with "
        f"target 0 and 1 in {record['seconds']:.0f} s: {'passed' if record['passed'] else 'FAILED'}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exhaustive",
        description="Evaluate loss and gradient at every number of a type, with target 0 and 1, "
        "and print the largest error in units in the last place (ULP).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backend", choices=tuple(FRAMEWORKS), default="torch", help="framework")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--gamma", type=float, nargs="+", default=[2.0], help="one or more")
    parser.add_argument("--alpha", type=float, default=None, help="weight of positives")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th bit pattern")
    parser.add_argument("--compile", action="store_true", help="torch.compile (torch only)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--out", type=Path, help="JSON record; a run that was killed resumes from FILE.part"
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    if options.dtype not in FRAMEWORKS[options.backend].dtypes:
        raise ValueError(
            f"{NAME}: dtype must be one that {options.backend} has; got {options.dtype!r}"
        )
    if options.compile and options.backend != "torch":
        raise ValueError(f"{NAME}: compile is for torch only; got backend {options.backend!r}")
    return Settings(
        backend=options.backend,
        dtype=options.dtype,
        gammas=tuple(checks.check_gamma(NAME, gamma) for gamma in options.gamma),
        alpha=checks.check_alpha(NAME, options.alpha),
        stride=checks.check_integer(NAME, "stride", options.stride, low=1),
        compiled=options.compile,
    )


class _State:
    """The results so far, saved after each piece; those of other settings are not used."""

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
    """A function like `map`, which may return the results in any order."""
    if jobs == 1:
        yield map
        return
    # Frameworks with threads do not survive a fork, so the processes are spawned; they read the
    # number of threads from the environment.
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
    importlib.import_module(settings.backend)  # for its version
    gammas = {}
    for gamma, (loss, gradient) in zip(settings.gammas, state.results, strict=True):
        bound = allowed_ulp(settings.dtype, gamma)
        gammas[f"{gamma:g}"] = {
            "bound": bound,
            "passed": loss.passed(bound) and gradient.passed(bound),
            "loss": dataclasses.asdict(loss),
            "gradient": dataclasses.asdict(gradient),
        }
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "backend": settings.backend,
        "dtype": settings.dtype,
        "alpha": settings.alpha,
        "stride": settings.stride,
        "compiled": settings.compiled,
        "logits": patterns(settings),
        "jobs": jobs,
        "seconds": round(state.seconds, 1),
        "passed": all(found["passed"] for found in gammas.values()),
        "gammas": gammas,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
