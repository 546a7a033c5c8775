"""The curves of a training run, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from focal.retinanet.report.draw import PALETTE, save_figure
from focal.retinanet.training.metrics import Lines, number, read_metrics

__all__ = ["curve", "loss_plot"]

_LOSSES = {"loss": "#555555", "classification": PALETTE[0], "box": PALETTE[6]}
_APS = {"AP": PALETTE[0], "AP50": PALETTE[1]}


def loss_plot(metrics_path: Path, out: Path) -> Path:
    """Draw the losses, the learning rate and, where it was measured, AP over the steps.

    Args:
        metrics_path: a run's `metrics.jsonl`.
        out: the picture, PNG or JPEG.
    """
    train, evals = read_metrics(Path(metrics_path))
    heights = [3, 2, 1] if evals else [3, 1]
    figure = Figure(figsize=(8, 1.5 * sum(heights) ** 0.85), dpi=100, layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    axes: list[Axes] = grid[:, 0].tolist()
    for key, color in _LOSSES.items():
        x, y = curve(train, key)
        axes[0].plot(x, np.where(y > 0, y, np.nan), color=color, alpha=0.25, linewidth=1)
        mean = _smooth(y)
        axes[0].plot(x, np.where(mean > 0, mean, np.nan), color=color, label=key, linewidth=2)
        if (y > 0).any():
            axes[0].set_yscale("log")
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("training loss")
    axes[-1].plot(*curve(train, "learning_rate"), color="#555555")
    axes[-1].set_ylabel("learning rate")
    axes[-1].set_ylim(bottom=0)
    axes[-1].ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    for (split, lines), style in zip(evals.items(), ("-", "--", ":", "-.")):  # noqa: B905
        for key, color in _APS.items():
            # The font lacks some glyphs, and $ would start math mode.
            name = f"{key}, {split}".encode("ascii", "replace").decode().replace("$", "")
            axes[1].plot(*curve(lines, key), style, color=color, marker="o", ms=4, label=name)
        axes[1].set(ylabel="average precision", ylim=(0, 1))
    for axis in axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(ncols=4, frameon=False, loc="lower right" if axis is axes[1] else "best")
    if not train:
        axes[0].text(0.5, 0.5, "no training steps yet", transform=axes[0].transAxes, ha="center")
    return save_figure(out, figure)


def curve(lines: Lines, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a finite number was logged, and the numbers."""
    x, y = np.array([(number(line, "step"), number(line, key)) for line in lines]).reshape(-1, 2).T
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centered moving average; the window is shorter at the ends."""
    if not values.size:
        return values
    window = np.ones(2 * (len(values) // 50) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
