"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # it must be possible to ask for help without what these need
    from focal.retinanet.data import Dataset

__all__ = [
    "Commands",
    "add_backend",
    "add_data",
    "add_detector",
    "add_inference",
    "assignments",
    "inference",
    "open_dataset",
    "print_metrics",
]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where images and boxes are."""
    parser.add_argument(
        "--data",
        required=True,
        help="a folder in the COCO format or as Roboflow and CVAT export it, a COCO JSON file, or "
        "'shapes' (generated)",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the train images that is val where there is no such split (default 0.1)",
    )


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
    parser.add_argument(
        "--image-size",
        "--canvas",
        metavar="HxW",
        help="pixels that images are scaled to fit, such as 256x320 (--canvas is its old name)",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Which framework, on which device."""
    parser.add_argument("--backend", default="torch", help="torch (default), jax or tensorflow")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Which detections there are; `inference` reads them."""
    parser.add_argument("--score-threshold", type=float, help="lowest score (default: as trained)")
    parser.add_argument("--nms-threshold", type=float, help="IoU above which the weaker one goes")
    parser.add_argument("--max-detections", type=int, help="the most in one image")


def inference(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_inference` added and was given, as `load` takes it."""
    names = ("score_threshold", "nms_threshold", "max_detections")
    return {name: vars(options)[name] for name in names if vars(options)[name] is not None}


def assignments(options: argparse.Namespace) -> dict[str, Any]:
    """What the user set by hand: values by field, of anchors as "anchors" or "anchors.sizes"."""
    from focal.core.anchors import AnchorConfig
    from focal.retinanet.config import FORMER, RetinaNetConfig, TrainConfig

    fields = {f.name for own in (RetinaNetConfig, TrainConfig) for f in dataclasses.fields(own)}
    fields |= {f"anchors.{field.name}" for field in dataclasses.fields(AnchorConfig)}
    own = {
        name: getattr(options, name, None) for name in ("steps", "seed", "eval_every", "patience")
    }
    found = {field: value for field, value in own.items() if value is not None}
    if (stages := getattr(options, "freeze", None)) is not None:
        if stages != "backbone" and not stages.isdecimal():
            raise ValueError(f"--freeze must be a number of stages or backbone; got {stages!r}")
        found["freeze"] = 5 if stages == "backbone" else int(stages)
    if options.image_size is not None:
        found["image_size"] = _size(options.image_size)
    for assignment in getattr(options, "set", ()):
        field, separator, text = assignment.partition("=")
        field = FORMER.get(field, field)
        if not separator:
            raise ValueError(f"--set must be FIELD=VALUE; got {assignment!r}")
        if field not in fields:
            owners = "RetinaNetConfig, TrainConfig or AnchorConfig"
            raise ValueError(f"--set: no field {field!r} in {owners}")
        found[field] = _value(text)
    return found


def open_dataset(
    data: str, split: str, size: tuple[int, int] | None, hold_out: float = 0.1
) -> Dataset:
    """A split of the data, or of the generated shapes in images of this (height, width)."""
    from focal.retinanet.data import CocoDataset, ShapesDataset

    if data == "shapes":
        return ShapesDataset(split) if size is None else ShapesDataset(split, size)
    return CocoDataset(data, split, hold_out)


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """The metrics of a split, one per line."""
    print(title)
    for name, value in metrics.items():
        if name.startswith("A"):
            print(f"  {name:<12} {math.nan if value is None else value:.3f}")


def _size(text: str) -> Any:
    size = _value(text)
    if not isinstance(size, list) or len(size) != 2 or 0 in size:
        raise ValueError(
            f"--image-size must be HEIGHTxWIDTH in pixels, such as 256x320; got {text!r}"
        )
    return size


def _value(text: str) -> Any:
    """The value of an option: HxW, JSON, or else text; the configs check it."""
    if size := re.fullmatch(r"(\d+)x(\d+)", text.lower()):
        return [int(side) for side in size.groups()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)
