"""The command line: `focal train`, `focal evaluate`, `focal predict`, `focal prior-bias`."""

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

The run folder holds config.json, metrics.jsonl, weights.safetensors, the last checkpoints,
loss.png, detections.png and report.html.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = _parser()
    options = parser.parse_args(arguments)
    command = shlex.join(["focal", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        options.run(options, command)
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
    return 0


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
    train.add_argument(
        "--preset",
        help="tiny (0.9 M parameters, for a CPU; default) or r50 (the paper's RetinaNet-50)",
    )
    train.add_argument(
        "--convention",
        help="whose anchors, matching and box loss: paper (default), torchvision, "
        "torchvision_v2, detectron2",
    )
    train.add_argument("--out", type=Path, default=Path("runs/latest"), help="the run folder")
    train.add_argument("--steps", type=int, help="optimiser steps (default: the preset's)")
    train.add_argument("--canvas", metavar="HxW", help="canvas in pixels, such as 256x320")
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

    bias = commands.add_parser("prior-bias", help="the bias that makes first scores PI")
    bias.add_argument("pi", type=float, nargs="?", default=0.01, help="default 0.01")
    bias.set_defaults(run=lambda options, _: print(focal.prior_bias(options.pi)))
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="a COCO folder, or 'shapes' (generated)")


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="torch", help="torch (default), jax or tensorflow")
    parser.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")


def _train(options: argparse.Namespace, command: str) -> None:
    from focal.retinanet import report
    from focal.retinanet.curves import loss_plot, read_metrics
    from focal.retinanet.detector import predict
    from focal.retinanet.loop import train
    from focal.retinanet.weights import load_weights

    detector, run = _configs(options)
    dataset = _dataset(options.data, "train", detector)
    validation = _dataset(options.data, "val", detector)
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
    )
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
    from focal.retinanet.loop import evaluate_model
    from focal.retinanet.run_folder import plain_json
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
    from focal.retinanet.draw import draw_boxes, save_image
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


def _configs(options: argparse.Namespace) -> tuple[Any, Any]:
    """What the run had if it is to go on, else the preset; with the options laid over it."""
    recorded = options.out / "config.json"
    named = options.preset is not None or options.convention is not None
    if options.resume and not named and recorded.is_file():
        detector, run = _recorded(recorded)
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
