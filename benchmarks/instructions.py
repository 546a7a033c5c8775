"""Machine instructions of the Triton kernels per logit; the compiler needs no GPU.

`python -m benchmarks.instructions` writes results/instructions.json.

The kernels have no loop, so that every instruction of the program is counted once, those on rare
branches too, and divided by the logits of a thread. An H200 issues at most 132 multiprocessors x
4 instructions x 32 lanes x 1.755 GHz = 29.7e12 instructions of a lane in a second, an eighth of
which may be MUFU, and copies 4.3e12 bytes in a second, reads and writes added. In the time that a
copy needs for the bytes of a logit it therefore issues 6.9 instructions for each byte. The share of
the copy's bandwidth that this leaves to a kernel is inferred, not measured.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common import CLASSES, record, table
from focal.kernels import torch_triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
LANES_PER_SECOND = 132 * 4 * 32 * 1.755e9
BYTES_PER_SECOND = 4.3e12
MUFU_SHARE = 1 / 8
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "i64": 8, "i8": 1}
CLASSES_OF_CODE = {
    "float64": r"D(ADD|MUL|FMA|SETP)|MUFU\.(RCP|RSQ)64H|.*F64",
    "MUFU": r"MUFU",
    "float32": r"F(ADD|MUL|FMA|SEL|SETP|MNMX|CHK)|HFMA2|HADD2|HMUL2",
    "memory": r"LD|ST|SHFL|RED|ATOM",
    "integer and conversion": r"",
}
"""Kinds of instructions by the start of their names, the first that fits."""


def compiled(
    task: str,
    logits: str = "fp32",
    targets: str = "fp32",
    gamma: float | None = 2.0,
    capability: int = 90,
    **options: Any,
) -> Any:
    """The kernel that a launch on contiguous, aligned tensors compiles.

    Args:
        task: "value", "sum" or "slope".
        logits: Triton's name of their type.
        targets: Of the targets; labels, with `CLASSES=80`, are "i64".
        gamma: One of `OWN_KERNEL`, or None.
        capability: 90 for an H100 or H200.
        options: Other constants of the kernel.
    """
    kernel = torch_triton._kernel
    types = {"x": f"*{logits}", "t": f"*{targets}", "scale": "*fp32"}
    types["out"] = "*fp32" if task == "sum" else f"*{logits}"
    if task != "slope":
        del types["scale"]
    constants = {
        "scale": None,
        **{"TASK": task, "GAMMA": gamma, "BALANCED": True, "CLASSES": 0, "GROUP": 1, "SMOOTHED": False},
        **{"SCALES": False, "HARD": targets.startswith("i"), "BLOCK": torch_triton.BLOCK},
        **{"EXACT": logits == "fp32", "WIDE": False},
        **options,
    }
    signature, fixed, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in types or not parameter.is_constexpr and name not in constants:
            default = "i32" if name == "n" else parameter.annotation_type or "fp32"
            signature[name] = types.get(name, default)
            if name in types or name == "n":
                aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
    source = ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": torch_triton.WARPS})


def opcodes(kernel: Any) -> list[str]:
    """Names of the instructions, without the padding at the end."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(NVDISASM), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text)
    return [name for name in found if name != "NOP"]


def per_logit(kernel: Any) -> dict[str, float]:
    """Instructions per logit: all, and of each kind."""
    names = opcodes(kernel)
    kinds = Counter(
        next(kind for kind, start in CLASSES_OF_CODE.items() if re.match(start, name))
        for name in names
    )
    logits = torch_triton.BLOCK / (32 * torch_triton.WARPS)
    return {
        "all": round(len(names) / logits, 1),
        **{kind: round(kinds[kind] / logits, 1) for kind in CLASSES_OF_CODE},
    }


def share_of_copy(bytes_per_logit: float, instructions: dict[str, float]) -> float:
    """Inferred: the time of a copy of those bytes, relative to that of the instructions."""
    slots = max(instructions["all"], instructions["MUFU"] / MUFU_SHARE)
    budget = bytes_per_logit / BYTES_PER_SECOND * LANES_PER_SECOND
    return round(min(1.0, budget / slots), 2)


def main() -> None:
    """Count, write, print."""
    found = {}
    titles = ("kernel", "bytes", *("all", *CLASSES_OF_CODE), "share of copy, inferred")
    rows: list[tuple[str, ...]] = [titles]
    for logits, kind, gamma in itertools.product(
        ("fp32", "bf16", "fp16"), ("dense", "sparse"), (2.0, 0.5, None)
    ):
        targets, options = (logits, {}) if kind == "dense" else ("i64", {"CLASSES": CLASSES, "GROUP": 16 // SIZES[logits]})
        read = SIZES[logits] + (SIZES[targets] if kind == "dense" else SIZES[targets] / CLASSES)
        for task in ("value", "sum", "slope"):
            instructions = per_logit(compiled(task, logits, targets, gamma, **options))
            needed = round(read + (0 if task == "sum" else SIZES[logits]), 1)
            share = share_of_copy(needed, instructions)
            name = f"{logits} {kind} {task}, gamma {'other' if gamma is None else gamma}"
            found[name] = {"bytes": needed, **instructions, "inferred_share_of_copy": share}
            rows.append((name, *(str(value) for value in found[name].values())))
    record(
        "instructions",
        "python -m benchmarks.instructions",
        target="sm_90",
        triton=triton.__version__,
        per_logit=found,
    )
    print(table(rows))


if __name__ == "__main__":
    main()
