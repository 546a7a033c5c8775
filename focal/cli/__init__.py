"""The command line: `focal train` and what goes with it; `focal --help` names them all."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import focal

__all__ = ["main"]

TRAIN_EPILOG = """\
examples:
  focal train --data shapes --canvas 128x128 --steps 1500 --out runs/shapes
      learn the generated set, which needs no download
  focal train --data path/to/coco --preset tiny --out runs/mine
      learn your own images: a folder with instances_{train,val,test}.json and images/,
      or the COCO 2017 layout
  focal train --data path/to/coco --preset r50 --set norm=batch --set steps=20000
      change any field of the detector or the run
  focal train --data path/to/coco --out runs/mine --resume
      go on with a run that was stopped
  torchrun --nproc-per-node 8 -m focal train --data path/to/coco --preset r50
      share each batch among 8 GPUs; see docs/scaling.md for JAX and TensorFlow

The run folder holds config.json, metrics.jsonl, weights.safetensors, the last checkpoints,
loss.png, detections.png and report.html.
"""

CHECK_EPILOG = """\
All splits are read, each image is decoded once, and every problem is listed with file and record.
Errors are what training or evaluation would stop on: files that are missing, broken, of another
size than the JSON says or outside the folder; records with a missing, wrong, unknown or repeated
value; a missing train or val split; classes that differ between splits. Warnings are the rest:
boxes that are dropped or clipped, images, boxes and files that are there twice, in two splits,
without a class or of an unusual size, and more.

The sizes of the boxes and the share that the anchors reach are those of --preset, --convention
and --canvas, on whole images without augmentation.

exit status: 0 if there are no errors, whatever the warnings; 1 if there are errors;
             2 if there is nothing to check, or the command is wrong
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("focal").setLevel(logging.INFO)
    parser = _parser()
    options = parser.parse_args(arguments)
    command = shlex.join(["focal", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        status: int = options.run(options, command) or 0
    except ModuleNotFoundError as error:
        print(f"focal: {_not_installed(error)}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        # Everything a person can mend ends in one sentence; the rest keeps its traceback.
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        print(f"focal: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        resume = "; --resume goes on from the last checkpoint" if options.run is _train else ""
        print(f"focal: {str(stop) or 'stopped'}{resume}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    return status


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="focal",
        description="Focal loss and the reference RetinaNet (Lin et al. 2017).",
    )
    parser.add_argument("--version", action="version", version=f"focal {focal.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser(
        "train", help="train a detector", epilog=TRAIN_EPILOG, formatter_class=raw
    )
    _add_data(train)
    _add_backend(train)
    _add_detector(train)
    train.add_argument("--out", type=Path, default=Path("runs/latest"), help="the run folder")
    train.add_argument("--steps", type=int, help="optimiser steps (default: the preset's)")
    train.add_argument("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    train.add_argument("--weights", type=Path, help="start from this weights file")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run's newest checkpoint, with its settings where no others are given",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set a field of RetinaNetConfig or TrainConfig; may be repeated",
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="measure COCO AP of a detector")
    evaluate.add_argument("weights", type=Path, help="weights.safetensors of a run")
    _add_data(evaluate)
    _add_backend(evaluate)
    evaluate.add_argument("--split", default="test", help="train, val or test (default)")
    evaluate.add_argument("--out", type=Path, help="also write the metrics to this JSON file")
    evaluate.set_defaults(run=_evaluate)

    predict = commands.add_parser("predict", help="find objects in images")
    predict.add_argument("weights", type=Path, help="weights.safetensors of a run")
    predict.add_argument("images", type=Path, nargs="+", help="image files")
    _add_backend(predict)
    predict.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write")
    predict.add_argument(
        "--score", type=float, default=0.3, help="least score drawn (default 0.3); JSON has all"
    )
    predict.set_defaults(run=_predict)

    export = commands.add_parser("export", help="write a detector for ONNX or TensorFlow programs")
    export.add_argument("weights", type=Path, help="weights.safetensors of a run")
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a file ending in .onnx, or a folder, without an ending, for a SavedModel",
    )
    export.set_defaults(run=_export)

    check = commands.add_parser(
        "check", help="find what is wrong with a data set", epilog=CHECK_EPILOG, formatter_class=raw
    )
    check.add_argument("data", type=Path, help="a COCO folder, as train reads it")
    _add_detector(check)
    check.add_argument("--out", type=Path, help="also write check.json and check.png here")
    check.set_defaults(run=_check, resume=False, set=[], steps=None, seed=None)

    figures = commands.add_parser("figures", help="draw the figures of the paper, and our own")
    figures.add_argument("--out", type=Path, default=Path("figures"), help="folder to write")
    figures.add_argument("--weights", type=Path, help="a trained detector, for figure 4")
    figures.add_argument("--data", help="images for it: a COCO folder, or 'shapes' (generated)")
    figures.add_argument("--split", default="test", help="train, val or test (default)")
    _add_backend(figures)
    figures.set_defaults(run=_figures)

    bias = commands.add_parser("prior-bias", help="the bias that makes first scores PI")
    bias.add_argument("pi", type=float, nargs="?", default=0.01, help="default 0.01")
    bias.set_defaults(run=lambda options, _: print(focal.prior_bias(options.pi)))
    return parser


def _not_installed(error: ModuleNotFoundError) -> str:
    """Which package is missing, and the extra that brings it."""
    package = (error.name or "").split(".")[0]
    if package in ("", "focal"):
        raise error
    extras = {"torch": "torch", "tensorflow": "tensorflow", "keras": "tensorflow"}
    extras |= dict.fromkeys(("jax", "flax", "optax"), "jax")
    extras |= dict.fromkeys(("onnx", "onnxscript"), "onnx")
    extra = extras.get(package, "retinanet")
    return f'{package} is not installed; pip install "focal-losses[{extra}]" brings it'


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="a COCO folder, or 'shapes' (generated)")


def _add_detector(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        help="tiny (0.9 M parameters, for a CPU; default) or r50 (the paper's RetinaNet-50)",
    )
    parser.add_argument(
        "--convention",
        help="whose anchors, matching and box loss: paper (default), torchvision, "
        "torchvision_v2, detectron2",
    )
    parser.add_argument("--canvas", metavar="HxW", help="canvas in pixels, such as 256x320")


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="torch", help="torch (default), jax or tensorflow")
    parser.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")


def _train(options: argparse.Namespace, command: str) -> None:
    from focal.retinanet import report
    from focal.retinanet.detector import backend_module, predict
    from focal.retinanet.report.curves import loss_plot, read_metrics
    from focal.retinanet.training.loop import train
    from focal.retinanet.weights import load_weights

    detector, run = _configs(options)
    # First of all: frameworks want to know of other processes before they are used.
    replicas = backend_module(options.backend).replicas(options.device)
    replicas.check(run)
    if replicas.rank > 0:  # one process speaks for all
        logging.getLogger().setLevel(logging.WARNING)
    dataset = _dataset(options.data, "train", detector)
    validation = _dataset(options.data, "val", detector)
    if validation.classes != dataset.classes:
        raise ValueError(
            f"{validation.name}: its classes are {validation.classes}, "
            f"those of {dataset.name} are {dataset.classes}"
        )
    detector = detector.replace(classes=dataset.classes)
    initial = None
    if options.weights is not None:
        initial, _ = load_weights(options.weights)
    model = train(
        detector,
        run,
        dataset,
        validation,
        options.out,
        backend=options.backend,
        device=options.device,
        initial=initial,
        resume=options.resume,
        notes={"command": command, "data": options.data},
        replicas=replicas,
    )
    if replicas.rank > 0:
        return
    count = min(4, len(validation))
    examples = [validation[i * len(validation) // count] for i in range(count)]
    found = predict(model, [example.image for example in examples])
    loss_plot(options.out / "metrics.jsonl", options.out / "loss.png")
    report.detections_picture(examples, found, detector.classes, options.out / "detections.png")
    page = report.write_report(options.out)
    _, evaluations = read_metrics(options.out / "metrics.jsonl")
    for split, lines in evaluations.items():
        _print_metrics(f"{split} after {lines[-1]['step']} steps", lines[-1])
    print(f"report: {page}")
    print(f"weights: {options.out / 'weights.safetensors'}")


def _evaluate(options: argparse.Namespace, command: str) -> None:
    from focal.retinanet.detector import load
    from focal.retinanet.training.loop import evaluate_model
    from focal.retinanet.training.run_folder import plain_json
    from focal.retinanet.weights import write_atomically

    model = load(options.weights, options.backend, options.device)
    dataset = _dataset(options.data, options.split, model.config)
    if dataset.classes != model.config.classes:
        raise ValueError(
            f"{options.weights}: the detector's classes are {model.config.classes}, "
            f"those of {dataset.name} are {dataset.classes}"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    metrics, _ = evaluate_model(model, dataset, progress=True)
    _print_metrics(dataset.name, metrics)
    if options.out is not None:
        record = {"command": command, "data": dataset.name, **metrics}
        write_atomically(options.out, plain_json(record, indent=2).encode())


def _predict(options: argparse.Namespace, _: str) -> None:
    from focal.retinanet.data import read_image
    from focal.retinanet.detector import load, predict
    from focal.retinanet.report.draw import draw_boxes, save_image
    from focal.retinanet.weights import write_atomically

    model = load(options.weights, options.backend, options.device)
    pictures = [options.out / f"{path.stem}.png" for path in options.images]
    for path, picture in zip(options.images, pictures, strict=True):
        onto_itself = path.is_file() and picture.resolve() == path.resolve()
        if onto_itself or pictures.count(picture) > 1:
            raise ValueError(f"--out {options.out}: {picture.name} would overwrite another image")
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.images:
        image = read_image(path)
        (found,) = predict(model, [image])
        shown = found["scores"] >= options.score
        drawn = draw_boxes(
            image,
            found["boxes"][shown],
            found["labels"][shown],
            model.config.classes,
            found["scores"][shown],
        )
        save_image(options.out / f"{path.stem}.png", drawn)
        entries = [
            {
                "class": model.config.classes[label],
                "score": round(float(score), 5),
                "box": [round(float(v), 2) for v in box],
            }
            for box, score, label in zip(
                found["boxes"], found["scores"], found["labels"], strict=True
            )
        ]
        record = {"image": str(path), "box_format": "x1, y1, x2, y2 in pixels", "found": entries}
        target = options.out / f"{path.stem}.json"
        write_atomically(target, json.dumps(record, indent=1).encode())
        print(f"{path}: {int(shown.sum())} objects -> {options.out / path.stem}.png, {target.name}")


def _export(options: argparse.Namespace, _: str) -> None:
    from focal.retinanet.detector import export, export_backend, load

    model = load(options.weights, export_backend(options.out), device="cpu")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    export(model, options.out)
    print(f"written: {options.out}")


def _check(options: argparse.Namespace, command: str) -> int:
    from focal.retinanet.report.check import check_data, read_boxes
    from focal.retinanet.report.check_picture import check_picture
    from focal.retinanet.report.check_report import check_record, check_text
    from focal.retinanet.weights import write_atomically

    detector, _ = _configs(options)
    findings, splits = check_data(options.data, progress=True)
    boxes = read_boxes(splits, detector)
    notes = {"command": command, "data": str(options.data), "focal": focal.__version__}
    record = check_record(findings, splits, boxes, detector, notes)
    print(check_text(record))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, allow_nan=False)
        write_atomically(options.out / "check.json", text.encode())
        picture = check_picture(boxes, record, detector, options.out / "check.png")
        print(f"\nwritten: {options.out / 'check.json'}, {picture.name}")
    return 1 if record["errors"] else 0


def _figures(options: argparse.Namespace, _: str) -> None:
    from focal.retinanet.detector import load
    from focal.retinanet.figures import write_figures

    if (options.weights is None) != (options.data is None):
        raise ValueError("--weights and --data: figure 4 needs both; got one")
    model = dataset = None
    if options.weights is not None:
        model = load(options.weights, options.backend, options.device)
        dataset = _dataset(options.data, options.split, model.config)
    for name in write_figures(options.out, model, dataset):
        print(options.out / name)
    print(options.out / "figures.md")


def _configs(options: argparse.Namespace) -> tuple[Any, Any]:
    """What the run had if it is to go on, else the preset; with the options laid over it."""
    named = options.preset is not None or options.convention is not None
    if options.resume and not named and (options.out / "config.json").is_file():
        detector, run = _recorded(options.out / "config.json")
    else:
        detector, run = _preset(options.preset or "tiny", options.convention or "paper")
    if options.canvas is not None:
        detector = detector.replace(canvas=_canvas(options.canvas))
    for name, value in (("steps", options.steps), ("seed", options.seed)):
        if value is not None:
            run = run.replace(**{name: value})
    for assignment in options.set:
        field, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set must be FIELD=VALUE; got {assignment!r}")
        if field in {f.name for f in dataclasses.fields(run)}:
            run = run.replace(**{field: _value(text)})
        elif field in {f.name for f in dataclasses.fields(detector)}:
            detector = detector.replace(**{field: _value(text)})
        else:
            raise ValueError(f"--set: no field {field!r} in RetinaNetConfig or TrainConfig")
    return detector, run


def _preset(preset: str, convention: str) -> tuple[Any, Any]:
    """The preset with the convention laid over it."""
    from focal.retinanet.presets import CONVENTIONS, PRESETS

    for name, value, table in (
        ("--preset", preset, PRESETS),
        ("--convention", convention, CONVENTIONS),
    ):
        if value not in table:
            raise ValueError(f"{name} must be one of {', '.join(table)}; got {value!r}")
    detector, run = PRESETS[preset]
    changes = dict(CONVENTIONS[convention])
    if "anchors" in changes:  # the preset's strides and sizes, the convention's placement
        own = changes["anchors"]
        changes["anchors"] = dataclasses.replace(
            detector.anchors, offset=own.offset, rounded=own.rounded
        )
    return detector.replace(**changes), run


def _recorded(path: Path) -> tuple[Any, Any]:
    """The settings in the config.json of a run."""
    from focal.retinanet.config import RetinaNetConfig, TrainConfig

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return (
            RetinaNetConfig.from_json(json.dumps(record["detector"])),
            TrainConfig.from_json(json.dumps(record["train"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the record of a run; {error!r}") from error


def _value(text: str) -> Any:
    """The text as JSON where it is JSON, else as a word; the configs check what it is."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)
    return tuple(value) if isinstance(value, list) else value


def _canvas(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"--canvas must be HEIGHTxWIDTH in pixels, such as 256x320; got {text!r}")
    return int(parts[0]), int(parts[1])


def _dataset(data: str, split: str, detector: Any) -> Any:
    from focal.retinanet.data import CocoDataset, ShapesDataset

    if data == "shapes":
        return ShapesDataset(split, size=detector.canvas)
    return CocoDataset(data, split)


def _print_metrics(title: str, metrics: dict[str, Any]) -> None:
    print(title)
    for name, value in metrics.items():
        if name.startswith("A"):
            print(f"  {name:<12} {math.nan if value is None else value:.3f}")
