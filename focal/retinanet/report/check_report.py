"""The result of `focal check`, as a record for check.json and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.data.images import printable
from focal.retinanet.report.check import Boxes, Finding, Split, all_classes

__all__ = ["BUCKETS", "check_record", "check_text"]

BUCKETS = {
    "all": (0, np.inf),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, np.inf),
}
"""COCO's ranges of area in pixels of the image, without the upper end."""
EXAMPLES = 5


def check_record(
    findings: Sequence[Finding],
    splits: Sequence[Split],
    boxes: Boxes,
    config: RetinaNetConfig,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Counts, findings and statistics, ready for JSON.

    Args:
        findings: of `check_data`.
        splits: of `check_data`.
        boxes: of `read_boxes`.
        config: the detector whose anchors and canvas are used.
        notes: what to add, such as the command.
    """
    classes = all_classes(splits)
    return {
        **notes,
        "image_size": list(config.image_size),
        "canvas": list(config.image_size),  # its old name
        "foreground": config.foreground,
        "anchors": {"sizes": config.anchors.sizes, "strides": config.anchors.strides},
        "classes": classes,
        "splits": {split.name: _counts(split) for split in splits},
        "errors": _grouped(findings, "error"),
        "warnings": _grouped(findings, "warning"),
        "boxes": _statistics(boxes, np.ones(len(boxes.label), bool), config),
        "boxes by class": {
            name: _statistics(boxes, boxes.label == label, config)
            for label, name in enumerate(classes)
        },
    }


def _counts(split: Split) -> dict[str, Any]:
    own = split.objects.label[~split.objects.crowd]
    counts = np.bincount(own, minlength=len(split.names)).tolist()
    return {
        "images": len(split.images),
        "boxes": len(own),
        "crowd": int(split.objects.crowd.sum()),
        "annotations": split.total,
        "classes": dict(zip(split.classes, counts, strict=True)),
    }


def _grouped(findings: Sequence[Finding], level: str) -> list[dict[str, Any]]:
    """The findings of a level by kind, the most frequent first."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.level == level:
            groups.setdefault(finding.kind, []).append(finding)
    return [
        {
            "kind": kind,
            "count": len(found),
            "splits": dict(Counter(finding.split for finding in found if finding.split)),
            "findings": [finding.sentence for finding in found],
        }
        for kind, found in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]


def _statistics(boxes: Boxes, own: np.ndarray, config: RetinaNetConfig) -> dict[str, Any]:
    """Sizes in pixels of the image, and the share that has an anchor, by COCO's sizes."""
    size, area, iou = boxes.size[own], boxes.area[own], boxes.iou[own]
    side = np.sqrt(np.prod(size, axis=1))
    columns = {
        "side": side,
        "height/width": size[:, 1] / size[:, 0],
        "side on the canvas": side * boxes.scale[own],
    }
    statistics: dict[str, Any] = {"count": len(size)}
    for name, values in columns.items():
        if len(values):
            low, middle, high = np.percentile(values, [5, 50, 95]).round(2).tolist()
            statistics[name] = {"5%": low, "median": middle, "95%": high}
    statistics["reached"] = {}
    for name, (low, high) in BUCKETS.items():
        inside = (area >= low) & (area < high)
        share = float(np.mean(iou[inside] >= config.foreground)) if inside.any() else None
        statistics["reached"][name] = {"count": int(inside.sum()), "share": share}
    return statistics


def check_text(record: Mapping[str, Any], limit: int = EXAMPLES) -> str:
    """The record as text, with up to `limit` examples of each kind of finding."""
    splits, classes = record["splits"], record["classes"]
    width = max([6, *(len(_name(name)) for name in classes)]) + 2
    totals = [*splits, "all"] if len(splits) > 1 else list(splits)
    lines = [
        " " * width + "".join(f"{_name(name):>10}" for name in totals),
        *(_row(key, width, [splits[name][key] for name in splits]) for key in ("images", "boxes")),
        *(
            _row(_name(name), width, [counts["classes"].get(name, 0) for counts in splits.values()])
            for name in classes
        ),
    ]
    for level in ("errors", "warnings"):
        lines += ["", f"{level}: none" if not record[level] else f"{level}:"]
        for group in record[level]:
            where = ", ".join(f"{_name(split)} {n}" for split, n in group["splits"].items())
            lines.append(
                f"  {group['count']:>5} x {group['kind']}" + (f" ({where})" if where else "")
            )
            lines += [f"          {sentence}" for sentence in group["findings"][:limit]]
            if group["count"] > limit:
                lines.append(f"          and {group['count'] - limit} more")
    height, breadth = record["image_size"]
    lines += [
        "",
        "sizes in pixels (square root of width x height) at 5%, 50%, 95%, and the share of boxes",
        f"with an anchor of IoU {record['foreground']:g} or more, canvas {height}x{breadth}:",
        f"{'':{width}}{'5%':>8}{'50%':>8}{'95%':>8}   " + "".join(f"{b:>8}" for b in BUCKETS),
    ]
    for name, found in [*record["boxes by class"].items(), ("(all)", record["boxes"])]:
        if not found["count"]:
            continue
        sizes = "".join(f"{value:>8.0f}" for value in found["side"].values())
        shares = "".join(
            f"{'-' if part['share'] is None else format(part['share'], '.1%'):>8}"
            for part in found["reached"].values()
        )
        lines.append(f"{_name(name):{width}}{sizes}   {shares}")
    if "suggested" in record:
        lines += ["", f"suggested: {record['suggested']}"]
    return "\n".join(lines)


def _row(name: str, width: int, counts: list[int]) -> str:
    values = [*counts, sum(counts)] if len(counts) > 1 else counts
    return f"{name:{width}}" + "".join(f"{value:>10,}" for value in values)


def _name(text: str) -> str:
    return printable(text, 24)
