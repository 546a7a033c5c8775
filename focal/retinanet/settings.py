"""The settings of a run: a preset's, a recorded run's or those of weights, and changes to them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focal.retinanet.config import RetinaNetConfig, TrainConfig, parse_fields
from focal.retinanet.presets import CONVENTIONS, PRESETS, Preset

__all__ = ["apply", "preset_settings", "recorded_settings"]


def preset_settings(preset: str, convention: str = "paper") -> Preset:
    """The preset, with the convention's values."""
    for name, value, known in (
        ("preset", preset, PRESETS),
        ("convention", convention, CONVENTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    detector, train = PRESETS[preset]
    changes = dict(CONVENTIONS[convention])
    if "anchors" in changes:  # the preset's strides and sizes, the convention's placement
        own = changes["anchors"]
        changes["anchors"] = dataclasses.replace(
            detector.anchors, offset=own.offset, rounded=own.rounded, stretched=own.stretched
        )
    return Preset(detector.replace(**changes), train)


def recorded_settings(path: Path, asked: Mapping[str, Any]) -> tuple[Preset, dict[str, Any]]:
    """The settings in the config.json of a run, and what they started from.

    Args:
        path: The file.
        asked: The preset, convention and weights that the user names, which must be the run's.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        detector = RetinaNetConfig(**parse_fields(record["detector"]))
        settings = Preset(detector, TrainConfig(**parse_fields(record["train"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected the record of a run; {error!r}") from error
    for name, value in asked.items():
        if value is not None and record.get(name, value) != value:
            raise ValueError(
                f"{path}: the run has {name} {record[name]}, and resumes with it; got {value}"
            )
    return settings, {name: record.get(name) for name in (*asked, "fit")}


def apply(settings: Preset, changes: Mapping[str, Any]) -> Preset:
    """The settings with fields of either config changed, of anchors also as "anchors.sizes".

    Raises:
        ValueError: a field that neither has, or a value that it does not take.
    """
    detector, train = settings
    fields = parse_fields(_with_anchors(detector, dict(changes)))
    for field in fields:
        if field not in {**vars(detector), **vars(train)}:
            raise ValueError(f"no field {field!r} in RetinaNetConfig or TrainConfig")
    # All at once: some fields only fit together, such as levels and anchors.
    detector = detector.replace(**{f: v for f, v in fields.items() if f in vars(detector)})
    return Preset(detector, train.replace(**{f: v for f, v in fields.items() if f in vars(train)}))


def _with_anchors(detector: RetinaNetConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with `anchors` as a whole: set by parts, and following `levels`."""
    parts = {f.split(".")[1]: changes.pop(f) for f in list(changes) if f.startswith("anchors.")}
    levels, whole = changes.get("levels"), changes.get("anchors")
    if whole is None and isinstance(levels, list | tuple) and set(map(type, levels)) == {int}:
        size = dict(zip(detector.levels, detector.anchors.sizes, strict=True))
        near = [min(max(level, min(size)), max(size)) for level in levels]
        sizes = [size[n] * 2.0 ** (level - n) for level, n in zip(levels, near, strict=True)]
        parts = {"strides": [2 ** max(level, 0) for level in levels], "sizes": sizes} | parts
    if parts and isinstance(whole, dict | None):
        changes["anchors"] = {**(whole or dataclasses.asdict(detector.anchors)), **parts}
    return changes
