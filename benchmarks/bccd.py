r"""BCCD from scratch: which settings of the preset `tiny` help, and the best in every framework.

    python -m benchmarks.bccd --data path/to/bccd --results docs/results/bccd.json
    python -m benchmarks.bccd --data path/to/bccd --results docs/results/bccd.json \
        --recipes preset GIoU --backends torch jax tensorflow --seeds 0 1 2
    python -m benchmarks.bccd --results docs/results/bccd.json --page docs/retinanet.md

The first command trains every recipe with PyTorch and seed 0; AP on val is what chooses. As many
runs at a time as `--jobs`, each a `focal train` on its share of the cores (Linux only). A run that
was stopped goes on from its last checkpoint, and one that is in the results with the same settings
is not run again. One command at a time writes RESULTS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import machine, write_lines
from benchmarks.pages import markdown, write_tables
from focal.retinanet.settings import apply, preset_settings, recorded_settings
from focal.retinanet.training.metrics import read_metrics

BACKENDS = "torch", "jax", "tensorflow"
CLASSES = "RBC", "WBC", "Platelets"
METRICS = "AP", "AP50", "AP75", *(f"AP/{name}" for name in CLASSES)

GIOU = {"box_loss": "giou", "box_weight": 4}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "preset": {},
    "gamma .5, alpha .5": {"gamma": 0.5, "alpha": 0.5},
    "GIoU": GIOU,
    "GIoU, weight 2": {**GIOU, "box_weight": 2},
    "GIoU, weight 8": {**GIOU, "box_weight": 8},
    "GIoU, varifocal loss": GIOU,
    "GIoU, positives from IoU .6": {**GIOU, "foreground": 0.6, "background": 0.5},
    "GIoU, 8,000 steps": {**GIOU, "steps": 8000},
    "GIoU, canvas 384 x 512": {
        **GIOU,
        "image_size": [384, 512],
        "crop": [320, 320],
        "anchors.sizes": [32, 64, 128],
    },
    "GIoU, whole images": {**GIOU, "crop": [320, 320]},
    "GIoU, 96 channels, 3 layers": {**GIOU, "channels": 96, "head_depth": 3},
    "GIoU, no jitter": {**GIOU, "jitter": 0},
    "GIoU, no flips": {**GIOU, "flips": "none"},
    "GIoU, no zoom": {**GIOU, "zoom": [1, 1]},
}
"""The settings that differ from the preset `tiny`."""
PROGRAMS = {"GIoU, varifocal loss": "benchmarks.varifocal"}
"""Where the loss is not one of the library's; PyTorch only."""


class Run(NamedTuple):
    """One training."""

    recipe: str
    backend: str
    seed: int

    def command(self) -> list[str]:
        """The training, without data and run folder."""
        program = PROGRAMS.get(self.recipe, "focal")
        start = (
            f"{program} train --backend {self.backend} --preset tiny --no-fit --seed {self.seed}"
        )
        changes = (f"--set={k}={json.dumps(v).strip(chr(34))}" for k, v in self.settings().items())
        return [*start.split(), *changes]

    def settings(self) -> Mapping[str, Any]:
        """What differs from the preset."""
        return RECIPES[self.recipe]


def measure(run: Run, data: str, out: Path, cores: Sequence[int]) -> dict[str, Any]:
    """Train and measure on both splits, on these cores alone."""
    folder = out / f"{run.recipe} {run.backend} {run.seed}"
    resume = []
    if (folder / "config.json").is_file():
        check_settings(run, folder)
        resume = ["--resume"]
    place = ["--data", data, "--out", str(folder)]
    with (out / f"{folder.name}.log").open("a", encoding="utf-8") as log:
        if not (folder / "report.html").is_file():
            run_module([*run.command(), *place, *resume], cores, log)
        test = ["focal", "evaluate", str(folder / "weights.safetensors"), "--backend", run.backend]
        run_module([*test, "--data", data, "--out", str(folder / "test.json")], cores, log)
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (lines,) = read_metrics(folder / "metrics.jsonl")[1].values()
    found = {"val": lines[-1], "test": json.loads((folder / "test.json").read_text())}
    print(f"{folder.name}: val AP {found['val']['AP']:.3f}", flush=True)
    return {
        **run._asdict(),
        "settings": run.settings(),
        "date": record["started"],
        "command": shlex.join(["python", "-m", *run.command(), "--data", data]),
        "cores": len(cores),
        "machine": machine(),
        "versions": record["versions"],
        "precision": record["precision"],
        "steps": record["train"]["steps"],
        "seconds": record["seconds"],
        **{split: {k: round(found[split][k], 4) for k in METRICS} for split in ("val", "test")},
    }


def check_settings(run: Run, folder: Path) -> None:
    """What was begun with other settings does not go on."""
    begun, _ = recorded_settings(folder / "config.json", {})
    own = {"classes": begun.detector.classes, "seed": run.seed, **run.settings()}
    if begun != apply(preset_settings("tiny"), own):
        raise ValueError(
            f"{folder}: expected a run with {own}; got that of its config.json; remove the folder"
        )


def run_module(arguments: Sequence[str], cores: Sequence[int], log: Any) -> None:
    """Run a module on some of the processor's cores."""
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    with subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment
    ) as process:
        os.sched_setaffinity(process.pid, cores)  # before it starts threads
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def tables(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """All settings with seed 0, and those of which there are several seeds."""
    first = [x for x in lines if x["backend"] == "torch" and x["seed"] == 0]
    rows = [("settings", "minutes", "val AP", "AP50", "AP75", *CLASSES)]
    for line in first:
        figures = (f"{line['val'][key]:.3f}" for key in METRICS)
        rows.append((line["recipe"], f"{line['seconds'] / 60:.0f}", *figures))
    several = [("backend", "settings", "seeds", "val AP", "test AP", "test AP50", "minutes")]
    for recipe, backend in dict.fromkeys((x["recipe"], x["backend"]) for x in lines):
        runs = [x for x in lines if (x["recipe"], x["backend"]) == (recipe, backend)]
        if len(runs) > 1:
            figures = (
                spread([x[split][key] for x in runs], 3)
                for split, key in (("val", "AP"), ("test", "AP"), ("test", "AP50"))
            )
            minutes = spread([x["seconds"] / 60 for x in runs], 0)
            several.append((f"`{backend}`", recipe, str(len(runs)), *figures, minutes))
    return {"bccd settings": markdown(rows), "bccd backends": markdown(several)}


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, least and greatest."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main(arguments: list[str] | None = None) -> None:
    """Run what is not in the results yet; write them after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the BCCD folder; without it, nothing is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="the run folders")
    parser.add_argument("--results", type=Path, help="default: OUT/results.json")
    parser.add_argument("--page", type=Path, help="a page with the tables, which are written anew")
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        metavar="NAME",
        help=f"default: all of {', '.join(map(repr, RECIPES))}",
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["torch"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its own cores")
    options = parser.parse_args(arguments)
    if options.backends != ["torch"] and (own := PROGRAMS.keys() & options.recipes):
        parser.error(f"--recipes: expected recipes for any backend; got {', '.join(own)}")
    path = options.results or options.out / "results.json"
    lines = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    done = {Run(*(line[key] for key in Run._fields)): line for line in lines}
    if options.data is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        wanted = [
            Run(*names)
            for names in itertools.product(options.recipes, options.backends, options.seeds)
        ]
        for run in wanted:
            if run in done and done[run]["settings"] != run.settings():
                raise ValueError(
                    f"{path}: expected {run} with {run.settings()}; "
                    f"got {done[run]['settings']}; remove its line"
                )
        missing = [run for run in wanted if run not in done]
        for line in in_turn(missing, options.data, options.out, options.jobs):
            done[Run(*(line[key] for key in Run._fields))] = line
            save(path, done)
    if options.page is not None:
        write_tables(options.page, tables(json.loads(path.read_text(encoding="utf-8"))))


def in_turn(runs: Sequence[Run], data: str, out: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """The results of the runs as they come, so many at a time, each on its share of the cores."""
    every = sorted(os.sched_getaffinity(0))
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(jobs):
        free.put(every[job::jobs] or every)
    errors: list[Exception] = []

    def one(run: Run) -> dict[str, Any]:
        cores = free.get()
        try:
            if errors:  # no other run begins
                raise errors[0]
            return measure(run, data, out, cores)
        except Exception as error:
            errors.append(error)
            raise
        finally:
            free.put(cores)

    with ThreadPoolExecutor(jobs) as pool:
        yield from (done.result() for done in as_completed([pool.submit(one, r) for r in runs]))


def save(path: Path, done: Mapping[Run, Mapping[str, Any]]) -> None:
    """Write the results, a line for each run, in the order of the recipes."""
    recipes = list(RECIPES)
    runs = sorted(
        done, key=lambda run: (recipes.index(run.recipe), BACKENDS.index(run.backend), run.seed)
    )
    write_lines(path, (done[run] for run in runs))


if __name__ == "__main__":
    main()
