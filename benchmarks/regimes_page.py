"""The tables and pictures of docs/when_focal.md, from docs/results/regimes.json.

python -m benchmarks.regimes_page
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from benchmarks.figures import blank
from benchmarks.pages import markdown, save_plot, write_tables
from benchmarks.regimes import read
from focal.retinanet.report.draw import PALETTE

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results" / "regimes.json"
PAGE = DOCS / "when_focal.md"
PICTURES = DOCS / "pictures"

COLORS = {
    "CE": PALETTE[6],
    "CE prior": PALETTE[3],
    "CE guided": PALETTE[1],
    "FL .5": PALETTE[5],
    "FL .5 prior": PALETTE[2],
    "FL 2": PALETTE[0],
}
PAIRS = ("FL .5", "CE"), ("FL .5", "CE prior"), ("FL 2", "CE")
"""The losses that are compared seed by seed."""
SHOWN = "CE", "FL .5", "FL 2"
"""The losses that every group has; their gradient, margins and scores are shown, too."""
LABELS: Mapping[str, str] = {
    "base": "3 classes, 2 objects",
    "sparse": "3 classes, 1 smaller object on a larger image",
    "24 classes": "24 classes, 2 objects",
    "unused classes": "3 classes and 77 without objects",
    "base, short": "3 classes, 2 objects, 200 steps",
    "base, long": "3 classes, 2 objects, 1,800 steps",
    "unused classes, long": "3 classes and 77 without objects, 1,800 steps",
    "base, SGD": "3 classes, 2 objects, SGD",
    "one class, few": "1 class, 2 objects",
    "distractors": "1 class, 2 objects and 4 distractors",
    "labels missing": "3 classes, 2 objects, 30 % of labels missing",
    "labels wrong": "3 classes, 2 objects, 30 % of labels wrong",
}
"""What the regimes are called on the page."""
LENGTHS = ["base, short", "base", "base, long", "unused classes", "unused classes, long"]
GROUPS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "imbalance": (("base", "sparse", "24 classes", "unused classes"), tuple(COLORS)),
    "training": ((*LENGTHS, "base, SGD"), SHOWN),
    "data": (("one class, few", "distractors", "base", "labels missing", "labels wrong"), SHOWN),
}
"""The regimes and losses of each table."""
LOOKED_AT = "base", "unused classes", "distractors"


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables by name, in Markdown."""
    found = {}
    for group, (names, compared) in GROUPS.items():
        own = {name: results[name] for name in names}
        shown = {loss: partial(_shown, loss) for loss in compared}
        found[group] = _table(own, {"logits per positive": _ratio, **shown})
        gains = ((a, b) for a, b in PAIRS if {a, b} <= set(compared))
        columns = {f"{a} less {b}": partial(_gain, a, b) for a, b in gains}
        found[f"{group} gain"] = _table(own, columns)
    own = {name: results[name] for name in LABELS}
    found["chosen"] = _table(own, {loss: partial(_chosen, loss) for loss in COLORS})
    return found


def _table(
    results: Mapping[str, Any], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]
) -> str:
    """A row for each regime; a column is made of the results of all losses."""
    rows = [
        (LABELS[name], *(cell(losses) for cell in columns.values()))
        for name, losses in results.items()
    ]
    return markdown([("regime", *columns), *rows])


def _ratio(losses: Mapping[str, Any]) -> str:
    """Logits per positive, to two digits."""
    ratio = np.median([cell["logits per positive"] for cell in losses.values()])
    return f"{float(f'{ratio:.2g}'):,.0f}"


def _gain(one: str, other: str, losses: Mapping[str, Any]) -> str:
    """AP of one loss less that of the other, seed by seed; bold where all seeds are apart."""
    if not {one, other} <= losses.keys():
        return ""
    first, second = (100 * np.array(losses[name]["AP"]) for name in (one, other))
    gain = first - second
    shown = f"{gain.mean():+.1f} ({gain.min():+.1f} to {gain.max():+.1f})"
    apart = first.min() > second.max() or second.min() > first.max()
    return f"**{shown}**" if apart else shown


def _shown(loss: str, losses: Mapping[str, Any]) -> str:
    """Mean, least and greatest of the seeds, in percent."""
    if loss not in losses:
        return ""
    values = 100 * np.array(losses[loss]["AP"])
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"


def _chosen(loss: str, losses: Mapping[str, Any]) -> str:
    """Alpha and learning rate."""
    cell = losses.get(loss)
    return "" if cell is None else f"{cell['alpha'][0]:g}, {cell['rate'][0]:g}"


def ap_picture(group: str, results: Mapping[str, Any], out: Path) -> None:
    """AP of every loss in each regime: every seed a point, the mean a line."""
    plot, (axis,) = blank()
    names, compared = GROUPS[group]
    for k, loss in enumerate(compared):
        color = COLORS[loss]
        axis.plot([], [], color=color, lw=3, label=loss)
        for i, name in enumerate(names):
            if loss not in results[name]:
                continue
            values = 100 * np.array(results[name][loss]["AP"])
            x = i + (k - (len(compared) - 1) / 2) * 0.13
            axis.plot([x] * len(values), values, ".", color=color, alpha=0.5)
            axis.plot([x - 0.05, x + 0.05], [values.mean()] * 2, color=color, lw=3)
    ticks = ["\n".join(wrap(LABELS[name], 72 // len(names))) for name in names]
    axis.set_xticks(range(len(names)), ticks, fontsize=8)
    axis.set(ylabel="AP, percent", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8, ncols=2)
    save_plot(out, plot)


def _shown_colors() -> list[tuple[str, str]]:
    return [(loss, COLORS[loss]) for loss in SHOWN]


def film_picture(results: Mapping[str, Any], out: Path) -> None:
    """The share of the gradient that easy negatives have, over training."""
    plot, axes = blank(len(LOOKED_AT))
    for axis, name in zip(axes, LOOKED_AT, strict=True):
        for loss, color in _shown_colors():
            film = results[name][loss]["film"]
            steps = [frame["step"] + 1 for frame in film]
            shares = [100 * frame["gradient"]["easy negatives"] for frame in film]
            axis.plot(steps, shares, color=color, label=loss)
        axis.set(xscale="log", xlabel="step", ylim=(0, 100))
        axis.set_title("\n".join(wrap(LABELS[name], 26)), fontsize=9)
    axes[0].set_ylabel("gradient from easy negatives, percent")
    axes[0].legend(frameon=False)
    save_plot(out, plot)


def calibration_picture(results: Mapping[str, Any], out: Path) -> None:
    """The share of positives among the anchors and classes of about one score."""
    plot, axes = blank(len(LOOKED_AT))
    for axis, name in zip(axes, LOOKED_AT, strict=True):
        for loss, color in _shown_colors():
            seeds = results[name][loss]["calibration"]
            count, score, hits = _pooled(seeds)
            there = count >= 20
            axis.plot(score[there], hits[there], "o-", color=color, label=loss, markersize=3)
        axis.plot([0, 1], [0, 1], color="#1f2328", linewidth=0.8, linestyle="--")
        axis.set(xlabel="score", xlim=(0, 1), ylim=(0, 1))
        axis.set_title("\n".join(wrap(LABELS[name], 26)), fontsize=9)
    axes[0].set_ylabel("share of positives")
    axes[0].legend(frameon=False)
    save_plot(out, plot)


def _pooled(seeds: list[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bins of all seeds: count, mean score, share of positives."""
    seeds = [seed for seed in seeds if seed is not None]
    counts = np.array([seed["count"] for seed in seeds])
    count = counts.sum(0)
    there = np.maximum(count, 1)
    score, hits = (
        (counts * [seed[key] for seed in seeds]).sum(0) / there for key in ("score", "positive")
    )
    return count, score, hits


def margins_picture(results: Mapping[str, Any], out: Path) -> None:
    """The logits of positives and of the hardest negatives over training."""
    plot, axes = blank(len(LOOKED_AT))
    for axis, name in zip(axes, LOOKED_AT, strict=True):
        for loss, color in _shown_colors():
            film = results[name][loss]["film"]
            steps = [frame["step"] + 1 for frame in film if frame["positive logits"]]
            positives = np.array([f["positive logits"] for f in film if f["positive logits"]])
            negatives = [frame["negative logits"][2] for frame in film]
            axis.plot(steps, positives[:, 2], color=color, label=loss)
            axis.fill_between(steps, *positives[:, [1, 3]].T, color=color, alpha=0.15, lw=0)
            every = [frame["step"] + 1 for frame in film]
            axis.plot(every, negatives, color=color, linestyle="--")
        axis.set(xscale="log", xlabel="step")
        axis.set_title("\n".join(wrap(LABELS[name], 26)), fontsize=9)
    axes[0].set_ylabel("logit")
    axes[0].set_ylim(None, 4)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    save_plot(out, plot)


PLOTS = {
    "regimes_ap.png": partial(ap_picture, "imbalance"),
    "regimes_training.png": partial(ap_picture, "training"),
    "regimes_data.png": partial(ap_picture, "data"),
    "regimes_film.png": film_picture,
    "regimes_margins.png": margins_picture,
    "regimes_calibration.png": calibration_picture,
}


def main() -> None:
    """Write tables and pictures."""
    results = read(RESULTS)
    write_tables(PAGE, tables(results))
    for name, draw in PLOTS.items():
        draw(results, PICTURES / name)


if __name__ == "__main__":
    main()
