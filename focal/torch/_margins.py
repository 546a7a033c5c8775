"""Softmax focal loss as differentiable PyTorch operations: its margins, and its smoothed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from focal.core import softmax
from focal.core.namespace import Namespace
from focal.kernels import torch_softmax
from focal.torch import _ops
from focal.torch._blocks import batch_first, by_rows, pushforward
from focal.torch._dispatch import apply, is_plain, nests_forward_mode
from focal.torch._pointwise import OWN_CODE

__all__ = ["label_margin", "softmax_pass"]

xp = cast(Namespace, _ops)
Plain = Callable[[Tensor, Tensor, Tensor], Tensor]


def label_margin(x: Tensor, at: Tensor, valid: Tensor) -> Tensor:
    """`focal.core.softmax.margin`, in blocks of rows that fit the cache."""
    if torch.compiler.is_compiling():
        return _CompiledMargin.apply(x, at, valid)
    if nests_forward_mode():
        return softmax.margin(xp, x, at, valid)[0]
    with_slope = torch.is_grad_enabled() and x.requires_grad and is_plain(x, at, valid)
    return cast(Tensor, apply(_Margin, x, at, valid, with_slope)[0])


def softmax_pass(
    plain: Plain, gamma: float, smoothing: float, x: Tensor, at: Tensor, valid: Tensor
) -> Tensor:
    """`plain(x, at, valid)`, by `focal.kernels.torch_softmax` in eager mode and compiled."""
    if torch.compiler.is_compiling():
        if smoothing == 0 or torch.compiler.is_exporting() or gamma not in OWN_CODE:
            return plain(x, at, valid)
        # As a tensor, a smoothing that changes does not compile anew.
        return _CompiledPass.apply(x, at, valid, x.new_ones(()) * smoothing, gamma)
    if nests_forward_mode() or not is_plain(x, at, valid):
        return plain(x, at, valid)
    with_slope = torch.is_grad_enabled() and x.requires_grad
    return cast(Tensor, apply(_Pass, x, at, valid, plain, gamma, smoothing, with_slope)[0])


class _Margin(torch.autograd.Function):
    """`focal.core.softmax.margin` of logits (..., K), and dz/dx for the first backward pass."""

    @staticmethod
    def forward(x: Tensor, at: Tensor, valid: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
        if not with_slope:
            return by_rows(lambda *rows: softmax.margin(xp, *rows)[0], x, at, valid), x.new_empty(0)

        def block(x: Tensor, at: Tensor, valid: Tensor, slope: Tensor) -> Tensor:
            z, odds = softmax.margin(xp, x, at, valid)
            slope.copy_(_slope(odds, at))
            return z

        slope = torch.empty_like(x, memory_format=torch.contiguous_format)
        return by_rows(block, x, at, valid, slope), slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *operands, with_slope = inputs
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)
        ctx.slope = output[1].detach() if with_slope else None
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, at, valid = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        slope, ctx.slope = ctx.slope, None
        if slope is not None and not torch.is_grad_enabled() and is_plain(grad):
            return slope.mul_(grad[..., None]), None, None, None

        # A second backward pass, or one that is itself differentiated.
        def scaled(x: Tensor, at: Tensor, valid: Tensor, grad: Tensor) -> Tensor:
            return _slope(softmax.margin(xp, x, at, valid)[1], at) * grad[..., None]

        return by_rows(scaled, x, at, valid, grad), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, tuple[int, None]]:
        x, at, valid, _ = batch_first(info.batch_size, in_dims, operands)
        return _Margin.apply(x, at, valid, False), (0, None)

    @staticmethod
    def jvp(ctx: Any, dx: Any, *_: Any) -> tuple[Tensor, None]:
        x, at, valid = ctx.saved_tensors
        slope = _slope(softmax.margin(xp, x, at, valid)[1], at)
        return torch.sum(slope * dx, -1), None


def _slope(odds: Tensor, at: Tensor) -> Tensor:
    """dz/dx."""
    return softmax.margin_grad(xp, odds, at, torch.ones_like(odds[..., 0]))


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


class _Pass(torch.autograd.Function):
    """The loss of each row, and its derivative for the first backward pass.

    What is differentiated again, or forward, is the plain formula.
    """

    @staticmethod
    def forward(
        x: Tensor,
        at: Tensor,
        valid: Tensor,
        plain: Plain,
        gamma: float,
        smoothing: float,
        with_slope: bool,
    ) -> tuple[Tensor, Tensor]:
        buffers: list[Tensor] = []

        def block(x: Tensor, at: Tensor, valid: Tensor, *slope: Tensor) -> Tensor:
            needed = (4 if smoothing else 1) - len(slope)
            buffers.extend(torch.empty_like(x) for _ in range(needed - len(buffers)))
            memory = [*(b[: len(x)] for b in buffers), *slope]
            if smoothing == 0:
                return torch_softmax.labeled(xp, x, at, valid, gamma, memory, with_slope)
            return torch_softmax.smoothed(xp, x, at, valid, gamma, smoothing, memory)[0]

        if not with_slope:
            return by_rows(block, x, at, valid), x.new_empty(0)
        slope = torch.empty_like(x, memory_format=torch.contiguous_format)
        return by_rows(block, x, at, valid, slope), slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.plain, *ctx.numbers, with_slope = inputs[3:]
        ctx.slope = output[1].detach() if with_slope else None
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, at, valid = ctx.saved_tensors
        slope, ctx.slope = ctx.slope, None
        by_x = None
        if grad is not None and torch.is_grad_enabled():
            by_x = torch.func.vjp(lambda x: ctx.plain(x, at, valid), x)[1](grad)[0]
        elif grad is not None:
            if slope is None:  # a second backward pass
                gamma, smoothing = ctx.numbers
                slope = _Pass.forward(x, at, valid, ctx.plain, gamma, smoothing, True)[1]
            by_x = slope.mul_(grad[..., None]) if is_plain(grad) else slope * grad[..., None]
        return by_x, *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, tuple[int, None]]:
        x, at, valid, plain, *_ = batch_first(info.batch_size, in_dims, operands)
        return (plain(x, at, valid), x.new_empty(0)), (0, None)

    @staticmethod
    def jvp(ctx: Any, dx: Any, *_: Any) -> tuple[Tensor, None]:
        x, at, valid = ctx.saved_tensors
        return pushforward(lambda x: ctx.plain(x, at, valid), [x], [dx]), None


class _CompiledPass(torch.autograd.Function):
    """The smoothed loss for `torch.compile`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, at: Tensor, valid: Tensor, smoothing: Tensor, gamma: float
    ) -> Tensor:
        ctx.save_for_backward(x, at, valid, smoothing)
        ctx.gamma = gamma
        return torch_softmax.smoothed(xp, x, at, valid, gamma, smoothing, torch_softmax.NEW)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, at, valid, smoothing = ctx.saved_tensors
        operands = (xp, x, at, valid, ctx.gamma, smoothing, torch_softmax.NEW)
        slope = torch_softmax.smoothed(*operands)[1]
        return slope * grad[..., None], None, None, None, None
