"""The tables and the plot of docs/benchmarks.md, from results/*.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.bench_inference import frameworks_rows, parts_rows, speed_rows
from benchmarks.bench_startup import share_rows
from benchmarks.common import PHASES, RESULTS, sides_of
from benchmarks.pages import markdown, save_plot, write_tables
from focal.retinanet.report.draw import PALETTE

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
PLOT = PAGE.parent / "pictures" / "benchmarks_cpu.png"
FRAMEWORKS = {
    "torch": "PyTorch and the textbook",
    "jax": "JAX and optax",
    "tensorflow": "TensorFlow and Keras",
}
Cases = Mapping[str, Mapping[str, Any]]


def main() -> None:
    """Read what was measured, write page and plot."""
    found = {
        name: _read(f"{name}_cpu") for name in (*FRAMEWORKS, "targets", "inference", "startup")
    }
    tables = {name: losses_table(found[name]["losses"]) for name in FRAMEWORKS}
    tables |= {
        "provenance": provenance(found),
        "small": microseconds_table(found["torch"]["small_calls"]),
        "memory": memory_table(found["torch"]["losses"]["both"]),
        "softmax": times_table(found["torch"]["softmax"]),
        "jax-small": microseconds_table(found["jax"]["small_calls"]),
        "tensorflow-small": microseconds_table(found["tensorflow"]["small_calls"]),
        "targets": times_table(found["targets"]["times"]),
        "inference": markdown(speed_rows(found["inference"])),
        "inference parts": markdown(parts_rows(found["inference"])),
        "inference frameworks": markdown(frameworks_rows(found["inference"])),
        "startup": times_table(found["startup"]["times"]),
        "startup parts": markdown(share_rows(found["startup"]["predict_ms"])),
        "step": step_table(found["torch"]["training_step"]),
    }
    write_tables(PAGE, tables)
    save_plot(PLOT, plot(found))


def provenance(found: Cases) -> str:
    """Where, when and with which versions."""
    machine = found["torch"]["machine"]
    versions = {k: v for name in FRAMEWORKS for k, v in found[name]["versions"].items()}
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "focal")
    dates = sorted(report["date"][:16] for report in found.values())
    copies = ", ".join(f"{found[name]['losses']['copy_gb_per_s']:.0f}" for name in FRAMEWORKS)
    return (
        f"{machine['cores']} cores of an {machine['processor']}, {dates[0]} to {dates[-1]} UTC; "
        f"{named}. A copy on all cores moved {copies} GB/s."
    )


def losses_table(losses: Mapping[str, Any]) -> str:
    """Every case, forward and backward together, then each alone."""
    rows = [("case", "focal, ms", "other, ms", "ratio", "all processes", "share of a copy")]
    for phase in PHASES:
        for name, case in losses[phase].items():
            ours, other, *floor = sides_of(case)
            label = name if phase == "both" else f"{name}; {phase}"
            share = f"{ours['share_of_copy']:.0%}" if phase == "both" else ""
            ratio = f"{case['ratio_of_medians']:.2f}"
            spread = f"{case['ratios'][0]:.2f} to {case['ratios'][-1]:.2f}"
            rows.append((label, _cell(ours), _cell(other), ratio, spread, share))
            for side in floor:
                rows.append(("... exponential and logarithm alone", _cell(side), *[""] * 4))
    return markdown(rows)


def times_table(cases: Cases) -> str:
    """Both sides and their ratio."""
    rows = [("case", "focal, ms", "other, ms", "ratio")]
    for name, case in cases.items():
        ours, other = sides_of(case)
        rows.append((name, _cell(ours), _cell(other), f"{case['ratio_of_medians']:.2f}"))
    return markdown(rows)


def microseconds_table(cases: Cases) -> str:
    """Both sides of small calls and their ratio."""
    rows = [("case", "focal, μs", "other, μs", "ratio")]
    for name, case in cases.items():
        cells = (
            f"{side['median_ms'] * 1e3:,.0f} ({side['min_ms'] * 1e3:,.0f})"
            for side in sides_of(case)[:2]
        )
        rows.append((name, *cells, f"{case['ratio_of_medians']:.2f}"))
    return markdown(rows)


def memory_table(cases: Cases) -> str:
    """Peak memory beyond the arguments."""
    rows = [("case", "focal", "textbook")]
    for name, case in cases.items():
        ours, other, *_ = case["peak_memory_in_logits"].values()
        rows.append((name, f"{ours:.2f}", f"{other:.2f}"))
    return markdown(rows)


def step_table(settings: Cases) -> str:
    """The parts of a training step."""
    names = ("forward", "backward", "optimizer", "the rest", "step")
    shown = ("forward", "backward", "optimizer", "the rest", "step")
    rows = [("preset", *shown, "share of the rest")]
    for setting, parts in settings.items():
        share = f"{parts['share_of_the_rest']:.1%}"
        rows.append((setting, *(_cell(parts[name]) for name in names), share))
    return markdown(rows)


def plot(found: Cases) -> Figure:
    """Milliseconds of both sides of every loss, forward and backward."""
    cases = {name: found[name]["losses"]["both"] for name in FRAMEWORKS}
    heights = [len(c) for c in cases.values()]
    figure = Figure(figsize=(8, 1.2 + 0.42 * sum(heights)), layout="constrained", dpi=110)
    panels = figure.subplots(len(cases), 1, sharex=True, height_ratios=heights)
    for axes, (framework, losses) in zip(panels, cases.items(), strict=True):
        places = range(len(losses))
        for offset, color, label, index in (
            (0.2, PALETTE[0], "focal", 0),
            (-0.2, "#bbbbbb", "other", 1),
        ):
            widths = [sides_of(case)[index]["median_ms"] for case in losses.values()]
            rows = [-place + offset for place in places]
            axes.barh(rows, widths, 0.38, color=color, label=label)
        for place, case in enumerate(losses.values()):
            end = max(side["median_ms"] for side in sides_of(case)[:2])
            axes.text(end, -place, f"  {case['ratio_of_medians']:.1f}x", va="center", fontsize=9)
        axes.set_yticks([-place for place in places], list(losses), fontsize=9)
        axes.set_title(FRAMEWORKS[framework], loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.1)
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    panels[-1].set_xlabel("median ms, forward and backward of 40,000 x 80 logits in float32")
    return figure


def _cell(side: Mapping[str, Any]) -> str:
    return f"{side['median_ms']:.1f} ({side['min_ms']:.1f})"


def _read(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    main()
