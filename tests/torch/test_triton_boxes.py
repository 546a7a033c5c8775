"""Triton's kernels for boxes without a GPU: what they compute, and that they compile."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_process import compile_without_a_gpu, needs_triton, pass_in_the_interpreter

pytest.importorskip("torch")

pytestmark = needs_triton


def test_the_kernels_in_the_interpreter() -> None:
    pass_in_the_interpreter("gpu/test_triton_boxes.py")


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
    compile_without_a_gpu(COMPILE, tmp_path)
