"""Draws the boxes of a dataset and the anchors of a detector in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.data.coverage import anchor_shapes
from focal.retinanet.data.images import printable
from focal.retinanet.report.check import Boxes
from focal.retinanet.report.check_report import BUCKETS
from focal.retinanet.report.draw import PALETTE, save_figure

__all__ = ["check_picture"]

_INK, _ANCHOR = "#333333", "#111111"
_COLORS = tuple(color for color in PALETTE if color != "#ffffff")
_ROWS = 10  # largest number of classes in the panel of shares
_POINTS = 20_000  # largest number of points of the scatter plot, a random sample


def check_picture(
    boxes: Boxes, record: Mapping[str, Any], config: RetinaNetConfig, out: Path
) -> Path:
    """Draw sizes, shapes, best IoU and the share of boxes that have an anchor.

    Args:
        boxes: of `read_boxes`.
        record: of `check_record`.
        config: the detector whose anchors are drawn.
        out: the picture, PNG or JPEG.
    """
    classes, total = record["classes"], len(boxes.label)
    groups = [
        (_label(name), color, boxes.label == label)
        for label, (name, color) in enumerate(zip(classes, _COLORS, strict=False))
    ]
    if len(classes) > len(_COLORS):  # too many to tell them apart
        groups = [(f"{len(classes)} classes", _COLORS[0], np.ones(total, bool))]
    figure = Figure(figsize=(11, 8.6), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2)
    _shapes(axes[0, 0], boxes, groups, config)
    _sides(axes[0, 1], boxes, groups, config)
    _ious(axes[1, 0], boxes, groups, config)
    _shares(axes[1, 1], record)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
    height, width = config.image_size
    figure.suptitle(
        f"{_label(Path(record['data']).resolve().name)}: {total:,} boxes "
        f"on a canvas of {height} x {width}, "
        f"{sum(len(cell) for cell in anchor_shapes(config))} anchor shapes",
        fontsize=13,
    )
    return save_figure(out, figure)


Groups = list[tuple[str, str, np.ndarray]]


def _shapes(axis: Axes, boxes: Boxes, groups: Groups, config: RetinaNetConfig) -> None:
    """Width against height, with the shapes of the anchors."""
    sizes = boxes.size * boxes.scale[:, None]
    shown = np.random.default_rng(0).permutation(len(sizes))[:_POINTS]
    for name, color, own in groups:
        width, height = sizes[shown[own[shown]]].T
        axis.scatter(width, height, s=9, color=color, alpha=0.35, linewidths=0, label=name)
    width, height = np.concatenate(anchor_shapes(config)).T
    squares: dict[str, Any] = {"marker": "s", "facecolors": "none", "edgecolors": _ANCHOR}
    axis.scatter(width, height, s=26, label="anchors", **squares)
    axis.set(title="shapes: boxes and anchors", xlabel="width (canvas pixels)")
    axis.set(ylabel="height (canvas pixels)", xscale="log", yscale="log")
    _plain(axis, "xy")
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    legend = axis.legend(frameon=False, loc="upper left", handletextpad=0.2)
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)


def _sides(axis: Axes, boxes: Boxes, groups: Groups, config: RetinaNetConfig) -> None:
    """Histogram of the box sizes, with the anchor sizes as lines."""
    side = np.sqrt(np.prod(boxes.size, axis=1)) * boxes.scale
    sizes = np.array([size * k for size in config.anchors.sizes for k in config.anchors.scales])
    every = np.concatenate([side, sizes])
    _hist(axis, side, np.geomspace(every.min() * 0.9, every.max() * 1.1, 48), groups)
    dashed: dict[str, Any] = {"color": _ANCHOR, "linewidth": 0.8, "linestyle": (0, (4, 3))}
    for size in sizes:
        axis.axvline(size, zorder=0, **dashed)
    axis.plot([], [], label="anchor sizes", **dashed)
    axis.set(title="sizes", xlabel="square root of width x height (canvas pixels)", xscale="log")
    _plain(axis, "x")
    axis.legend(frameon=True, framealpha=1, edgecolor="none", loc="upper right")


def _ious(axis: Axes, boxes: Boxes, groups: Groups, config: RetinaNetConfig) -> None:
    """Histogram of the IoU of each box with its best anchor, with the matching thresholds."""
    _hist(axis, boxes.iou, np.linspace(0, 1, 51), groups)
    low = float(np.mean(boxes.iou < config.foreground)) if len(boxes.iou) else 0.0
    top: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "va": "top"}
    for name in ("background", "foreground"):
        value = getattr(config, name)
        axis.axvline(value, color=_INK, linewidth=0.8)
        axis.text(value - 0.005, 0.97, name, rotation=90, ha="right", fontsize=9, **top)
    text = f"{low:.1%} of all boxes\nhave no anchor\nabove {config.foreground:g}"
    axis.text(0.02, 0.97, text, **top)
    axis.set(title="IoU with the best anchor", xlabel="IoU", xlim=(0, 1))


def _shares(axis: Axes, record: Mapping[str, Any]) -> None:
    """The share of boxes that have an anchor, by class and size, as a heat map."""
    found = [(name, part) for name, part in record["boxes by class"].items() if part["count"]]
    if len(found) > _ROWS:  # the worst ones
        found.sort(key=lambda item: item[1]["reached"]["all"]["share"])
    rows = [(_label(name), part["reached"]) for name, part in found[:_ROWS]]
    rows.append(("all classes", record["boxes"]["reached"]))
    of = "\nof" if len(rows) < 7 else " of"
    shares = [[cells[b]["share"] for b in BUCKETS] for _, cells in rows]
    table = np.array([[np.nan if s is None else s for s in row] for row in shares], float)
    axis.imshow(1 - table, cmap="Oranges", vmin=0, vmax=1.4, aspect="auto")  # white: 100 %
    for y, (_, cells) in enumerate(rows):
        for x, bucket in enumerate(BUCKETS):
            cell = cells[bucket]
            text = "none" if cell["share"] is None else f"{cell['share']:.1%}{of} {cell['count']:,}"
            axis.text(x, y, text, ha="center", va="center", color=_INK, fontsize=9)
    axis.set_xticks(range(len(BUCKETS)), [*BUCKETS])
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.tick_params(length=0)
    title = f"share of boxes with an anchor of IoU {record['foreground']:g} or more"
    if len(found) > _ROWS:
        title += f"\n(the {_ROWS} lowest of {len(found)} classes)"
    axis.set_title(title)
    axis.set_xlabel("small: below 32², medium: to 96², large: above (image pixels)")


def _hist(axis: Axes, values: np.ndarray, edges: np.ndarray, groups: Groups) -> None:
    """A histogram per class, normalized by the number of its boxes."""
    for name, color, own in groups:
        share, _ = np.histogram(values[own], edges)
        share = share / max(1, own.sum())
        axis.stairs(share, edges, fill=True, color=color, alpha=0.35)
        axis.stairs(share, edges, color=color, linewidth=1.5, label=name)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set(ylabel="share of the class's boxes", ylim=(0, None))


def _plain(axis: Axes, which: str) -> None:
    """Numbers such as 20 and 50 on a logarithmic axis."""
    for own in which:
        ticks: XAxis | YAxis = axis.xaxis if own == "x" else axis.yaxis
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_formatter(NullFormatter())


def _label(name: str) -> str:
    """A name in glyphs of the font; $ would start math mode, and a leading _ would hide it."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    known = FT2Font(str(path)).get_charmap()
    text = "".join(c if ord(c) in known else "?" for c in printable(name, 24))
    return text.replace("$", r"\$").lstrip("_") or "?"
