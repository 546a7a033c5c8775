"""The tables and the picture of docs/reproduction.md, from docs/results/ablations.json.

python -m benchmarks.ablations_page
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import blank
from benchmarks.pages import markdown, save_plot, write_tables
from focal.retinanet.report.draw import PALETTE

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results" / "ablations.json"
PAGE = DOCS / "reproduction.md"
PICTURE = DOCS / "pictures" / "ablations.png"

# What the paper has in its tables (AP on COCO, in percent), and the cell that answers to it.
ALPHA = (
    (".10", 0.0, "CE .1"),
    (".25", 10.8, "CE .25"),
    (".50", 30.2, "CE .5"),
    (".75", 31.1, "CE .75"),
    (".90", 30.8, "CE .9"),
    (".99", 28.7, "CE .99"),
    (".999", 25.1, "CE .999"),
)
GAMMA = (
    ("0", ".75", 31.1, ("CE .25", "CE .5", "CE .75")),
    ("0.5", ".50", 32.9, (None, "FL .5 .5", "FL .5 .75")),
    ("1", ".25", 33.7, ("FL 1 .25", "FL 1 .5", "FL 1 .75")),
    ("2", ".25", 34.0, ("FL 2 .25", "FL 2 .5", "FL 2 .75")),
    ("5", ".25", 32.2, ("FL 5 .25", "FL 5 .5", "FL 5 .75")),
)
SCALES = (
    ("1 x 1", 30.3, "1 x 1 anchors"),
    ("3 x 1", 31.8, "3 x 1 anchors"),
    ("1 x 3", 32.4, "1 x 3 anchors"),
    ("2 x 3", 34.2, "2 x 3 anchors"),
    ("3 x 3", 34.0, "FL 2 .25"),
)
OHEM = (
    ("OHEM, 128 examples, NMS .7", 31.1, "OHEM 128 .7"),
    ("OHEM, 128 examples, NMS .5", 32.8, "OHEM 128 .5"),
    ("OHEM, 32 examples, NMS .5", None, "OHEM 32 .5"),
    ("OHEM 1:3, 128 examples, NMS .5", 31.1, "OHEM 1:3 128 .5"),
)
STAR = (
    ("CE", 31.1, "CE .75"),
    ("FL, gamma 2", 34.0, "FL 2 .25"),
    ("FL*, gamma 2, beta 1", 33.8, "FL* 2 1"),
    ("FL*, gamma 4, beta 0", 33.9, "FL* 4 0"),
)
PRIOR = (
    ("shapes", "CE, alpha .5", "CE .5", "CE .5, no prior"),
    (
        "shapes",
        "CE, alpha .5, no group norm",
        "CE .5, no norm",
        "CE .5, no norm, no prior",
    ),
    ("shapes", "FL, gamma 2", "FL 2 .25", "FL 2 .25, no prior"),
    ("bccd", "CE, alpha .5, no group norm", "CE .5", "CE .5, no prior"),
    ("bccd", "FL, gamma 2, no group norm", "FL 2 .25", None),
)

LONGER = (
    ("CE, alpha .5", "CE .5"),
    ("FL, gamma 1, alpha .25", "FL 1 .25"),
    ("FL, gamma 2, alpha .25", "FL 2 .25"),
    ("OHEM, 128 examples, NMS .5", "OHEM 128 .5"),
)

Cells = Mapping[str, Mapping[str, Any]]


def shown(cells: Cells, name: str | None, metric: str = "AP") -> str:
    """Mean, and the least and greatest of the seeds, in percent; where it diverged, in words."""
    if name is None or name not in cells:
        return ""
    values = 100 * np.array(cells[name][metric])
    steps = [step for step in cells[name]["diverged"] if step is not None]
    if steps:
        where = f"step {steps[0]}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}"
        if len(steps) == len(values):
            return f"diverged at {where}"
        return f"{len(steps)} of {len(values)} diverged at {where}; at most {values.max():.1f}"
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables by name, in Markdown."""
    shapes = results["shapes"]["cells"]
    paper = "paper, COCO"
    found = {
        "alpha": [("alpha", paper, "AP", "AP50")],
        "gamma": [("gamma", "paper, COCO (alpha)", "alpha .25", "alpha .50", "alpha .75")],
        "ohem": [("loss", paper, "AP", "AP50")],
        "star": [("loss", paper, "AP", "AP50")],
        "scales": [("scales x ratios", paper, "AP", "AP50", "positives per image")],
        "longer": [("loss", "500 steps", "2,000 steps")],
        "prior": [("set", "loss", "AP with prior", "AP without", "initial loss with", "without")],
    }
    for alpha, published, name in ALPHA:
        row = (alpha, f"{published:.1f}", shown(shapes, name), shown(shapes, name, "AP50"))
        found["alpha"].append(row)
    for gamma, alpha, published, names in GAMMA:
        found["gamma"].append(
            (gamma, f"{published:.1f} ({alpha})", *(shown(shapes, name) for name in names))
        )
    best = max((n for *_, names in GAMMA[1:] for n in names if n in shapes), key=_mean(shapes))
    gamma, alpha = (f"0{part}" if part[0] == "." else part for part in best.split()[1:])
    fl = (f"FL, gamma {gamma}, alpha {alpha} (best of ours)", 36.0, best)
    for name, rows in (("ohem", (*OHEM, fl)), ("star", STAR)):
        for label, published, cell in rows:
            number = "" if published is None else f"{published:.1f}"
            found[name].append((label, number, shown(shapes, cell), shown(shapes, cell, "AP50")))
    for label, published, cell in SCALES:
        positives = f"{np.mean(shapes[cell]['positives']):.1f}" if cell in shapes else ""
        row = (label, f"{published:.1f}", shown(shapes, cell), shown(shapes, cell, "AP50"))
        found["scales"].append((*row, positives))
    for label, name in LONGER:
        row = (label, shown(shapes, name), shown(shapes, f"{name}, longer"))
        found["longer"].append(row)
    for data, label, with_prior, without in PRIOR:
        cells = results.get(data, {"cells": {}})["cells"]
        losses = (
            f"{np.mean(cells[n]['first_loss']):.1f}" if n in cells else ""
            for n in (with_prior, without)
        )
        row = (data, label, shown(cells, with_prior), shown(cells, without), *losses)
        found["prior"].append(row)
    return {name: markdown(rows) for name, rows in found.items()}


def picture(results: Mapping[str, Any], out: Path) -> None:
    """AP over alpha for cross entropy, and over gamma: ours in points, the paper's as a line."""
    cells = results["shapes"]["cells"]
    plot, axes = blank(2)
    rows = [(i, label, p, name) for i, (label, p, name) in enumerate(ALPHA)]
    _series(axes[0], cells, rows, "alpha, cross entropy")
    rows = []
    for i, (label, _, published, names) in enumerate(GAMMA):
        known = [n for n in names if n in cells]
        rows.append((i, label, published, max(known, key=_mean(cells))))
    _series(axes[1], cells, rows, "gamma, the best alpha of each")
    axes[0].set_ylabel("AP on shapes, percent")
    save_plot(out, plot)


def _series(
    axis: Any, cells: Cells, rows: Sequence[tuple[int, str, float, str]], name: str
) -> None:
    """Every seed as a point, the means as a line, and the paper's AP on an axis of its own."""
    for i, _, _, cell in rows:
        values = 100 * np.array(cells[cell]["AP"])
        axis.plot([i] * len(values), values, "o", color=PALETTE[0], alpha=0.5)
    means = [100 * np.mean(cells[cell]["AP"]) for *_, cell in rows]
    axis.plot([i for i, *_ in rows], means, color=PALETTE[0], label="ours, shapes")
    axis.set(xticks=[i for i, *_ in rows], xticklabels=[label for _, label, *_ in rows])
    axis.set(xlabel=name, ylim=(0, 25))
    right = axis.twinx()
    published = [p for _, _, p, _ in rows]
    axis.plot([], [], color=PALETTE[6], linestyle="--", label="the paper, COCO (right)")
    right.plot([i for i, *_ in rows], published, color=PALETTE[6], linestyle="--")
    right.set_ylim(0, 40)
    right.spines["top"].set_visible(False)
    axis.legend(frameon=False, loc="lower center")


def _mean(cells: Cells) -> Any:
    return lambda name: np.mean(cells[name]["AP"])


def main() -> None:
    """Write tables and picture."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_tables(PAGE, tables(results))
    picture(results, PICTURE)


if __name__ == "__main__":
    main()
