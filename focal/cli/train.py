"""`focal train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from focal.cli.options import (
    Commands,
    add_backend,
    add_data,
    add_detector,
    assignments,
    open_dataset,
    print_metrics,
)

__all__ = ["add", "run"]

EPILOG = """\
examples:
  focal train --data shapes --image-size 128x128 --steps 1500
      train on the generated set, which needs no download
  focal train --data path/to/images --out runs/mine
      train on your own images, in the COCO format or as exported from Roboflow or CVAT; canvas,
      anchors and steps are chosen from the boxes
  focal train --data path/to/images --weights retinanet_resnet50.pth --freeze backbone --steps 2000
      fine-tune torchvision's detector for your classes
  focal train --data path/to/images --preset r50 --set norm=batch --set steps=20000
      change any field of the detector or the run
  focal train --data path/to/images --out runs/mine --resume
      resume a run that was stopped
  torchrun --nproc-per-node 8 -m focal train --data path/to/images --preset r50
      share each batch among 8 GPUs; see docs/scaling.md for JAX and TensorFlow

The run folder holds config.json, metrics.jsonl, weights.safetensors (of the last step),
best.safetensors (of the greatest AP), the last checkpoints, loss.png, detections.png and
report.html.
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
    train.add_argument(
        "--out", type=Path, help="the run folder (default: a new one, runs/1, runs/2, ...)"
    )
    train.add_argument(
        "--steps", type=int, help="optimizer steps (default: of --fit or the preset)"
    )
    train.add_argument("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    train.add_argument(
        "--weights",
        type=Path,
        help="start from a weights file, checkpoint or run folder, or from torchvision's weights "
        "of a RetinaNet or ResNet (.pth); the class head starts anew if the classes differ",
    )
    train.add_argument(
        "--freeze",
        metavar="STAGES",
        help="keep the first stages of the backbone as they are: 1 (the stem) to 5, or backbone",
    )
    train.add_argument(
        "--fit",
        action=argparse.BooleanOptionalAction,
        help="choose image size, anchors, crop and steps from the boxes (default: for tiny without "
        "--weights)",
    )
    train.add_argument(
        "--eval-every", type=int, help="steps between evaluations on val (0: only at the end)"
    )
    train.add_argument(
        "--patience",
        type=int,
        help="stop after this many evaluations without a better AP; needs --eval-every",
    )
    train.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard event files to the run folder"
    )
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
    from focal.retinanet.data.coco import find_splits
    from focal.retinanet.run import run
    from focal.retinanet.training.metrics import number, read_metrics

    changes = assignments(options)
    generated = options.data == "shapes"
    size = _size_of_shapes(options, changes) if generated else None
    data = open_dataset(options.data, "train", size, options.hold_out)
    val = None
    if options.hold_out > 0 or generated or "val" in find_splits(Path(options.data)):
        val = open_dataset(options.data, "val", size, options.hold_out)
    found = run(
        data,
        val,
        options.out,
        {name: vars(options)[name] for name in ("preset", "convention", "weights")},
        changes,
        {"command": command, "data": options.data},
        fit_to_data=False if generated and options.fit is None else options.fit,
        tensorboard=options.tensorboard,
        backend=options.backend,
        device=options.device,
        resume=options.resume,
    )
    if not found.writes:
        return
    _, evaluations = read_metrics(found.folder / "metrics.jsonl")
    for split, lines in evaluations.items():
        print_metrics(f"{split} after {lines[-1]['step']} steps", lines[-1])
        best = max(lines, key=lambda line: number(line, "AP"))
        if best is not lines[-1] and best["AP"] is not None:
            text = f"best AP {best['AP']:.3f} after {best['step']} steps"
            print(f"{text}: {found.folder / 'best.safetensors'}")
    print(f"report: {found.folder / 'report.html'}")
    print(f"weights: {found.folder / 'weights.safetensors'}")


def _size_of_shapes(options: argparse.Namespace, changes: dict[str, Any]) -> tuple[int, int]:
    """The size of generated images: that of the canvas."""
    from focal.retinanet.pretrained import read_pretrained
    from focal.retinanet.settings import preset_settings, recorded_settings

    if "image_size" in changes:
        return tuple(changes["image_size"])
    if options.resume and options.out and (options.out / "config.json").is_file():
        return recorded_settings(options.out / "config.json", {})[0].detector.image_size
    if options.weights and (config := read_pretrained(options.weights).config):
        return config.image_size
    return preset_settings(options.preset or "tiny").detector.image_size
