"""Whether operations run eagerly on plain tensors, or are traced or batched.

PyTorch has no public interface for this. Where a private name no longer exists, tensors do not
count as plain: the results stay the same, without the faster paths.
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
    """Whether a transformation such as vmap wraps this operand, which then has no memory.

    `torch.autograd.grad(..., is_grads_batched=True)` passes batched tensors to the inside of an
    `autograd.Function`; only their dispatch keys show it.
    """
    if not isinstance(a, Tensor):
        return False
    if WRAPPED is None:
        return True
    keys = torch._C._dispatch_keys(a)
    return any(keys.has(key) for key in WRAPPED)


def is_plain(*operands: Any) -> bool:
    """Whether operations run now, on the memory of these tensors.

    Otherwise they are traced or computed elsewhere, and the formula itself must be used.
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

    There PyTorch silently drops the second derivative of every `autograd.Function`.
    """
    stack = None if get_interpreter_stack is None else get_interpreter_stack()
    return stack is not None and sum(level.key() == TransformType.Jvp for level in stack) > 1
