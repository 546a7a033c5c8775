"""Softmax focal loss with label smoothing in PyTorch: loss and derivative of all classes at once.

With e_k = exp(x_k - max x), T = sum(e) - 1 and S = 1 + T, the focal loss of class k as the label is

    FL_k = m_k^gamma n_k,    m_k = 1 - p_k = (T + (1 - e_k)) / S,    n_k = -log p_k = log S - log e_k,

and for the smoothed loss L = (1 - s) FL_c + s / K sum_k FL_k, with H = sum_k h_k,

    dFL_k/dx_j = h_k (p_j - [j = k]),    h_k = m_k^(gamma - 1) (gamma p_k n_k + m_k),
    dL/dx_j = (1 - s) h_c (p_j - [j = c]) + s / K (p_j H - h_j).

That is one exponential per logit and one logarithm per row. T is a sum of positive terms (of e_k
without the greatest, which is 1), so that no digit of a small m_k is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from focal.core.namespace import Namespace

__all__ = ["BUFFERS", "smoothed"]

BUFFERS = 4
"""How many buffers like the logits `smoothed` needs; the last one becomes the derivative."""


def smoothed(
    xp: Namespace,
    x: Tensor,
    at: Tensor,
    valid: Tensor,
    gamma: float,
    smoothing: float | Tensor,
    buffers: Sequence[Tensor | None] = (None,) * BUFFERS,
    with_slope: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """L of each row of logits (..., K), and dL/dx.

    Args:
        xp: The array namespace of PyTorch.
        x: Logits, float32 or float64.
        at: (...) classes in [0, K).
        valid: (...) booleans; the logits of other rows count as zeros.
        gamma: The exponent.
        smoothing: The s above.
        buffers: Memory to work in. None: new memory.
        with_slope: Whether to compute dL/dx.
    """
    a, b, c, d = buffers
    limit = torch.finfo(x.dtype).max / 4
    logs = xp.keep_rows(torch.clamp(x, -limit, limit, out=a), valid)
    at = at[..., None].long()
    own = torch.gather(logs, -1, at)
    top = torch.amax(logs, -1, keepdim=True)
    own = own - top
    logs = torch.sub(logs, top, out=a)
    e = torch.exp(logs, out=b)
    whole = torch.floor(e, out=c)  # 1 for the greatest, else 0
    ties = torch.sum(whole, -1, keepdim=True) - 1
    others = torch.sum(torch.sub(e, whole, out=c), -1, keepdim=True) + ties
    others = torch.clamp(others, min=torch.finfo(x.dtype).smallest_normal)
    row = _Row(1 / (1 + others), others / (1 + others), torch.log1p(others))
    share = smoothing / x.shape[-1]

    p, m = row.shares(e, b, c)
    own_p, own_m = row.shares(torch.exp(own), None, None)
    losses, h = _losses(torch.sub(row.log, logs, out=a), p, m, gamma, buffers, with_slope)
    own_loss, own_h = _losses(row.log - own, own_p, own_m, gamma)
    value = (1 - smoothing) * own_loss + share * torch.sum(losses, -1, keepdim=True)
    if not with_slope:
        return value[..., 0], None
    total = share * torch.sum(h, -1, keepdim=True)
    at_label = own_p * total - (share + (1 - smoothing) * own_m) * own_h
    slope = torch.mul(p, total + (1 - smoothing) * own_h, out=d)
    if torch.compiler.is_compiling():  # one loop; as a tensor, `share` is no `alpha`
        classes = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        return value[..., 0], torch.where(classes == at.int(), at_label, slope - share * h)
    slope = torch.sub(slope, h, alpha=share, out=d)
    return value[..., 0], slope.scatter_(-1, at, at_label)


class _Row(NamedTuple):
    """1 / S, T / S and log S of each row."""

    unit: Tensor
    rest: Tensor
    log: Tensor

    def shares(self, e: Tensor, b: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """p and m."""
        p = torch.mul(e, self.unit, out=b)
        m = torch.sub(self.unit, p, out=c)
        return p, torch.add(m, self.rest, out=c)


def _losses(
    n: Tensor,
    p: Tensor,
    m: Tensor,
    gamma: float,
    buffers: Sequence[Tensor | None] = (None,) * BUFFERS,
    with_slope: bool = True,
) -> tuple[Tensor, Tensor]:
    """FL and h; these may take the memory of n and m."""
    a, _, c, d = buffers
    if gamma == 0:
        return n, torch.ones_like(m)
    if gamma in (1, 2):  # no division by m
        less = torch.mul(n, m, out=a) if gamma == 2 else n
        loss = torch.mul(less, m, out=d)
        bend = torch.mul(less, p, out=a)
        square = torch.mul(m, m, out=c) if gamma == 2 else m
        return loss, torch.add(square, bend, alpha=2 if gamma == 2 else 1, out=c)
    factor = torch.sqrt(m, out=d) if gamma == 0.5 else torch.pow(m, gamma, out=d)
    bend = torch.mul(torch.div(n, m, out=c), p, out=c)
    bend = torch.add(torch.mul(bend, gamma, out=c), 1, out=c)
    return torch.mul(n, factor, out=a), torch.mul(bend, factor, out=c)
