"""The ablations of the focal loss paper at small scale, on a CPU: prior, alpha, gamma, OHEM, FL*.

    python -m benchmarks.ablations --out runs/ablations --seeds 3 --bccd path/to/bccd

A cell is one setting with one seed: a small RetinaNet, trained by the paper's optimizer (SGD with
momentum, warm-up, steps down, no clipping) and measured on the test split. A finished cell is a
line of OUT/cells.jsonl and is not run again unless its settings changed, so a command that was
stopped resumes when it is started again. With `--results docs/results/ablations.json` at the end,
and then `python -m benchmarks.ablations_page`, docs/reproduction.md shows the results.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import machine, versions
from focal.core.anchors import AnchorConfig
from focal.files import write_atomically
from focal.retinanet import RetinaNetConfig, TrainConfig, build
from focal.retinanet.data import CocoDataset, Dataset, Example, ShapesDataset, train_batches
from focal.retinanet.torch.trainer import Trainer
from focal.retinanet.training.evaluate import evaluate_model
from focal.retinanet.training.loop import learning_rate

Changes = Mapping[str, Any]
RESULTS = (
    *("AP", "AP50", "AP75", "diverged", "first_loss"),
    *("positives", "anchors", "cpu_seconds"),
)


class Setting(NamedTuple):
    """What all cells of a dataset have in common."""

    detector: RetinaNetConfig
    train: TrainConfig


# Few objects, dense anchors: one positive anchor in about 250. Group norm in the subnets lets a
# network learn from scratch in so few steps.
SHAPES = Setting(
    RetinaNetConfig(
        classes=("circle", "square", "triangle"),
        image_size=(96, 96),
        backbone="tiny",
        norm="batch",
        levels=(3, 4, 5),
        channels=64,
        head_depth=1,
        head_norm="group",
        anchors=AnchorConfig(strides=(8, 16, 32), sizes=(10.0, 20.0, 40.0)),
        box_beta=1 / 9,
        candidates=300,
    ),
    TrainConfig(
        steps=500,
        batch_size=16,
        learning_rate=0.1,
        warmup=50,
        flips="d4",
        workers=0,
        precision="bfloat16",
    ),
)
# The paper's subnets, without norm, and its learning rate.
BCCD = Setting(
    SHAPES.detector.replace(
        classes=("RBC", "WBC", "Platelets"),
        image_size=(192, 256),
        head_norm="none",
        anchors=AnchorConfig(strides=(8, 16, 32), sizes=(16.0, 32.0, 64.0)),
    ),
    SHAPES.train.replace(steps=400, batch_size=8, learning_rate=0.01),
)
NUM_OBJECTS, OBJECT_SIZE = 2, (20, 44)
IMAGES = {"train": 1500, "test": 300}


def focal(gamma: float, alpha: float, **changes: Any) -> Changes:
    """Focal loss; gamma 0 is cross entropy."""
    return {"gamma": gamma, "alpha": alpha, **changes}


def star(gamma: float, beta: float) -> Changes:
    """FL* with the paper's alpha."""
    return {"loss": "focal_star", "gamma": gamma, "star_beta": beta, "alpha": 0.25}


def ohem(examples: int, iou: float, ratio: float | None = None) -> Changes:
    """Cross entropy of the hardest examples."""
    hard = {"ohem_examples": examples, "ohem_iou": iou, "ohem_ratio": ratio}
    return {"loss": "ohem", "gamma": 0.0, "alpha": None, **hard}


def cell_anchors(scales: int, ratios: int) -> Changes:
    """Focal loss with so many anchors at each place, as in table 1c."""
    own = AnchorConfig(
        strides=SHAPES.detector.anchors.strides,
        sizes=SHAPES.detector.anchors.sizes,
        scales=tuple(2 ** (k / 3) for k in range(scales)),
        ratios=(0.5, 1.0, 2.0) if ratios == 3 else (1.0,),
    )
    return {**focal(2.0, 0.25), "anchors": own}


# The most informative first, since a command may be stopped.
SHAPES_CELLS: Mapping[str, Changes] = {
    "CE .5, no prior": focal(0.0, 0.5, prior=0.5),
    "CE .5": focal(0.0, 0.5),
    "FL 2 .25, no prior": focal(2.0, 0.25, prior=0.5),
    "FL 2 .25": focal(2.0, 0.25),
    "CE .5, no norm, no prior": focal(0.0, 0.5, prior=0.5, head_norm="none", learning_rate=0.01),
    "CE .5, no norm": focal(0.0, 0.5, head_norm="none", learning_rate=0.01),
    "CE .75": focal(0.0, 0.75),
    "FL 2 .5": focal(2.0, 0.5),
    "FL 1 .25": focal(1.0, 0.25),
    "FL 1 .5": focal(1.0, 0.5),
    "FL .5 .5": focal(0.5, 0.5),
    "FL 5 .25": focal(5.0, 0.25),
    "OHEM 128 .7": ohem(128, 0.7),
    "OHEM 128 .5": ohem(128, 0.5),
    "OHEM 1:3 128 .5": ohem(128, 0.5, 3.0),
    "FL* 2 1": star(2.0, 1.0),
    "FL* 4 0": star(4.0, 0.0),
    "CE .25": focal(0.0, 0.25),
    "CE .9": focal(0.0, 0.9),
    "CE .99": focal(0.0, 0.99),
    "CE .1": focal(0.0, 0.1),
    "CE .999": focal(0.0, 0.999),
    "1 x 1 anchors": cell_anchors(1, 1),
    "1 x 3 anchors": cell_anchors(1, 3),
    "3 x 1 anchors": cell_anchors(3, 1),
    "2 x 3 anchors": cell_anchors(2, 3),
    "FL 2 .75": focal(2.0, 0.75),
    "FL 5 .5": focal(5.0, 0.5),
    "FL .5 .75": focal(0.5, 0.75),
    "FL 5 .75": focal(5.0, 0.75),
    "OHEM 32 .5": ohem(32, 0.5),
    "FL 1 .75": focal(1.0, 0.75),
    "FL 2 .25, longer": focal(2.0, 0.25, steps=2000),
    "CE .5, longer": focal(0.0, 0.5, steps=2000),
    "FL 1 .25, longer": focal(1.0, 0.25, steps=2000),
    "OHEM 128 .5, longer": {**ohem(128, 0.5), "steps": 2000},
}
BCCD_CELLS = {n: SHAPES_CELLS[n] for n in ("CE .5, no prior", "CE .5", "FL 2 .25")}


class Kept:
    """A dataset whose examples are made once."""

    constant = True

    def __init__(self, dataset: Dataset) -> None:
        self.name, self.classes = dataset.name, dataset.classes
        self.category_ids, self.max_boxes = dataset.category_ids, dataset.max_boxes
        self.ground_truth = functools.cache(dataset.ground_truth)
        self._length, self._get = len(dataset), functools.cache(dataset.__getitem__)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return self._get(index)


def run_cell(setting: Setting, train: Dataset, test: Dataset) -> dict[str, Any]:
    """Train and measure. A loss that is not finite ends the training, and AP is then 0."""
    start = time.process_time()
    model, trained = train_cell(setting, train)
    if trained["diverged"] is None:
        metrics, _ = evaluate_model(model, test)
    else:
        metrics = dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
    return {
        **{k: round(metrics[k], 4) for k in ("AP", "AP50", "AP75")},
        **trained,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def train_cell(setting: Setting, train: Dataset, device: str = "cpu") -> tuple[Any, dict[str, Any]]:
    """The model, and what is known of its training; it ends at a loss that is not finite."""
    run = setting.train
    model = build(setting.detector, seed=run.seed, device=device)
    trainer = Trainer(model, run)
    batches = train_batches(train, setting.detector, run)
    diverged, positives, losses = None, 0.0, []
    with contextlib.closing(batches):
        for step in range(run.steps):
            parts = trainer.step(step, next(batches), learning_rate(run, step))
            losses.append(float(parts["classification"]))
            positives += float(parts["positives"])
            if not math.isfinite(float(parts["loss"])):
                diverged = step
                break
    return model, {
        "diverged": diverged,
        "first_loss": round(losses[0], 4),
        "positives": round(positives / (len(losses) * run.batch_size), 2),
        "anchors": anchors_of(setting.detector),
    }


def anchors_of(config: RetinaNetConfig) -> int:
    """The number of anchors of an image."""
    height, width = config.image_size
    cells = sum(-(-height // s) * -(-width // s) for s in config.anchors.strides)
    return cells * config.anchors.per_cell


def plan(options: argparse.Namespace) -> Iterator[tuple[str, str, Setting]]:
    """Dataset, name and setting of every cell, one seed after the other."""
    of_run = {f.name for f in dataclasses.fields(TrainConfig)}
    sets = [("shapes", SHAPES, SHAPES_CELLS)]
    if options.bccd is not None:
        sets.append(("bccd", BCCD, BCCD_CELLS))
    for seed in range(options.seeds):
        for data, base, cells in sets:
            for name, changes in cells.items():
                if options.only and name not in options.only:
                    continue
                run = {"seed": seed} | {k: v for k, v in changes.items() if k in of_run}
                run |= {} if options.steps is None else {"steps": options.steps}
                detector = {k: v for k, v in changes.items() if k not in of_run}
                setting = Setting(base.detector.replace(**detector), base.train.replace(**run))
                yield data, name, setting


def datasets(options: argparse.Namespace) -> dict[str, tuple[Dataset, Dataset]]:
    """What to train on and what to measure on."""
    size = SHAPES.detector.image_size
    found = {
        "shapes": tuple(
            Kept(ShapesDataset(s, size, n, num_objects=NUM_OBJECTS, object_size=OBJECT_SIZE))
            for s, n in IMAGES.items()
        )
    }
    if options.bccd is not None:
        found["bccd"] = tuple(Kept(CocoDataset(options.bccd, s)) for s in ("train", "test"))
    return found


def key(line: Mapping[str, Any]) -> str:
    """What makes a cell the same: dataset, name and every setting."""
    detector = RetinaNetConfig.from_json(json.dumps(line["detector"]))
    train = TrainConfig.from_json(json.dumps(line["train"]))
    return json.dumps([line["data"], line["name"], detector.to_json(), train.to_json()])


def read_cells(path: Path) -> dict[str, dict[str, Any]]:
    """The finished cells by their key; a line cut short by a stop is left out."""
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[key(line)] = line
    return found


def summary(lines: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """What is kept: the setting of each dataset, and of each cell its changes and its results."""
    found: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "versions": versions(),
    }
    for data, base, cells in (("shapes", SHAPES, SHAPES_CELLS), ("bccd", BCCD, BCCD_CELLS)):
        own = [line for line in lines if line["data"] == data]
        if not own:
            continue
        train = json.loads(base.train.to_json()) | {"steps": own[0]["train"]["steps"]}
        found[data] = {"detector": json.loads(base.detector.to_json()), "train": train, "cells": {}}
        for name, changes in cells.items():
            seeds = [line for line in own if line["name"] == name]
            plain = {k: dataclasses.asdict(v) if k == "anchors" else v for k, v in changes.items()}
            results = {key: [line[key] for line in seeds] for key in ("seed", *RESULTS)}
            if seeds:
                found[data]["cells"][name] = {"changes": plain, **results}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="the cells")
    parser.add_argument("--results", type=Path, help="default: OUT/results.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bccd", type=Path, help="the BCCD folder; without it, shapes only")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="names of cells")
    parser.add_argument("--steps", type=int, help="fewer steps, for a trial")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.jsonl"
    done = read_cells(path)
    # A line cut short must not spoil the one that is appended to it.
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in done.values()).encode())
    sets = datasets(options)
    planned = list(plan(options))
    lines = []
    for number, (data, name, setting) in enumerate(planned, 1):
        line = {
            "data": data,
            "name": name,
            "seed": setting.train.seed,
            "detector": json.loads(setting.detector.to_json()),
            "train": json.loads(setting.train.to_json()),
        }
        if key(line) in done:
            line = done[key(line)]
        else:
            line |= run_cell(setting, *sets[data])
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        lines.append(line)
        where = f"{number}/{len(planned)} {data}, {name}, seed {line['seed']}"
        print(f"{where}: AP {line['AP']:.3f}", flush=True)
    command = shlex.join(["python", "-m", "benchmarks.ablations", *(arguments or sys.argv[1:])])
    text = json.dumps(summary(lines, command), indent=1) + "\n"
    write_atomically(options.results or options.out / "results.json", text.encode())


if __name__ == "__main__":
    main()
