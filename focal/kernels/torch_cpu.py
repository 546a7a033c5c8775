"""The focal loss and its derivative in PyTorch on a CPU, in place in buffers that fit the cache.

For hard targets the loss depends on one number, the logit counted toward the wrong side:
`w = x` for y = 0 and `w = -x` for y = 1. With m = sigmoid(w) and p_t = sigmoid(-w),

    FL = a m^gamma softplus(w),    dFL/dw = a m^gamma (gamma p_t softplus(w) + m).

Label smoothing s moves every target by e = s / 2 toward the other side. With p = sigmoid(w),

    m = e + (1 - 2 e) p,    ce = softplus(w) - e w,
    FL = a m^gamma ce,      dFL/dw = a m^gamma (gamma (1 - 2 e) (p (1 - p) / m) ce + p - e).

This is half the work of the formulas for targets between 0 and 1 in `focal.core.formulas`, with
the same results; blocks with such targets use those formulas. Where positives are rare, as in
detection, they are handled by index instead of by a mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from focal.core.formulas import Positive, SigmoidFocal, Sparse
from focal.core.namespace import Formula, Namespace

__all__ = ["Everywhere", "Kernels", "few_calls"]

Hard = SigmoidFocal | Sparse | Positive

FEW = 1 << 12
"""The number of logits up to which the calls take longer than the arithmetic."""
BLOCK = 3 << 17
"""Logits per block: larger blocks do not fit the cache, smaller ones spend time in Python."""
STRIP = 128
"""Targets per strip in the search for positives: the maximum of each is cheaper than `nonzero`."""
RARE = 1 / 64
"""The share of positives up to which they are listed."""
WORTH_LISTING = 1 << 15
"""The number of targets from which on listing saves time."""


class Kernels:
    """The functions of `focal.kernels.torch_triton` and `few`, for operands of any type on a CPU.

    A formula is `SigmoidFocal`, for targets like the logits, that in `Sparse`, for labels, or that
    in `Positive`, whose target is the number 1.

    Args:
        xp: The array namespace of PyTorch.
    """

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    def few(
        self, formula: Hard, x: Tensor, t: Tensor | float, with_slope: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """FL and dFL/dx in a wide type and in as few calls as possible: for up to FEW logits."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x if x.dtype == wide else x.to(wide)
        if isinstance(formula, Sparse) and isinstance(t, Tensor):
            value, slope = self.few(formula.formula, x, _one_hot(t, x), with_slope)
            ignored = (t < -1)[..., None]
            for values in (value, slope):
                if values is not None:
                    values.masked_fill_(ignored, 0)
            return value, slope
        if isinstance(formula, SigmoidFocal) and isinstance(t, Tensor):
            t = t if t.dtype == wide else t.to(wide)
            if formula.smoothing == 0 and torch.equal(t * t, t):
                return few_calls(formula, x, _Masked.of(t), with_slope)
        loss: Formula = formula
        if with_slope:
            return loss.value_and_grad(self.xp, x, t)
        return loss.value(self.xp, x, t), None

    def value(
        self, formula: Hard, x: Tensor, t: Tensor | float, out: Tensor | None = None
    ) -> Tensor:
        """FL of every logit.

        Args:
            formula: The formula.
            x: Logits: any number of them, or (rows, classes) for labels.
            t: Targets, a label for each row, or 1.
            out: Where it is written to, contiguous and like x. Default: a new tensor.
        """
        out = torch.empty_like(x) if out is None else out
        flat = out.view(-1)
        for here, value, _ in self._blocks(formula, x, t, value=flat):
            if value.dtype != out.dtype:
                flat[here] = value
        return out

    def slope(
        self,
        formula: Hard,
        x: Tensor,
        t: Tensor | float,
        scale: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """dFL/dx * scale; `scale` is a scalar, or one number for each logit."""
        out = torch.empty_like(x) if out is None else out
        flat = out.view(-1)
        scale = scale.reshape(-1) if scale.ndim else scale
        for here, _, slope in self._blocks(formula, x, t, slope=flat):
            slope.mul_(scale[here] if scale.ndim else scale)
            if slope.dtype != out.dtype:
                flat[here] = slope
        return out

    def total(self, formula: Hard, x: Tensor, t: Tensor | float) -> Tensor:
        """The sum of FL, in float32 or better."""
        sums = [value.sum() for _, value, _ in self._blocks(formula, x, t)]
        return torch.stack(sums).sum()

    def total_and_slope(
        self, formula: Hard, x: Tensor, t: Tensor | float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of FL and dFL/dx in one pass, for logits of float32 or better."""
        out = torch.empty_like(x) if out is None else out
        sums = [value.sum() for _, value, _ in self._blocks(formula, x, t, slope=out.view(-1))]
        return torch.stack(sums).sum(), out

    def _blocks(
        self,
        formula: Hard,
        x: Tensor,
        t: Tensor | float,
        value: Tensor | None = None,
        slope: Tensor | None = None,
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each block of logits in turn: where it is, FL and dFL/dx.

        The results are in `value` and `slope` where these are given and have the type to compute
        in, and otherwise in memory that the next block reuses.
        """
        loss = formula if isinstance(formula, SigmoidFocal) else formula.formula
        sparse = isinstance(formula, Sparse)
        wide = torch.promote_types(x.dtype, torch.float32)
        classes = x.shape[1] if sparse else 1
        rows = max(1, BLOCK // classes)
        buffers: list[Tensor] = []
        listed = None
        if isinstance(t, Tensor):
            listed = _labeled(t, classes) if sparse else _rare(t)
        for start in range(0, len(x), rows):
            xb = x[start : start + rows].to(wide).reshape(-1)
            tb = t[start : start + rows] if isinstance(t, Tensor) else xb.new_ones(())
            here = slice(start * classes, start * classes + len(xb))
            scratch = _scratch(buffers, xb)
            v = value[here] if value is not None and value.dtype == wide else next(scratch)
            s = slope[here] if slope is not None and slope.dtype == wide else next(scratch)
            m, ce = next(scratch), next(scratch)
            positives: _Listed | _Masked | Everywhere | None
            if isinstance(formula, Positive):
                positives = Everywhere()
            elif listed is not None:
                positives = listed.within(here)
            else:
                hard = tb.to(wide)
                is_hard = torch.equal(torch.mul(hard, hard, out=m), hard)
                positives = _Masked.of(hard, next(scratch)) if is_hard else None
            if positives is not None:
                _margin_pass(loss, xb, positives, v, s, m, ce)
            else:
                plain = loss.value_and_grad(self.xp, xb, tb.to(wide))
                v.copy_(plain[0])
                s.copy_(plain[1])
            if sparse:
                ignored = torch.nonzero(tb < -1)[:, 0]
                v.view(-1, classes).index_fill_(0, ignored, 0)
                s.view(-1, classes).index_fill_(0, ignored, 0)
            yield here, v, s


def _scratch(buffers: list[Tensor], like: Tensor) -> Iterator[Tensor]:
    """Buffers like this one, allocated when first needed."""
    for i in itertools.count():
        if i == len(buffers):
            buffers.append(torch.empty_like(like))
        yield buffers[i][: len(like)]


class _Listed(NamedTuple):
    """Positives by their indices, in rising order."""

    at: Tensor

    def within(self, here: slice) -> _Listed:
        """Those of a block, counted from its start."""
        first, last = (int(torch.searchsorted(self.at, end)) for end in (here.start, here.stop))
        return _Listed(self.at[first:last] - here.start)

    def flip(self, values: Tensor) -> None:
        """Change the sign of the positives' values."""
        values.index_copy_(0, self.at, values[self.at].neg_())

    def weighted_power(self, loss: SigmoidFocal, m: Tensor) -> None:
        """The factor a m^gamma in the memory of m."""
        if loss.alpha is None:
            _power(m, loss.gamma)
            return
        alpha, rest = _shares(loss)
        positive = _power(m[self.at], loss.gamma).mul_(alpha)
        if loss.gamma == 2:  # the usual case in one operation
            torch.addcmul(m.new_zeros(()), m, m, value=rest, out=m)
        else:
            _power(m, loss.gamma).mul_(rest)
        m.index_copy_(0, self.at, positive)


class _Masked(NamedTuple):
    """Positives by targets of 0 and 1, and 1 - 2 y."""

    y: Tensor
    sign: Tensor

    @classmethod
    def of(cls, y: Tensor, sign: Tensor | None = None) -> _Masked:
        """Those of targets y, with 1 - 2 y in the memory of `sign` where there is one."""
        return cls(y, torch.sub(_scalar(1, y), y, alpha=2, out=sign))

    def flip(self, values: Tensor) -> None:
        """Change the sign of the positives' values."""
        values.mul_(self.sign)

    def weighted_power(self, loss: SigmoidFocal, m: Tensor) -> None:
        """The factor a m^gamma in the memory of m."""
        _power(m, loss.gamma)
        if loss.alpha is None:
            return
        alpha, rest = _shares(loss)
        if alpha < 0.25:  # starting from the value that does not cancel
            share = torch.add(_scalar(alpha, m), 1 - self.y, alpha=rest - alpha)
        else:
            share = torch.add(_scalar(rest, m), self.y, alpha=alpha - rest)
        m.mul_(share)


class Everywhere(NamedTuple):
    """Positives only, for a formula without alpha."""

    def flip(self, values: Tensor) -> None:
        """Change the sign of the values."""
        values.neg_()

    def weighted_power(self, loss: SigmoidFocal, m: Tensor) -> None:
        """The factor m^gamma in the memory of m."""
        _power(m, loss.gamma)


def _labeled(labels: Tensor, classes: int) -> _Listed:
    """The logits of the labels' classes."""
    rows = torch.nonzero(labels >= 0)[:, 0]
    return _Listed(rows * classes + labels[rows])


def _rare(y: Tensor) -> _Listed | None:
    """The targets of 1, if they are few and all others are 0."""
    if len(y) < WORTH_LISTING:
        return None
    whole = len(y) // STRIP * STRIP
    strips = y[:whole].view(-1, STRIP)
    # Not the sum, where a target out of range could cancel a positive.
    found = torch.nonzero(strips.amax(1))[:, 0]
    if len(found) > RARE * len(y):
        return None
    row, column = torch.nonzero(strips[found], as_tuple=True)
    rest = torch.nonzero(y[whole:])[:, 0] + whole
    at = torch.cat([found[row] * STRIP + column, rest])
    return _Listed(at) if len(at) <= RARE * len(y) and bool((y[at] == 1).all()) else None


def _margin_pass(
    loss: SigmoidFocal,
    x: Tensor,
    positives: _Listed | _Masked | Everywhere,
    value: Tensor,
    slope: Tensor,
    m: Tensor,
    ce: Tensor,
) -> None:
    """FL and dFL/dx of hard targets."""
    # An infinite softplus must not meet p_t = 0.
    largest = torch.finfo(x.dtype).max
    w = torch.clamp(x, -largest, largest, out=value)
    positives.flip(w)
    torch.sigmoid(w, out=m)
    p_t = torch.neg(w, out=slope).sigmoid_()
    # softplus(w) = max(w, 0) - log(1 - min(m, p_t))
    torch.minimum(m, p_t, out=ce).neg_().log1p_()
    e = loss.smoothing / 2
    if e == 0:
        w.clamp_(min=0).sub_(ce)
        torch.addcmul(m, p_t, w, value=loss.gamma, out=slope)
    else:
        # softplus(w) - e w = (1 - e) max(w, 0) + e max(-w, 0) - log(1 - min(p, p_t))
        torch.nn.functional.leaky_relu_(w, -e / (1 - e)).mul_(1 - e).sub_(ce)
        bend = p_t.mul_(m)
        p, m = m, torch.add(_scalar(e, m), m, alpha=1 - 2 * e, out=ce)
        bend.div_(m).mul_(w)
        torch.add(p.sub_(e), bend, alpha=loss.gamma * (1 - 2 * e), out=slope)
    positives.weighted_power(loss, m)
    value.mul_(m)
    slope.mul_(m)
    positives.flip(slope)


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Dense targets of labels; a row without a class has none."""
    positive = (labels >= 0).to(like.dtype)[..., None]
    return torch.zeros_like(like).scatter_(-1, labels.clamp(min=0)[..., None], positive)


def few_calls(
    loss: SigmoidFocal, x: Tensor, positives: _Masked | Everywhere, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """`_margin_pass` of unsmoothed targets, in new memory: fewer calls, but more arithmetic."""
    largest = torch.finfo(x.dtype).max
    w = torch.clamp(x, -largest, largest)
    positives.flip(w)
    m = torch.sigmoid(w)
    ce = torch.nn.functional.logsigmoid(w.neg_()).neg_()
    slope = torch.addcmul(m, w.sigmoid_(), ce, value=loss.gamma) if with_slope else None
    positives.weighted_power(loss, m)
    if slope is not None:
        positives.flip(slope.mul_(m))
    return m.mul_(ce), slope  # in this order, since logsigmoid drops the order of the axes


def _scalar(value: float, like: Tensor) -> Tensor:
    """A number as a tensor, in less time than `new_tensor` takes."""
    return torch.scalar_tensor(value, dtype=like.dtype, device=like.device)


def _shares(loss: SigmoidFocal) -> tuple[float, float]:
    """The factor a of positives and of the others."""
    assert loss.alpha is not None
    alpha, y = loss.alpha, loss.smoothed(1.0)
    return alpha * y + (1 - alpha) * (1 - y), alpha * (1 - y) + (1 - alpha) * y


def _power(m: Tensor, gamma: float) -> Tensor:
    """m^gamma in the memory of m."""
    if gamma == 0.5:
        return m.sqrt_()
    if gamma == 2:
        return m.mul_(m)
    return m if gamma == 1 else m.pow_(gamma)
