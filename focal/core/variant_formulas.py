r"""Variants of focal loss, elementwise: value, first and second derivative.

Notation as in `focal.core.formulas`. All are built from cross entropy and the focal loss of a
negative, `p^gamma softplus(x)`; that of a positive is the same function of -x.
"""

from __future__ import annotations

from typing import NamedTuple

from focal.core.formulas import Parameter, SigmoidFocal, curvature, power
from focal.core.namespace import Array, Namespace

__all__ = ["Asymmetric", "HeatmapFocal", "QualityFocal", "Varifocal"]

CROSS_ENTROPY = SigmoidFocal(None, 0.0)


class QualityFocal(NamedTuple):
    """QFL = |d|^beta ce with d = p - y, which is also dce/dx (Li et al. 2020, equation 2)."""

    beta: Parameter

    def value(self, xp: Namespace, x: Array, y: Array) -> Array:
        """QFL."""
        ce, d = CROSS_ENTROPY.value_and_grad(xp, x, y)
        return power(xp, xp.abs(d), self.beta) * ce

    def value_and_grad(self, xp: Namespace, x: Array, y: Array) -> tuple[Array, Array]:
        """QFL and dQFL/dx = |d|^beta (beta (p q / d) ce + d), 0 where d is."""
        ce, d = CROSS_ENTROPY.value_and_grad(xp, x, y)
        factor = power(xp, xp.abs(d), self.beta)
        tiny = xp.finfo(d.dtype).smallest_normal
        k = xp.sigmoid(x) * xp.sigmoid(-x) / _away_from_zero(xp, d, tiny)
        return factor * ce, factor * (self.beta * k * ce + d)

    def hess(self, xp: Namespace, x: Array, y: Array) -> Array:
        """d2QFL/dx2; where d is 0 but for its rounding, as if it were that rounding."""
        ce, d = CROSS_ENTROPY.value_and_grad(xp, x, y)
        p, q = xp.sigmoid(x), xp.sigmoid(-x)
        limits = xp.finfo(d.dtype)
        d = _away_from_zero(xp, d, limits.eps / 4 * (y * q + (1 - y) * p) + limits.smallest_normal)
        bend = curvature(self.beta, p * q / d, ce, d, p * q, q - p)
        return power(xp, xp.abs(d), self.beta) * bend


class Varifocal(NamedTuple):
    """VFL (Zhang et al. 2021, equation 2): y ce for y > 0, alpha p^gamma softplus(x) for y = 0."""

    alpha: Parameter
    gamma: Parameter

    def value(self, xp: Namespace, x: Array, y: Array) -> Array:
        """VFL."""
        positive = y * CROSS_ENTROPY.value(xp, x, y)
        return xp.where(y <= 0, self.alpha * self._negative().background(xp, x), positive)

    def value_and_grad(self, xp: Namespace, x: Array, y: Array) -> tuple[Array, Array]:
        """VFL and dVFL/dx: y (p - y), or alpha p^gamma (gamma q softplus(x) + p)."""
        ce, d = CROSS_ENTROPY.value_and_grad(xp, x, y)
        value, slope = self._negative().background_and_grad(xp, x)
        return (
            xp.where(y <= 0, self.alpha * value, y * ce),
            xp.where(y <= 0, self.alpha * slope, y * d),
        )

    def hess(self, xp: Namespace, x: Array, y: Array) -> Array:
        """d2VFL/dx2."""
        positive = y * xp.sigmoid(x) * xp.sigmoid(-x)
        return xp.where(y <= 0, self.alpha * self._negative().hess(xp, x, 0.0), positive)

    def _negative(self) -> SigmoidFocal:
        return SigmoidFocal(None, self.gamma)


class HeatmapFocal(NamedTuple):
    """The penalty-reduced focal loss (Law and Deng 2018, equation 1): FL of 0 and 1 times r.

    A target of 1 is a positive. All others are negatives, reduced by r = (1 - y)^beta.
    """

    gamma: Parameter
    beta: Parameter

    def value(self, xp: Namespace, x: Array, y: Array) -> Array:
        """The loss."""
        sign, rest = self._sides(xp, y)
        return rest * self._focal().background(xp, sign * x)

    def value_and_grad(self, xp: Namespace, x: Array, y: Array) -> tuple[Array, Array]:
        """The loss and its derivative."""
        sign, rest = self._sides(xp, y)
        value, slope = self._focal().background_and_grad(xp, sign * x)
        return rest * value, sign * rest * slope

    def hess(self, xp: Namespace, x: Array, y: Array) -> Array:
        """The second derivative."""
        sign, rest = self._sides(xp, y)
        return rest * self._focal().hess(xp, sign * x, 0.0)

    def _focal(self) -> SigmoidFocal:
        return SigmoidFocal(None, self.gamma)

    def _sides(self, xp: Namespace, y: Array) -> tuple[Array, Array]:
        """-1 for a positive, 1 for a negative, and r, which is 1 for a positive."""
        rest = 1 - xp.where(y >= 1, 0.0, y)
        return 1 - 2 * xp.astype(y >= 1, y.dtype), power(xp, rest, self.beta)


class Asymmetric(NamedTuple):
    """ASL (Ridnik et al. 2021): a focal loss for each side, mixed by y."""

    gamma_positive: Parameter
    gamma_negative: Parameter
    margin: float

    def value(self, xp: Namespace, x: Array, y: Array) -> Array:
        """ASL."""
        positive, negative = self._sides()
        return y * positive.background(xp, -x) + (1 - y) * negative.background(xp, x)

    def value_and_grad(self, xp: Namespace, x: Array, y: Array) -> tuple[Array, Array]:
        """ASL and dASL/dx."""
        positive, negative = self._sides()
        cost, slope = positive.background_and_grad(xp, -x)
        other_cost, other_slope = negative.background_and_grad(xp, x)
        return y * cost + (1 - y) * other_cost, (1 - y) * other_slope - y * slope

    def hess(self, xp: Namespace, x: Array, y: Array) -> Array:
        """d2ASL/dx2."""
        positive, negative = self._sides()
        return y * positive.hess(xp, -x, 0.0) + (1 - y) * negative.hess(xp, x, 0.0)

    def _sides(self) -> tuple[SigmoidFocal, SigmoidFocal | _Shifted]:
        plain = SigmoidFocal(None, self.gamma_negative)
        shifted = _Shifted(self.gamma_negative, self.margin) if self.margin else plain
        return SigmoidFocal(None, self.gamma_positive), shifted


class _Shifted(NamedTuple):
    """u^gamma (-log(1 - u)) with u = max(p - margin, 0): a negative that may score `margin`."""

    gamma: Parameter
    margin: float

    def background(self, xp: Namespace, x: Array) -> Array:
        u, ce, *_ = self._parts(xp, x)
        return power(xp, u, self.gamma) * ce

    def background_and_grad(self, xp: Namespace, x: Array) -> tuple[Array, Array]:
        """Of the derivative, u^gamma (gamma (p q / u) ce + p q / (1 - u))."""
        u, ce, k, d = self._parts(xp, x)
        factor = power(xp, u, self.gamma)
        return factor * ce, factor * (self.gamma * k * ce + d)

    def hess(self, xp: Namespace, x: Array, _: float) -> Array:
        u, ce, k, d = self._parts(xp, x)
        tilt = xp.sigmoid(-x) - xp.sigmoid(x)
        return power(xp, u, self.gamma) * curvature(self.gamma, k, ce, d, d * (tilt + d), tilt)

    def _parts(self, xp: Namespace, x: Array) -> tuple[Array, Array, Array, Array]:
        """u, ce = -log(1 - u), u' / u and ce' = u' / (1 - u)."""
        p, q = xp.sigmoid(x), xp.sigmoid(-x)
        u = xp.maximum(p - self.margin, 0.0)
        rest = q + self.margin  # 1 - u, without its cancellation
        ce = xp.where(u < 0.5, -xp.log1p(-xp.minimum(u, 0.5)), -xp.log(rest))
        slope = xp.where(~(u > 0), 0.0, p * q)
        return u, ce, slope / xp.maximum(u, xp.finfo(u.dtype).smallest_normal), slope / rest


def _away_from_zero(xp: Namespace, d: Array, least: Array | float) -> Array:
    """d, with a size of at least `least`; 0 counts as positive."""
    return xp.where(d < 0, xp.minimum(d, -least), xp.maximum(d, least))
