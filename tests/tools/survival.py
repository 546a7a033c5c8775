"""Training runs that are killed, again and again, and what must be true of what they leave.

test_survival.py kills a few. Many, with a record of them:

    python -m tests.tools.survival --backend torch --kills 80 --out docs/results/survival_torch.json
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focal.cli import main as focal_main
from focal.retinanet.data import ShapesDataset
from focal.retinanet.weights import load_weights, read_checkpoint, read_tensors

KEEP = 2
AIMS = {"start": 1, "step": 4, "write": 5}
"""When to kill, and in which shares: before the first step, at a step, while a file is written."""
COMMON = """
    batch_size=2 channels=16 head_depth=1 precision=float32 candidates=50 warmup=5 zoom=[0.8,1.25]
    crop=[64,56] flips=d4 jitter=0.2 workers=1 log_every=1 eval_every=7
""".split()
VARIANTS = {
    "adamw": ["optimizer=adamw", "learning_rate=1e-3", "ema=0.9", "normalizer=ema"],
    "sgd": ["optimizer=sgd", "learning_rate=0.01", "ema=None", "schedule=step", "norm=group"],
}
CLOCKS = ("images_per_second", "seconds")


def coco_folder(root: Path) -> Path:
    """A small set in the COCO format."""
    (root / "images").mkdir(parents=True)
    for split, count in (("train", 8), ("val", 2)):
        data = ShapesDataset(split, size=(64, 64), num_images=count)
        truth = data.ground_truth()
        for record, i in zip(truth["images"], range(count), strict=True):
            record["file_name"] = f"{split}{i}.png"
            Image.fromarray(data[i].image).save(root / "images" / record["file_name"])
        (root / f"instances_{split}.json").write_text(json.dumps(truth))
    return root


def environment(folder: Path) -> dict[str, str]:
    """One thread for each framework, and a place for what JAX has compiled."""
    return {
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", ""),
        # A process would else compile for 20 seconds what the one before it has compiled.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


class Forked:
    """`focal` in a fork of this process, which has imported what takes seconds, and done no more.

    With the interface of `subprocess.Popen`.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._process = multiprocessing.get_context("fork").Process(
            target=self._work, args=(arguments, log)
        )
        self._process.start()

    @staticmethod
    def _work(arguments: list[str], log: Path) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.exit(focal_main(arguments))

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


@dataclass
class Run:
    """`focal train` in processes of its own, one after another in one folder."""

    backend: str
    data: Path
    out: Path
    variant: str = "adamw"
    save_every: int = 2
    steps: int = 30
    forked: bool = False
    starts_in: float = 3.0
    """Seconds from the start of a process to its first step, more or less."""

    @property
    def arguments(self) -> list[str]:
        options = [*COMMON, *VARIANTS[self.variant], f"save_every={self.save_every}"]
        options.append(f"keep={KEEP}")
        return [
            *("train", "--data", str(self.data), "--out", str(self.out), "--image-size", "64x64"),
            *("--backend", self.backend, "--device", "cpu", "--steps", str(self.steps), "--no-fit"),
            *(word for option in options for word in ("--set", option)),
        ]

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes] | Forked:
        """A process that goes on if there is something to go on from."""
        arguments = [*self.arguments, "--resume"] if self.lines() else self.arguments
        if self.forked:
            return Forked(arguments, self.log)
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "focal", *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment(self.data.parent)},
            )

    def finish(self) -> None:
        """Run to the end."""
        process = self.start()
        assert process.wait() == 0, self.log.read_text()

    def checkpoints(self) -> list[Path]:
        return sorted(self.out.glob("checkpoint-*.safetensors"))

    def partial_files(self) -> list[Path]:
        return sorted(self.out.glob(".*.partial"))

    def lines(self) -> list[dict[str, Any]]:
        """The metrics; only the last line may be cut short."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return []
        *whole, rest = path.read_text().split("\n")
        assert "\n" not in rest
        return [json.loads(line) for line in whole]

    def steps_logged(self) -> int:
        return max((x["step"] for x in self.lines() if x["kind"] == "train"), default=0)


@dataclass
class Tally:
    """What was seen."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    resumed: int = 0
    files_checked: int = 0
    runs: int = 0
    identical: int = 0

    def check_files(self, run: Run) -> None:
        """Every file is whole, or has the name of one that is being written."""
        for path in run.checkpoints():
            _, metadata = read_tensors(path, "focal.checkpoint")
            assert path.name == f"checkpoint-{int(metadata['step']):06d}.safetensors"
        if (run.out / "weights.safetensors").exists():
            load_weights(run.out / "weights.safetensors")
        if (run.out / "config.json").exists():
            json.loads((run.out / "config.json").read_text())
        logged = run.steps_logged()
        # Until it is logged that a step is done, all earlier ones are saved that were to be.
        due = (logged - 1) // run.save_every * run.save_every
        if due > 0:
            path, _, metadata = read_checkpoint(run.out)
            assert int(metadata["step"]) >= due, f"step {logged} is logged, and {path} the newest"
        self.files_checked += sum(1 for _ in run.out.glob("[!.]*"))

    def check_equal(self, run: Run, whole: Run) -> None:
        """The finished run is the one that was never stopped, bit for bit."""
        self.runs += 1
        weights = "weights.safetensors"
        assert (run.out / weights).read_bytes() == (whole.out / weights).read_bytes()
        _, ours, facts = read_checkpoint(run.out)
        _, theirs, other_facts = read_checkpoint(whole.out)
        assert {**facts, "seconds": ""} == {**other_facts, "seconds": ""}
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            assert x.dtype == theirs[name].dtype and x.tobytes() == theirs[name].tobytes(), name
        assert [without_clocks(x) for x in run.lines()] == [
            without_clocks(x) for x in whole.lines()
        ]
        assert run.partial_files() == []
        assert len(run.checkpoints()) == min(KEEP, run.steps)
        self.identical += 1


def without_clocks(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in CLOCKS}


def moments(
    run: Run, rng: random.Random, aims: Sequence[str]
) -> Iterator[tuple[str, Callable[[], bool], float]]:
    """When to kill, for ever: what is aimed at, what to wait for, and how long after that."""
    while True:
        aim = rng.choices(aims, [AIMS[aim] for aim in aims])[0]
        target = run.steps_logged() + rng.randint(1, 6)
        if aim == "start":
            yield aim, lambda: True, rng.uniform(0, run.starts_in)
        elif aim == "step":
            yield aim, lambda t=target: run.steps_logged() >= t, rng.uniform(0, 0.06)
        else:
            yield (
                aim,
                lambda t=target: run.steps_logged() >= t and bool(run.partial_files()),
                rng.uniform(0, 0.01),
            )


def kill(run: Run, aim: str, ready: Callable[[], bool], delay: float) -> dict[str, Any] | None:
    """Start a process and kill it; None: it came to its end before."""
    newest = max((int(path.stem[11:]) for path in run.checkpoints()), default=0)
    process = run.start()
    try:
        while process.poll() is None and not ready():
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
    if process.returncode == 0:
        return None
    assert process.returncode == -9, run.log.read_text()
    log = run.log.read_text(errors="replace")
    if newest:
        going_on = f"checkpoint-{newest:06d}.safetensors, after step {newest}\n"
        assert "resuming from" not in log or going_on in log
    partial = [path.name.split(".")[1] for path in run.partial_files()]
    steps = run.steps_logged()
    if partial:
        phase = f"writing {partial[0].split('-')[0]}"
    elif (f"after step {newest}\n" not in log and newest) or not steps:
        phase = "starting"
    else:
        phase = "between writings"
    return {"aim": aim, "phase": phase, "step": steps, "resumed": "resuming from" in log}


def survive(
    run: Run, whole: Run, kills: int, rng: random.Random, tally: Tally, aims: Sequence[str]
) -> None:
    """Kill a run up to so many times, let it finish, and compare it with one never stopped."""
    for _, (aim, ready, delay) in zip(range(kills), moments(run, rng, aims), strict=False):
        found = kill(run, aim, ready, delay)
        if found is None:
            break
        tally.kills.append(found)
        tally.resumed += found["resumed"]
        tally.check_files(run)
    run.finish()
    tally.resumed += "resuming from" in run.log.read_text()
    tally.check_files(run)
    tally.check_equal(run, whole)


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.common import machine

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--kills", type=int, default=80)
    parser.add_argument("--each", type=int, default=8, help="the most kills of one run")
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--aims", nargs="+", choices=AIMS, default=list(AIMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write a record to this JSON file")
    options = parser.parse_args(arguments)

    rng, tally, begin, where = random.Random(options.seed), Tally(), time.monotonic(), machine()
    with tempfile.TemporaryDirectory() as name:
        data = coco_folder(Path(name) / "data")
        os.environ.update(environment(Path(name)))
        for module in (f"{options.backend}.trainer", "training.loop", "report.report"):
            importlib.import_module(f"focal.retinanet.{module}")
        whole = {}
        common = {"steps": options.steps, "forked": True}
        for variant in options.variants:
            whole[variant] = Run(options.backend, data, Path(name) / variant, variant, **common)
            whole[variant].finish()
        while len(tally.kills) < options.kills:
            variant = rng.choice(options.variants)
            save_every = rng.choice((1, 1, 2, 3, 5))
            folder = Path(name) / f"run{tally.runs}"
            run = Run(options.backend, data, folder, variant, save_every, **common)
            left = options.kills - len(tally.kills)
            survive(run, whole[variant], min(left, options.each), rng, tally, options.aims)
            print(f"{len(tally.kills)} kills, {tally.identical} of {tally.runs} runs identical")
        versions = json.loads((whole[variant].out / "config.json").read_text())["versions"]
    phases = collections.Counter(x["phase"] for x in tally.kills)
    record = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"python -m tests.tools.survival --backend {options.backend} "
        f"--kills {options.kills} --seed {options.seed}",
        "machine": where,
        "versions": {**versions, "numpy": np.__version__},
        "seconds": round(time.monotonic() - begin),
        "kills": len(tally.kills),
        "killed_while": dict(sorted(phases.items())),
        "temporary_files_left_behind": sum(x["phase"].startswith("writing") for x in tally.kills),
        "resumed": tally.resumed,
        "files_checked": tally.files_checked,
        "runs": tally.runs,
        "runs_bit_identical": tally.identical,
        "each": [f"step {x['step']}, {x['phase']}" for x in tally.kills],
    }
    print(json.dumps({k: v for k, v in record.items() if k != "each"}, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
