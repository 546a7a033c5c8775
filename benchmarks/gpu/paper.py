"""Gamma and alpha (tables 1a and 1b of the paper) with about 100,000 anchors an image."""

from __future__ import annotations

import functools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import ablations
from benchmarks.gpu.detections import detections_on, scored
from benchmarks.gpu.results import NOT_REACHED, Job, LeftOut, Plan
from focal.retinanet.data import ShapesDataset

SIZE, IMAGES = (768, 768), {"train": 400, "test": 100}
DRY_SIZE, DRY_IMAGES = (64, 64), {"train": 4, "test": 2}
NUM_OBJECTS = 8
# The most informative first, since time may run out.
FIRST = ("FL 2 .25", "CE .5", "CE .75", "FL 1 .25", "FL 5 .25", "CE .5, no prior", "FL .5 .5")
THEN = ("CE .25", "FL 2 .5", "FL 1 .5", "FL 5 .5", "CE .9", "FL .5 .75", "FL 2 .75", "CE .99")
SEEDS = 3


def plan(job: Job) -> Plan:
    cells = [(name, seed) for names in (FIRST, THEN) for seed in range(SEEDS) for name in names]
    if job.dry:
        cells = cells[:2]
    return {
        f"{name}, seed {seed}": functools.partial(cell, job, name, seed) for name, seed in cells
    }


def cell(job: Job, name: str, seed: int) -> dict[str, Any]:
    """One setting with one seed."""
    done = [one["seconds"] for one in job.report.content["measured"].values()]
    if done and job.seconds_left() < 1.1 * max(done):
        raise LeftOut(f"{NOT_REACHED}: no time for another")
    train, test = sets(job.dry)
    setting = setting_of(job, name, seed)
    begin = time.monotonic()
    model, trained = ablations.train_cell(setting, train, job.device)
    training = time.monotonic() - begin
    found = {} if trained["diverged"] is not None else scored(detections_on(model, test), test)
    return {
        **trained,
        **found,
        "split": test.name,
        "gamma": setting.detector.gamma,
        "alpha": setting.detector.alpha,
        "prior": setting.detector.prior,
        "training_seconds": round(training, 1),
        "seconds": round(time.monotonic() - begin, 1),
        "detector": json.loads(setting.detector.to_json()),
        "train": json.loads(setting.train.to_json()),
    }


def setting_of(job: Job, name: str, seed: int) -> ablations.Setting:
    """The cell of that name in the ablations, on larger images."""
    changes = ablations.SHAPES_CELLS[name]
    base = ablations.SHAPES
    run = base.train.replace(seed=seed, workers=min(8, os.cpu_count() or 1))
    if job.dry:
        run = run.replace(steps=2, batch_size=2, workers=0, precision="float32")
    size = DRY_SIZE if job.dry else SIZE
    return ablations.Setting(base.detector.replace(image_size=size, **changes), run)


@functools.cache
def sets(dry: bool) -> list[ablations.Kept]:
    """What to train on and what to measure on, drawn once."""
    made = []
    for split in ("train", "test"):
        kept = ablations.Kept(shapes(split, dry))
        with ThreadPoolExecutor() as pool:
            list(pool.map(kept.__getitem__, range(len(kept))))
        made.append(kept)
    return made


def shapes(split: str, dry: bool) -> ShapesDataset:
    """Few objects on large images."""
    size, images = (DRY_SIZE, DRY_IMAGES) if dry else (SIZE, IMAGES)
    objects: Any = {"num_objects": NUM_OBJECTS, "object_size": ablations.OBJECT_SIZE}
    return ShapesDataset(split, size, images[split], **objects)
