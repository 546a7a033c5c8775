"""A Triton kernel of the focal loss as it is usually written, for comparison.

Forward and backward compute the power of `1 - p_t` with `pow`, the backward pass twice, and atomic
additions make the sum, whose rounding differs from run to run. Where `1 - p_t` rounds to 0, the
gradient has `pow(0, gamma - 1)`, which is infinite for gamma below 1: times 0 it is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

BLOCK = 1024
COMPILED = not triton.knobs.runtime.interpret
"""The interpreter does not have CUDA's library."""


class UsualFocal(torch.autograd.Function):
    """The sum over all logits, for targets like the logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
        """The sum, in float32."""
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, y)
        ctx.parameters = alpha, gamma
        blocks = (triton.cdiv(x.numel(), BLOCK),)
        _forward[blocks](x, y, total, x.numel(), alpha, gamma, COMPILED, BLOCK)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in the logits."""
        x, y = ctx.saved_tensors
        slope = torch.empty_like(x)
        blocks = (triton.cdiv(x.numel(), BLOCK),)
        _backward[blocks](x, y, upstream, slope, x.numel(), *ctx.parameters, COMPILED, BLOCK)
        return slope, None, None, None


@triton.jit
def _power(base, exponent, COMPILED: tl.constexpr):
    if COMPILED:
        return libdevice.pow(base, exponent)
    else:
        return tl.exp2(exponent * tl.log2(base))


@triton.jit
def _parts(x, y, at, n, alpha):
    inside = at < n
    x = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.sigmoid(x)
    ce = tl.maximum(x, 0.0) - x * y + tl.log(1 + tl.exp(-tl.abs(x)))
    rest = 1 - (p * y + (1 - p) * (1 - y))
    balance = alpha * y + (1 - alpha) * (1 - y)
    return inside, y, p, ce, rest, balance


@triton.jit
def _forward(x, y, total, n, alpha, gamma, COMPILED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, _, _, ce, rest, balance = _parts(x, y, at, n, alpha)
    loss = balance * ce * _power(rest, gamma, COMPILED)
    tl.atomic_add(total, tl.sum(tl.where(inside, loss, 0.0)))


@triton.jit
def _backward(x, y, upstream, slope, n, alpha, gamma, COMPILED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, y, p, ce, rest, balance = _parts(x, y, at, n, alpha)
    bend = (1 - 2 * y) * p * (1 - p)
    change = gamma * _power(rest, gamma - 1, COMPILED) * bend * ce
    change += _power(rest, gamma, COMPILED) * (p - y)
    tl.store(slope + at, balance * change * tl.load(upstream), mask=inside)
