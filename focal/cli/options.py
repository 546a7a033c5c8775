"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # it must be possible to ask for help without what these need
    from focal.retinanet import RetinaNetConfig, TrainConfig
    from focal.retinanet.data import Dataset

__all__ = [
    "Commands",
    "add_backend",
    "add_data",
    "add_detector",
    "assignments",
    "configs",
    "open_dataset",
    "print_metrics",
]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Configs: TypeAlias = "tuple[RetinaNetConfig, TrainConfig]"


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


def configs(options: argparse.Namespace) -> Configs:
    """The recorded settings of a run to resume, else the preset's; other options override them."""
    from focal.retinanet.config import parse_fields

    named = options.preset is not None or options.convention is not None
    if options.resume and not named and (options.out / "config.json").is_file():
        detector, run = _recorded(options.out / "config.json")
    else:
        detector, run = _preset(options.preset or "tiny", options.convention or "paper")
    changes = _with_anchors(detector, assignments(options))
    # All at once: some fields only fit together, such as levels and anchors.
    changes = parse_fields(changes)
    detector = detector.replace(**{f: v for f, v in changes.items() if f in vars(detector)})
    return detector, run.replace(**{f: v for f, v in changes.items() if f in vars(run)})


def assignments(options: argparse.Namespace) -> dict[str, Any]:
    """What the user set by hand: values by field, of anchors as "anchors" or "anchors.sizes"."""
    from focal.core.anchors import AnchorConfig
    from focal.retinanet.config import FORMER, RetinaNetConfig, TrainConfig

    fields = {f.name for own in (RetinaNetConfig, TrainConfig) for f in dataclasses.fields(own)}
    fields |= {f"anchors.{field.name}" for field in dataclasses.fields(AnchorConfig)}
    own = {"steps": options.steps, "seed": options.seed}
    found = {field: value for field, value in own.items() if value is not None}
    if options.image_size is not None:
        found["image_size"] = _size(options.image_size)
    for assignment in options.set:
        field, separator, text = assignment.partition("=")
        field = FORMER.get(field, field)
        if not separator:
            raise ValueError(f"--set must be FIELD=VALUE; got {assignment!r}")
        if field not in fields:
            owners = "RetinaNetConfig, TrainConfig or AnchorConfig"
            raise ValueError(f"--set: no field {field!r} in {owners}")
        found[field] = _value(text)
    return found


def open_dataset(data: str, split: str, detector: RetinaNetConfig) -> Dataset:
    """A split of the data, or of the generated shapes."""
    from focal.retinanet.data import CocoDataset, ShapesDataset

    if data == "shapes":
        return ShapesDataset(split, size=detector.image_size)
    return CocoDataset(data, split)


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """The metrics of a split, one per line."""
    print(title)
    for name, value in metrics.items():
        if name.startswith("A"):
            print(f"  {name:<12} {math.nan if value is None else value:.3f}")


def _with_anchors(detector: RetinaNetConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with `anchors` as a whole: set by parts, and following `levels`."""
    parts = {f.split(".")[1]: changes.pop(f) for f in list(changes) if f.startswith("anchors.")}
    levels, whole = changes.get("levels"), changes.get("anchors")
    if whole is None and isinstance(levels, list) and set(map(type, levels)) == {int}:
        size = dict(zip(detector.levels, detector.anchors.sizes, strict=True))
        near = [min(max(level, min(size)), max(size)) for level in levels]
        sizes = [size[n] * 2.0 ** (level - n) for level, n in zip(levels, near, strict=True)]
        parts = {"strides": [2 ** max(level, 0) for level in levels], "sizes": sizes} | parts
    if parts and isinstance(whole, dict | None):
        changes["anchors"] = {**(whole or dataclasses.asdict(detector.anchors)), **parts}
    return changes


def _preset(preset: str, convention: str) -> Configs:
    """The preset, with the convention's values."""
    from focal.retinanet.presets import CONVENTIONS, PRESETS

    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    if convention not in CONVENTIONS:
        raise ValueError(
            f"--convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}"
        )
    detector, run = PRESETS[preset]
    changes = dict(CONVENTIONS[convention])
    if "anchors" in changes:  # the preset's strides and sizes, the convention's placement
        own = changes["anchors"]
        changes["anchors"] = dataclasses.replace(
            detector.anchors, offset=own.offset, rounded=own.rounded
        )
    return detector.replace(**changes), run


def _recorded(path: Path) -> Configs:
    """The settings in the config.json of a run."""
    from focal.retinanet.config import RetinaNetConfig, TrainConfig, parse_fields

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        detector = RetinaNetConfig(**parse_fields(record["detector"]))
        return detector, TrainConfig(**parse_fields(record["train"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected the record of a run; {error!r}") from error


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
