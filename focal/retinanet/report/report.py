"""The report of a training run: a picture of detections, and one HTML page with everything."""

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

from focal.files import write_atomically
from focal.retinanet.data.dataset import Example
from focal.retinanet.report.curves import curve
from focal.retinanet.report.draw import draw_boxes, save_image, side_by_side
from focal.retinanet.training.metrics import Lines, number, read_metrics

__all__ = ["detections_picture", "write_report"]

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
.number { text-align: right; font-variant-numeric: tabular-nums; width: 7rem }
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


def detections_picture(
    examples: Iterable[Example],
    predictions: Iterable[Mapping[str, Any]],
    classes: tuple[str, ...],
    out: Path,
    limit: int = 4,
    threshold: float = 0.3,
) -> Path:
    """Draw ground truth and detections side by side, one image per row.

    Args:
        examples: images with their objects.
        predictions: per image, `boxes` (n, 4) in its pixels, `scores` and `labels` (n,).
        classes: name of each class.
        out: the picture, PNG or JPEG.
        limit: the largest number of rows.
        threshold: detections with a lower score are not shown.
    """
    rows, seen = [], set[int]()
    for example, found in islice(zip(examples, predictions, strict=True), limit):
        # Small images are enlarged until names are legible, large ones reduced to fit a page.
        scale = float(np.clip(1, *np.array([512, 640]) / max(example.image.shape[:2])))
        scores, labels = np.asarray(found["scores"]), np.asarray(found["labels"])
        shown = np.flatnonzero(scores >= threshold)
        boxes = np.asarray(found["boxes"]).reshape(-1, 4)[shown]
        truth = draw_boxes(example.image, example.boxes, example.labels, classes, None, scale)
        drawn = draw_boxes(example.image, boxes, labels[shown], classes, scores[shown], scale)
        rows.append((truth, drawn))
        seen.update(example.labels.tolist(), labels[shown].tolist())
    titles = "ground truth", f"detections (score {threshold:g} or more)"
    return save_image(out, side_by_side(rows, titles, [(k, classes[k]) for k in sorted(seen)]))


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's folder: one self-contained file.

    Where `config.json`, `metrics.jsonl`, `loss.png` or `detections.png` is missing, the page says
    so.
    """
    run = Path(run)
    try:
        config = json.loads((run / "config.json").read_bytes())
    except (OSError, ValueError):
        config = {}
    config = config if isinstance(config, dict) else {}
    train, evals = read_metrics(run / "metrics.jsonl")
    title = _text(f"RetinaNet on {config.get('data', 'unknown data')}")
    settings = [
        f"<details><summary>{name}</summary>{_table(_flat(config[key]))}</details>"
        for name, key in [("Detector", "detector"), ("Training", "train"), ("Versions", "versions")]
        if isinstance(config.get(key), dict)
    ]
    parts = [
        f"<h1>{title}</h1>",
        _table(_facts(config, train)),
        "<h2>Accuracy</h2>",
        _accuracy({split: lines[-1] for split, lines in evals.items()}),
        "<h2>Curves</h2>",
        _figure(
            run / "loss.png",
            "Losses (thin: as logged, thick: smoothed), average precision "
            "and learning rate over the training steps.",
        ),
        "<h2>Detections</h2>",
        _figure(run / "detections.png", "Ground truth on the left, detections on the right."),
        "<h2>Configuration</h2>",
        *(settings or ["<p>config.json is missing or damaged.</p>"]),
        "<h2>Command</h2>",
        f"<pre><code>{_text(config.get('command', 'not recorded'))}</code></pre>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{chr(10).join(parts)}"
        "</body></html>\n"
    )
    write_atomically(run / "report.html", page.encode("utf-8", "replace"))
    return run / "report.html"


def _facts(config: dict[str, Any], train: Lines) -> list[tuple[str, Any]]:
    """The summary of a run, as far as it is known."""
    parameters, seconds = number(config, "parameters"), number(config, "seconds")
    speeds = curve(train, "images_per_second")[1]
    facts = {key: config.get(key) for key in ("data", "backend", "device", "precision", "started")}
    if parameters == parameters:
        facts["parameters"] = f"{parameters:,.0f}"
    if train:
        facts["steps"] = f"{train[-1]['step']:,}"
        facts["loss at the last step"] = _show(number(train[-1], "loss"))
    if seconds == seconds:
        facts["time"] = f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if speeds.size:
        facts["speed"] = f"{np.median(speeds):,.1f} images per second"
    return [(key, value) for key, value in facts.items() if value is not None]


def _accuracy(finals: dict[str, dict[str, Any]]) -> str:
    """Tables of the last evaluation of each split: overall and by class."""
    if not finals:
        return "<p>This run has not been evaluated yet.</p>"
    cell = '<td class="number">{}</td>'.format
    head = "".join(f'<th class="number">{_text(split)}</th>' for split in finals)
    overall, classes = [], []
    for key in dict.fromkeys(key for line in finals.values() for key in line):
        values = [number(line, key) for line in finals.values()]
        cells = "".join(cell(_show(value)) for value in values)
        if key in _MEANING:
            overall.append(f"<tr><td>{key} <span class=dim>{_MEANING[key]}</span></td>{cells}</tr>")
        elif key.startswith("AP/"):
            share = 0 if math.isnan(values[0]) else 100 * min(max(values[0], 0), 1)
            bar = f'<td class="bar" style="--share: {share:.1f}%"></td>'
            classes.append(f"<tr><td>{_text(key[3:])}</td>{bar}{cells}</tr>")
    text = f"<table><tr><th>metric</th>{head}</tr>{''.join(overall)}</table>"
    if classes:
        head = f"<tr><th>AP by class</th><th></th>{head}</tr>"
        text += f"<table>{head}{''.join(classes)}</table>"
    return text


def _figure(path: Path, caption: str) -> str:
    if not path.is_file():
        return f"<p>{path.name} is missing.</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = (f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested dicts by dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    """Anything as escaped text."""
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _show(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "\N{EN DASH}"
