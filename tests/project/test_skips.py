"""Where everything must be installed, a skip is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import ROOT, TESTS

SAMPLE = """
import pytest
from backends import load

@pytest.fixture
def missing():
    pytest.skip("torch is not installed")

def test_of_an_import():
    pytest.importorskip("no_such_module")

def test_of_a_fixture(missing):
    pass

def test_of_a_backend():
    load("torch")

@pytest.mark.skipif(True, reason="needs a GPU")
def test_of_a_condition():
    pass
"""
MODULE = 'import pytest\npytest.importorskip("no_such_module")'


@pytest.mark.parametrize(
    ("required", "said"),
    [
        ("0", {"4 skipped"}),
        # The fixture's is an error; what FOCAL_BACKENDS leaves out and the condition are skips.
        ("1", {"1 failed", "2 skipped", "1 error"}),
    ],
)
def test_skips_fail_where_everything_is_required(
    required: str, said: set[str], tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(SAMPLE)
    assert outcome(tmp_path, required) == said


@pytest.mark.parametrize(("required", "said"), [("0", {"1 skipped"}), ("1", {"1 error"})])
def test_a_module_that_skips_itself(required: str, said: set[str], tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(MODULE)
    assert outcome(tmp_path, required) == said


def outcome(folder: Path, required: str) -> set[str]:
    """What pytest counts under our conftest.py, with no backend to be tested but NumPy."""
    path = os.pathsep.join(map(str, (TESTS, TESTS / "helpers", ROOT)))
    environment = {"PYTHONPATH": path, "FOCAL_REQUIRE_ALL": required, "FOCAL_BACKENDS": "numpy"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", folder],
        cwd=folder,
        env={**os.environ, **environment, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    *_, last = done.stdout.splitlines()
    return set(last.partition(" in ")[0].split(", "))
