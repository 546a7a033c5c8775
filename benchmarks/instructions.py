"""Machine instructions of the Triton kernels per logit, counted; the compiler needs no GPU.

`python -m benchmarks.instructions` writes results/instructions.json.

The kernels have no loop: all instructions of the program are counted, those of rare branches too,
and divided by the logits of a thread. At 1.755 GHz an H200 issues at most 132 multiprocessors x 4 x
32 lanes x 1.755e9 = 29.7e12 instructions per second and lane, of which an eighth may be MUFU
(exponential, square roots). A copy is assumed to move 4.3e12 bytes per second, reads and writes
added: 6.9 instructions per byte. A kernel takes at least the longer one of the two times. The share
of the copy's bandwidth that follows is inferred, not measured: latencies and launches come on top.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common import ALPHA, CLASSES, record, table
from focal.core.formulas import SigmoidFocal, Sparse
from focal.kernels import torch_triton

LANES_PER_SECOND = 132 * 4 * 32 * 1.755e9
BYTES_PER_SECOND = 4.3e12
MUFU_SHARE = 1 / 8
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int8: "i8",
}
KINDS = {
    "float64": r"D(ADD|MUL|FMA|SETP)|MUFU\.\w+64H|\w2F.*F64",
    "MUFU": r"MUFU",
    "float32": r"F(ADD|MUL|FMA|SEL|SETP|MNMX)|H(ADD|MUL|FMA|SETP)2",
    "memory": r"LD|ST|SHFL",
    "integer and conversion": r"",
}
"""Patterns of the instructions' names; the first that matches decides."""


def compiled(
    task: str, formula: SigmoidFocal | Sparse, x: Tensor, t: Tensor, capability: int = 90
) -> Any:
    """The kernel of a launch on such tensors, which may have no memory, as Triton compiles it.

    Args:
        task: "value", "sum", or "slope" with one factor for all logits.
        formula: As in `focal.kernels.torch_triton`.
        x: Logits.
        t: Targets or labels.
        capability: Of the GPU; 90 is an H100 or H200.
    """
    one = torch.empty((), device=x.device)
    out, scale = (one if task == "sum" else x), (one if task == "slope" else None)
    operands, constants = torch_triton._arguments(task, formula, x, t, out, scale)
    constants = {**constants, **({} if task == "slope" else {"scale": None})}
    signature: dict[str, str] = {}
    aligned, fixed = {}, {}
    for i, name in enumerate(torch_triton._kernel.arg_names):
        value = None if name in constants else operands[i]
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            number = "i64" if constants["WIDE"] else "i32"
            signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else number
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(torch_triton._kernel, signature, fixed, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), torch_triton.OPTIONS)


def opcodes(kernel: Any) -> list[str]:
    """Names of the machine's instructions, without the padding at the end."""
    found = re.findall(r"^\S+\t(?:@\S+ +)?([A-Z][\w.]*)", kernel.asm["sass"], re.M)
    return [name for name in found if name != "NOP"]


def per_logit(kernel: Any) -> dict[str, float]:
    """Instructions per logit: all, and of each kind."""
    names = opcodes(kernel)
    kinds = Counter(
        next(kind for kind, start in KINDS.items() if re.match(start, name)) for name in names
    )
    logits = torch_triton.BLOCK / (32 * torch_triton.WARPS)
    return {
        "all": round(len(names) / logits, 1),
        **{kind: round(kinds[kind] / logits, 1) for kind in KINDS},
    }


def least_time(bytes_per_logit: float, instructions: dict[str, float]) -> float:
    """Seconds per logit: those of a copy of so many bytes, or of the instructions."""
    slots = max(instructions["all"], instructions["MUFU"] / MUFU_SHARE)
    return max(bytes_per_logit / BYTES_PER_SECOND, slots / LANES_PER_SECOND)


def count(dtype: torch.dtype, sparse: bool, gamma: float) -> dict[str, dict[str, float]]:
    """Bytes, instructions and share of each kernel, and of the two of a training step."""
    x = torch.empty(1000, CLASSES, dtype=dtype, device="meta")
    loss = SigmoidFocal(ALPHA, gamma)
    formula = Sparse(loss) if sparse else loss
    t = torch.empty(1000, dtype=torch.int64, device="meta") if sparse else x
    found, times = {}, {}
    for task in ("value", "sum", "slope"):
        moved = (x.nbytes + t.nbytes + (0 if task == "sum" else x.nbytes)) / x.numel()
        instructions = per_logit(compiled(task, formula, x, t))
        times[task] = moved, least_time(moved, instructions)
        found[task] = {"bytes": round(moved, 1), **instructions}
    found["sum and slope"] = {
        name: round(found["sum"][name] + figure, 1) for name, figure in found["slope"].items()
    }
    moved, seconds = map(sum, zip(times["sum"], times["slope"], strict=True))
    times["sum and slope"] = moved, seconds
    for task, (moved, seconds) in times.items():
        share = moved / BYTES_PER_SECOND / seconds
        found[task]["inferred share of copy"] = round(share, 2)
    return found


def main() -> None:
    """Count, write, print."""
    found = {
        f"{TYPES[dtype]} {'sparse' if sparse else 'dense'} {task}, gamma {gamma}": figures
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for sparse in (False, True)
        for gamma in (2.0, 0.5, 1.5)
        for task, figures in count(dtype, sparse, gamma).items()
    }
    record(
        "instructions",
        "python -m benchmarks.instructions",
        target="sm_90",
        per_logit=found,
    )
    rows: list[tuple[str, ...]] = [("kernel", *next(iter(found.values())))]
    rows += [(name, *map(str, figures.values())) for name, figures in found.items()]
    print(table(rows))


if __name__ == "__main__":
    main()
