"""The training loop and its records, the same for every framework.

A run folder holds config.json, metrics.jsonl, weights.safetensors (what to use), and
checkpoint.safetensors (what to resume from); `report.py` adds pictures and report.html.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import focal
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data import Dataset, eval_batches, train_batches
from focal.retinanet.detector import backend_module, detect
from focal.retinanet.evaluate import evaluate
from focal.retinanet.weights import (
    read_tensors,
    save_weights,
    write_atomically,
    write_tensors,
)

__all__ = ["evaluate_model", "learning_rate", "train"]


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then the schedule."""
    rate = train.learning_rate
    if train.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / train.steps))
    else:
        rate *= 0.1 ** sum(step >= m * train.steps for m in train.milestones)
    return rate * min(1.0, (step + 1) / max(1, train.warmup))


def train(
    config: RetinaNetConfig,
    train_config: TrainConfig,
    dataset: Dataset,
    validation: Dataset | None,
    out: Path,
    *,
    backend: str = "torch",
    device: str | None = None,
    initial: Mapping[str, np.ndarray] | None = None,
    resume: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Any:
    """Train a detector into a run folder.

    Args:
        config: The detector; its classes are those of the dataset.
        train_config: Optimiser, schedule, augmentation, records.
        dataset: What to learn from.
        validation: What to measure on, where `eval_every` says and at the end; None: not at all.
        out: The run folder; made if it does not exist.
        backend: The framework.
        device: Such as "cpu" or "cuda"; default: a GPU where there is one.
        initial: Weights to start from instead of random ones.
        resume: Go on from the checkpoint in `out`.
        notes: More entries for config.json.

    Returns:
        The trained model, with the weights that were saved.
    """
    library = backend_module(backend)
    out.mkdir(parents=True, exist_ok=True)
    model = library.build(config, train_config.seed, device)
    if initial is not None:
        library.load_state(model, initial)
    trainer = library.Trainer(model, train_config)
    first, seconds = 0, 0.0
    if resume:
        tensors, found = read_tensors(out / "checkpoint.safetensors", "focal.checkpoint")
        trainer.load_state(tensors)
        first, seconds = int(found["step"]), float(found["seconds"])
        _truncate_metrics(out / "metrics.jsonl", first)
    else:
        write_atomically(out / "metrics.jsonl", b"")
    record = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "focal": focal.__version__,
        "backend": backend,
        "detector": json.loads(config.to_json()),
        "train": json.loads(train_config.to_json()),
        **library.describe(model),
        **(notes or {}),
    }
    write_atomically(out / "config.json", json.dumps(record, indent=2).encode())

    def save_checkpoint(step: int) -> None:
        metadata = {"step": str(step), "seconds": str(seconds + time.monotonic() - begin)}
        write_tensors(out / "checkpoint.safetensors", trainer.state(), "focal.checkpoint", metadata)

    def measure(step: int) -> dict[str, float]:
        weights = trainer.weights()
        save_weights(out / "weights.safetensors", weights, config)
        if validation is None:
            return {}
        measured = library.build(config, train_config.seed, device)
        library.load_state(measured, weights)
        metrics, _ = evaluate_model(measured, validation)
        _append(
            out / "metrics.jsonl",
            {"kind": "eval", "split": validation.name, "step": step, **metrics},
        )
        return metrics

    begin = time.monotonic()
    batches = train_batches(dataset, config, train_config, start=first)
    bar = tqdm(total=train_config.steps, initial=first, unit="step", dynamic_ncols=True)
    with contextlib.closing(batches), bar:
        last_time, last_step, shown = begin, first, ""
        for step in range(first, train_config.steps):
            rate = learning_rate(train_config, step)
            parts = trainer.step(step, next(batches), rate)
            done = step + 1
            bar.update()
            if done % train_config.log_every == 0 or done == train_config.steps:
                now = time.monotonic()
                speed = (done - last_step) * train_config.batch_size / (now - last_time)
                values = {k: float(v) for k, v in parts.items()}
                last_time, last_step = now, done
                _append(
                    out / "metrics.jsonl",
                    {
                        "kind": "train",
                        "step": done,
                        **values,
                        "learning_rate": rate,
                        "images_per_second": round(speed, 2),
                        "seconds": round(seconds + now - begin, 2),
                    },
                )
                bar.set_postfix_str(
                    f"loss {values['loss']:.3f} (class {values['classification']:.3f}, "
                    f"box {values['box']:.3f}), lr {rate:.1e}, {speed:.0f} img/s{shown}"
                )
            if train_config.save_every and done % train_config.save_every == 0:
                save_checkpoint(done)
            if train_config.eval_every and done % train_config.eval_every == 0:
                if done < train_config.steps and validation is not None:
                    metrics = measure(done)
                    shown = f", AP {metrics['AP']:.3f}"
                    last_time = time.monotonic()
    if first < train_config.steps:
        save_checkpoint(train_config.steps)
    record["seconds"] = round(seconds + time.monotonic() - begin, 1)
    measure(train_config.steps)
    write_atomically(out / "config.json", json.dumps(record, indent=2).encode())
    final = library.build(config, train_config.seed, device)
    library.load_state(final, trainer.weights())
    return final


def evaluate_model(
    model: Any, dataset: Dataset, batch_size: int = 8, progress: bool = False
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """COCO metrics of a model on a dataset, and its detections in pixels of the images."""
    found: list[dict[str, Any]] = []
    batches = eval_batches(dataset, model.config, batch_size)
    total = -(-len(dataset) // batch_size)
    bar = tqdm(batches, total=total, desc=dataset.name, unit="batch", disable=not progress)
    with contextlib.closing(batches):
        for batch in bar:
            results = detect(model, batch.images, batch.sizes, batch.scales)
            for image_id, result in zip(batch.image_ids, results, strict=True):
                if image_id >= 0:
                    found.append({"image_id": int(image_id), **result})
    return evaluate(dataset.ground_truth(), found, dataset.category_ids), found


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    """One more line, on the disk before training goes on."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after the checkpoint, which the resumed run writes again."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line cut short by the kill
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    write_atomically(path, "".join(lines).encode())
