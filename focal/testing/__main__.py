"""`python -m focal.testing exhaustive`: the sigmoid focal loss at every number of a type."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from focal.core import checks
from focal.testing.exhaustive import exhaustive, summary
from focal.testing.frameworks import FRAMEWORKS
from focal.testing.sweep import Settings

NAME = "python -m focal.testing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if the bound is kept, 1 if not."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    try:
        settings = _settings(options)
        jobs = checks.check_integer("exhaustive", "jobs", options.jobs, low=1)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    record = exhaustive(settings, jobs, options.out, shlex.join([*NAME.split(), *given]))
    print(summary(record))
    return 0 if record["kept"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "exhaustive",
        help="loss and gradient at every number of a type, both targets, against float64",
        description="Evaluate loss and gradient at every number of a type, with target 0 and 1, "
        "and print the largest error in units in the last place (ULP).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--backend", choices=tuple(FRAMEWORKS), default="torch", help="framework")
    command.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    command.add_argument("--gamma", type=float, nargs="+", default=[2.0], help="one or more")
    command.add_argument("--alpha", type=float, default=None, help="weight of positives")
    command.add_argument("--stride", type=int, default=1, help="take every n-th bit pattern")
    command.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    command.add_argument(
        "--out", type=Path, help="JSON record; a run that was killed goes on from FILE.part"
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    name = "exhaustive"
    if options.dtype not in FRAMEWORKS[options.backend].dtypes:
        raise ValueError(
            f"{name}: dtype must be one that {options.backend} has; got {options.dtype!r}"
        )
    return Settings(
        backend=options.backend,
        dtype=options.dtype,
        gammas=tuple(checks.check_gamma(name, gamma) for gamma in options.gamma),
        alpha=checks.check_alpha(name, options.alpha),
        stride=checks.check_integer(name, "stride", options.stride, low=1),
    )


if __name__ == "__main__":
    sys.exit(main())
