"""Every example of every docstring runs and prints what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from backends import REQUIRE_ALL

import focal

ROOT = Path(focal.__file__).parent


def modules_with_examples() -> list[str]:
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>> " in path.read_text():
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            names.append(".".join(parts).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if REQUIRE_ALL or (error.name or "focal").startswith("focal"):
            raise
        pytest.skip(f"{error.name} is not installed")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
    # doctest looks into modules, classes and functions, and not into every object.
    found = {test.name for test in doctest.DocTestFinder().find(module) if test.examples}
    assert set(written(ast.parse(inspect.getsource(module)), name)) <= found


def written(tree: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[str]:
    """Names of what has an example in its docstring."""
    if ">>> " in (ast.get_docstring(tree) or ""):
        yield name
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield from written(node, f"{name}.{node.name}")


def test_examples_are_in_docstrings_only() -> None:
    for path in ROOT.rglob("*.py"):
        source = path.read_text()
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
        inside = sum((ast.get_docstring(node) or "").count(">>> ") for node in nodes)
        assert source.count(">>> ") == inside, path
