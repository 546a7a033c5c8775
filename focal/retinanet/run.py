"""A training run from data to report: what `fit` and `focal train` do."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from focal.retinanet.data import Dataset, Transformed
from focal.retinanet.data.dataset import category_ids, class_names, dataset_name, read_example
from focal.retinanet.data.fitting import fit_config
from focal.retinanet.detector import backend_module, predict
from focal.retinanet.presets import Preset
from focal.retinanet.pretrained import Pretrained, read_pretrained
from focal.retinanet.report import report
from focal.retinanet.report.curves import loss_plot
from focal.retinanet.settings import apply, preset_settings, recorded_settings
from focal.retinanet.training.loop import Callback, check_data, train
from focal.retinanet.training.run_folder import new_folder, refuse_run
from focal.retinanet.training.stopping import Signals
from focal.retinanet.training.tensorboard import TensorBoard
from focal.retinanet.weights import checkpoints

__all__ = ["Run", "fit", "run"]

_log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run that is over."""

    model: Any
    """With the weights of the last step."""
    folder: Path
    writes: bool
    """Whether this process is the one that wrote the folder."""


def fit(
    data: Dataset,
    val: Dataset | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    preset: str | None = None,
    convention: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    fit_to_data: bool | None = None,
    transform: Callable[..., Mapping[str, Any]] | None = None,
    callback: Callback | None = None,
    tensorboard: bool = False,
    backend: str = "torch",
    device: str | None = None,
    resume: bool = False,
    **settings: Any,
) -> Any:
    """Train a detector: what `focal train` does, with the same checks and the same run folder.

    The run folder gets config.json, metrics.jsonl, the last checkpoints, weights.safetensors (of
    the last step), best.safetensors (of the evaluation with the greatest AP), pictures and
    report.html. Ctrl-C finishes the step and saves; `resume=True` continues.

    Args:
        data: What to learn from.
        val: What to evaluate on, every `eval_every` steps and at the end; None: never.
        out: The run folder, which must not hold a run unless `resume` is set. Default: a new one,
            runs/1, runs/2, ...
        preset: "tiny" (default) or "r50", of `PRESETS`.
        convention: "paper" (default), "torchvision", "torchvision_v2" or "detectron2", of
            `CONVENTIONS`.
        weights: Start from these: a weights file, checkpoint or run folder of this library, or
            torchvision's weights of a RetinaNet or a ResNet (.pth or .safetensors). The detector is
            then that of the weights; where its classes are others, the last layer of its class head
            starts anew, with the prior bias. Default: random weights.
        fit_to_data: Choose canvas, anchors, crop and steps from the training boxes. Default: for
            the preset "tiny" with random weights.
        transform: Your augmentation, called as `transform(image=..., bboxes=..., labels=...)` for
            each training image, before ours; see `Transformed`.
        callback: Called as `callback(step, metrics)` with each line of metrics.jsonl, such as
            {"kind": "train", "loss": ...} or {"kind": "eval", "AP": ...}.
        tensorboard: Write TensorBoard event files to the run folder; needs the extra `tensorboard`.
        backend: "torch", "jax" or "tensorflow".
        device: Such as "cpu" or "cuda:1". Default: a GPU where there is one.
        resume: Continue the run in `out` from its newest checkpoint, with its recorded settings.
        settings: Any fields of `RetinaNetConfig` and `TrainConfig`, such as `steps=2000`, and
            `freeze=5` to train all but the backbone.

    Returns:
        The framework's own model with the weights of the last step, as from `load`.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is not set.
        FloatingPointError: a loss or a gradient is not finite; the state before it is saved.
        ValueError: a setting, example or class does not fit; the message names it.
        KeyboardInterrupt: a signal came, and the state is saved.

    Example:
        >>> import tempfile
        >>> from focal.retinanet import fit, predict
        >>> from focal.retinanet.data import ShapesDataset
        >>> data, val = ShapesDataset("train"), ShapesDataset("val", num_images=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = fit(data, val, folder, image_size=(128, 128), steps=2, batch_size=2)
        >>> found = predict(model, [val[0].image])
    """
    if transform is not None:
        data = Transformed(data, transform)
    return run(
        data,
        val,
        out,
        {"preset": preset, "convention": convention, "weights": weights},
        settings,
        {"data": dataset_name(data)},
        fit_to_data=fit_to_data,
        callbacks=[] if callback is None else [callback],
        tensorboard=tensorboard,
        backend=backend,
        device=device,
        resume=resume,
    ).model


def run(
    data: Dataset,
    val: Dataset | None,
    out: str | os.PathLike[str] | None,
    start: Mapping[str, Any],
    changes: dict[str, Any],
    notes: Mapping[str, Any],
    *,
    fit_to_data: bool | None,
    callbacks: Sequence[Callback] = (),
    tensorboard: bool,
    backend: str,
    device: str | None,
    resume: bool,
) -> Run:
    """What `fit` and `focal train` do.

    `start` has the preset, convention and weights, `changes` the fields that were set by hand, and
    `notes` goes into config.json.
    """
    # From here on: while a framework starts, an interrupt could be lost in its callbacks.
    with Signals() as signals, contextlib.ExitStack() as stack:
        library = backend_module(backend)
        # First of all: a framework must know of the other processes before it is used.
        replicas = library.replicas(device)
        writes = replicas.rank == 0
        if not writes:  # one process logs
            logging.getLogger("focal").setLevel(logging.WARNING)
        folder, pretrained = None if out is None else Path(out), None
        if resume and folder is None:
            raise ValueError("resume: the run folder, out (--out), must be given")
        if resume and folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{folder}: expected the folder of a run to resume; found none")
        if not resume and folder is not None and writes:
            refuse_run(folder)
        begun = {k: str(v) if isinstance(v, os.PathLike) else v for k, v in start.items()}
        if folder is not None and resume and (folder / "config.json").is_file():
            settings, begun = recorded_settings(folder / "config.json", begun)
            settings = apply(settings, changes)
            if begun["weights"] is not None and not checkpoints(folder):  # it was killed before
                pretrained = read_pretrained(begun["weights"])
        else:
            settings, pretrained = _settings(data, begun, fit_to_data, changes)
        detector, train_config = settings
        replicas.check(train_config)
        check_data(detector, train_config, data, val)
        if folder is None:
            number = int(new_folder(Path("runs")).name) if writes else 0
            folder = Path("runs") / str(replicas.maximum(number))
        if tensorboard and writes:
            board = stack.enter_context(contextlib.closing(TensorBoard(folder)))
            callbacks = [*callbacks, board]
        model = train(
            detector,
            train_config,
            data,
            val,
            folder,
            backend=backend,
            device=device,
            initial=None if pretrained is None else pretrained.tensors,
            fresh=() if pretrained is None else pretrained.fresh(detector.classes),
            resume=resume,
            notes={**begun, **notes},
            replicas=replicas,
            callbacks=callbacks,
            signals=signals,
        )
    if writes:
        _report(model, data if val is None else val, folder)
    return Run(model, folder, writes)


def _settings(
    data: Dataset, start: dict[str, Any], fit_to_data: bool | None, changes: dict[str, Any]
) -> tuple[Preset, Pretrained | None]:
    """The settings of a new run, and the weights to start from; completes `start`."""
    names, ids, pretrained = class_names(data), category_ids(data), None
    usual = ids == tuple(range(1, len(ids) + 1))
    own = {"classes": names, "category_ids": () if usual else ids, **changes}
    if start["weights"] is not None:
        pretrained = read_pretrained(start["weights"])
        if pretrained.config is not None and start["convention"] is not None:
            raise ValueError(
                f"convention: {start['weights']} has a detector with its own; "
                f"got {start['convention']!r}"
            )
    small = pretrained is None or pretrained.backbone == "tiny"
    start["preset"] = start["preset"] or ("tiny" if small else "r50")
    settings = preset_settings(start["preset"], start["convention"] or "paper")
    if pretrained is None or pretrained.config is None:
        start["convention"] = start["convention"] or "paper"
    if pretrained is not None:
        settings = pretrained.settings(settings, own)
        _log.info(pretrained.summary(settings.detector))
    else:
        settings = apply(settings, own)
        if settings.train.freeze:
            _log.warning("freeze: without weights to start from, the frozen stages stay random")
    if fit_to_data if fit_to_data is not None else start["preset"] == "tiny" and not pretrained:
        # Trained heads stay with their anchors.
        kept = {"anchors", "levels"} if pretrained and pretrained.config else set()
        fitted = fit_config(data, *settings, kept | changes.keys())
        _log.info(fitted.sentence)
        start["fit"] = fitted.sentence
        settings = Preset(fitted.detector, fitted.train)
    return settings, pretrained


def _report(model: Any, data: Dataset, folder: Path) -> None:
    """Pictures and the page."""
    count = min(4, len(data))
    examples = [read_example(data, i * len(data) // count) for i in range(count)]
    found = predict(model, [example.image for example in examples])
    loss_plot(folder / "metrics.jsonl", folder / "loss.png")
    classes = model.config.classes
    report.detections_picture(examples, found, classes, folder / "detections.png")
    report.write_report(folder)
