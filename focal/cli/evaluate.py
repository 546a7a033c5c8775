"""`focal evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from focal.cli.options import (
    Commands,
    add_backend,
    add_data,
    add_inference,
    inference,
    open_dataset,
    print_metrics,
)

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command and its options."""
    evaluate = commands.add_parser("evaluate", help="measure COCO AP of a detector")
    evaluate.add_argument("weights", type=Path, help="a weights file, a checkpoint or a run folder")
    add_data(evaluate)
    add_backend(evaluate)
    add_inference(evaluate)
    evaluate.add_argument("--split", default="test", help="train, val or test (default)")
    evaluate.add_argument("--out", type=Path, help="also write the metrics to this JSON file")
    evaluate.add_argument(
        "--results", type=Path, help="also write the detections to this results file of COCO"
    )
    evaluate.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    """Run the command."""
    from focal.files import write_atomically
    from focal.retinanet.data.dataset import category_ids, dataset_name
    from focal.retinanet.detector import load
    from focal.retinanet.training.evaluate import coco_results, evaluate_model
    from focal.retinanet.training.run_folder import plain_json

    model = load(options.weights, options.backend, options.device, **inference(options))
    dataset = open_dataset(options.data, options.split, model.config.image_size, options.hold_out)
    for file in (options.out, options.results):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    metrics, found = evaluate_model(model, dataset, progress=True)
    print_metrics(dataset_name(dataset), metrics)
    if options.out is not None:
        record = {"command": command, "data": dataset_name(dataset), **metrics}
        write_atomically(options.out, plain_json(record, indent=2).encode())
    if options.results is not None:
        ids = category_ids(dataset)
        results = [
            entry for image in found for entry in coco_results(image["image_id"], image, ids)
        ]
        write_atomically(options.results, json.dumps(results).encode())
