"""The tables and pictures of docs/when_focal.md, from docs/results/regimes.json.

python -m benchmarks.regimes_page
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import blank
from benchmarks.pages import markdown, save_plot, write_tables
from focal.retinanet.report.draw import PALETTE

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results" / "regimes.json"
PAGE = DOCS / "when_focal.md"
PICTURES = DOCS / "pictures"

LOSSES = "CE", "CE guided", "FL .5", "FL 2"
COLORED = dict(zip(LOSSES, (PALETTE[6], PALETTE[1], PALETTE[5], PALETTE[0]), strict=True))
FOCAL = LOSSES[2:]
# The regimes of each table, and what they are called there.
GROUPS: Mapping[str, Mapping[str, str]] = {
    "imbalance": {
        "one class": "1 class, 6 objects",
        "base": "3 classes, 2 objects",
        "sparse": "3 classes, 1 object on a larger image",
        "24 classes": "24 classes by color, 2 objects",
        "unused classes": "3 classes and 77 without objects",
        "sparse, unused classes": "3 classes and 125 without objects, 1 object on a larger image",
    },
}
LOOKED_AT = "base", "unused classes"


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables by name, in Markdown."""
    regimes = results["regimes"]
    head = ("regime", "logits per positive", *LOSSES, "best focal loss less CE")
    found = {}
    for group, rows in GROUPS.items():
        own = [(label, regimes[name]["losses"]) for name, label in rows.items() if name in regimes]
        found[group] = markdown([head, *(_row(label, losses) for label, losses in own)])
    chosen = [("regime", *LOSSES)]
    for name, regime in regimes.items():
        settings = (_chosen(regime["losses"].get(loss)) for loss in LOSSES)
        chosen.append((name, *settings))
    return {**found, "chosen": markdown(chosen)}


def _row(label: str, losses: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = np.median([cell["logits per positive"] for cell in losses.values()])
    best = max((loss for loss in FOCAL if loss in losses), key=lambda name: _mean(losses[name]))
    gain = 100 * (np.array(losses[best]["AP"]) - losses["CE"]["AP"])
    shown = f"{gain.mean():+.1f} ({gain.min():+.1f} to {gain.max():+.1f})"
    if min(losses[best]["AP"]) > max(losses["CE"]["AP"]):
        shown = f"**{shown}**"
    values = (_shown(losses.get(loss)) for loss in LOSSES)
    return (label, f"{float(f'{ratio:.2g}'):,.0f}", *values, shown)


def _shown(cell: Mapping[str, Any] | None) -> str:
    """Mean, least and greatest of the seeds, in percent."""
    if cell is None:
        return ""
    values = 100 * np.array(cell["AP"])
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"


def _chosen(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['alpha'][0]:g}, {cell['rate'][0]:g}"


def _mean(cell: Mapping[str, Any]) -> float:
    return float(np.mean(cell["AP"]))


def gain_picture(results: Mapping[str, Any], out: Path) -> None:
    """AP over that of cross entropy, against the imbalance: every seed a point, the mean a line."""
    plot, (axis,) = blank()
    measured = results["regimes"]
    regimes = [measured[n]["losses"] for n in GROUPS["imbalance"] if n in measured]
    for loss, color in list(COLORED.items())[1:]:
        rows = [r for r in regimes if loss in r]
        ratios = [r["CE"]["logits per positive"] for r in rows]
        gains = [100 * (np.array(r[loss]["AP"]) - r["CE"]["AP"]) for r in rows]
        for ratio, values in zip(ratios, gains, strict=True):
            axis.plot([ratio] * len(values), values, ".", color=color, alpha=0.5)
        axis.plot(ratios, [values.mean() for values in gains], color=color, label=loss)
    axis.axhline(0, color="#1f2328", linewidth=0.8)
    axis.set(xscale="log", xlabel="logits per positive", ylabel="AP less that of CE, percent")
    axis.legend(frameon=False)
    save_plot(out, plot)


def film_picture(results: Mapping[str, Any], out: Path) -> None:
    """The share of the gradient that easy negatives have, over training."""
    plot, axes = blank(2)
    for axis, name in zip(axes, LOOKED_AT, strict=True):
        for loss, color in COLORED.items():
            film = results["regimes"][name]["losses"][loss]["film"]
            steps = [frame["step"] + 1 for frame in film]
            shares = [100 * frame["gradient"]["easy negatives"] for frame in film]
            axis.plot(steps, shares, color=color, label=loss)
        axis.set(xscale="log", xlabel="step", ylim=(0, 100))
        axis.set_title(GROUPS["imbalance"][name], fontsize=10)
    axes[0].set_ylabel("gradient from easy negatives, percent")
    axes[0].legend(frameon=False)
    save_plot(out, plot)


def calibration_picture(results: Mapping[str, Any], out: Path) -> None:
    """The share of positives among the anchors and classes of about one score."""
    plot, axes = blank(2)
    for axis, name in zip(axes, LOOKED_AT, strict=True):
        for loss, color in COLORED.items():
            seeds = results["regimes"][name]["losses"][loss]["calibration"]
            count, score, hits = _pooled(seeds)
            there = count >= 20
            axis.plot(score[there], hits[there], "o-", color=color, label=loss, markersize=3)
        axis.plot([0, 1], [0, 1], color="#1f2328", linewidth=0.8, linestyle="--")
        axis.set(xlabel="score", xlim=(0, 1), ylim=(0, 1))
        axis.set_title(GROUPS["imbalance"][name], fontsize=10)
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
    plot, axes = blank(2)
    for axis, name in zip(axes, LOOKED_AT, strict=True):
        for loss, color in ((loss, COLORED[loss]) for loss in ("CE", "FL 2")):
            film = [f for f in results["regimes"][name]["losses"][loss]["film"]]
            steps = [frame["step"] + 1 for frame in film if frame["positive logits"]]
            positives = np.array([f["positive logits"] for f in film if f["positive logits"]])
            negatives = [frame["negative logits"][2] for frame in film]
            axis.plot(steps, positives[:, 2], color=color, label=f"{loss}, positives, median")
            axis.fill_between(steps, positives[:, 1], positives[:, 3], color=color, alpha=0.15)
            label = f"{loss}, negatives, 99.9 %"
            every = [frame["step"] + 1 for frame in film]
            axis.plot(every, negatives, color=color, linestyle="--", label=label)
        axis.set(xscale="log", xlabel="step")
        axis.set_title(GROUPS["imbalance"][name], fontsize=10)
    axes[0].set_ylabel("logit")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    save_plot(out, plot)


PLOTS = {
    "regimes_gain.png": gain_picture,
    "regimes_film.png": film_picture,
    "regimes_margins.png": margins_picture,
    "regimes_calibration.png": calibration_picture,
}


def main() -> None:
    """Write tables and pictures."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_tables(PAGE, tables(results))
    for name, draw in PLOTS.items():
        draw(results, PICTURES / name)


if __name__ == "__main__":
    main()
