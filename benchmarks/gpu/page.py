"""Tables of the results: at the end of a run as text, and in docs/gpu.md.

    python -m benchmarks.gpu.page --results benchmarks/results/gpu --data path/to/coco

AP is computed here where the machine with the GPU had no pycocotools.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, table
from benchmarks.gpu.results import Report
from benchmarks.pages import markdown, write_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
EMPTY = "Not measured yet."
SHOWN_FAILURES, SHOWN_CHARACTERS = 4, 200

Rows = list[tuple[str, ...]]
Measured = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Compute AP where it is missing, and fill in the page."""
    options = _parser().parse_args(arguments)
    parts = {}
    for path in sorted(options.results.glob("*.json")):
        report = Report.read(path)
        if score(report.content, options.data):
            report.write()
        parts[report.content["part"]] = report.content
    write_tables(options.page, {part: text(content) for part, content in parts.items()})
    print(f"{options.page}: {', '.join(parts) or 'no results'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu", help="the folder of --out")
    parser.add_argument("--data", type=Path, help="what the parts were run with, for AP")
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser


def summary(content: Mapping[str, Any]) -> str:
    """A part in a few lines: its state, its tables, its failures."""
    failed, left_out = content["failed"], content["left_out"]
    counts = f"{len(content['measured'])} measured, {len(failed)} failed, {len(left_out)} left out"
    lines = [f"== {content['part']}: {content['state']}, {content.get('seconds')} s, {counts}"]
    for title, rows in tables(content).items():
        lines += [title, table(rows)]
    shown = list(failed.items())[:SHOWN_FAILURES]
    lines += [f"FAILED {name}: {e['error'][:SHOWN_CHARACTERS]}" for name, e in shown]
    lines += [f"left out, {why}: {n}" for why, n in Counter(left_out.values()).most_common(4)]
    return "\n".join(lines) + "\n"


def text(content: Mapping[str, Any]) -> str:
    """A part in Markdown."""
    gpu, versions = content["gpu"], content.get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "focal")
    state = "" if content["state"] == "done" else f" It ended with the state: {content['state']}."
    lines = [f"{gpu['name']}, {content['date'][:16]}; {named}.{state}"]
    lines += [f"**{title}**\n\n{markdown(rows)}" for title, rows in tables(content).items()]
    for name, failure in content["failed"].items():
        error = " ".join(failure["error"][:SHOWN_CHARACTERS].replace("`", "'").split())
        lines.append(f"Failed: {name}: `{error}`")
    by_reason: dict[str, list[str]] = {}
    for name, why in content["left_out"].items():
        by_reason.setdefault(why, []).append(name)
    lines += [f"Left out ({why}): {', '.join(names)}." for why, names in by_reason.items()]
    return "\n\n".join(lines)


def tables(content: Mapping[str, Any]) -> dict[str, Rows]:
    """The tables of a part by their titles; those without a row are left out."""
    makers = {
        "tests": tests,
        "losses": losses,
        "train-torch": training,
        "train-jax": training,
        "agree": agree,
        "paper": paper,
        "tensorflow": on_tensorflow,
    }
    made = makers[content["part"]](content["measured"]) if content["part"] in makers else ()
    return {title: rows for title, rows in made if len(rows) > 1}


def tests(measured: Measured) -> Iterator[tuple[str, Rows]]:
    ran = measured.get("pytest tests/gpu", {"outcomes": {}})["outcomes"]
    yield "Tests", _row(ran) if ran else []
    rows: Rows = [("worst ULP, loss and gradient", "logits", "bound", "loss", "gradient")]
    for name, found in measured.items():
        for gamma, one in found.items() if name.startswith("every") else [("", found)]:
            if "bound_ulp" in one:
                errors = (f"{one[kind]['ulp']:.2f}" for kind in ("loss", "gradient"))
                label = f"{name}, {gamma}".removesuffix(", ")
                rows.append((label, f"{one['logits']:,}", f"{one['bound_ulp']:g}", *errors))
    yield "Kernels against the core in float64", rows


def losses(measured: Measured) -> Iterator[tuple[str, Rows]]:
    head = ("ms", "forward", "backward", "both", "share of copy", "extra memory in logits")
    for dtype in ("float32", "bfloat16"):
        for kind in ("dense", "sparse"):
            phases = {
                phase: measured.get(f"{dtype}, {kind}, {phase}", {}).get("sides", {})
                for phase in ("forward", "backward", "both")
            }
            yield f"PyTorch, {dtype}, {kind}", [head, *_phases(phases)]
            yield f"JAX, {dtype}, {kind}", [
                head, *_phases(measured.get(f"JAX, {dtype}, {kind}", {}))
            ]  # fmt: skip
    rows = [("measured with", "GB/s")]
    for name, found in measured.items():
        if name.endswith("both") or name.startswith("JAX"):
            rows.append((name, f"{found['copy_gb_per_s']:,.0f}"))
    yield "Copy", rows
    found = measured.get("NaN gradients", {})
    sides = {side: counts for side, counts in found.items() if isinstance(counts, dict)}
    gammas = next(iter(sides.values()), {})
    rows = [("gradients that are not finite", *gammas)]
    rows += [(side, *map(str, counts.values())) for side, counts in sides.items()]
    yield f"NaN gradients among {found.get('logits')} logits from -120 to 120", rows


def _phases(phases: Mapping[str, Any]) -> Rows:
    """A row for each side."""
    found = [phases.get(name, {}) for name in ("forward", "backward", "both")]
    rows = []
    for side in dict.fromkeys(side for phase in found for side in phase):
        *_, both = ones = [phase.get(side, {}) for phase in found]
        rest = (both.get("share_of_copy"), both.get("extra_memory_in_logits"))
        rows.append((side, *map(_cell, (*(one.get("median_ms") for one in ones), *rest))))
    return rows


def training(measured: Measured) -> Iterator[tuple[str, Rows]]:
    rows: Rows = [("one step", "ms", "images/s", "peak GiB")]
    for found in measured.values():
        for side, one in found.get("sides", {}).items():
            if isinstance(one, dict):
                values = (one.get(k) for k in ("median_ms", "images_per_second", "peak_memory_gib"))
                rows.append((side, *(_cell(value) for value in values)))
    setting = measured.get("step", {})
    size = "x".join(map(str, setting.get("image_size", ())))
    yield f"Step, batch of {setting.get('batch_size')}, {size}", rows
    if speed := measured.get("speed with the loader"):
        yield (
            "With the loader",
            _row(
                {
                    "images/s": speed["images_per_second"],
                    "loader alone, images/s": speed["loader_alone_images_per_second"],
                    "first step, s": speed["first_step_s"],
                }
            ),
        )
    if one := measured.get("profile"):
        yield (
            "Profile of a step",
            _row(
                {
                    "step, ms": one["step_ms"],
                    "kernels, ms": one["kernel_ms"],
                    "kernels": one["kernels"],
                    "waits": sum(one["waits"].values()),
                }
            ),
        )
    if one := measured.get("training"):
        scores = one.get("AP") if isinstance(one.get("AP"), dict) else {}
        yield (
            f"Run, {one.get('split', 'stopped')}",
            _row(
                {
                    "steps": one["steps"],
                    "seconds": one["seconds"],
                    "images/s": one["images_per_second"],
                    "peak GiB": one["peak_memory_gib"],
                    "AP": scores.get("AP"),
                    "AP50": scores.get("AP50"),
                    "last loss": one["log"][-1][1] if one["log"] else None,
                }
            ),
        )


def _row(cells: Mapping[str, Any]) -> Rows:
    """A table of one row."""
    return [tuple(cells), tuple(map(_cell, cells.values()))]


def agree(measured: Measured) -> Iterator[tuple[str, Rows]]:
    rows: Rows = [("against PyTorch on the CPU", "logits", "deltas", "boxes, px", "matched", "of")]
    for name, one in measured.items():
        if "matched" in one:
            values = (f"{one[key]:.1e}" for key in ("logits", "deltas", "boxes_px"))
            rows.append((name, *values, f"{one['matched']:.1%}", str(one["detections"])))
    yield "One checkpoint", rows


def paper(measured: Measured) -> Iterator[tuple[str, Rows]]:
    cells: dict[str, list[Any]] = {}
    for name, one in measured.items():
        cells.setdefault(name.rpartition(", seed")[0], []).append(one)
    rows: Rows = [("setting", "gamma", "alpha", "seeds", "AP", "AP50", "s")]
    for name, runs in cells.items():
        scores = (_spread([_score(one, key) for one in runs]) for key in ("AP", "AP50"))
        first = runs[0]
        seconds = _cell(sum(one["seconds"] for one in runs) / len(runs))
        values = (_cell(first["gamma"]), _cell(first["alpha"]), str(len(runs)))
        rows.append((name, *values, *scores, seconds))
    anchors = next(iter(measured.values()), {}).get("anchors", 0)
    yield f"Gamma and alpha, {anchors:,} anchors an image, AP in percent", rows


def on_tensorflow(measured: Measured) -> Iterator[tuple[str, Rows]]:
    rows: Rows = [("forward and backward", "ms")]
    for name, found in measured.items():
        if name.startswith("float32"):
            rows += [(f"{name}: {s}", _cell(one["median_ms"])) for s, one in found["sides"].items()]
    yield "TensorFlow, losses", rows
    yield from agree(measured)
    yield from training({name: found for name, found in measured.items() if name == "step"})


def _score(one: Mapping[str, Any], key: str) -> float | None:
    """AP in percent; 0 where the loss diverged, None where it has not been computed."""
    if one["diverged"] is not None:
        return 0.0
    return 100 * one["AP"][key] if isinstance(one["AP"], dict) else None


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = sum(known) / len(known)
    return f"{mean:.1f}" + (f" ({min(known):.1f} to {max(known):.1f})" if len(known) > 1 else "")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def score(content: Mapping[str, Any], data: Path | None) -> bool:
    """Compute AP from the detections where it is missing; whether any was."""
    missing = [
        one
        for one in content["measured"].values()
        if isinstance(one, dict) and "detections" in one and isinstance(one.get("AP"), str)
    ]
    if not missing:
        return False
    # Not at the top: the tables need no framework.
    from benchmarks.gpu.detections import average_precision, unpack

    if content["part"] == "paper":
        from benchmarks.gpu.paper import shapes

        dataset = shapes("test", content["dry"])
    else:
        from benchmarks.gpu.training import dataset as dataset_of

        dataset = dataset_of(data, ("test", "val"), content["dry"])
    for one in missing:
        if one.get("split", dataset.name) != dataset.name:
            raise ValueError(
                f"benchmarks.gpu.page: --data must be the folder that the part was run with, "
                f"{one['split']}; got {dataset.name}"
            )
        one["AP"] = average_precision(unpack(one["detections"]), dataset)
    return True


if __name__ == "__main__":
    main()
