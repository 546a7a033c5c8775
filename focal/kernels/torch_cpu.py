"""The focal loss and its derivative in PyTorch on a CPU, in place in buffers that fit the cache.

For hard targets the loss depends on one number, the logit counted towards the wrong side:
`w = x` for y = 0 and `w = -x` for y = 1. With m = sigmoid(w) and p_t = sigmoid(-w),

    FL = a m^gamma softplus(w),    dFL/dw = a m^gamma (gamma p_t softplus(w) + m).

This is half the work of the formulas for targets between 0 and 1 in `focal.core.formulas`,
which it equals, and to which a block with such targets is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focal.core.formulas import SigmoidFocal, Sparse
from focal.core.namespace import Namespace

__all__ = ["BlockPass"]


class BlockPass:
    """Loss and derivative of one block of logits after another.

    Args:
        xp: The array namespace of PyTorch.
        formula: `SigmoidFocal`, for targets like the logits, or that in `Sparse`, for labels.
        size: Logits in the largest block.
        like: A tensor of the type to compute in.
    """

    def __init__(
        self, xp: Namespace, formula: SigmoidFocal | Sparse, size: int, like: Tensor
    ) -> None:
        self.xp = xp
        self.formula = formula
        self.buffers = [like.new_empty(size) for _ in range(5)]

    def __call__(
        self, x: Tensor, t: Tensor, value: Tensor | None = None, slope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """FL and dFL/dx, written to `value` and `slope`, or to a buffer where one is not given."""
        scratch = [buffer[: x.numel()].view(x.shape) for buffer in self.buffers]
        value = scratch.pop() if value is None else value
        slope = scratch.pop() if slope is None else slope
        if isinstance(self.formula, Sparse):
            self._sparse(x, t, value, slope, scratch)
        else:
            self._dense(x, t, value, slope, scratch)
        return value, slope

    def _dense(
        self, x: Tensor, y: Tensor, value: Tensor, slope: Tensor, scratch: list[Tensor]
    ) -> None:
        sign, *scratch = scratch
        torch.add(x.new_ones(()), y, alpha=-2, out=sign)
        if torch.abs(sign, out=slope).amin() == 1:
            wrong = torch.mul(x, sign, out=value)
            _margin_pass(self.formula, wrong, y, value, slope, scratch)
            slope.mul_(sign)
        else:
            plain = self.formula.value_and_grad(self.xp, x, y)
            value.copy_(plain[0])
            slope.copy_(plain[1])

    def _sparse(
        self, x: Tensor, labels: Tensor, value: Tensor, slope: Tensor, scratch: list[Tensor]
    ) -> None:
        loss = self.formula.formula
        _margin_pass(loss, x, None, value, slope, scratch)
        # One logit a row by the formula for any target: that of the label, or else of class 0.
        at = labels.clamp(min=0).long()[:, None]
        y_at = (labels >= 0).to(x.dtype)[:, None]
        value_at, slope_at = loss.value_and_grad(self.xp, x.gather(1, at), y_at)
        value.scatter_(1, at, value_at)
        slope.scatter_(1, at, slope_at)
        ignored = torch.nonzero(labels < -1)[:, 0]
        value.index_fill_(0, ignored, 0)
        slope.index_fill_(0, ignored, 0)


def _margin_pass(
    loss: SigmoidFocal,
    wrong: Tensor,
    y: Tensor | None,
    value: Tensor,
    slope: Tensor,
    scratch: list[Tensor],
) -> None:
    """FL and dFL/dw of margins w, which may stand in `value`; y None is 0."""
    m, ce = scratch[:2]
    torch.sigmoid(wrong, out=m)
    p_t = torch.neg(wrong, out=slope).sigmoid_()
    # softplus(w) = max(w, 0) - log(1 - min(m, p_t)); an infinite one must not meet p_t = 0.
    torch.minimum(m, p_t, out=ce).neg_().log1p_()
    torch.clamp(wrong, 0, torch.finfo(wrong.dtype).max, out=value).sub_(ce)
    torch.add(m, p_t.mul_(value), alpha=loss.gamma, out=slope)
    for factor in _factors(loss, m, y, ce):
        value.mul_(factor)
        slope.mul_(factor)


def _factors(
    loss: SigmoidFocal, m: Tensor, y: Tensor | None, spare: Tensor
) -> list[Tensor | float]:
    """The factor a m^gamma in the memory of m, or what of it is not 1."""
    if loss.gamma == 0.5:
        m.sqrt_()
    elif loss.gamma == 2:
        m.mul_(m)
    elif loss.gamma not in (0, 1):
        m.pow_(loss.gamma)
    power = [] if loss.gamma == 0 else [m]
    if loss.alpha is None:
        return power
    if y is None:
        share: Tensor | float = 1 - loss.alpha
    elif loss.alpha < 0.25:  # from the end where nothing cancels
        torch.sub(m.new_ones(()), y, out=spare)
        share = torch.add(m.new_tensor(loss.alpha), spare, alpha=1 - 2 * loss.alpha, out=spare)
    else:
        share = torch.add(m.new_tensor(1 - loss.alpha), y, alpha=2 * loss.alpha - 1, out=spare)
    return [m.mul_(share)] if power else [share]
