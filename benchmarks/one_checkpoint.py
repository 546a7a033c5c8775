"""One weights file in three frameworks: how far outputs, boxes and AP are apart.

python -m benchmarks.one_checkpoint runs/bccd/weights.safetensors path/to/bccd
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.common import record, table
from focal.retinanet import load, predict, raw_outputs
from focal.retinanet.data import CocoDataset
from focal.retinanet.detector import BACKENDS
from focal.retinanet.training.evaluate import evaluate_model


def main() -> None:
    """Measure, write, print."""
    weights, data = sys.argv[1:]
    dataset = CocoDataset(data, "test")
    images = [dataset[i].image for i in range(8)]
    results: dict[str, dict[str, Any]] = {}
    outputs, boxes = {}, {}
    for backend in BACKENDS:
        model = load(weights, backend, device="cpu")
        outputs[backend] = raw_outputs(model, images)
        boxes[backend] = predict(model, images)
        metrics, _ = evaluate_model(model, dataset, progress=True)
        results[backend] = {"AP": metrics["AP"], "AP50": metrics["AP50"]}
    for backend in BACKENDS:
        for i, name in enumerate(("logits", "deltas")):
            first, other = outputs["torch"][i], outputs[backend][i]
            results[backend][name] = float(np.abs(first - other).max() / np.abs(first).max())
        results[backend]["boxes"] = max(
            float(np.abs(a["boxes"] - b["boxes"]).max())
            for a, b in zip(boxes["torch"], boxes[backend], strict=True)
        )
        for a, b in zip(boxes["torch"], boxes[backend], strict=True):
            np.testing.assert_array_equal(a["labels"], b["labels"])
    command = f"python -m benchmarks.one_checkpoint {weights} {data}"
    record("one_checkpoint", command, images=len(images), backends=results)
    rows = [("backend", "logits", "deltas", "boxes (pixels)", "AP", "AP50")]
    for backend, r in results.items():
        apart = (f"{r[name]:.1e}" for name in ("logits", "deltas", "boxes"))
        rows.append((backend, *apart, f"{r['AP']:.4f}", f"{r['AP50']:.4f}"))
    print(f"Greatest distance from PyTorch, {len(images)} images; AP on the test split\n")
    print(table(rows))


if __name__ == "__main__":
    main()
