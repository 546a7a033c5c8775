"""`focal evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from focal.cli.options import Commands, add_backend, add_data, open_dataset, print_metrics

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command and its options."""
    evaluate = commands.add_parser("evaluate", help="measure COCO AP of a detector")
    evaluate.add_argument("weights", type=Path, help="weights.safetensors of a run")
    add_data(evaluate)
    add_backend(evaluate)
    evaluate.add_argument("--split", default="test", help="train, val or test (default)")
    evaluate.add_argument("--out", type=Path, help="also write the metrics to this JSON file")
    evaluate.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    """Run the command."""
    from focal.files import write_atomically
    from focal.retinanet.detector import load
    from focal.retinanet.training.evaluate import evaluate_model
    from focal.retinanet.training.run_folder import plain_json

    model = load(options.weights, options.backend, options.device)
    dataset = open_dataset(options, options.split, model.config.image_size)
    if dataset.classes != model.config.classes:
        raise ValueError(
            f"{options.weights}: the detector's classes are {model.config.classes}, "
            f"those of {dataset.name} are {dataset.classes}"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    metrics, _ = evaluate_model(model, dataset, progress=True)
    print_metrics(dataset.name, metrics)
    if options.out is not None:
        record = {"command": command, "data": dataset.name, **metrics}
        write_atomically(options.out, plain_json(record, indent=2).encode())
