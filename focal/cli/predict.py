"""`focal predict`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from focal.cli.options import Commands, add_backend

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command and its options."""
    predict = commands.add_parser("predict", help="find objects in images")
    predict.add_argument("weights", type=Path, help="weights.safetensors of a run")
    predict.add_argument("images", type=Path, nargs="+", help="image files")
    add_backend(predict)
    predict.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write")
    predict.add_argument(
        "--score",
        type=float,
        default=0.3,
        help="lowest score that is drawn (default 0.3); the JSON file has all",
    )
    predict.set_defaults(run=run)


def run(options: argparse.Namespace, _: str) -> None:
    """Run the command."""
    from focal.files import write_atomically
    from focal.retinanet.data import read_image
    from focal.retinanet.detector import load, predict
    from focal.retinanet.report.draw import draw_boxes, save_image

    model = load(options.weights, options.backend, options.device)
    pictures = [options.out / f"{path.stem}.png" for path in options.images]
    for path, picture in zip(options.images, pictures, strict=True):
        onto_itself = path.is_file() and picture.resolve() == path.resolve()
        if onto_itself or pictures.count(picture) > 1:
            raise ValueError(f"--out {options.out}: {picture.name} would overwrite another image")
    options.out.mkdir(parents=True, exist_ok=True)
    for path, picture in zip(options.images, pictures, strict=True):
        image = read_image(path)
        (found,) = predict(model, [image])
        shown = found["scores"] >= options.score
        boxes, labels, scores = found["boxes"], found["labels"], found["scores"]
        classes = model.config.classes
        drawn = draw_boxes(image, boxes[shown], labels[shown], classes, scores[shown])
        save_image(picture, drawn)
        entries = [
            {
                "class": classes[label],
                "score": round(float(score), 5),
                "box": [round(float(v), 2) for v in box],
            }
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]
        record = {"image": str(path), "box_format": "x1, y1, x2, y2 in pixels", "found": entries}
        target = picture.with_suffix(".json")
        write_atomically(target, json.dumps(record, indent=1).encode())
        print(f"{path}: {int(shown.sum())} objects -> {picture}, {target.name}")
