"""Types to compute in, blocks that fit the cache, and batch axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from focal.torch._dispatch import is_plain

__all__ = [
    "CPU_BLOCK",
    "Layout",
    "Targets",
    "batch_first",
    "by_block",
    "by_rows",
    "narrow",
    "pushforward",
    "wide",
    "wide_pair",
]

Targets = Tensor | float

CPU_BLOCK = 1 << 18
"""Elements per block: larger blocks do not fit the cache, smaller ones spend time in Python."""
DEVICE_BLOCK = 1 << 22
"""Large enough that launching kernels takes no time compared with running them."""


def wide(x: Tensor) -> Tensor:
    """Half types as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def narrow(values: Tensor, x: Tensor) -> Tensor:
    """Values in the type of x; torch 2.11 miscompiles a conversion of a tensor to its own type."""
    return values if values.dtype == x.dtype else values.to(x.dtype)


def wide_pair(x: Tensor, t: Targets) -> tuple[Tensor, Targets]:
    """Logits and dense targets in the type to compute in; labels and numbers as they are."""
    x = wide(x)
    return x, t.to(x.dtype) if isinstance(t, Tensor) and t.shape == x.shape else t


def batch_first(size: int, in_dims: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Operands with the axis of vmap in front; scalars broadcast along it."""
    axes = 1 + max(
        a.ndim - (d is not None)
        for a, d in zip(operands, in_dims, strict=True)
        if isinstance(a, Tensor)
    )

    def first(a: Any, d: int | None) -> Any:
        if not isinstance(a, Tensor):
            return a
        if d is None:
            return a.expand(size, *a.shape) if a.ndim else a
        a = a.movedim(d, 0)
        return a if a.ndim > 1 else a.reshape((size,) + (1,) * (axes - 1))

    return [first(a, d) for a, d in zip(operands, in_dims, strict=True)]


def by_block(
    function: Callable[..., Tensor | None],
    numbers: Sequence[Tensor],
    x: Tensor,
    t: Targets,
    *more: Tensor,
    output: bool = True,
) -> Tensor:
    """function(x, t, *more, *numbers) elementwise, block by block, into a new tensor like x.

    Without `output` the function is only called, and the result is empty.
    """
    size = CPU_BLOCK if x.device.type == "cpu" else DEVICE_BLOCK
    operands = [a for a in (x, t, *more) if isinstance(a, Tensor)]
    one_block = x.numel() <= size and all(a.is_contiguous() for a in operands)
    if one_block or not is_plain(*operands, *numbers) or any(n.ndim for n in numbers):
        result = function(*wide_pair(x, t), *more, *numbers)
        return x.new_empty(0) if result is None else narrow(result, x)
    layout = Layout(x, t)
    result = layout.new() if output else x.new_empty(0)
    flat = layout.flat(x)
    rows = max(1, size // max(1, math.prod(flat.shape[1:])))
    blocks = [layout.flat(a).split(rows) if isinstance(a, Tensor) else None for a in (t, *more)]
    target = layout.flat(result).split(rows) if output else None
    for i, xb in enumerate(flat.split(rows)):
        tb, *rest = (t if b is None else b[i] for b in blocks)
        values = function(*wide_pair(xb, tb), *rest, *numbers)
        if target is not None:
            target[i].copy_(cast(Tensor, values))
    return result


class Layout:
    """Flat views of the operands, in the memory order of x.

    Dense operands become one axis, so that channels-last logits (or any other permutation) are
    neither copied nor read with large strides. With one target per row, logits become
    (rows, classes).
    """

    def __init__(self, x: Tensor, t: Targets) -> None:
        self.x = x
        self.by_row = isinstance(t, Tensor) and t.shape != x.shape
        contiguous = x.is_contiguous()
        self.order = None if contiguous else sorted(range(x.ndim), key=x.stride, reverse=True)

    def new(self) -> Tensor:
        """An empty tensor like x. It is not a view, so that users may change it in place."""
        if self.by_row or self.order is None:
            return torch.empty_like(self.x, memory_format=torch.contiguous_format)
        strides, step = [1] * self.x.ndim, 1
        for axis in reversed(self.order):
            strides[axis] = step
            step *= max(1, self.x.shape[axis])
        return self.x.new_empty_strided(self.x.shape, strides)

    def flat(self, a: Any) -> Any:
        """An operand, or a result of `new`, as one axis or as rows; a view where possible.

        A number stays as it is.
        """
        if not isinstance(a, Tensor):
            return a
        if not self.by_row:
            return (a if self.order is None else a.permute(self.order)).reshape(-1)
        return a.reshape(-1, a.shape[-1]) if a.ndim == self.x.ndim else a.reshape(-1)


def pushforward(
    function: Callable[..., Tensor], operands: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    """The derivative of function(*operands) along the tangents, by reverse mode alone."""
    value, pull, *_ = torch.func.vjp(function, *operands)
    # The pullback is linear, so its own pullback is the derivative itself.
    return torch.func.vjp(pull, torch.zeros_like(value))[1](tuple(tangents))[0]


def by_rows(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """function(x, *others) of logits (..., K) and operands (...) or (..., K), in blocks of rows."""
    size = CPU_BLOCK if x.device.type == "cpu" else DEVICE_BLOCK
    if x.numel() <= size or torch.is_grad_enabled() or not is_plain(x, *others):
        return function(x, *others)
    classes = x.shape[-1]
    operands = [a.reshape(-1, classes) if a.ndim == x.ndim else a.reshape(-1) for a in (x, *others)]
    blocks = zip(*(a.split(max(1, size // max(1, classes))) for a in operands), strict=True)
    result: Tensor | None = None
    start = 0
    for rows in blocks:
        values = function(*rows)
        if result is None:
            like = x if values.ndim == 2 else x[..., 0]
            result = torch.empty_like(like, memory_format=torch.contiguous_format)
            flat = result.view(-1, *values.shape[1:])
        flat[start : start + len(values)] = values
        start += len(values)
    return function(x, *others) if result is None else result
