"""Triton's kernels without a GPU: what they compute, that they compile, and life without Triton."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from triton_process import compile_without_a_gpu, needs_triton, pass_in_the_interpreter, run

torch = pytest.importorskip("torch")

import focal.kernels  # noqa: E402
import focal.torch as F  # noqa: E402
from focal.core.formulas import SigmoidFocal  # noqa: E402
from focal.torch import _pointwise  # noqa: E402


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    pass_in_the_interpreter("gpu/test_triton.py")


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
    rows = 2**27 if dtype == F16 else 1000  # more logits than 32 bits count
    x = torch.empty(rows, 80, dtype=dtype, device="meta")
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
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
    compile_without_a_gpu(COMPILE, tmp_path)


@pytest.fixture
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sends losses on the CPU to whatever stands for Triton's kernels."""
    monkeypatch.setattr(_pointwise, "TRITON_DEVICE", "cpu")
    clear = _pointwise._triton.cache_clear, _pointwise._trial.cache_clear
    for each in clear:
        each()
    yield
    for each in clear:
        each()


def replace_kernels(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "focal.kernels.torch_triton", module)
    monkeypatch.delattr(focal.kernels, "torch_triton", raising=False)


def without_triton(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(_pointwise, "TRITON_DEVICE", "none")
        return loss_and_slope()


def loss_and_slope() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-5, 5, 50, requires_grad=True)
    loss = F.sigmoid_focal_loss(x, torch.ones(50), reduction="sum")
    return loss, torch.autograd.grad(loss, x)[0]


def test_without_triton_it_is_the_formula(
    monkeypatch: pytest.MonkeyPatch, triton_on_the_cpu: None
) -> None:
    expected = without_triton(monkeypatch)
    replace_kernels(monkeypatch, None)
    for a, b in zip(loss_and_slope(), expected, strict=True):  # without a warning
        assert torch.equal(a, b)


def test_a_failure_of_triton_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, triton_on_the_cpu: None
) -> None:
    """Seldom, as it may cost a failed compilation; a success is for good."""
    expected = without_triton(monkeypatch)
    kernels = Kernels(failures=3)
    replace_kernels(monkeypatch, kernels)
    with pytest.warns(UserWarning, match="Triton cannot compile for cpu, .*: no C compiler"):
        got = loss_and_slope()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    device = torch.device("cpu")
    _pointwise._trial.cache_clear()
    kernels.tried = 0
    with pytest.warns(UserWarning, match="no C compiler"):
        assert _pointwise._triton_on(device) is None
    tried = []
    for _ in range(2, 12):  # no second warning: warnings are errors
        _pointwise._triton_on(device)
        tried.append(kernels.tried)
    assert tried == [2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert _pointwise._triton_on(device) is kernels


def test_nothing_is_compiled_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    trial, kernels = _pointwise._Trial(torch.device("cuda")), Kernels(failures=9)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not trial.passed(kernels)
    assert (trial.calls, kernels.tried) == (0, 0)


class Kernels(ModuleType):
    """Stands in for the module of the kernels, which fails as often as told."""

    def __init__(self, failures: int) -> None:
        super().__init__("kernels")
        self.failures, self.tried = failures, 0

    def total(self, formula: SigmoidFocal, x: object, t: object) -> None:
        self.tried += 1
        if self.tried <= self.failures:
            raise RuntimeError("no C compiler")

    def takes(self, *operands: object) -> bool:
        return False


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
