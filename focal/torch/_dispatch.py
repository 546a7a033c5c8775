"""What kind of tensor an operation sees: plain memory, or one that traces or batches.

PyTorch offers no public way to ask this. Where a private name is gone, a tensor does not count
as plain: results stay right, and the faster paths are not taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

try:
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode
except ImportError:

    def is_in_torch_dispatch_mode() -> bool:  # type: ignore[misc]
        """Unknown."""
        return True


WRAPPED: tuple[Any, ...] | None
try:
    WRAPPED = tuple(
        map(torch._C._dispatch_key_parse, ("Batched", "FuncTorchBatched", "FuncTorchGradWrapper"))
    )
except (AttributeError, RuntimeError):
    WRAPPED = None

try:
    from torch._C._functorch import TransformType, get_interpreter_stack
except ImportError:
    get_interpreter_stack = None  # type: ignore[assignment]

__all__ = ["is_plain", "is_wrapped", "nests_forward_mode"]


def is_wrapped(a: Any) -> bool:
    """Whether a transformation (a vmap, say) wraps this operand, which then has no memory.

    `torch.autograd.grad(..., is_grads_batched=True)` has a batching of its own that reaches
    the inside of an `autograd.Function`; only the dispatch keys show it.
    """
    if not isinstance(a, Tensor):
        return False
    if WRAPPED is None:
        return True
    keys = torch._C._dispatch_keys(a)
    return any(keys.has(key) for key in WRAPPED)


def is_plain(*operands: Any) -> bool:
    """Whether operations run now, on the memory of just these tensors.

    What traces operations, or computes them elsewhere, must be given the formula instead.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or is_in_torch_dispatch_mode()
        or any(
            isinstance(a, Tensor) and (type(a) not in (Tensor, Parameter) or is_wrapped(a))
            for a in operands
        )
    )


def nests_forward_mode() -> bool:
    """Whether `torch.func.jvp` runs inside itself, as in `jacfwd(jacfwd(f))`.

    PyTorch loses the second derivative of every `autograd.Function` there, and says nothing.
    """
    stack = None if get_interpreter_stack is None else get_interpreter_stack()
    return stack is not None and sum(level.key() == TransformType.Jvp for level in stack) > 1
