"""When focal loss is better than cross entropy: both tuned alike, in several regimes.

    python -m benchmarks.regimes --out runs/regimes --results docs/results/regimes.json
    python -m benchmarks.regimes_page        # the tables and pictures of docs/when_focal.md

A cell is one small RetinaNet, trained from scratch on generated images on one core. In each regime,
the alpha and then the learning rate of every loss are searched with one seed on the validation
split; the best setting is trained with five other seeds and measured on the test split. Each
finished cell is a file under OUT, so a command that was stopped resumes when it is started again.
Processes of one thread train side by side: `torch.vmap` over the weights of five networks took 2.4
to 3.1 times as long as one network after the other (four convolutions with group norm).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import focal.torch as F
from benchmarks.ablations import SHAPES, anchors_of
from benchmarks.common import machine, versions, write_lines
from benchmarks.scenes import Scene, Scenes, names
from focal.files import write_atomically
from focal.retinanet import RetinaNetConfig, TrainConfig, build
from focal.retinanet.data import Example, train_batches
from focal.retinanet.objective import Losses, Targets, losses, targets
from focal.retinanet.torch.trainer import raw_outputs
from focal.retinanet.training.evaluate import evaluate_model
from focal.retinanet.training.loop import learning_rate

TEST_SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 100
IMAGES = {"train": 2000, "val": 400, "test": 400}
ALPHAS = 0.25, 0.5, 0.75
FACTORS = 0.5, 2.0
"""Of the learning rate of the regime, tried with the best alpha."""
KEPT = (
    *("seed", "alpha", "rate", "prior", "AP", "AP50", "AP75"),
    *("diverged", "positives", "cpu_seconds"),
)


class Loss(NamedTuple):
    """A classification loss."""

    gamma: float
    fitted: bool = False
    """The prior bias is the share of positives in the data instead of 0.01."""
    guided: bool = False
    """Scaled to the box loss in every step; with `fitted`, after arXiv:1909.04868."""


LOSSES: Mapping[str, Loss] = {
    "CE": Loss(0.0),
    "CE prior": Loss(0.0, fitted=True),
    "CE guided": Loss(0.0, fitted=True, guided=True),
    "FL .5": Loss(0.5),
    "FL .5 prior": Loss(0.5, fitted=True),
    "FL 2": Loss(2.0),
}


class Regime(NamedTuple):
    """Images, detector and training."""

    scene: Scene
    detector: Mapping[str, Any] = {}
    train: Mapping[str, Any] = {}
    like: str = ""
    """The regime whose search gives alpha and learning rate, where an own one takes too long."""


# Cross entropy under imbalance has low scores; the AP does not depend on a lower threshold.
DETECTOR = SHAPES.detector.replace(score_threshold=0.001)
TRAIN = TrainConfig(
    steps=600,
    batch_size=16,
    optimizer="adamw",
    learning_rate=6e-3,
    weight_decay=0.01,
    schedule="cosine",
    warmup=50,
    flips="d4",
    workers=0,
    precision="bfloat16",
)


def sgd(rate: float = 0.1, **changes: Any) -> Mapping[str, Any]:
    """The paper's optimizer."""
    own = {"optimizer": "sgd", "learning_rate": rate, "weight_decay": 1e-4, "schedule": "step"}
    return {**own, **changes}


SPARSE = Scene(size=128, objects=1, sides=(16, 36))
REGIMES: Mapping[str, Regime] = {
    # Imbalance: logits per positive grow, by more classes and by fewer objects.
    "one class": Regime(Scene(objects=6, classes="one")),
    "base": Regime(Scene()),
    "sparse": Regime(SPARSE),
    "unused classes": Regime(Scene(unused=77)),
    "sparse, unused classes": Regime(SPARSE._replace(unused=125)),
    "24 classes": Regime(Scene(classes="colors")),
    # Length of training.
    "base, short": Regime(Scene(), train={"steps": 200}),
    "base, long": Regime(Scene(), train={"steps": 1800}),
    "sparse, long": Regime(SPARSE, train={"steps": 1800}),
    "unused classes, long": Regime(Scene(unused=77), train={"steps": 1800}, like="unused classes"),
    # The optimizer: with SGD, a smaller loss takes smaller steps.
    "base, SGD": Regime(Scene(), train=sgd()),
    "sparse, SGD": Regime(SPARSE, train=sgd()),
    "sparse, SGD, long": Regime(SPARSE, train=sgd(steps=1800)),
    # Distractors of the shape of objects; as many objects as in "one class, few".
    "one class, few": Regime(Scene(classes="one")),
    "distractors": Regime(Scene(objects=6, classes="circles")),
    # Errors in the labels.
    "labels missing": Regime(Scene(missing=0.3)),
    "labels wrong": Regime(Scene(wrong=0.3)),
}


class Cell(NamedTuple):
    """One training."""

    regime: str
    loss: str
    alpha: float
    rate: float
    seed: int
    split: str
    """What it is measured on."""


def settings(cell: Cell, steps: int | None = None) -> tuple[RetinaNetConfig, TrainConfig]:
    """The detector and the run of a cell."""
    regime = REGIMES[cell.regime]
    side = regime.scene.size
    own = {"classes": names(regime.scene), "image_size": (side, side), **regime.detector}
    detector = DETECTOR.replace(**own, gamma=LOSSES[cell.loss].gamma, alpha=cell.alpha)
    run = TRAIN.replace(**{**regime.train, "learning_rate": cell.rate, "seed": cell.seed})
    return detector, run if steps is None else run.replace(steps=steps)


def run_cell(cell: Cell, steps: int | None = None) -> dict[str, Any]:
    """Train and measure. A loss that is not finite ends the training, and AP is then 0."""
    begin = time.process_time()
    detector, run = settings(cell, steps)
    scene, loss = REGIMES[cell.regime].scene, LOSSES[cell.loss]
    train, measured = scenes(scene, "train"), scenes(scene, cell.split)
    if loss.fitted:
        detector = detector.replace(prior=share_of_positives(train, detector))
    model, found = fit(detector, run, train, loss.guided)
    if found["diverged"] is None:
        metrics, _ = evaluate_model(model, measured, batch_size=16)
        found["calibration"] = calibration(model, measured)
    else:
        metrics = dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
    return {
        **{name: round(metrics[name], 4) for name in ("AP", "AP50", "AP75")},
        "prior": detector.prior,
        **found,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


@functools.lru_cache(maxsize=4)
def scenes(scene: Scene, split: str) -> Scenes:
    """The images of a split."""
    return Scenes(split, IMAGES[split], scene)


def fit(
    detector: RetinaNetConfig, run: TrainConfig, train: Scenes, scaled: bool
) -> tuple[Any, dict[str, Any]]:
    """The trained network, and what was seen on the way."""
    model = build(detector, seed=run.seed, device="cpu").train()
    kind = torch.optim.AdamW if run.optimizer == "adamw" else torch.optim.SGD
    own = {} if run.optimizer == "adamw" else {"momentum": run.momentum}
    optimizer = kind(model.parameters(), 1.0, weight_decay=run.weight_decay, fused=True, **own)
    anchors = model.anchors(detector.image_size)
    diverged, positives, film = None, 0, []
    with contextlib.closing(train_batches(train, detector, run)) as batches:
        for step in range(run.steps):
            batch = next(batches)
            boxes, labels = torch.as_tensor(batch.boxes), torch.as_tensor(batch.labels)
            target = targets(F, anchors, boxes, labels, detector)
            images = torch.as_tensor(batch.images).permute(0, 3, 1, 2)
            shift, scale = model.shift[:, None, None], model.scale[:, None, None]
            with torch.autocast("cpu", torch.bfloat16):
                logits, deltas = model(shift + images * scale)
            count = F.num_positives(target.labels)
            parts = losses(F, logits, deltas, anchors, target, detector, count)
            total = guided(parts) if scaled else parts.classification + parts.box
            if not math.isfinite(float(total.detach())):
                diverged = step
                break
            if step in frames(run.steps):
                film.append({"step": step, **frame(logits.detach().float(), target, detector)})
            optimizer.param_groups[0]["lr"] = learning_rate(run, step)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            positives += int((target.labels >= 0).sum())
    return model.eval(), {
        "diverged": diverged,
        "positives": round(positives / max(1, step + 1) / run.batch_size, 3),
        "anchors": anchors_of(detector),
        "film": film,
    }


def guided(parts: Losses) -> Tensor:
    """Both losses, that of the classes scaled to that of the boxes (arXiv:1909.04868)."""
    return (parts.box / parts.classification).detach() * parts.classification + parts.box


def frames(steps: int) -> set[int]:
    """The steps whose gradient is looked at: close together at first."""
    return {round(steps ** (i / 15)) - 1 for i in range(16)}


def frame(logits: Tensor, target: Targets, detector: RetinaNetConfig) -> dict[str, Any]:
    """Where loss and gradient of a batch come from, and how far positives and negatives are apart.

    A negative is easy below a score of 0.1, and hard above. "hardest" is the share of the
    negatives' loss that the hardest 0.1, 1 and 10 percent of them have (figure 4 of the paper).
    """
    logits.requires_grad_()
    each = F.sparse_sigmoid_focal_loss(logits, target.labels, detector.alpha, detector.gamma)
    (slope,) = torch.autograd.grad(each.sum(), logits)
    slope, logits, each = slope.abs(), logits.detach(), each.detach()
    classes = torch.arange(logits.shape[-1])
    positive = target.labels[..., None] == classes
    negative = ~positive & (target.labels >= -1)[..., None]
    easy = negative & (logits < math.log(0.1 / 0.9))
    whole = slope.sum().clamp(min=1e-30)
    worst = each[negative].sort(descending=True).values.double().cumsum(0)
    at = [max(1, round(share * len(worst))) - 1 for share in (0.001, 0.01, 0.1)]
    return {
        "gradient": {
            "positives": _number((slope * positive).sum() / whole),
            "hard negatives": _number((slope * (negative & ~easy)).sum() / whole),
            "easy negatives": _number((slope * easy).sum() / whole),
        },
        "hardest": [_number(worst[i] / worst[-1].clamp(min=1e-300)) for i in at],
        "positive logits": _quantiles(logits[positive], (0.05, 0.25, 0.5, 0.75, 0.95)),
        "negative logits": _quantiles(logits[negative], (0.5, 0.99, 0.999, 1.0)),
    }


def _quantiles(values: Tensor, at: Sequence[float]) -> list[float]:
    # `torch.quantile` takes at most 16 million values; NumPy any number.
    return np.quantile(values.numpy(), at).round(3).tolist() if len(values) else []


def _number(value: Tensor) -> float:
    return float(f"{float(value):.4g}")


def calibration(model: Any, data: Scenes, images: int = 96) -> dict[str, list[float]]:
    """Scores in ten bins: how many, their mean, and the share of them that are positive."""
    config = model.config
    anchors = model.anchors(config.image_size)
    count, score, hits = np.zeros(10), np.zeros(10), np.zeros(10)
    for first in range(0, min(images, len(data)), 16):
        examples = [data[i] for i in range(first, first + 16)]
        logits, _ = raw_outputs(model, np.stack([e.image for e in examples]))
        for example, x in zip(examples, logits, strict=True):
            target = matched(example, anchors, config)
            p = 1 / (1 + np.exp(-x.astype(np.float64)))
            used = np.broadcast_to((target >= -1)[:, None], p.shape)
            hit = target[:, None] == np.arange(config.num_classes)
            bins = np.minimum((p * 10).astype(int), 9)[used]
            count += np.bincount(bins, minlength=10)
            score += np.bincount(bins, p[used], 10)
            hits += np.bincount(bins, hit[used], 10)
    there = np.maximum(count, 1)
    return {
        "count": count.astype(int).tolist(),
        "score": (score / there).round(4).tolist(),
        "positive": (hits / there).round(4).tolist(),
    }


def matched(example: Example, anchors: Tensor, detector: RetinaNetConfig) -> np.ndarray:
    """The label of each anchor."""
    boxes, labels = torch.as_tensor(example.boxes), torch.as_tensor(example.labels)
    return targets(F, anchors, boxes, labels, detector).labels.numpy()


def share_of_positives(data: Scenes, detector: RetinaNetConfig, images: int = 200) -> float:
    """The share of the logits that are positive: the prior bias that fits the data."""
    anchors = F.anchors(detector.image_size, detector.anchors)
    positives, images = 0, min(images, len(data))
    for index in range(images):
        positives += int((matched(data[index], anchors, detector) >= 0).sum())
    return max(1, positives) / (images * len(anchors) * detector.num_classes)


def chain(regime: str, loss: str, out: Path, steps: int | None = None) -> dict[str, Any]:
    """Search, then the seeds that count."""
    torch.set_num_threads(1)
    found = search(REGIMES[regime].like or regime, loss, out, steps)
    best = max(found, key=lambda line: line["AP"])
    test = [Cell(regime, loss, best["alpha"], best["rate"], seed, "test") for seed in TEST_SEEDS]
    return {"search": found, "test": [finished(cell, out, steps) for cell in test]}


def search(regime: str, loss: str, out: Path, steps: int | None) -> list[dict[str, Any]]:
    """The alphas at the usual learning rate, then the other rates with the best alpha."""
    rate = REGIMES[regime].train.get("learning_rate", TRAIN.learning_rate)
    base = Cell(regime, loss, ALPHAS[0], rate, SEARCH_SEED, "val")
    found = [finished(base._replace(alpha=alpha), out, steps) for alpha in ALPHAS]
    base = base._replace(alpha=max(found, key=lambda line: line["AP"])["alpha"])
    rates = [round(rate * factor, 8) for factor in FACTORS]
    return found + [finished(base._replace(rate=rate), out, steps) for rate in rates]


def finished(cell: Cell, out: Path, steps: int | None) -> dict[str, Any]:
    """The result of a cell, from its file if that is of the same settings."""
    detector, run = (json.loads(config.to_json()) for config in settings(cell, steps))
    scene, loss = REGIMES[cell.regime].scene._asdict(), LOSSES[cell.loss]._asdict()
    other = {"images": IMAGES, "scene": json.loads(json.dumps(scene)), "kind": loss}
    same = {**cell._asdict(), "detector": detector, "train": run, **other}
    name = f"{cell.alpha:g} {cell.rate:g} {cell.split} {cell.seed}"
    path = out / cell.regime / cell.loss / f"{name}.json"
    if path.is_file():
        line = json.loads(path.read_text(encoding="utf-8"))
        if line.items() >= same.items():
            return line
    line = {**same, **run_cell(cell, steps)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(line) + "\n").encode())
    print(f"{cell.regime}, {cell.loss}, {name}: AP {line['AP']:.3f}", flush=True)
    return line


def summary(
    chains: Mapping[tuple[str, str], Mapping[str, Any]], command: str
) -> Iterator[dict[str, Any]]:
    """What is kept of each loss: its search and its seeds, and how they were made."""
    made = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "versions": versions(),
    }
    for (name, loss), parts in chains.items():
        tests = parts["test"]
        yield {
            "regime": name,
            "loss": loss,
            **made,
            **{k: tests[0][k] for k in ("images", "scene", "detector", "train")},
            "search": [[line[k] for k in ("alpha", "rate", "AP")] for line in parts["search"]],
            "logits per positive": _logits_per_positive(tests),
            **{k: [line[k] for line in tests] for k in KEPT},
            "film": tests[0]["film"],
            "calibration": [line.get("calibration") for line in tests],
        }


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The results by regime and loss."""
    found: dict[str, dict[str, Any]] = {}
    for line in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
        found.setdefault(line["regime"], {})[line["loss"]] = line
    return found


def _logits_per_positive(lines: Sequence[Mapping[str, Any]]) -> int:
    logits = lines[0]["anchors"] * len(lines[0]["detector"]["classes"])
    return round(logits / max(1e-9, np.mean([line["positives"] for line in lines])))


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/regimes"), help="the cells")
    parser.add_argument("--results", type=Path, help="default: OUT/results.json")
    for option, known in (("--only", REGIMES), ("--losses", LOSSES)):
        text = f"default: all of {', '.join(map(repr, known))}"
        parser.add_argument(option, nargs="+", choices=tuple(known), metavar="NAME", help=text)
    parser.add_argument("--steps", type=int, help="fewer steps, for a trial")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread; 0: this one")
    options = parser.parse_args(arguments)
    names = [
        (regime, loss) for regime in options.only or REGIMES for loss in options.losses or LOSSES
    ]
    work = [(regime, loss, options.out, options.steps) for regime, loss in names]
    if options.jobs == 0:
        found = [chain(*arguments) for arguments in work]
    else:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            found = pool.starmap(chain, work, chunksize=1)
    chains = dict(zip(names, found, strict=True))
    command = shlex.join(["python", "-m", "benchmarks.regimes", *(arguments or sys.argv[1:])])
    path = options.results or options.out / "results.json"
    results = read(path)  # of regimes and losses that were not run now, they stay
    for line in summary(chains, command):
        results.setdefault(line["regime"], {})[line["loss"]] = line
    write_lines(path, (line for losses in results.values() for line in losses.values()))


if __name__ == "__main__":
    main()
