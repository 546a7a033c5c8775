"""Options that several commands have, and what they mean."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

__all__ = [
    "Commands",
    "add_backend",
    "add_data",
    "add_detector",
    "configs",
    "open_dataset",
    "print_metrics",
]

Commands = Any
"""What `add_subparsers` gives."""


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where images and boxes are."""
    parser.add_argument("--data", required=True, help="a COCO folder, or 'shapes' (generated)")


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Which detector."""
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


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Which framework, on what."""
    parser.add_argument("--backend", default="torch", help="torch (default), jax or tensorflow")
    parser.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")


def configs(options: argparse.Namespace) -> tuple[Any, Any]:
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


def open_dataset(data: str, split: str, detector: Any) -> Any:
    """A split of the data, or of the generated shapes."""
    from focal.retinanet.data import CocoDataset, ShapesDataset

    if data == "shapes":
        return ShapesDataset(split, size=detector.canvas)
    return CocoDataset(data, split)


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """The metrics of a split, a line each."""
    print(title)
    for name, value in metrics.items():
        if name.startswith("A"):
            print(f"  {name:<12} {math.nan if value is None else value:.3f}")


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
