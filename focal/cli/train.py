"""`focal train`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from focal.cli.options import (
    Commands,
    add_backend,
    add_data,
    add_detector,
    configs,
    open_dataset,
    print_metrics,
)

__all__ = ["add", "run"]

EPILOG = """\
examples:
  focal train --data shapes --image-size 128x128 --steps 1500 --out runs/shapes
      train on the generated set, which needs no download
  focal train --data path/to/coco --preset tiny --out runs/mine
      train on your own images: a folder with instances_{train,val,test}.json and images/,
      or the COCO 2017 layout
  focal train --data path/to/coco --preset r50 --set norm=batch --set steps=20000
      change any field of the detector or the run
  focal train --data path/to/coco --out runs/mine --resume
      resume a run that was stopped
  torchrun --nproc-per-node 8 -m focal train --data path/to/coco --preset r50
      share each batch among 8 GPUs; see docs/scaling.md for JAX and TensorFlow

The run folder holds config.json, metrics.jsonl, weights.safetensors, the last checkpoints,
loss.png, detections.png and report.html.
"""


def add(commands: Commands) -> None:
    """Add the command and its options."""
    train = commands.add_parser(
        "train",
        help="train a detector",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data(train)
    add_backend(train)
    add_detector(train)
    train.add_argument("--out", type=Path, default=Path("runs/latest"), help="the run folder")
    train.add_argument("--steps", type=int, help="optimizer steps (default: the preset's)")
    train.add_argument("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    train.add_argument("--weights", type=Path, help="start from this weights file")
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue from the run's newest checkpoint, with its settings unless others are given",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set a field of RetinaNetConfig or TrainConfig; may be repeated",
    )
    train.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> None:
    """Run the command."""
    from focal.retinanet.detector import backend_module, predict
    from focal.retinanet.report import report
    from focal.retinanet.report.curves import loss_plot
    from focal.retinanet.training.loop import train
    from focal.retinanet.training.metrics import read_metrics
    from focal.retinanet.weights import load_weights

    detector, settings = configs(options)
    # First of all: a framework must know of the other processes before it is used.
    replicas = backend_module(options.backend).replicas(options.device)
    replicas.check(settings)
    if replicas.rank > 0:  # only one process logs
        logging.getLogger().setLevel(logging.WARNING)
    dataset = open_dataset(options.data, "train", detector)
    validation = open_dataset(options.data, "val", detector)
    if validation.classes != dataset.classes:
        raise ValueError(
            f"{validation.name}: its classes are {validation.classes}, "
            f"those of {dataset.name} are {dataset.classes}"
        )
    detector = detector.replace(classes=dataset.classes)
    initial = None if options.weights is None else load_weights(options.weights)[0]
    model = train(
        detector,
        settings,
        dataset,
        validation,
        options.out,
        backend=options.backend,
        device=options.device,
        initial=initial,
        resume=options.resume,
        notes={"command": command, "data": options.data},
        replicas=replicas,
    )
    if replicas.rank > 0:
        return
    count = min(4, len(validation))
    examples = [validation[i * len(validation) // count] for i in range(count)]
    found = predict(model, [example.image for example in examples])
    loss_plot(options.out / "metrics.jsonl", options.out / "loss.png")
    report.detections_picture(examples, found, detector.classes, options.out / "detections.png")
    page = report.write_report(options.out)
    _, evaluations = read_metrics(options.out / "metrics.jsonl")
    for split, lines in evaluations.items():
        print_metrics(f"{split} after {lines[-1]['step']} steps", lines[-1])
    print(f"report: {page}")
    print(f"weights: {options.out / 'weights.safetensors'}")
