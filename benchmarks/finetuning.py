"""Steps to a given AP on a COCO folder: from random weights, and from weights of another set.

    python -m benchmarks.finetuning --data path/to/bccd --out runs/finetuning

Three runs of the preset "tiny": on the generated shapes, then twice on the folder, from random
weights and from those. Nothing else differs. A run that was stopped resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

from focal.cli import main as focal
from focal.files import write_atomically
from focal.retinanet.training.metrics import read_metrics

APS = (0.2, 0.3, 0.4, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()

    shapes = options.out / "shapes"
    if not (shapes / "report.html").is_file():
        train(shapes, "--data", "shapes", "--image-size", "128x128", "--steps", "2200")
    own = ["--data", options.data, "--steps", str(options.steps), "--eval-every", "100"]
    own += ["--image-size", "256x320", "--no-fit"]
    starts = {"scratch": [], "finetuned": ["--weights", str(shapes / "weights.safetensors")]}
    record = {"date": str(date.today()), "command": " ".join(["python", *sys.orig_argv[1:]])}
    for name, weights in starts.items():
        out = options.out / name
        if not (out / "report.html").is_file():
            train(out, *own, *weights)
        config = json.loads((out / "config.json").read_text())
        record |= {key: config[key] for key in ("focal", "device", "versions")}
        (lines,) = read_metrics(out / "metrics.jsonl")[1].values()
        record[name] = {
            "AP": {line["step"]: round(line["AP"], 4) for line in lines},
            "AP50": {line["step"]: round(line["AP50"], 4) for line in lines},
            "steps to AP": {
                ap: next((line["step"] for line in lines if line["AP"] >= ap), None) for ap in APS
            },
        }
    write_atomically(options.out / "finetuning.json", json.dumps(record, indent=1).encode())
    print(json.dumps(record, indent=1))


def train(out: Path, *arguments: str) -> None:
    """Run `focal train`, or resume it."""
    resume = ["--resume"] if out.is_dir() else []
    if focal(["train", "--preset", "tiny", "--out", str(out), *arguments, *resume]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
