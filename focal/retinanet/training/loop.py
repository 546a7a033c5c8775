"""The training loop, the same for every framework."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import focal
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data import Batch, Dataset, train_batches
from focal.retinanet.data.dataset import class_names, dataset_name
from focal.retinanet.detector import backend_module
from focal.retinanet.replicas import Replicas
from focal.retinanet.training.evaluate import evaluate_model
from focal.retinanet.training.first_loss import check_first_loss
from focal.retinanet.training.progress import Progress
from focal.retinanet.training.run_folder import RunFolder
from focal.retinanet.training.stopping import Signals, Stopped
from focal.retinanet.weights import save_weights

__all__ = ["Callback", "check_data", "learning_rate", "train"]

Callback = Callable[[int, dict[str, Any]], object]
"""Called with the step and what is logged of it: a line of metrics.jsonl."""

MAX_PENDING_STEPS = 100
"""Losses are read from the device at least this often."""


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
    fresh: tuple[str, ...] = (),
    resume: bool = False,
    notes: Mapping[str, Any] | None = None,
    replicas: Replicas | None = None,
    callbacks: Sequence[Callback] = (),
    signals: Signals | None = None,
) -> Any:
    """Train a detector into a run folder.

    On SIGINT and SIGTERM the current step is finished and saved; the resumed run gives the same
    result as one without a stop. A step whose loss or gradient is not finite is not taken: the
    state before it is saved.

    Args:
        config: The detector; its classes are those of the dataset.
        train_config: Optimizer, schedule, augmentation, records.
        dataset: What to learn from.
        validation: What to evaluate on, every `eval_every` steps and at the end; None: never.
        out: The run folder; made if it does not exist.
        backend: The framework.
        device: Such as "cpu" or "cuda"; default: a GPU where there is one.
        initial: Weights to start from instead of random ones.
        fresh: Prefixes of the names that `initial` lacks, and that start as in a new detector.
        resume: Continue from the newest whole checkpoint in `out`.
        notes: More entries for config.json.
        replicas: Data-parallel replicas. Default: those that the framework's launcher started.
        callbacks: Called with the step and the metrics that were logged, in the main process.
        signals: Signals that are recorded already. Default: from here on.

    Returns:
        The trained model, with the weights that were saved.

    Raises:
        Stopped: a signal came, and the state is saved; it is a KeyboardInterrupt.
        FloatingPointError: a loss or a gradient is not finite.
        FileExistsError: `out` holds a run, and `resume` is not set.
        OSError: a file cannot be written; existing files stay whole.
        ValueError: the classes are not those of the datasets, the checkpoint is damaged or of
            another run, or an example cannot be used.
    """
    check_data(config, train_config, dataset, validation)
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
            "freeze": str(train_config.freeze),  # the optimizer's state is of the others
            "seed": str(train_config.seed),  # of the order of the data, which is all that is random
        },
        {"config": config.to_json()},
        train_config.keep,
        writes=replicas.rank == 0,
    )
    model = library.build(config, train_config.seed, device)
    if initial is not None:
        new = {k: v for k, v in library.state(model).items() if k.startswith(fresh)}
        library.load_state(model, {**initial, **new})
    trainer = library.Trainer(model, train_config, replicas)
    first, before = 0, 0.0
    if not resume:
        folder.start()
    elif (found := folder.resume(train_config.steps)) is not None:
        tensors, first, before = found
        trainer.load_state(tensors)
    record = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "focal": focal.__version__,
        "backend": backend,
        "detector": json.loads(config.to_json()),
        "train": json.loads(train_config.to_json()),
        **library.describe(model),
        "precision": trainer.precision,
        "replicas": replicas.count,
        **(notes or {}),
    }
    folder.write_config(record)
    share = replicas.rank, replicas.processes
    batches = train_batches(dataset, config, train_config, start=first, share=share)
    run = _Run(
        config=config,
        train=train_config,
        validation=validation,
        backend=backend,
        device=device,
        trainer=trainer,
        folder=folder,
        replicas=replicas,
        first=first,
        before=before,
        check_start=initial is None and config.loss == "focal" and replicas.processes == 1,
        callbacks=callbacks,
        signals=signals or Signals(),
    )
    with run.signals if signals is None else contextlib.nullcontext():
        with contextlib.closing(batches):
            last = run.steps(batches)
        record["seconds"] = run.seconds(1)
        model = run.measured(last)
        folder.write_config(record)
        run.wait()  # for the measurement
    return model


def check_data(
    config: RetinaNetConfig, train: TrainConfig, dataset: Dataset, validation: Dataset | None
) -> None:
    """Raise a ValueError where the settings do not fit the data."""
    for split in (dataset, validation):
        if split is not None and class_names(split) != config.classes:
            raise ValueError(
                f"train: {dataset_name(split)} has the classes {class_names(split)}; "
                f"expected {config.classes}"
            )
    if train.patience and not (train.eval_every and validation):
        raise ValueError("train: patience needs eval_every > 0 and a validation split")


@dataclass
class _Run:
    """A run from its first step to its last."""

    config: RetinaNetConfig
    train: TrainConfig
    validation: Dataset | None
    backend: str
    device: str | None
    trainer: Any
    folder: RunFolder
    replicas: Replicas
    first: int
    """Steps that are done already."""
    before: float
    """Seconds that they took."""
    check_start: bool
    """Whether to compare the first loss with the expected one. Not with several processes: each has
    a part of the batch, but the loss of the whole."""
    callbacks: Sequence[Callback]
    signals: Signals
    pending: list[tuple[int, Mapping[str, Any], np.ndarray]] = field(default_factory=list)
    """Number, losses and image ids of the steps since losses were last read from the device."""

    def __post_init__(self) -> None:
        self.begin = time.monotonic() - self.before

    def seconds(self, digits: int) -> float:
        """Since the run began, without the time between stopping and resuming."""
        return round(time.monotonic() - self.begin, digits)

    def steps(self, batches: Iterator[Batch]) -> int:
        """The remaining steps, with logs, checkpoints and evaluations; the number of the last."""
        train, first = self.train, self.first
        if early := self.replicas.maximum(self.signals.received):
            self.stop(early, first)
        if 0 < first < train.steps and _every(train.eval_every, first):
            self.measured(first)
        logged, since = first, time.monotonic()
        with Progress(train.steps, first, shown=self.replicas.rank == 0) as progress:
            if self.exhausted(progress):
                return first
            for done in range(first + 1, train.steps + 1):
                rate = learning_rate(train, done - 1)
                batch = next(batches)
                parts = self.trainer.step(done - 1, batch, rate)
                self.pending.append((done, parts, batch.image_ids))
                progress.update()
                logs = _every(train.log_every, done) or done == train.steps
                saves = _every(train.save_every, done) or done == train.steps
                evaluates = _every(train.eval_every, done) and done < train.steps
                starts = done == 1 and self.check_start
                stopping = self.stopping(logs or saves or evaluates or starts)
                if starts:
                    check_first_loss(float(parts["classification"]), batch, self.config)
                if logs:
                    now = time.monotonic()
                    speed = (done - logged) * train.batch_size / (now - since)
                    logged, since = done, now
                    self.log(done, parts, rate, round(speed, 2), progress)
                if stopping:
                    self.stop(stopping, done)
                if saves:
                    self.save(done)
                if evaluates:
                    self.measured(done, progress)
                    if self.exhausted(progress):
                        self.save(done)
                        return done
        return train.steps

    def exhausted(self, progress: Progress) -> bool:
        """Whether the last `patience` evaluations brought no better AP."""
        if not self.train.patience:
            return False
        found = list(self.folder.evaluations().values()) if self.replicas.rank == 0 else []
        since = len(found) - 1 - found.index(max(found)) if found else 0
        over = bool(self.replicas.maximum(int(since >= self.train.patience)))
        if over:
            steps = self.train.patience * self.train.eval_every
            progress.say(f"stopped: no better AP in the last {steps} steps")
        return over

    def stopping(self, reads: bool) -> int:
        """The signal for which all processes stop, or 0.

        Only here does a step wait for the device and the other processes: when it `reads` its
        losses, and every `MAX_PENDING_STEPS`.
        """
        received = self.signals.received if self.replicas.processes == 1 else 0
        if not (reads or received or len(self.pending) == MAX_PENDING_STEPS):
            return 0
        if not self.trainer.healthy:
            self.refuse()
        self.pending.clear()
        return self.replicas.maximum(self.signals.received)

    def log(
        self, step: int, parts: Mapping[str, Any], rate: float, speed: float, progress: Progress
    ) -> None:
        """Write a line of metrics; show it with the progress."""
        values = {name: float(value) for name, value in parts.items()}
        values |= {"learning_rate": rate, "images_per_second": speed, "seconds": self.seconds(2)}
        self.record(step, {"kind": "train", "step": step, **values})
        progress.show(
            step,
            f"loss {values['loss']:.3f} (class {values['classification']:.3f}, "
            f"box {values['box']:.3f}), lr {rate:.1e}, {speed:.0f} img/s",
        )

    def record(self, step: int, entry: dict[str, Any]) -> None:
        """Write a line of metrics, and hand it to the callbacks."""
        self.folder.log(entry)
        if self.replicas.rank == 0:
            for callback in self.callbacks:
                callback(step, entry)

    def save(self, step: int, state: dict[str, np.ndarray] | None = None) -> Path:
        """A checkpoint of the state after a step (default: of the trainer's), and its weights."""
        state = self.trainer.state() if state is None else state
        path = self.folder.save_checkpoint(state, step, time.monotonic() - self.begin)
        self.save_weights()
        return path

    def save_weights(self) -> dict[str, np.ndarray]:
        """Write the weights to use, those of the last step; returns them."""
        weights: dict[str, np.ndarray] = self.trainer.weights()
        if self.replicas.rank == 0:
            save_weights(self.folder.weights, weights, self.config)
        return weights

    def stop(self, number: int, step: int) -> NoReturn:
        """Save a checkpoint and raise `Stopped`."""
        path = self.save(step)
        self.wait()
        name = signal.Signals(number).name
        text = f"stopped by {name} after step {step} of {self.train.steps}; {path} is saved"
        raise Stopped(number, text)

    def refuse(self) -> NoReturn:
        """Raise an error that says what is not finite. No step since then had an effect."""
        step, reason = _first_not_finite(self.pending)
        state = self.trainer.state()
        # Before the first step of this run there is nothing to save.
        if step - 1 > self.first and all(np.isfinite(x).all() for x in state.values()):
            path = self.save(step - 1, state)
            self.wait()
            reason += f"; {path} is the state before it"
        raise FloatingPointError(reason)

    def wait(self) -> None:
        """Wait for the other processes: a launcher may kill them when one ends."""
        self.replicas.maximum(0)

    @functools.cached_property
    def candidate(self) -> Any:
        """The model to evaluate and return: only one, since graphs may never be freed."""
        return backend_module(self.backend).build(self.config, self.train.seed, self.device)

    def measured(self, step: int, progress: Progress | None = None) -> Any:
        """The model with the weights to keep; they are saved, and evaluated if there is a split."""
        self.signals.at_once = self.replicas.processes == 1  # nothing here must be finished
        try:
            weights = self.save_weights()
            backend_module(self.backend).load_state(self.candidate, weights)
            if self.validation is not None and self.replicas.rank == 0:
                before = self.folder.evaluations()
                if step not in before:  # where a resumed run was evaluated already
                    metrics, _ = evaluate_model(self.candidate, self.validation)
                    best = max(before.values(), default=-math.inf)
                    better = math.isnan(metrics["AP"]) or metrics["AP"] > best
                    if better or not self.folder.best.exists():
                        save_weights(self.folder.best, weights, self.config)
                    split = dataset_name(self.validation)
                    self.record(step, {"kind": "eval", "split": split, "step": step, **metrics})
                    if progress is not None:
                        text = f"step {step}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}"
                        progress.say(text + ("" if better else f" (best AP {best:.3f})"))
            return self.candidate
        except KeyboardInterrupt:
            if not self.signals.received:
                raise
            self.stop(self.signals.received, step)
        finally:
            self.signals.at_once = False


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _first_not_finite(steps: list[tuple[int, Mapping[str, Any], np.ndarray]]) -> tuple[int, str]:
    """The first of these steps with a loss or gradient that is not finite, and the message."""
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
