"""The closed-form derivatives as public functions, for NumPy, which has no autodiff.

The frameworks' autodiff uses the same formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from focal.core import checks
from focal.core.losses import (
    checked_weight,
    dense_arguments,
    dense_factors,
    focal_formula,
    star_formula,
)
from focal.core.namespace import Array, Formula, Framework, In, Namespace, Out

__all__ = ["sigmoid_focal_loss_grad", "sigmoid_focal_loss_hess", "sigmoid_focal_loss_star_grad"]


def sigmoid_focal_loss_grad(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    alpha: float | Sequence[float] | In | None = 0.25,
    gamma: float = 2.0,
    *,
    weight: In | None = None,
    label_smoothing: float = 0.0,
) -> Out:
    r"""First derivative of :func:`sigmoid_focal_loss` in its logits, elementwise.

    .. math:: \alpha_t m^\gamma \left[\gamma (1 - 2y) \frac{pq}{m} \mathrm{CE}
              + (1-y) p - y q\right], \qquad m = y q + (1-y) p,\ q = 1 - p

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, values in [0, 1].
        alpha: As in :func:`sigmoid_focal_loss`.
        gamma: As in :func:`sigmoid_focal_loss`.
        weight: Factors that broadcast to the shape of `inputs`.
        label_smoothing: As in :func:`sigmoid_focal_loss`.

    Returns:
        The derivative, with the shape and type of `inputs`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ or a number is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import sigmoid_focal_loss_grad
        >>> sigmoid_focal_loss_grad(np.array([-4.0, 0.0]), np.array([1, 1]), alpha=None).round(6)
        array([-1.086396, -0.298287])

    Source: Lin et al. 2017, appendix B, equation 10, extended to soft targets.
    """
    name = "sigmoid_focal_loss_grad"
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula, alphas = focal_formula(xp, name, alpha, gamma, label_smoothing, inputs)
    factors = dense_factors(xp, formula, alphas, inputs, targets)
    return _derivative(xp, name, formula, 1, inputs, targets, weight, factors)


def sigmoid_focal_loss_hess(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    alpha: float | Sequence[float] | In | None = 0.25,
    gamma: float = 2.0,
    *,
    weight: In | None = None,
    label_smoothing: float = 0.0,
) -> Out:
    r"""Second derivative of :func:`sigmoid_focal_loss` in its logits, elementwise.

    With :math:`k = (1 - 2y)\, pq / m` and :math:`d = (1-y) p - y q`,

    .. math:: \alpha_t m^\gamma \left[\gamma^2 k^2 \mathrm{CE} + 2 \gamma k d
              + \gamma k (q - p - k)\, \mathrm{CE} + p q\right]

    With the gradient it makes focal loss an objective for gradient boosting. It is negative
    where the loss is not convex.

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, values in [0, 1].
        alpha: As in :func:`sigmoid_focal_loss`.
        gamma: As in :func:`sigmoid_focal_loss`.
        weight: Factors that broadcast to the shape of `inputs`.
        label_smoothing: As in :func:`sigmoid_focal_loss`.

    Returns:
        The second derivative, with the shape and type of `inputs`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ or a number is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import sigmoid_focal_loss_hess
        >>> sigmoid_focal_loss_hess(np.array([0.0]), np.array([1]), alpha=None, gamma=0)
        array([0.25])

    Source: differentiation of equation 10 of Lin et al. 2017; docs/math.md derives it.
    """
    name = "sigmoid_focal_loss_hess"
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula, alphas = focal_formula(xp, name, alpha, gamma, label_smoothing, inputs)
    factors = dense_factors(xp, formula, alphas, inputs, targets)
    return _derivative(xp, name, formula, 2, inputs, targets, weight, factors)


def sigmoid_focal_loss_star_grad(
    xp: Framework[In, Out],
    inputs: In,
    targets: In,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    beta: float = 1.0,
    *,
    weight: In | None = None,
) -> Out:
    r"""First derivative of :func:`sigmoid_focal_loss_star` in its logits, elementwise.

    .. math:: \alpha_t \left[(1-y)\, \sigma(\gamma x - \beta)
              - y\, \sigma(-\gamma x - \beta)\right]

    Args:
        inputs: Logits of any shape and floating-point type.
        targets: Same shape as `inputs`, values in [0, 1].
        alpha: As in :func:`sigmoid_focal_loss_star`.
        gamma: As in :func:`sigmoid_focal_loss_star`.
        beta: As in :func:`sigmoid_focal_loss_star`.
        weight: Factors that broadcast to the shape of `inputs`.

    Returns:
        The derivative, with the shape and type of `inputs`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ or a number is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import sigmoid_focal_loss_star_grad
        >>> sigmoid_focal_loss_star_grad(np.array([0.0]), np.array([1]), alpha=None).round(6)
        array([-0.268941])

    Source: Lin et al. 2017, appendix B, equation 11.
    """
    name = "sigmoid_focal_loss_star_grad"
    inputs, targets = dense_arguments(xp, name, inputs, targets)
    formula = star_formula(xp, name, alpha, gamma, beta, inputs)
    return _derivative(xp, name, formula, 1, inputs, targets, weight)


def _derivative(
    xp: Namespace,
    name: str,
    formula: Formula,
    order: Literal[1, 2],
    inputs: Array,
    targets: Array,
    weight: Array | None,
    factors: Array | None = None,
) -> Array:
    x, y = checks.wide(xp, inputs), xp.astype(targets, checks.wide_type(xp, inputs))
    result = formula.value_and_grad(xp, x, y)[1] if order == 1 else formula.hess(xp, x, y)
    for factor in (factors, checked_weight(xp, name, weight, inputs)):
        if factor is not None:
            result = result * factor
    return xp.astype(result, inputs.dtype)
