"""`focal prior-bias`."""

from __future__ import annotations

import argparse

import focal
from focal.cli.options import Commands

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command and its options."""
    bias = commands.add_parser("prior-bias", help="the bias that makes first scores PI")
    bias.add_argument("pi", type=float, nargs="?", default=0.01, help="default 0.01")
    bias.set_defaults(run=run)


def run(options: argparse.Namespace, _: str) -> None:
    """Run the command."""
    print(focal.prior_bias(options.pi))
