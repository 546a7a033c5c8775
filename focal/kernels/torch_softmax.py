"""Softmax focal loss in PyTorch: loss and derivative of all classes at once.

With e_k = exp(x_k - max x), T = sum(e) - 1 and S = 1 + T, the focal loss of class k as the label is

    FL_k = m_k^gamma n_k,    m_k = 1 - p_k = (T + (1 - e_k)) / S,    n_k = -log p_k,

and with label smoothing s the loss is L = (1 - s) FL_c + s / K sum_k FL_k, with H = sum_k h_k,

    dFL_k/dx_j = h_k (p_j - [j = k]),    h_k = m_k^(gamma - 1) (gamma p_k n_k + m_k),
    dL/dx_j = (1 - s) h_c (p_j - [j = c]) + s / K (p_j H - h_j).

That is one exponential per logit and one logarithm per row. T is summed without the greatest e_k,
which is 1, so that no digit of a small m_k is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focal.core.formulas import SigmoidFocal
from focal.core.namespace import Namespace
from focal.kernels.torch_cpu import Everywhere, few_calls

__all__ = ["NEW", "labeled", "smoothed"]

Buffers = Sequence[Tensor | None]
NEW = (None,) * 4


def labeled(
    xp: Namespace,
    x: Tensor,
    at: Tensor,
    valid: Tensor,
    gamma: float,
    buffers: Sequence[Tensor],
    with_slope: bool,
) -> Tensor:
    """The loss of each row of logits (..., K) without smoothing, by `focal.core.softmax.margin`.

    The only buffer is memory like x to work in, which becomes dFL/dx.
    """
    (odds,) = buffers
    limits = torch.finfo(x.dtype)
    odds = xp.keep_rows(torch.clamp(x, -limits.max / 4, limits.max / 4, out=odds), valid)
    at = at[..., None].long()
    own = torch.gather(odds, -1, at)
    odds.scatter_(-1, at, limits.min)
    top = torch.amax(odds, -1, keepdim=True)
    total = torch.sum(odds.sub_(top).exp_(), -1, keepdim=True)
    z = own.sub_(top).sub_(torch.log(total))
    value, slope = few_calls(SigmoidFocal(None, gamma), z, Everywhere(), with_slope)
    if slope is not None:
        odds.mul_(slope / -total).scatter_(-1, at, slope)
    return value[..., 0]


def smoothed(
    xp: Namespace, x: Tensor, at: Tensor, valid: Tensor, gamma: float, s: Any, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """L of each row of logits (..., K), float32 or float64, and dL/dx.

    The rows that are not valid count as zeros. The buffers are memory like x to work in, or None;
    the last one becomes dL/dx.
    """
    a, b, c, d = buffers
    limits = torch.finfo(x.dtype)
    logs = xp.keep_rows(torch.clamp(x, -limits.max / 4, limits.max / 4, out=a), valid)
    at = at[..., None].long()
    top = torch.amax(logs, -1, keepdim=True)
    own = torch.gather(logs, -1, at) - top
    logs = torch.sub(logs, top, out=a)
    e = torch.exp(logs, out=b)
    whole = torch.floor(e, out=c)  # 1 for the greatest, else 0
    ties = torch.sum(whole, -1, keepdim=True) - 1
    rest = torch.sum(torch.sub(e, whole, out=c), -1, keepdim=True) + ties
    rest = torch.clamp(rest, min=limits.smallest_normal)
    row = 1 / (1 + rest), rest / (1 + rest), torch.log1p(rest)
    share = s / x.shape[-1]

    losses, h, p, _ = _classes(logs, e, row, gamma, buffers)
    own_loss, own_h, own_p, own_m = _classes(own, torch.exp(own), row, gamma, NEW)
    value = (1 - s) * own_loss + share * torch.sum(losses, -1, keepdim=True)
    total = share * torch.sum(h, -1, keepdim=True)
    at_label = own_p * total - (share + (1 - s) * own_m) * own_h
    slope = torch.mul(p, total + (1 - s) * own_h, out=d)
    slope = torch.sub(slope, torch.mul(h, share, out=c), out=d)
    if torch.compiler.is_compiling():  # in the same loop
        classes = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        return value[..., 0], torch.where(classes == at.int(), at_label, slope)
    return value[..., 0], slope.scatter_(-1, at, at_label)


def _classes(
    logs: Tensor, e: Tensor, row: Sequence[Tensor], gamma: float, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FL, h, p and m (gone where there are buffers), given 1 / S, T / S and log S."""
    a, b, c, d = buffers
    unit, rest, log_sum = row
    p = torch.mul(e, unit, out=b)
    m = torch.add(torch.sub(unit, p, out=c), rest, out=c)
    n = torch.sub(log_sum, logs, out=a)
    if gamma == 2:  # the usual case, without a division
        less = torch.mul(n, m, out=a)
        loss = torch.mul(less, m, out=d)
        bend = torch.mul(less, p, out=a)
        return loss, torch.add(torch.mul(m, m, out=c), bend, alpha=2, out=c), p, m
    factor = torch.sqrt(m, out=d) if gamma == 0.5 else torch.pow(m, gamma, out=d)
    bend = torch.mul(torch.div(n, m, out=c), p, out=c)
    bend = torch.add(torch.mul(bend, gamma, out=c), 1, out=c)
    return torch.mul(n, factor, out=a), torch.mul(bend, factor, out=c), p, m
