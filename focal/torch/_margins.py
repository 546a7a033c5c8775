"""The margins of softmax focal loss as differentiable PyTorch operations."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from focal.core import softmax
from focal.core.namespace import Namespace
from focal.torch import _ops
from focal.torch._blocks import batch_first, by_rows
from focal.torch._dispatch import nests_forward_mode

__all__ = ["class_margins", "label_margin"]

xp = cast(Namespace, _ops)


def label_margin(x: Tensor, at: Tensor, valid: Tensor) -> Tensor:
    """`focal.core.softmax.margin`, in blocks of rows that fit the cache."""
    if torch.compiler.is_compiling():
        return _CompiledMargin.apply(x, at, valid)
    if nests_forward_mode():
        return softmax.margin(xp, x, at, valid)[0]
    return _Margin.apply(x, at, valid)


def class_margins(x: Tensor, valid: Tensor) -> Tensor:
    """`focal.core.softmax.all_margins`, in blocks of rows that fit the cache."""
    if torch.compiler.is_compiling() or nests_forward_mode():
        return softmax.all_margins(xp, x, valid)[0]
    return _AllMargins.apply(x, valid)


class _Margin(torch.autograd.Function):
    """`focal.core.softmax.margin` of logits (..., K)."""

    @staticmethod
    def forward(x: Tensor, at: Tensor, valid: Tensor) -> Tensor:
        return by_rows(lambda *rows: softmax.margin(xp, *rows)[0], x, at, valid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, at, valid = ctx.saved_tensors

        def slope(x: Tensor, at: Tensor, valid: Tensor, grad: Tensor) -> Tensor:
            return softmax.margin_grad(xp, softmax.margin(xp, x, at, valid)[1], at, grad)

        return by_rows(slope, x, at, valid, grad), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        return _Margin.apply(*batch_first(info.batch_size, in_dims, operands)), 0

    @staticmethod
    def jvp(ctx: Any, dx: Any, *_: Any) -> Tensor:
        x, at, valid = ctx.saved_tensors
        odds = softmax.margin(xp, x, at, valid)[1]
        slopes = softmax.margin_grad(xp, odds, at, torch.ones_like(odds[..., 0]))
        return torch.sum(slopes * dx, -1)


class _CompiledMargin(torch.autograd.Function):
    """The same for `torch.compile`, which differentiates once and batches by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(x, at, valid)
        return softmax.margin(xp, x, at, valid)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, at, valid = ctx.saved_tensors
        odds = softmax.margin(xp, x, at, valid)[1]
        return softmax.margin_grad(xp, odds, at, grad), None, None


class _AllMargins(torch.autograd.Function):
    """`focal.core.softmax.all_margins` of logits (..., K)."""

    @staticmethod
    def forward(x: Tensor, valid: Tensor) -> Tensor:
        return by_rows(lambda *rows: softmax.all_margins(xp, *rows)[0], x, valid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, valid = ctx.saved_tensors

        def slope(x: Tensor, valid: Tensor, grad: Tensor) -> Tensor:
            return softmax.all_margins_grad(xp, softmax.all_margins(xp, x, valid)[1], grad)

        return by_rows(slope, x, valid, grad), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        return _AllMargins.apply(*batch_first(info.batch_size, in_dims, operands)), 0

    @staticmethod
    def jvp(ctx: Any, dx: Any, *_: Any) -> Tensor:
        x, valid = ctx.saved_tensors
        margins, pull = torch.func.vjp(lambda x: softmax.all_margins(xp, x, valid)[0], x)
        return torch.func.vjp(pull, torch.zeros_like(margins))[1]((dx,))[0]
