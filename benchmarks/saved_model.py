"""A SavedModel of the detector against `predict`: every test image, in a process without focal.

python -m benchmarks.saved_model runs/bccd/weights.safetensors path/to/bccd
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks.common import interleaved, record
from focal.retinanet import load, predict
from focal.retinanet.data import CocoDataset, eval_batches
from focal.retinanet.tensorflow.export import export_saved_model
from focal.retinanet.tensorflow.trainer import detect

PROGRAM = """
import sys
sys.modules["focal"] = sys.modules["keras"] = None
import numpy as np, tensorflow as tf
folder, given, found = sys.argv[1:]
detect = tf.saved_model.load(folder).signatures["serving_default"]
images, sizes = np.load(given).values()
parts = [slice(i, i + 5) for i in range(0, len(images), 5)]
results = [detect(images=tf.constant(images[p]), sizes=tf.constant(sizes[p])) for p in parts]
np.savez(found, **{k: np.concatenate([r[k] for r in results]) for k in results[0]})
"""


def main() -> None:
    """Export, run, compare, time, write, print."""
    weights, data = sys.argv[1:]
    model = load(weights, "tensorflow", device="cpu")
    dataset = CocoDataset(data, "test")
    examples = [dataset[i] for i in range(len(dataset))]
    expected = predict(model, [example.image for example in examples])
    batch = next(eval_batches(dataset, model.config, len(dataset)))

    with tempfile.TemporaryDirectory() as scratch:
        folder, given, found_file = (Path(scratch) / n for n in ("net", "in.npz", "out.npz"))
        export_saved_model(model, folder, canvas=True)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        np.savez(given, batch.images, batch.sizes)
        subprocess.run([sys.executable, "-c", PROGRAM, folder, given, found_file], check=True)
        found = dict(np.load(found_file))
        loaded = tf.saved_model.load(str(folder)).signatures["serving_default"]

        times = {}
        for count in (1, 8):
            images, sizes = batch.images[:count], batch.sizes[:count]
            sides = {
                "saved_model": lambda i=images, s=sizes: loaded(
                    images=tf.constant(i), sizes=tf.constant(s)
                )["count"].numpy(),
                "detect": lambda i=images, s=sizes: detect(model, i, s),
            }
            times[f"{count} images"] = interleaved(sides)

    boxes, scores = [], []
    for i, (e, example) in enumerate(zip(expected, examples, strict=True)):
        n = found["count"][i]
        np.testing.assert_array_equal(found["labels"][i, :n], e["labels"])
        height, width = example.image.shape[:2]
        own = np.minimum(found["boxes"][i, :n] / batch.scales[i], [width, height, width, height])
        boxes.append(np.abs(own - e["boxes"]).max(initial=0))
        scores.append(np.abs(found["scores"][i, :n] - e["scores"]).max(initial=0))
    report = record(
        "saved_model",
        f"python -m benchmarks.saved_model {weights} {data}",
        images=len(examples),
        detections=int(found["count"].sum()),
        largest_difference={"boxes_pixels": float(max(boxes)), "scores": float(max(scores))},
        bytes={"saved_model": size, "weights": Path(weights).stat().st_size},
        times=times,
    )
    print({k: report[k] for k in ("images", "detections", "largest_difference", "bytes", "times")})


if __name__ == "__main__":
    main()
