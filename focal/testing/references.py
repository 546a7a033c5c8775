"""What a loss is compared with: the core's formulas on NumPy, in a wider type.

A float32 or half-precision loss is compared in float64, a float64 one in NumPy's `longdouble`
(80 bits on x86; where it is no wider than float64, the reference has errors of its own).
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import focal.numpy
from focal.core import checks
from focal.core.formulas import SigmoidFocal, SigmoidFocalStar
from focal.core.losses import star_formula
from focal.numpy._namespace import xp
from focal.testing.grid import Grid, dense_grid, softmax_grid, sparse_grid
from focal.testing.ulp import LIMITS

__all__ = ["REFERENCES", "Exact", "checked_parameters", "exact", "grids"]

Wide = NDArray[Any]
Formula = SigmoidFocal | SigmoidFocalStar
ELEMENTWISE = ("sigmoid_focal_loss", "sigmoid_focal_loss_star", "balanced_cross_entropy")
REFERENCES = (*ELEMENTWISE, "sparse_sigmoid_focal_loss", "softmax_focal_loss")


class Exact(NamedTuple):
    """Loss and derivatives, the size that an error is measured by, and what cannot be helped.

    `..._size` is the sum of the absolute terms where terms may cancel (the gradient at a soft
    target), else the result itself. `..._slack` is the absolute error from rounding a margin
    that is itself computed: gamma x + beta of FL*, x_c - logsumexp of softmax.
    """

    value: Wide
    gradient: Wide
    second: Wide
    gradient_size: Wide
    second_size: Wide
    value_slack: Wide
    gradient_slack: Wide
    second_slack: Wide
    pick: Wide
    """Weights of the gradients whose sum is differentiated for `second`."""


def checked_parameters(function: str, reference: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a reference, complete, each checked."""
    signature = inspect.signature(getattr(focal.numpy, reference)).parameters
    known = {n: signature[n].default for n in ("alpha", "gamma", "beta") if n in signature}
    for name in params.keys() - known.keys():
        raise TypeError(
            f"{function}: params must be among those of {reference}, {', '.join(known)}; got {name}"
        )
    values = known | params
    alpha = values["alpha"]
    if reference != "softmax_focal_loss":
        checks.check_alpha(function, alpha)
    elif alpha is not None and alpha != -1:
        checks.check_number(function, "alpha", alpha, low=0)
    if reference == "sigmoid_focal_loss_star":
        star_formula(function, **values)
    elif "gamma" in values:
        checks.check_gamma(function, values["gamma"])
    return values


def grids(reference: str, dtype: str, soft_targets: bool) -> dict[str, Grid]:
    """The grid for each kind of target that a reference takes, by name."""
    if reference == "sparse_sigmoid_focal_loss":
        return {"labels": sparse_grid(dtype)}
    if reference == "softmax_focal_loss":
        return {"labels": softmax_grid(dtype)}
    parts = {"hard": dense_grid(dtype, soft=False)}
    return parts | {"soft": dense_grid(dtype, soft=True)} if soft_targets else parts


def exact(reference: str, params: dict[str, Any], dtype: str, grid: Grid) -> Exact:
    """The reference on a grid.

    gamma and beta are rounded to the type that the loss is computed in, as a framework does
    with a Python number; m^gamma feels it at large logits.
    """
    wide = np.longdouble if dtype == "float64" else np.float64
    number = float if dtype == "float64" else lambda v: float(np.float32(v))
    values = {k: v if k == "alpha" else number(v) for k, v in params.items()}
    x = grid.inputs.astype(wide)
    if reference == "softmax_focal_loss":
        return _softmax(x, grid.targets, values, dtype)
    y = grid.target_of_logit.astype(wide)
    if reference == "sigmoid_focal_loss_star":
        gamma, beta = values["gamma"], values["beta"]
        rounding = _computed_epsilon(dtype) * (np.abs(x) + abs(beta) / gamma)
        return _elementwise(star_formula("star", **values), x, y, rounding)
    alpha = checks.check_alpha(reference, values["alpha"])
    result = _elementwise(SigmoidFocal(alpha, values.get("gamma", 0.0)), x, y, np.zeros_like(x))
    if reference == "sparse_sigmoid_focal_loss":
        keep = np.broadcast_to(grid.targets[:, None] >= -1, x.shape)
        return result._replace(**{n: a * keep for n, a in result._asdict().items() if n != "pick"})
    return result


def _computed_epsilon(dtype: str) -> float:
    """That of the type computed in: float32 for half types."""
    return min(LIMITS[dtype].epsilon, LIMITS["float32"].epsilon)


def _elementwise(formula: Formula, x: Wide, y: Wide, rounding: Wide) -> Exact:
    value, gradient = formula.value_and_grad(xp, x, y)
    second = formula.hess(xp, x, y)
    size = np.maximum(_terms(formula, x, y, value, gradient), np.abs(gradient))
    # The second derivative crosses zero: there p q (that of cross entropy) is the measure.
    bend = np.minimum(np.abs(gradient), SigmoidFocal(None, 0.0).hess(xp, x, y))
    return Exact(
        value=value,
        gradient=gradient,
        second=second,
        gradient_size=size,
        second_size=np.abs(second) + bend,
        value_slack=size * rounding,
        gradient_slack=np.abs(second) * rounding,
        second_slack=np.zeros_like(x),
        pick=np.ones(x.shape),
    )


def _terms(formula: Formula, x: Wide, y: Wide, value: Wide, gradient: Wide) -> Wide:
    """Sum of the absolute terms of a gradient: three, of which a soft target makes some cancel.

    A loss is a factor times a mixture, by y, of the losses of y = 1 and y = 0. The derivative of
    the mixture has two terms, one per class, and what remains is that of the factor.
    """
    plain = SigmoidFocal(None, 0.0) if isinstance(formula, SigmoidFocal) else formula
    plain = plain._replace(alpha=None)
    mixture, slope = plain.value_and_grad(xp, x, y)
    factor = np.divide(value, mixture, out=np.zeros_like(x), where=mixture > 0)
    negative, positive = (
        np.abs(plain.value_and_grad(xp, x, np.full_like(x, t))[1]) for t in (0.0, 1.0)
    )
    straight = (1 - y) * negative + y * positive
    return np.asarray(np.abs(gradient - factor * slope) + factor * straight)


def _softmax(x: Wide, labels: NDArray[Any], params: dict[str, Any], dtype: str) -> Exact:
    """Also the second derivatives of the gradient at the label, FL''(z) dz/dx."""
    options = {"alpha": params["alpha"], "gamma": params["gamma"]}
    value = focal.numpy.softmax_focal_loss(x, labels, **options)
    gradient = focal.numpy.softmax_focal_loss_grad(x, labels, **options)
    label = labels[:, None] == np.arange(x.shape[-1])
    others = np.where(label, -np.inf, x - x[label][:, None])
    z = -xp.logsumexp(others)
    share = np.where(label, -1.0, np.exp(others + z[:, None]))  # -dz/dx
    off = params["alpha"] is None or params["alpha"] == -1
    scale = 1.0 if off else params["alpha"]
    bend = scale * SigmoidFocal(None, params["gamma"]).hess(xp, z, np.ones_like(z))
    slope = np.abs(gradient[label])
    # Three roundings (x_j - x_c, logsumexp, their difference) of numbers as large as the row is
    # wide, to half an ULP each; exp makes them relative errors.
    rounding = 1.5 * _computed_epsilon(dtype) * (1 + np.ptp(x, axis=-1))
    spread = np.abs(share) * (np.abs(bend) * rounding)[:, None]
    # The gradient at the label is a sum over the others, each of which may be flushed to zero.
    flushed = x.shape[-1] * LIMITS[dtype].tiny if LIMITS[dtype].may_flush else 0.0
    return Exact(
        value=value,
        gradient=gradient,
        second=-bend[:, None] * share,
        gradient_size=np.abs(gradient),
        second_size=np.abs(share) * (np.abs(bend) + slope * xp.sigmoid(-np.abs(z)))[:, None],
        value_slack=slope * rounding,
        gradient_slack=spread + np.abs(gradient) * rounding[:, None] + flushed,
        second_slack=np.abs(share) * (slope * rounding)[:, None],
        pick=label.astype(np.float64),
    )
