"""The focal loss and its derivative in float32, as operations that inductor turns into a fast loop.

The formulas are those of `SigmoidFocal`, `Sparse` and `Positive` in `focal.core.formulas`; a target
known to be 0 or 1 takes the shorter one of `focal.kernels.torch_cpu`. For `torch.compile` on a CPU:

- log(1 + e) is a polynomial, because the vector routine for `log1p` takes half the time of a loop;
- the exponential is that of -|x|, and nothing is selected before it: a `where` there can double the
  time of the loop;
- there is one division, and another one only for an exponent other than 0, 1 and 2.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from focal.core.formulas import Positive, SigmoidFocal, Sparse, alpha_factor, power
from focal.core.logarithm import log1p_to_one
from focal.core.namespace import Namespace
from focal.core.parameters import is_number

__all__ = ["takes", "value_and_grad"]

Focal = SigmoidFocal | Sparse | Positive

LIMITS = torch.finfo(torch.float32)


def takes(formula: Any, x: Tensor) -> bool:
    """Whether these are a formula and logits for `value_and_grad`.

    An exported program is differentiated operation by operation, which would be wrong at 0.
    """
    fits = isinstance(formula, SigmoidFocal | Sparse | Positive) and x.dtype != torch.float64
    return fits and x.device.type == "cpu" and not torch.compiler.is_exporting()


def value_and_grad(
    xp: Namespace, formula: Focal, x: Tensor, t: Tensor | float
) -> tuple[Tensor, Tensor]:
    """FL and dFL/dx of logits in float32; the targets are those of the formula, of any type."""
    if isinstance(formula, Positive):
        value, slope = _hard(
            xp, formula.formula, -x, torch.zeros((), dtype=torch.bool, device=x.device)
        )
        return value, -slope
    y = cast(Tensor, t)
    if isinstance(formula, Sparse):
        labels = y.to(torch.int32)[..., None]
        y = labels == torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        both = value_and_grad(xp, formula.formula, x, y)
        value, slope = (torch.where(labels >= -1, a, 0.0) for a in both)
        return value, slope
    if y.dtype.is_floating_point or not (is_number(formula.smoothing) and formula.smoothing == 0):
        return _soft(xp, formula, x, y.to(x.dtype))
    return _hard(xp, formula, x, y != 0)


def _hard(xp: Namespace, loss: SigmoidFocal, x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """For targets of 0 and 1."""
    size, e, larger, log = _shared(x)
    wrong = (x > 0) != positive
    m, rest = torch.where(wrong, larger, e * larger), torch.where(wrong, e * larger, larger)
    ce = torch.where(wrong, size, 0.0) + log
    factor = power(xp, m, loss.gamma)
    if loss.alpha is not None:
        alpha: Any = loss.alpha
        factor = factor * torch.where(positive, alpha, 1 - alpha)
    slope = factor * (cast(Any, loss.gamma) * rest * ce + m)
    return factor * ce, torch.where(positive, -slope, slope)


def _soft(xp: Namespace, loss: SigmoidFocal, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For targets between 0 and 1."""
    size, e, larger, log = _shared(x)
    y = loss.smoothed(y)
    right = x >= 0
    s, w = e * larger, torch.where(right, 1 - y, y)
    ce = w * size + log
    away = 1 - 2 * w
    m = w + s * away
    gamma: Any = loss.gamma
    if is_number(gamma) and gamma in (1, 2):  # m^(gamma - 1) is a factor of both terms
        factor, value = power(xp, m, gamma - 1), m * ce
        slope = m * (w - s) - s * larger * (gamma * away) * ce
    else:
        m = torch.clamp(m, min=LIMITS.smallest_normal)
        factor, value = power(xp, m, gamma), ce
        slope = (w - s) - s * larger / m * (gamma * away) * ce
    if loss.alpha is not None:
        factor = factor * cast(Any, alpha_factor(xp, loss.alpha, y))
    slope = factor * slope
    return factor * value, torch.where(right, slope, -slope)


def _shared(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|x|, finite so that 0 times it is 0, e = exp(-|x|), 1 / (1 + e) and log(1 + e)."""
    size = torch.clamp(torch.abs(x), max=LIMITS.max)
    e = torch.exp(-size)
    return size, e, 1 / (1 + e), log1p_to_one(e)
