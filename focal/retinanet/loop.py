"""The training loop, the same for every framework."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

import focal
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data import Dataset, eval_batches, train_batches
from focal.retinanet.detector import backend_module, detect
from focal.retinanet.evaluate import evaluate
from focal.retinanet.first_loss import check_first_loss
from focal.retinanet.replicas import Replicas
from focal.retinanet.run_folder import RunFolder
from focal.retinanet.stopping import Signals, Stopped
from focal.retinanet.weights import save_weights

__all__ = ["evaluate_model", "learning_rate", "train"]

UNREAD = 100
"""The most steps that go by before their losses are looked at."""


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of a step: scaled to the batch, linear warm-up, then the schedule."""
    rate = train.learning_rate
    if train.reference_batch is not None:
        rate *= train.batch_size / train.reference_batch
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
    replicas: Replicas | None = None,
) -> Any:
    """Train a detector into a run folder.

    SIGINT and SIGTERM finish the step and save it; a run that goes on from there ends like one
    that was never stopped. From a loss or gradient that is not finite nothing is learned: the
    state before it is saved.

    Args:
        config: The detector; its classes are those of the dataset.
        train_config: Optimiser, schedule, augmentation, records.
        dataset: What to learn from.
        validation: What to measure on, where `eval_every` says and at the end; None: not at all.
        out: The run folder; made if it does not exist.
        backend: The framework.
        device: Such as "cpu" or "cuda"; default: a GPU where there is one.
        initial: Weights to start from instead of random ones.
        resume: Go on from the newest whole checkpoint in `out`.
        notes: More entries for config.json.
        replicas: Who trains together; default: those that the framework's launcher started.

    Returns:
        The trained model, with the weights that were saved.

    Raises:
        Stopped: a signal came, and the state is saved; it is a KeyboardInterrupt.
        FloatingPointError: a loss or a gradient is not finite.
        OSError: a file cannot be written; those that are there stay whole.
        ValueError: the checkpoint is damaged or of another run, or an example cannot be used.
    """
    library = backend_module(backend)
    replicas = replicas or library.replicas(device)
    replicas.check(train_config)
    folder = RunFolder(
        out,
        {
            "backend": backend,
            "classes": json.dumps(config.classes),
            "optimizer": train_config.optimizer,
            "ema": "on" if train_config.ema else "off",
            "seed": str(train_config.seed),  # of the order of the data, which is all that is random
        },
        train_config.keep,
        writes=replicas.rank == 0,
    )
    model = library.build(config, train_config.seed, device)
    if initial is not None:
        library.load_state(model, initial)
    trainer = library.Trainer(model, train_config, replicas)
    steps = train_config.steps
    first, before = 0, 0.0
    if resume:
        tensors, first, before = folder.resume(steps)
        trainer.load_state(tensors)
    else:
        folder.start()
    record = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "focal": focal.__version__,
        "backend": backend,
        "detector": json.loads(config.to_json()),
        "train": json.loads(train_config.to_json()),
        **library.describe(model),
        "replicas": replicas.count,
        **(notes or {}),
    }
    folder.write_config(record)
    begin = time.monotonic() - before

    def every(interval: int, step: int) -> bool:
        return interval > 0 and step % interval == 0

    def save(step: int) -> Path:
        return folder.save_checkpoint(trainer.state(), step, time.monotonic() - begin)

    def stop(number: int, step: int) -> NoReturn:
        path = save(step)
        replicas.maximum(0)  # a launcher may end the others when one process ends
        name = signal.Signals(number).name
        text = f"stopped by {name} after step {step} of {steps}; {path} is saved"
        raise Stopped(number, text)

    def refuse() -> NoReturn:
        """Say what is not finite; since then no step has changed anything."""
        step, reason = _first_not_finite(unread)
        state = trainer.state()
        # From before the run's first step nothing is missing.
        if step - 1 > first and all(np.isfinite(x).all() for x in state.values()):
            path = folder.save_checkpoint(state, step - 1, time.monotonic() - begin)
            replicas.maximum(0)
            reason += f"; {path} is the state before it"
        raise FloatingPointError(reason)

    @functools.cache
    def candidate() -> Any:
        """The model to keep. One for all evaluations: a framework may keep the graph of each."""
        return library.build(config, train_config.seed, device)

    def measured(step: int) -> Any:
        """The model with the weights to keep, which are saved, and measured if asked to."""
        signals.at_once = replicas.processes == 1  # nothing here needs to be finished
        try:
            weights = trainer.weights()
            if replicas.rank == 0:
                save_weights(folder.weights, weights, config)
            library.load_state(candidate(), weights)
            # A run that goes on from here may have it already, or was stopped in the midst of it.
            wanted = validation is not None and replicas.rank == 0
            if wanted and not folder.evaluated(step):
                metrics, _ = evaluate_model(candidate(), validation)
                folder.log({"kind": "eval", "split": validation.name, "step": step, **metrics})
            return candidate()
        except KeyboardInterrupt:
            if not signals.received:
                raise
            stop(signals.received, step)
        finally:
            signals.at_once = False

    share = replicas.rank, replicas.processes
    batches = train_batches(dataset, config, train_config, start=first, share=share)
    silent = replicas.rank > 0
    bar = _Bar(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=silent)
    unread: list[tuple[int, Mapping[str, Any], np.ndarray]] = []
    with Signals() as signals:
        if 0 < first < steps and every(train_config.eval_every, first):
            measured(first)
        with contextlib.closing(batches), bar:
            speed = _Speed(train_config.batch_size, first)
            for done in range(first + 1, steps + 1):
                rate = learning_rate(train_config, done - 1)
                batch = next(batches)
                parts = trainer.step(done - 1, batch, rate)
                unread.append((done, parts, batch.image_ids))
                bar.update()
                logs = every(train_config.log_every, done) or done == steps
                saves = every(train_config.save_every, done) or done == steps
                evaluates = every(train_config.eval_every, done) and done < steps
                starts = done == 1 and initial is None
                alone = replicas.processes == 1
                stopping = signals.received if alone else 0
                if logs or saves or evaluates or stopping or starts or len(unread) == UNREAD:
                    # Only here is the device waited for, and are the other processes.
                    if not trainer.healthy:
                        refuse()
                    unread.clear()
                    stopping = replicas.maximum(signals.received)
                # One process has a part of the batch, and knows the loss of the whole.
                if starts and alone and config.loss == "focal":
                    check_first_loss(float(parts["classification"]), batch, config)
                if logs:
                    values = {name: float(value) for name, value in parts.items()}
                    values |= {"learning_rate": rate, "images_per_second": speed.since_last(done)}
                    values["seconds"] = round(time.monotonic() - begin, 2)
                    folder.log({"kind": "train", "step": done, **values})
                    bar.set_postfix_str(
                        f"loss {values['loss']:.3f} (class {values['classification']:.3f}, "
                        f"box {values['box']:.3f}), lr {rate:.1e}, "
                        f"{values['images_per_second']:.0f} img/s"
                    )
                if stopping:
                    stop(stopping, done)
                if saves:
                    save(done)
                if evaluates:
                    measured(done)
        record["seconds"] = round(time.monotonic() - begin, 1)
        model = measured(steps)
        folder.write_config(record)
        replicas.maximum(0)  # for the measurement: a launcher may end the run when one process ends
    return model


def _first_not_finite(steps: list[tuple[int, Mapping[str, Any], np.ndarray]]) -> tuple[int, str]:
    """The first of these steps with a loss or gradient that is not finite, and a sentence on it."""
    for step, parts, image_ids in steps:
        values = {name: float(parts[name]) for name in ("classification", "box", "gradient_norm")}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong or not math.isfinite(float(parts["loss"])):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            images = ", ".join(map(str, image_ids))
            return step, (
                f"step {step}: {' and '.join(wrong or ['loss'])} not finite ({shown}) "
                f"for the images with the ids {images}; the step was not taken"
            )
    raise AssertionError("every loss and gradient is finite")


class _Bar(tqdm):
    """Progress, without the thread that tqdm watches it with, which would outlive the run."""

    monitor_interval = 0


class _Speed:
    """Images per second between two calls."""

    def __init__(self, batch_size: int, step: int) -> None:
        self._batch_size, self._step, self._time = batch_size, step, time.monotonic()

    def since_last(self, step: int) -> float:
        now = time.monotonic()
        speed = (step - self._step) * self._batch_size / (now - self._time)
        self._step, self._time = step, now
        return round(speed, 2)


def evaluate_model(
    model: Any, dataset: Dataset, batch_size: int = 8, progress: bool = False
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """COCO metrics of a model on a dataset, and its detections in pixels of the images."""
    found: list[dict[str, Any]] = []
    batches = eval_batches(dataset, model.config, batch_size)
    total = -(-len(dataset) // batch_size)
    bar = _Bar(batches, total=total, desc=dataset.name, unit="batch", disable=not progress)
    with contextlib.closing(batches):
        for batch in bar:
            results = detect(model, batch.images, batch.sizes, batch.scales)
            for image_id, result in zip(batch.image_ids, results, strict=True):
                if image_id >= 0:
                    found.append({"image_id": int(image_id), **result})
    return evaluate(dataset.ground_truth(), found, dataset.category_ids), found
