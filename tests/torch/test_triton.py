"""Triton's kernels without a GPU: what they compute, that they compile, and life without Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import REQUIRE_ALL
from folders import ROOT, TESTS

torch = pytest.importorskip("torch")

import focal.torch as F  # noqa: E402
from focal.core.formulas import SigmoidFocal  # noqa: E402
from focal.torch import _pointwise  # noqa: E402

ON_LINUX = sys.platform == "linux"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and not (REQUIRE_ALL and ON_LINUX),
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


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    """Runs tests/gpu/test_triton.py; all of it but what only a GPU can do must pass."""
    file = str(TESTS / "gpu/test_triton.py")
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    printed = run(
        f"import sys, pytest; sys.exit(pytest.main({arguments!r}))",
        TRITON_INTERPRET="1",
        PYTEST_ADDOPTS="",
    )
    assert " passed" in printed
    skipped = [line for line in printed.splitlines() if line.startswith("SKIPPED")]
    assert all(line.endswith("needs a GPU") for line in skipped)


COMPILE = """
import itertools
import torch
from benchmarks.instructions import compiled, opcodes
from focal.core.formulas import SigmoidFocal, Sparse

FLOAT, HALF, F16 = torch.float32, torch.bfloat16, torch.float16
TASKS = "value", "sum", "slope"
H100 = itertools.product((90,), TASKS, (FLOAT, HALF), (1.5, 2.0), (0.0,))
others = itertools.product((80, 100), ("slope",), (FLOAT, HALF), (1.5,), (0.0,))
rare = [(90, "slope", *c) for c in ((FLOAT, 0.5, 0.0), (F16, 1.5, 0.0), (FLOAT, 1.5, 0.1))]
for capability, task, dtype, gamma, smoothing in (*H100, *others, *rare):
    x = torch.empty(1000, 80, dtype=dtype, device="meta")
    labels = torch.empty(1000, dtype=torch.int64, device="meta")
    loss = SigmoidFocal(0.25, gamma, smoothing)
    for formula, t in ((loss, x), (Sparse(loss), labels)):
        kernel = compiled(task, formula, x, t, capability)
        names = opcodes(kernel)
        assert ".f64" not in kernel.asm["ptx"], (task, dtype, gamma)
        assert "LDG.E.128" in names
        # No spilled registers, but for one address in the largest kernel.
        assert sum(name.startswith(("LDL", "STL")) for name in names) <= (2 if smoothing else 0)
print("compiled")
"""


@needs_triton
def test_the_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """For the A100, the H100 and the B200: no float64, no spilled registers, loads of 128 bits."""
    assert run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "compiled\n"


def test_without_a_working_triton_it_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(50, requires_grad=True), torch.rand(50).round()
    expected = F.sigmoid_focal_loss(x, y, reduction="sum")
    slope = torch.autograd.grad(expected, x)[0]
    monkeypatch.setattr(_pointwise, "TRITON_DEVICE", "cpu")
    _pointwise._triton_on.cache_clear()
    try:
        # Not installed, so quietly; installed, but with no GPU for it to compile for, so aloud.
        monkeypatch.setitem(sys.modules, "focal.kernels.torch_triton", None)
        assert torch.equal(F.sigmoid_focal_loss(x, y, reduction="sum"), expected)
        monkeypatch.setitem(sys.modules, "focal.kernels.torch_triton", BrokenTriton)
        _pointwise._triton_on.cache_clear()
        with pytest.warns(UserWarning, match="focal does without: no C compiler"):
            got = F.sigmoid_focal_loss(x, y, reduction="sum")
    finally:
        _pointwise._triton_on.cache_clear()
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got, x)[0], slope)


class BrokenTriton:
    """Stands in for the module of the kernels."""

    @staticmethod
    def total(formula: SigmoidFocal, x: object, t: object) -> None:
        raise RuntimeError("no C compiler")


def test_importing_the_adapter_does_not_load_triton() -> None:
    code = """
import sys
import torch
before = "triton" in sys.modules
import focal.torch
x = torch.ones(3, requires_grad=True)
focal.torch.sigmoid_focal_loss(x, torch.ones(3)).sum().backward()
assert before or "triton" not in sys.modules
assert "focal.kernels.torch_triton" not in sys.modules
"""
    run(code)
