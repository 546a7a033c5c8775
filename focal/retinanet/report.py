"""What a training run looks like: its curves, its detections, and one HTML page with all of it."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from focal.retinanet.data.dataset import Example
from focal.retinanet.draw import PALETTE, draw_boxes, save_image, side_by_side
from focal.retinanet.weights import write_atomically

__all__ = ["detections_picture", "loss_plot", "read_metrics", "write_report"]

_LOSSES = {"loss": "#555555", "classification": PALETTE[0], "box": PALETTE[6]}
_APS = {"AP": PALETTE[0], "AP50": PALETTE[1]}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #666; --bar: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --dim: #aaa; --bar: #56b4e9 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere } h2 { margin-top: 2.5rem }
img { max-width: 100%; height: auto; border-radius: 6px; background: #fff }
figure { margin: 1rem 0 } figcaption, .dim { color: var(--dim); font-size: .9rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left }
td { overflow-wrap: anywhere; min-width: 4rem } th { font-weight: 600; overflow-wrap: anywhere }
.number { text-align: right; font-variant-numeric: tabular-nums; width: 5rem }
.bar { background: linear-gradient(var(--bar) 0 0) left / var(--share) .6rem no-repeat }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .8rem }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0 }
@media (max-width: 30rem) { .bar { display: none } }
"""
_MEANING = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "objects below 32² pixels",
    "APm": "from 32² to 96²",
    "APl": "above 96²",
    "AR100": "recall with 100 detections an image",
}


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a `metrics.jsonl`: "train", and one list for each split that was evaluated.

    Lines cut short by a crash are left out. Where a resumed run did steps again, the later line
    counts. A missing file has no lines.
    """
    found: dict[str, dict[float, dict[str, Any]]] = {"train": {}}
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and math.isfinite(_number(line, "step")):
            evaluated = line.get("kind") == "eval"
            name = f"eval {line.get('split', '')}".strip() if evaluated else "train"
            found.setdefault(name, {})[line["step"]] = line
    return {name: [steps[s] for s in sorted(steps)] for name, steps in found.items()}


def loss_plot(metrics_path: Path, out: Path) -> Path:
    """Draw the losses, the learning rate and, where it was measured, AP over the steps.

    Args:
        metrics_path: a run's `metrics.jsonl`.
        out: the picture, PNG or JPEG.
    """
    metrics = read_metrics(Path(metrics_path))
    train = metrics.pop("train")
    heights = [3, 2, 1] if metrics else [3, 1]
    figure = Figure(figsize=(8, 1.5 * sum(heights) ** 0.85), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    axes: list[Axes] = grid[:, 0].tolist()
    for key, colour in _LOSSES.items():
        x, y = _curve(train, key)
        axes[0].plot(x, np.where(y > 0, y, np.nan), color=colour, alpha=0.25, linewidth=1)
        mean = _smooth(y)
        axes[0].plot(x, np.where(mean > 0, mean, np.nan), color=colour, label=key, linewidth=2)
        if (y > 0).any():
            axes[0].set_yscale("log")
    axes[0].set_ylabel("training loss (log scale)")
    axes[-1].plot(*_curve(train, "learning_rate"), color="#555555", linewidth=1.5)
    axes[-1].set_ylabel("learning rate")
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes[-1].set_ylim(bottom=0)
    styles = ["-", "--", ":", "-."]
    for (split, lines), style in zip(metrics.items(), styles, strict=False):
        for key, colour in _APS.items():
            name = f"{key}, {split.removeprefix('eval ')}".replace("$", r"\$")
            x, y = _curve(lines, key)
            axes[1].plot(x, y, style, color=colour, marker="o", markersize=4, label=name)
        axes[1].set(ylabel="average precision", ylim=(0, 1))
