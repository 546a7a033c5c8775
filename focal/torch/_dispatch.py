"""Whether operations run eagerly on plain tensors, or are traced or batched.

PyTorch has no public interface for this. Where a private name no longer exists, tensors do not
count as plain: the results stay the same, without the faster paths.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

try:
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode
except ImportError:

    def is_in_torch_dispatch_mode() -> bool:  # type: ignore[misc]
        """Unknown."""
        return True


def _keys(*names: str) -> int:
    """A set of dispatch keys as bits."""
    keys = map(torch._C._dispatch_key_parse, names)
    return functools.reduce(operator.or_, (torch._C.DispatchKeySet(k).raw_repr() for k in keys))


WRAPPED: int | None
try:
    WRAPPED = _keys("Batched", "FuncTorchBatched", "FuncTorchGradWrapper")
except (AttributeError, RuntimeError, TypeError):
    WRAPPED = None

try:
    from torch._C._functorch import TransformType, get_interpreter_stack
except ImportError:
    get_interpreter_stack = None  # type: ignore[assignment]

__all__ = ["apply", "is_plain", "is_wrapped", "nests_forward_mode"]


def apply(operation: type[Function], *operands: Any) -> Any:
    """`operation.apply`, several times faster where `torch.func` does not run.

    A function with `setup_context`, which `torch.func` needs, binds its arguments to a signature
    in Python at every call.
    """
    if get_interpreter_stack is None or get_interpreter_stack():
        return operation.apply(*operands)
    return _in_one(operation).apply(*operands)


@functools.cache
def _in_one(operation: type[Function]) -> type[Function]:
    """The operation with `forward` and `setup_context` in one."""

    def forward(ctx: Any, *operands: Any) -> Any:
        output = operation.forward(*operands)
        operation.setup_context(ctx, operands, output)
        return output

    own = {"forward": staticmethod(forward), "setup_context": Function.setup_context}
    return type(operation.__name__, (operation,), own)


def is_wrapped(a: Any) -> bool:
    """Whether a transformation such as vmap wraps this operand, which then has no memory.

    `torch.autograd.grad(..., is_grads_batched=True)` passes batched tensors to the inside of an
    `autograd.Function`; only their dispatch keys show it.
    """
    if not isinstance(a, Tensor):
        return False
    return WRAPPED is None or torch._C._dispatch_keys(a).raw_repr() & WRAPPED != 0


def is_plain(*operands: Any) -> bool:
    """Whether operations run now, on the memory of these tensors.

    Otherwise they are traced or computed elsewhere, and the formula itself must be used.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or is_in_torch_dispatch_mode()
    ):
        return False
    for a in operands:  # called several times by every loss: a loop is faster than a generator
        if isinstance(a, Tensor) and (type(a) not in (Tensor, Parameter) or is_wrapped(a)):
            return False
    return True


def nests_forward_mode() -> bool:
    """Whether `torch.func.jvp` runs inside itself, as in `jacfwd(jacfwd(f))`.

    There PyTorch silently drops the second derivative of every `autograd.Function`.
    """
    stack = None if get_interpreter_stack is None else get_interpreter_stack()
    return stack is not None and sum(level.key() == TransformType.Jvp for level in stack) > 1
