"""`focal figures`."""

from __future__ import annotations

import argparse
from pathlib import Path

from focal.cli.options import Commands, add_backend, open_dataset

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """The command and its options."""
    figures = commands.add_parser("figures", help="draw the figures of the paper, and our own")
    figures.add_argument("--out", type=Path, default=Path("figures"), help="folder to write")
    figures.add_argument("--weights", type=Path, help="a trained detector, for figure 4")
    figures.add_argument("--data", help="images for it: a COCO folder, or 'shapes' (generated)")
    figures.add_argument("--split", default="test", help="train, val or test (default)")
    add_backend(figures)
    figures.set_defaults(run=run)


def run(options: argparse.Namespace, _: str) -> None:
    """Carry it out."""
    from focal.retinanet.detector import load
    from focal.retinanet.report.figures import write_figures

    if (options.weights is None) != (options.data is None):
        raise ValueError("--weights and --data: figure 4 needs both; got one")
    model = dataset = None
    if options.weights is not None:
        model = load(options.weights, options.backend, options.device)
        dataset = open_dataset(options.data, options.split, model.config)
    for name in write_figures(options.out, model, dataset):
        print(options.out / name)
    print(options.out / "figures.md")
