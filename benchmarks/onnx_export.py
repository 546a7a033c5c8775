"""An ONNX file of the detector against `predict`: every image, by onnxruntime without focal.

python -m benchmarks.onnx_export runs/bccd/weights.safetensors path/to/bccd
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from benchmarks.common import interleaved, record
from focal.retinanet import load, predict
from focal.retinanet.data import CocoDataset, eval_batches
from focal.retinanet.torch.export import export_onnx
from focal.retinanet.torch.trainer import detect

PROGRAM = """
import sys
sys.modules["focal"] = sys.modules["torch"] = None
import numpy as np, onnxruntime
file, given, found = sys.argv[1:]
session = onnxruntime.InferenceSession(file)
images, sizes = np.load(given).values()
parts = [slice(i, i + 5) for i in range(0, len(images), 5)]
results = [session.run(None, {"images": images[p], "sizes": sizes[p]}) for p in parts]
np.savez(found, *map(np.concatenate, zip(*results)))
"""


def main() -> None:
    """Export, run, compare, time, write, print."""
    weights, data = sys.argv[1:]
    model = load(weights, device="cpu")
    images = detections = 0
    apart = {"boxes_pixels": 0.0, "boxes_relative": 0.0, "scores": 0.0}
    with tempfile.TemporaryDirectory() as scratch:
        file, given, found = (Path(scratch) / n for n in ("net.onnx", "in.npz", "out.npz"))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            export_onnx(model, file, canvas=True)
            seconds.append(round(time.perf_counter() - start, 2))
        for split in ("train", "val", "test"):
            dataset = CocoDataset(data, split)
            examples = [dataset[i] for i in range(len(dataset))]
            batch = next(eval_batches(dataset, model.config, len(dataset)))
            np.savez(given, batch.images, batch.sizes)
            subprocess.run([sys.executable, "-c", PROGRAM, file, given, found], check=True)
            results = zip(*np.load(found).values(), batch.scales, strict=True)
            expected = predict(model, [example.image for example in examples])
            images += len(examples)
            for (boxes, scores, labels, n, scale), example, e in zip(
                results, examples, expected, strict=True
            ):
                np.testing.assert_array_equal(labels[:n], e["labels"])
                height, width = example.image.shape[:2]
                own = np.minimum(boxes[:n] / scale, [width, height, width, height])
                off = np.abs(own - e["boxes"])
                relative = off / np.maximum(np.abs(e["boxes"]), 1)
                worst = (off, relative, np.abs(scores[:n] - e["scores"]))
                for key, values in zip(apart, worst, strict=True):
                    apart[key] = max(apart[key], float(values.max(initial=0)))
                detections += int(n)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options)
        times = {}
        for count in (1, 8):
            some, sizes = batch.images[:count], batch.sizes[:count]
            times[f"{count} images"] = interleaved(
                {
                    "onnxruntime": lambda i=some, s=sizes: session.run(
                        None, {"images": i, "sizes": s}
                    ),
                    "torch": lambda i=some, s=sizes: detect(model, i, s),
                }
            )
        size = file.stat().st_size
    report = record(
        "onnx_export",
        "python -m benchmarks.onnx_export runs/bccd/weights.safetensors path/to/bccd",
        onnxruntime=onnxruntime.__version__,
        threads=torch.get_num_threads(),
        images=images,
        detections=detections,
        largest_difference=apart,
        bytes={"onnx": size, "weights": Path(weights).stat().st_size},
        seconds_to_export=seconds,
        times=times,
    )
    print({k: v for k, v in report.items() if k not in ("machine", "versions", "date", "command")})


if __name__ == "__main__":
    main()
