"""Triton's kernels for boxes without a GPU: what they compute, and that they compile."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import REQUIRE_ALL
from folders import ROOT, TESTS

pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and not (REQUIRE_ALL and sys.platform == "linux"),
    reason="triton is not installed",
)


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints: a process has one Triton, compiled or interpreted."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_the_kernels_in_the_interpreter() -> None:
    """Runs tests/gpu/test_triton_boxes.py; all of it but what only a GPU can do must pass."""
    file = str(TESTS / "gpu/test_triton_boxes.py")
    arguments = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    printed = run(
        f"import sys, pytest; sys.exit(pytest.main({arguments!r}))",
        TRITON_INTERPRET="1",
        PYTEST_ADDOPTS="",
    )
    assert " passed" in printed
    skipped = [line for line in printed.splitlines() if line.startswith("SKIPPED")]
    assert all(line.endswith("needs a GPU") for line in skipped)


COMPILE = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from focal.kernels import torch_boxes as kernels

pair = {"anchors": "*fp32", "boxes": "*fp32", "n": "i32", "m": "i32"}
numbers = dict.fromkeys(("foreground", "background", "floor"), "fp32")
matching = {**pair, **numbers, "out": "*i64"}
crowd = {"boxes": "*fp32", "hits": "*i32", "n": "i32", "words": "i32", "threshold": "fp32"}
sweep = {"hits": "*i32", "keep": "*u8", "n": "i32", "words": "i32"}
block, rows = {"BLOCK": kernels.BLOCK}, {"ROWS": kernels.ROWS}
cases = [
    (kernels._top_kernel, {**pair, "tops": "*fp32"}, block),
    (kernels._match_kernel, matching, {**block, "tops": None}),
    (kernels._match_kernel, {**matching, "tops": "*fp32"}, block),
    (kernels._hits_kernel, crowd, {**rows, "classes": None}),
    (kernels._hits_kernel, {**crowd, "classes": "*i64"}, rows),
    *((kernels._sweep_kernel, sweep, {"WORDS": words, "UNROLL": 8}) for words in (1, 32, 256)),
]
for kernel, signature, constants in cases:
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(i,): constants[name] for i, name in enumerate(names) if name not in signature},
    )
    options = {"num_warps": 1} if kernel is kernels._sweep_kernel else kernels.EXACT
    for capability in (80, 90, 100):
        asm = compile(source, GPUTarget("cuda", capability, 32), options=options).asm
        assert asm["cubin"]
        # The arithmetic of the core: no fused multiply-add, no approximate division.
        assert not re.search(r"fma\\.|\\.ftz|\\.approx|div\\.full", asm["ptx"])
        assert ("div.rn.f32" in asm["ptx"]) == (kernel is not kernels._sweep_kernel)
print("compiled")
"""


def test_the_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """For three generations of GPUs; the compiler needs no such device."""
    assert run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "compiled\n"
