"""Seed faults at random and count how many the tests catch: `python -m tests.faults`.

One fault at a time, in a copy of the project: an operator, a comparison, a number, a boolean or
the name of a function is changed. Each is tried on the tests of its room, the quick ones first.
A fault that survives is printed with its line: either a test is missing, or the line does nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1800
"""Seconds for a stage of tests; a fault may well make an endless loop."""

SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
NAMES = {"maximum": "minimum", "minimum": "maximum", "log1p": "log", "sum": "mean"}


class Room(NamedTuple):
    """Files, and the stages of tests that a fault in them must pass to survive.

    A stage is the backends to test (FOCAL_BACKENDS; "" is all) and the tests.
    """

    files: str
    stages: tuple[tuple[str, str], ...]


CORE = "tests/core/test_*.py"
ROOMS = {
    "core": Room(
        "focal/core/*.py focal/numpy/*.py",
        (
            ("numpy,array_api_strict", CORE),
            ("torch", f"{CORE} tests/project/test_docstrings.py"),
            ("numpy,torch", "tests/retinanet/test_objective.py tests/project/test_migration.py"),
        ),
    ),
    "adapters": Room(
        "focal/torch/*.py focal/jax/*.py focal/tensorflow/*.py focal/kernels/*.py",
        (
            ("{backend}", "tests/{backend}/test_[io]*.py tests/core/test_*.py"),
            ("{backend}", "tests/project/test_migration.py tests/torch/test_triton*.py"),
            ("{backend}", "tests/testing/test_testing.py tests/project/test_docstrings.py"),
        ),
    ),
    "trainers": Room(
        "focal/retinanet/torch/*.py focal/retinanet/jax/*.py focal/retinanet/tensorflow/*.py "
        "focal/retinanet/training/*.py focal/retinanet/*.py",
        (
            ("{backend}", "tests/{backend}/test_network.py tests/retinanet/test_[cenpw]*.py"),
            ("{backend}", "tests/retinanet/test_t*.py tests/retinanet/test_objective.py"),
            ("{backend}", "tests/retinanet/test_detector.py tests/{backend}/test_export.py"),
            ("{backend}", "tests/retinanet/test_replicas.py"),
        ),
    ),
}


def places(tree: ast.Module) -> Iterator[ast.AST]:
    """Where a fault can be seeded: not in annotations, and not in text."""
    notes = {
        id(part)
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if getattr(node, field, None) is not None
        for part in ast.walk(getattr(node, field))
    }
    for node in ast.walk(tree):
        if id(node) in notes:
            continue
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
            yield node
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield node
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            yield node
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node


class _Replace(ast.NodeTransformer):
    """Puts another node in the place of one."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def seed_fault(tree: ast.Module, node: ast.AST) -> ast.Module:
    """The module with this node changed."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.Attribute):
        node.attr = NAMES[node.attr]
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        node.value = not node.value
    elif isinstance(node, ast.Constant):
        node.value = node.value + 1 if type(node.value) is int else node.value * 1.01 + 0.01
    elif isinstance(node, ast.UnaryOp):
        tree = _Replace(node, node.operand).visit(tree)
    return tree


def outcome(copy: Path, room: Room, backend: str, python: str) -> str:
    """Which stage catches the fault that is in the copy now."""
    for number, (backends, tests) in enumerate(room.stages, 1):
        paths = sorted(
            str(path.relative_to(copy))
            for pattern in tests.format(backend=backend).split()
            for path in copy.glob(pattern)
        )
        if not paths:
            continue
        command = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "OMP_NUM_THREADS": "1",
            "FOCAL_BACKENDS": backends.format(backend=backend),
        }
        try:
            run = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return f"caught in stage {number}, by its time"
        if run.returncode not in (0, 5):  # all passed; nothing was collected
            return f"caught in stage {number}"
    return "SURVIVED"


def main() -> None:
    """Seed the faults and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=ROOT, help="the project to copy")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--count", type=int, default=20, help="faults in each room")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        hidden = shutil.ignore_patterns(".*", "build", "runs", "__pycache__")
        shutil.copytree(options.project, copy, ignore=hidden)
        for name in options.rooms:
            room, generator, caught = ROOMS[name], random.Random(options.seed), 0
            files = sorted({p for pattern in room.files.split() for p in copy.glob(pattern)})
            sources = {path: path.read_text() for path in files}
            # Every place is as likely as every other.
            everywhere = [
                (path, index)
                for path, source in sources.items()
                for index in range(len(list(places(ast.parse(source)))))
            ]
            for path, index in generator.sample(everywhere, options.count):
                tree = ast.parse(sources[path])
                node = list(places(tree))[index]
                line = sources[path].splitlines()[node.lineno - 1].strip()
                tree = ast.fix_missing_locations(seed_fault(tree, node))
                path.write_text(ast.unparse(tree))
                backend = next(
                    (b for b in ("torch", "jax", "tensorflow") if b in str(path)), "torch"
                )
                found = outcome(copy, room, backend, sys.executable)
                path.write_text(sources[path])
                caught += found != "SURVIVED"
                place = f"{path.relative_to(copy)}:{node.lineno}"
                print(f"{found}: {place}: {type(node).__name__} in `{line[:100]}`", flush=True)
            print(f"{name}: caught {caught} of {options.count}", flush=True)


if __name__ == "__main__":
    main()
