"""`focal export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from focal.cli.options import Commands

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command and its options."""
    export = commands.add_parser("export", help="write a detector for ONNX or TensorFlow programs")
    export.add_argument("weights", type=Path, help="a weights file, a checkpoint or a run folder")
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a file ending in .onnx, or a folder, without an ending, for a SavedModel",
    )
    export.add_argument(
        "--canvas",
        action="store_true",
        help="take images that are on the canvas already, in batches, and not one of any size",
    )
    export.set_defaults(run=run)


def run(options: argparse.Namespace, _: str) -> None:
    """Run the command."""
    from focal.retinanet.detector import export, export_backend, load

    model = load(options.weights, export_backend(options.out), device="cpu")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    export(model, options.out, options.canvas)
    print(f"written: {options.out}")
