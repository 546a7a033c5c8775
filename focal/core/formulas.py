r"""The elementwise formulas: value, first and second derivative, each written once.

Notation (docs/math.md has the derivations): logit `x`, target `y` in [0, 1], `p = sigmoid(x)`,
`q = sigmoid(-x)`. No formula forms `1 - p`, and no power `gamma - 1` appears.

    m  = y q + (1 - y) p                     1 - p_t, as a sum of positive terms
    ce = y softplus(-x) + (1 - y) softplus(x)
    a  = alpha y + (1 - alpha)(1 - y)
    FL = a m^gamma ce

`value_and_grad` is written for the larger and the smaller of p and q rather than for p and q:
with `s = sigmoid(-|x|)` the smaller and `w` the part of the target on the wrong side of the
logit (`1 - y` for x >= 0, else `y`),

    m = w + s (1 - 2 w),    ce = w |x| - log(1 - s),    dce/dx = sign(x) (w - s),

which needs one exponential and one logarithm for loss and gradient together. Augmented
assignments (`w -= s`) save memory traffic where arrays are mutable. They change only arrays that
were made here and are not needed again, neither here nor in a derivative.
"""

from __future__ import annotations

from typing import NamedTuple

from focal.core.namespace import Array, Namespace
from focal.core.parameters import is_number

__all__ = ["Positive", "SigmoidFocal", "SigmoidFocalStar", "Sparse", "curvature", "power"]

Parameter = float | Array
"""A Python number, or an array without axes (`focal.core.parameters`)."""


class SigmoidFocal(NamedTuple):
    """FL = a m^gamma ce (paper, equation 5); soft targets blend inside m and ce.

    With `smoothing` s the targets are y (1 - s) + s / 2.
    """

    alpha: Parameter | None
    gamma: Parameter
    smoothing: Parameter = 0.0

    def value(self, xp: Namespace, x: Array, y: Array) -> Array:
        """FL."""
        y = self.smoothed(y)
        _, _, _, ce, m = _parts(xp, x, y)
        return _weighted_power(xp, self, m, y) * ce

    def value_and_grad(self, xp: Namespace, x: Array, y: Array) -> tuple[Array, Array]:
        """FL and dFL/dx = a m^gamma (gamma (1 - 2 y) (p q / m) ce + dce/dx)."""
        y = self.smoothed(y)
        sign, s, w, ce, m = _parts(xp, x, y)
        factor = _weighted_power(xp, self, m, y)
        slope = w - s
        if not _is_zero(self.gamma):
            slope = xp.addcmul(slope, self._bend(xp, s, w, m), ce)
        slope *= factor
        slope *= sign
        return ce * factor, slope

    def _bend(self, xp: Namespace, s: Array, w: Array, m: Array) -> Array:
        """Gamma (2 w - 1) p q / m; divided first, or the product underflows."""
        bend = s - s * s
        bend /= m
        bend *= xp.addcmul(-self.gamma, w, 2 * self.gamma)
        return bend

    def background(self, xp: Namespace, x: Array) -> Array:
        """FL for y = 0, half the work: (1 - alpha) p^gamma softplus(x)."""
        if not _is_zero(self.smoothing):
            return self.value(xp, x, 0.0)
        _, p, ce = _background_parts(xp, x)
        return _weighted_power(xp, self, p, 0.0) * ce

    def background_and_grad(self, xp: Namespace, x: Array) -> tuple[Array, Array]:
        """FL and dFL/dx = (1 - alpha) p^gamma (gamma q softplus(x) + p) for y = 0."""
        if not _is_zero(self.smoothing):
            return self.value_and_grad(xp, x, 0.0)
        q, p, ce = _background_parts(xp, x)
        factor = _weighted_power(xp, self, p, 0.0)
        q *= ce
        slope = xp.addcmul(p, q, self.gamma)
        slope *= factor
        return ce * factor, slope

    def hess(self, xp: Namespace, x: Array, y: Array) -> Array:
        """d2FL/dx2; with k = (1 - 2 y) p q / m and d = dce/dx it is.

        a m^gamma (gamma^2 k^2 ce + 2 gamma k d + gamma k (q - p - k) ce + p q)
        """
        x, y = _finite(xp, x), self.smoothed(y)
        p, q = xp.sigmoid(x), xp.sigmoid(-x)
        m = _at_least_tiny(xp, y * q + (1 - y) * p)
        ce = y * xp.softplus(-x) + (1 - y) * xp.softplus(x)
        d = (1 - y) * p - y * q
        k = (1 - 2 * y) * (p * q / m)
        g = self.gamma
        return _weighted_power(xp, self, m, y) * curvature(g, k, ce, d, p * q, q - p)

    def smoothed(self, y: Array) -> Array:
        """The targets y (1 - s) + s / 2."""
        if _is_zero(self.smoothing):
            return y
        return y * (1 - self.smoothing) + self.smoothing / 2


class Positive(NamedTuple):
    """FL for y = 1, which is that for y = 0 at -x."""

    formula: SigmoidFocal

    def value(self, xp: Namespace, x: Array, _: float) -> Array:
        """FL."""
        return self.formula.background(xp, -x)

    def value_and_grad(self, xp: Namespace, x: Array, _: float) -> tuple[Array, Array]:
        """FL and dFL/dx."""
        value, slope = self.formula.background_and_grad(xp, -x)
        return value, -slope

    def hess(self, xp: Namespace, x: Array, _: float) -> Array:
        """d2FL/dx2."""
        return self.formula.hess(xp, -x, 0.0)


class SigmoidFocalStar(NamedTuple):
    """FL* (paper, appendix A): cross entropy of the margin scaled by gamma, shifted by beta.

    a (y softplus(-(gamma x + beta)) + (1 - y) softplus(gamma x - beta)) / gamma
    """

    alpha: Parameter | None
    gamma: Parameter
    beta: Parameter

    def value(self, xp: Namespace, x: Array, y: Array) -> Array:
        """FL*."""
        ce = y * self._negative(xp, -x) + (1 - y) * self._negative(xp, x)
        return _times(alpha_factor(xp, self.alpha, y), ce)

    def value_and_grad(self, xp: Namespace, x: Array, y: Array) -> tuple[Array, Array]:
        """FL* and dFL*/dx = a ((1 - y) sigmoid(gamma x - beta) - y sigmoid(-gamma x - beta))."""
        positive, negative = self._margins(x)
        slope = (1 - y) * xp.sigmoid(-negative) - y * xp.sigmoid(-positive)
        return self.value(xp, x, y), _times(alpha_factor(xp, self.alpha, y), slope)

    def hess(self, xp: Namespace, x: Array, y: Array) -> Array:
        """d2FL*/dx2."""
        positive, negative = self._margins(x)
        bend_positive = xp.sigmoid(positive) * xp.sigmoid(-positive)
        bend_negative = xp.sigmoid(negative) * xp.sigmoid(-negative)
        bend = y * bend_positive + (1 - y) * bend_negative
        return _times(alpha_factor(xp, self.alpha, y), self.gamma * bend)

    def _margins(self, x: Array) -> tuple[Array, Array]:
        """Gamma x_t + beta of a positive and of a negative."""
        return self.gamma * x + self.beta, self.beta - self.gamma * x

    def _negative(self, xp: Namespace, x: Array) -> Array:
        """softplus(gamma x - beta) / gamma, linear beyond `large`, where gamma x may overflow."""
        x = _finite(xp, x)
        large = xp.finfo(x.dtype).max / 2**20
        near = xp.softplus(self.gamma * xp.clip(x, -large, large) - self.beta) / self.gamma
        return near + (xp.maximum(x, large) - large)


class Sparse(NamedTuple):
    """A formula for integer labels: class in [0, K), -1 background, -2 ignored.

    At most one logit of a row is a positive. All are computed as background, and the positive is
    then overwritten, so no one-hot tensor is built.
    """

    formula: SigmoidFocal

    def value(self, xp: Namespace, x: Array, labels: Array) -> Array:
        """The loss of every logit."""
        at, x_at, y_at = self._labeled(xp, x, labels)
        background = self.formula.background(xp, x)
        return self._merge(xp, background, at, self.formula.value(xp, x_at, y_at), labels)

    def value_and_grad(self, xp: Namespace, x: Array, labels: Array) -> tuple[Array, Array]:
        """The loss of every logit and its derivative."""
        at, x_at, y_at = self._labeled(xp, x, labels)
        background = self.formula.background_and_grad(xp, x)
        labeled = self.formula.value_and_grad(xp, x_at, y_at)
        value, grad = (
            self._merge(xp, b, at, v, labels) for b, v in zip(background, labeled, strict=True)
        )
        return value, grad

    def hess(self, xp: Namespace, x: Array, labels: Array) -> Array:
        """The second derivative at every logit."""
        at, x_at, y_at = self._labeled(xp, x, labels)
        background = self.formula.hess(xp, x, 0.0)
        return self._merge(xp, background, at, self.formula.hess(xp, x_at, y_at), labels)

    def _labeled(self, xp: Namespace, x: Array, labels: Array) -> tuple[Array, Array, Array]:
        """Per row the index, logit and target of its label; of class 0 where it has none."""
        at = xp.maximum(labels, 0)[..., None]
        y_at = xp.astype(labels >= 0, x.dtype)[..., None]
        return at, xp.take_along_axis(x, at, axis=-1), y_at

    def _merge(
        self, xp: Namespace, background: Array, at: Array, labeled: Array, labels: Array
    ) -> Array:
        return xp.keep_rows(xp.put_along_axis(background, at, labeled), labels >= -1)


def alpha_t(alpha: Array, y: Array | float) -> Array:
    """The factor a for an array of alphas, which broadcasts."""
    return alpha * y + (1 - alpha) * (1 - y)


def power(xp: Namespace, m: Array, gamma: Parameter) -> Array | float:
    """m^gamma; common exponents by cheaper and more accurate operations."""
    if not is_number(gamma):
        return m**gamma
    if gamma == 0:
        return 1.0
    if gamma == 0.5:
        return xp.sqrt(m)
    if gamma == 1:
        return m
    if gamma == 2:
        return m * m
    return m**gamma


def curvature(gamma: Parameter, k: Array, ce: Array, d: Array, bend: Array, tilt: Array) -> Array:
    """(m^gamma ce)'' / m^gamma; k = m' / m, d = ce', bend = ce'', tilt = q - p = m'' / m'."""
    return gamma * k * (ce * (gamma * k + tilt - k) + 2 * d) + bend


def _parts(xp: Namespace, x: Array, y: Array) -> tuple[Array, Array, Array, Array, Array]:
    """sign(x), s, w, ce and m of the module's docstring."""
    positive = xp.step(x)
    sign = xp.addcmul(-1, positive, 2)
    # |x| as sign(x) x, so that autodiff is right at 0 too, where that of `abs` is 0. The clamp
    # keeps w |x| a number at an infinite logit on the right side, where w is 0.
    size = xp.minimum(sign * x, xp.finfo(x.dtype).max)
    s = xp.sigmoid(-size)
    w = positive - y
    w *= sign
    ce = w * size
    ce -= xp.log1p(-s)
    m = _at_least_tiny(xp, xp.addcmul(w, s, xp.addcmul(1, w, -2)))
    return sign, s, w, ce, m


def _background_parts(xp: Namespace, x: Array) -> tuple[Array, Array, Array]:
    """q, p and softplus(x) = max(x, 0) - log(1 - s), with s the smaller of p and q."""
    positive = xp.step(x)
    s = xp.sigmoid(-xp.abs(x))
    # As in `_parts`, an infinite logit must not meet q = 0.
    ce = xp.minimum(xp.maximum(x, 0.0), xp.finfo(x.dtype).max)
    ce -= xp.log1p(-s)
    return xp.abs((1 - positive) - s), xp.abs(positive - s), ce


def _at_least_tiny(xp: Namespace, m: Array) -> Array:
    """A subnormal m has lost precision, and p q / m could be 0 / 0."""
    return xp.maximum(m, xp.finfo(m.dtype).smallest_normal)


def _weighted_power(xp: Namespace, loss: SigmoidFocal, m: Array, y: Array) -> Array:
    """The factor a m^gamma."""
    return _times(alpha_factor(xp, loss.alpha, y), power(xp, m, loss.gamma))


def alpha_factor(xp: Namespace, alpha: Parameter | None, y: Array) -> Array | None:
    """The factor a: alpha for y = 1, 1 - alpha for y = 0, linear between; None if it is off."""
    if alpha is None:
        return None
    if not is_number(alpha):
        return alpha_t(alpha, y)
    if alpha < 0.25:  # 1 - alpha + (2 alpha - 1) would lose the digits of a small alpha
        return xp.addcmul(alpha, 1 - y, 1 - 2 * alpha)
    return xp.addcmul(1 - alpha, y, 2 * alpha - 1)


def _finite(xp: Namespace, x: Array) -> Array:
    """The largest finite number for an infinite one, so that a factor of 0 makes it 0."""
    largest = xp.finfo(x.dtype).max
    return xp.clip(x, -largest, largest)


def _is_zero(parameter: Parameter) -> bool:
    """Whether a parameter is the number 0; an array may be traced."""
    return is_number(parameter) and parameter == 0


def _times(factor: Array | None, values: Array) -> Array:
    return values if factor is None else values * factor
