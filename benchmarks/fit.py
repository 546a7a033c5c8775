"""The plain command, `focal train --data FOLDER`, on sets of very different object sizes.

    python -m benchmarks.fit --only plates
    python -m benchmarks.fit --bccd path/to/bccd --results docs/results/fit.json
        writes the results and the table of docs/fitting.md

The sets are those of `benchmarks.fit_sets`, written to a folder where they are not there yet, and
BCCD. For each, one at a time, the command is run with what it chooses by itself, and the weights
are measured on the test split. A set that is in the results with the same command is not run again,
and one that was stopped goes on from its last checkpoint (then "seconds" are those of the rest).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.fit_sets import SETS, write
from benchmarks.pages import markdown, write_tables
from focal.files import write_atomically
from focal.retinanet.training.metrics import read_metrics

QUIET = 0.05
"""Share of the processors that other programs may take on a machine that counts as quiet."""
VERSIONS = (
    "import json, torch, focal; from benchmarks.common import versions; "
    "print(json.dumps(versions()))"
)
PAGE = Path(__file__).parent.parent / "docs" / "fitting.md"
METRICS = ("AP", "AP50", "AP75")


def focal(*arguments: object) -> tuple[float, float]:
    """Run a command of this library; its seconds, and the share of processors others took."""
    before, own, begin = busy(), children(), time.monotonic()
    subprocess.run([sys.executable, "-m", "focal", *map(str, arguments)], check=True)
    seconds = time.monotonic() - begin
    others = busy() - before - (children() - own)
    return seconds, max(0.0, others / seconds / (os.cpu_count() or 1))


def busy() -> float:
    """Seconds that all processors have worked since the start, on Linux."""
    line = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    user, nice, system, _idle, _wait, irq, soft, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def children() -> float:
    """Seconds of processor time of all programs that were run."""
    times = os.times()
    return times.children_user + times.children_system


def measure(data: Path, out: Path, extra: list[str]) -> dict[str, Any]:
    """Train and measure on one set; out is the run folder."""
    arguments = ["train", "--data", str(data), "--out", str(out), *extra]
    load = round(os.getloadavg()[0], 2)
    resumed = bool(list(out.glob("checkpoint-*")))
    seconds, others = focal(*arguments, *(["--resume"] if resumed else []))
    focal("evaluate", out / "weights.safetensors", "--data", data, "--out", out / "test.json")
    record = json.loads((out / "config.json").read_text())
    _, evaluations = read_metrics(out / "metrics.jsonl")
    (lines,) = evaluations.values()
    splits = {"val": lines[-1], "test": json.loads((out / "test.json").read_text())}
    detector, train = record["detector"], record["train"]
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["focal", *arguments]),
        "sentence": record.get("fit"),
        "image_size": detector["image_size"],
        "levels": detector["levels"],
        "sizes": detector["anchors"]["sizes"],
        "ratios": [round(ratio, 3) for ratio in detector["anchors"]["ratios"]],
        "crop": train["crop"],
        "steps": train["steps"],
        "seconds": round(seconds, 1),
        "training_seconds": record["seconds"],
        "resumed": resumed,
        "load_before": load,
        "others": round(others, 3),
        "quiet": others < QUIET and not resumed,
        **{split: {k: round(found[k], 4) for k in METRICS} for split, found in splits.items()},
    }


def table(found: dict[str, Any]) -> str:
    """What was chosen for each set, and what came of it."""
    rows = [("set", "canvas", "anchors", "crop", "steps", "minutes", "val AP50", "test AP50", "AP")]
    for name, line in found["sets"].items():
        canvas, crop = (
            f"{height} x {width}" for height, width in (line["image_size"], line["crop"])
        )
        most = line["sizes"][-1] * 2 ** (2 / 3)
        sizes = f"{line['sizes'][0]:.0f} to {most:.0f}"
        minutes = f"{line['seconds'] / 60:.1f}" + ("" if line["quiet"] else " (shared machine)")
        minutes = "stopped and resumed" if line["resumed"] else minutes
        scores = line["val"]["AP50"], line["test"]["AP50"], line["test"]["AP"]
        figures = [f"{score:.3f}" for score in scores]
        rows.append((f"`{name}`", canvas, sizes, crop, f"{line['steps']:,}", minutes, *figures))
    return markdown(rows)


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, and write the results after each set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="SET", help=f"of {', '.join(SETS)} and bccd")
    parser.add_argument("--data", type=Path, default=Path("build/fit"), help="where the sets are")
    parser.add_argument("--bccd", type=Path, help="the BCCD folder; without it, BCCD is left out")
    parser.add_argument("--out", type=Path, default=Path("runs/fit"), help="the run folders")
    parser.add_argument("--results", type=Path, help="default: OUT/results.json")
    parser.add_argument(
        "--again", action="store_true", help="also run what is in the results, from the start"
    )
    parser.add_argument(
        "--train", nargs=argparse.REMAINDER, default=[], help="more for the command"
    )
    options = parser.parse_args(arguments)
    path = options.results or options.out / "results.json"
    found = json.loads(path.read_text()) if path.is_file() else {"sets": {}}
    folders = {name: options.data / name for name in SETS}
    folders |= {"bccd": options.bccd} if options.bccd else {}
    for name in options.only or folders:
        if name in found["sets"] and not options.again:
            continue
        if options.again:
            shutil.rmtree(options.out / name, ignore_errors=True)
        if name in SETS and not (folders[name] / "instances_test.json").is_file():
            write(name, folders[name])
        line = measure(folders[name], options.out / name, options.train)
        versions = subprocess.run(
            [sys.executable, "-c", VERSIONS], stdout=subprocess.PIPE, check=True
        )
        found |= {"machine": machine(), "versions": json.loads(versions.stdout)}
        found["sets"][name] = line
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
        if options.results:
            write_tables(PAGE, {"fit": table(found)})
        print(f"{name}: {line['sentence']}; test AP50 {line['test']['AP50']:.3f}", flush=True)


if __name__ == "__main__":
    main()
