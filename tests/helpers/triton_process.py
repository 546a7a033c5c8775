"""Triton without a GPU, in a process of its own: one has Triton either compiled or interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import REQUIRE_ALL
from folders import ROOT, TESTS

ON_LINUX = sys.platform == "linux"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and not (REQUIRE_ALL and ON_LINUX),
    reason="triton is not installed",
)


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def compile_without_a_gpu(code: str, cache: Path) -> None:
    """Run code that compiles kernels and prints "compiled" at its end."""
    assert run(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)) == "compiled\n"


def pass_in_the_interpreter(file: str) -> None:
    """Run a file of tests; all of it but what only a GPU can do must pass."""
    arguments = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS / file)]
    printed = run(
        f"import sys, pytest; sys.exit(pytest.main({arguments!r}))",
        TRITON_INTERPRET="1",
        PYTEST_ADDOPTS="",
    )
    assert " passed" in printed
    skipped = [line for line in printed.splitlines() if line.startswith("SKIPPED")]
    assert skipped and all(line.endswith("needs a GPU") for line in skipped)
