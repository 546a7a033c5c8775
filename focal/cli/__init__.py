"""The command line: `focal train` and the other commands, one file each."""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
from collections.abc import Sequence

import focal
from focal.cli import check, evaluate, export, predict, prior_bias, train

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("focal").setLevel(logging.INFO)
    parser = _parser()
    options = parser.parse_args(arguments)
    command = shlex.join(["focal", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        status: int = options.run(options, command) or 0
    except ModuleNotFoundError as error:
        print(f"focal: {_not_installed(error)}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        # What a user can fix ends in one sentence; other errors keep their traceback.
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        print(f"focal: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        resume = "; --resume continues from the last checkpoint" if options.run is train.run else ""
        print(f"focal: {str(stop) or 'stopped'}{resume}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="focal",
        description="Focal loss and the reference RetinaNet (Lin et al. 2017).",
    )
    parser.add_argument("--version", action="version", version=f"focal {focal.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (train, evaluate, predict, export, check, prior_bias):
        command.add(commands)
    return parser


def _not_installed(error: ModuleNotFoundError) -> str:
    """Which package is missing, and the extra that installs it."""
    package = (error.name or "").split(".")[0]
    if package in ("", "focal"):
        raise error
    extras = {"torch": "torch", "tensorflow": "tensorflow", "keras": "tensorflow"}
    extras |= dict.fromkeys(("jax", "flax", "optax"), "jax")
    extras |= dict.fromkeys(("onnx", "onnxscript"), "onnx")
    extras |= {"tensorboardX": "tensorboard"}
    extra = extras.get(package, "retinanet")
    return f'{package} is not installed; install it with: pip install "focal-losses[{extra}]"'
