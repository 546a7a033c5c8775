"""The library's own loss at every number of a type, against the reference.

A margin w stands for two logits: w with target 0 and -w with target 1, which have the same loss
and, but for the sign, the same gradient. So the reference is the core's formula for target 0 at
w, times alpha or 1 - alpha, and a sweep over all w is one over all logits with both targets.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focal.core.formulas import SigmoidFocal
from focal.numpy._namespace import xp
from focal.testing.frameworks import FRAMEWORKS, Framework
from focal.testing.ulp import LIMITS, allowed_ulp

CHUNK = {"numpy": 1 << 12}
"""Logits evaluated at once, by default 2^17, so that the calls cost little; in NumPy few, so that
the temporary arrays stay in the cache."""
BLOCK = 1 << 14
"""Margins compared at once: a dozen float64 arrays of them stay in the cache."""
EXPONENT = np.int64(0x7FF << 52)
TARGETS = (0, 1)

Both = Callable[[Any, Any], tuple[Any, Any]]


class Settings(NamedTuple):
    """The loss, the framework and the logits of a sweep."""

    backend: str
    dtype: str
    gammas: tuple[float, ...]
    alpha: float | None
    stride: int
    compiled: bool = False
    """By `torch.compile`; the other frameworks compile in any case."""


@dataclass
class Tally:
    """Errors of the loss, or of the gradient, at one gamma.

    Attributes:
        ulp: Largest error of a result that is a normal number (in float16: any).
        logit: The logit of that result.
        target: Its target, 0 or 1.
        beyond: Results below the smallest normal number with an error larger than it.
        flushed: Results below it that are flushed to zero.
        not_finite: Results that are NaN or infinite at a finite logit.
        nan_lost: Results that are not NaN at a NaN logit.
        limit_missed: Results at an infinite logit that are not the limit; where the limit is
            infinite, the largest finite number is accepted.
    """

    ulp: float = 0.0
    logit: float = 0.0
    target: int = 0
    beyond: int = 0
    flushed: int = 0
    not_finite: int = 0
    nan_lost: int = 0
    limit_missed: int = 0

    def add(self, other: Tally) -> None:
        """Add the errors of other logits."""
        if (other.ulp, other.logit, other.target) > (self.ulp, self.logit, self.target):
            self.ulp, self.logit, self.target = other.ulp, other.logit, other.target
        for count in ("beyond", "flushed", "not_finite", "nan_lost", "limit_missed"):
            setattr(self, count, getattr(self, count) + getattr(other, count))

    def passed(self, bound: float) -> bool:
        """Whether all results are within the bound, and finite or NaN where they should be."""
        wrong = self.beyond + self.not_finite + self.nan_lost + self.limit_missed
        return self.ulp <= bound and wrong == 0


def patterns(settings: Settings) -> int:
    """Number of bit patterns in a sweep."""
    bits = 32 if settings.dtype == "float32" else 16
    return -(-(1 << bits) // settings.stride)


@np.errstate(invalid="ignore", over="ignore")  # signaling NaNs and infinities are logits here
def sweep(settings: Settings, first: int, last: int) -> list[tuple[Tally, Tally]]:
    """Loss and gradient, for each gamma, at the patterns first to last - 1 of a sweep."""
    framework = FRAMEWORKS[settings.backend]()
    own = [
        own_loss(framework, settings.alpha, gamma, settings.compiled) for gamma in settings.gammas
    ]
    tallies = [(Tally(), Tally()) for _ in own]
    chunk = CHUNK.get(settings.backend, 1 << 17)
    for begin in range(first, last, chunk):
        bits = _bits(settings, begin, min(begin + chunk, last))
        margins = _numbers(bits, settings.dtype)
        # Logits w with target 0, then -w with target 1.
        logits = _numbers(np.concatenate([bits, bits ^ _sign(bits)]), settings.dtype)
        targets = np.repeat(np.array(TARGETS, np.float32), len(bits))
        x, y = (framework.asarray(a, settings.dtype) for a in (logits, targets))
        for function, gamma, seen in zip(own, settings.gammas, tallies, strict=True):
            results = [framework.numpy(r).reshape(2, -1) for r in function(x, y)]
            for start in range(0, len(bits), BLOCK):
                block = slice(start, start + BLOCK)
                got = [r[:, block] for r in results]
                _compare(got, margins[block].astype(np.float64), settings, gamma, seen)
    return tallies


def own_loss(
    framework: Framework, alpha: float | None, gamma: float, compiled: bool = False
) -> Both:
    """The library's sigmoid focal loss and its gradient, as its users compile them."""
    focal: Any = importlib.import_module(f"focal.{framework.name}")

    def loss(x: Any, y: Any) -> Any:
        return focal.sigmoid_focal_loss(x, y, alpha, gamma)

    if framework.name == "numpy":
        return lambda x, y: (loss(x, y), focal.sigmoid_focal_loss_grad(x, y, alpha, gamma))
    if compiled:
        torch: Any = importlib.import_module("torch")
        loss = torch.compile(loss, fullgraph=True)
    both = functools.partial(framework.value_and_gradient, loss)
    if framework.name == "tensorflow":
        tf: Any = importlib.import_module("tensorflow")
        return tf.function(both, autograph=False, reduce_retracing=True)
    return framework.compiled(both)


def _bits(settings: Settings, first: int, last: int) -> NDArray[Any]:
    """The patterns of the margins."""
    kind = np.uint32 if settings.dtype == "float32" else np.uint16
    return (np.arange(first, last, dtype=np.int64) * settings.stride).astype(kind)


def _sign(bits: NDArray[Any]) -> Any:
    """The pattern of the sign bit."""
    return bits.dtype.type(1 << (8 * bits.itemsize - 1))


def _numbers(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The numbers that the patterns stand for."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype)


def _compare(
    got: list[NDArray[Any]],
    margins: NDArray[np.float64],
    settings: Settings,
    gamma: float,
    seen: tuple[Tally, Tally],
) -> None:
    """Loss and gradient of a block of margins, a row of each per target."""
    finite = np.isfinite(margins)
    if not finite.all():
        _compare_specials([r[:, ~finite] for r in got], margins[~finite], settings, seen)
        got, margins = [r[:, finite] for r in got], margins[finite]
        if not len(margins):
            return
    reference = SigmoidFocal(None, gamma).background_and_grad(xp, margins)
    bound = allowed_ulp(settings.dtype, gamma)
    for target, weight in zip(TARGETS, _weights(settings.alpha), strict=True):
        # The margin of a positive is -x, so its gradient has the other sign.
        rows = got[0][target], -got[1][target] if target else got[1][target]
        for row, exact, tally in zip(rows, reference, seen, strict=True):
            exact = exact if weight == 1 else exact * weight
            _compare_row(row, exact, margins, target, settings.dtype, bound, tally)


def _compare_row(
    got: NDArray[Any],
    exact: NDArray[np.float64],
    margins: NDArray[np.float64],
    target: int,
    dtype: str,
    bound: float,
    tally: Tally,
) -> None:
    epsilon, tiny, may_flush = LIMITS[dtype]
    error = np.abs(got - exact)
    scale = (exact.view(np.int64) & EXPONENT).view(np.float64)  # 2^floor(log2(exact))
    # A result within its error of the smallest normal number may come out below it.
    threshold = tiny * (1 + (1 + bound) * epsilon)
    if exact.min() < threshold:
        if may_flush:
            small = exact < threshold
            tally.beyond += int((small & (error > threshold)).sum())
            tally.flushed += int((small & (got == 0) & (exact > tiny * epsilon / 2)).sum())
            error[small & np.isfinite(error)] = 0
        scale = np.maximum(scale, tiny)
    error /= scale
    at = error.argmax()  # that of a NaN, if there is one
    if not np.isfinite(error[at]):
        finite = np.isfinite(got)
        tally.not_finite += int((~finite).sum())
        error[~finite] = 0
        at = error.argmax()
    logit = -margins[at] if target else margins[at]
    tally.add(Tally(float(error[at] / epsilon), float(logit), target))


def _compare_specials(
    got: list[NDArray[Any]],
    margins: NDArray[np.float64],
    settings: Settings,
    seen: tuple[Tally, Tally],
) -> None:
    """NaN stays NaN. At -inf loss and gradient are 0; at inf the loss is inf, its slope 1."""
    nan = np.isnan(margins)
    right, wrong = margins == -np.inf, margins == np.inf
    greatest = np.finfo(np.float16 if settings.dtype == "float16" else np.float32).max
    for target, weight in zip(TARGETS, _weights(settings.alpha), strict=True):
        loss, slope = got[0][target], -got[1][target] if target else got[1][target]
        for values, tally in ((loss, seen[0]), (slope, seen[1])):
            tally.nan_lost += int((~np.isnan(values[nan])).sum())
            tally.limit_missed += int((values[right] != 0).sum())
        # Half a percent, because the greatest bfloat16 is below the greatest float32.
        least = 0.995 * weight * float(greatest)
        seen[0].limit_missed += int((~(loss[wrong] >= least)).sum()) if weight else 0
        close = np.abs(slope[wrong] - weight) <= 2 * LIMITS[settings.dtype].epsilon * weight
        seen[1].limit_missed += int((~close).sum())


def _weights(alpha: float | None) -> tuple[float, float]:
    """The factor of target 0 and of target 1."""
    return (1.0, 1.0) if alpha is None else (1 - alpha, alpha)
