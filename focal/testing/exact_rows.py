"""The exact losses of rows of logits, of differences and of boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import focal.numpy
from focal.core import boxes
from focal.numpy._namespace import xp
from focal.testing.exact import Exact, Result
from focal.testing.references import derivatives
from focal.testing.ulp import Limits

__all__ = ["giou", "smooth_l1", "softmax"]

Wide = NDArray[Any]
Params = dict[str, Any]
SIDES = (1e-200, -1e-200)


def softmax(x: Wide, labels: NDArray[Any], params: Params, limits: Limits) -> Exact:
    """The loss of the label; smoothed, the mixture of those of all labels.

    Args:
        x: Logits (N, K).
        labels: Classes (N,).
        params: The parameters, in the type computed in.
        limits: Those of the type, with the epsilon of the type computed in.
    """
    smoothing, classes = params["label_smoothing"], x.shape[-1]
    own = _softmax_of_label(x, labels, params, limits)
    if not smoothing:
        return own
    mixture = [(1 - smoothing, own)]
    for k in range(classes):
        other = _softmax_of_label(x, np.full_like(labels, k), params, limits)
        mixture.append((smoothing / classes, other))

    def mixed(name: str) -> Result:
        parts = [(share, getattr(part, name)) for share, part in mixture]
        return Result(*(sum(share * part[i] for share, part in parts) for i in range(3)))

    return Exact(mixed("value"), mixed("gradient"))


def _softmax_of_label(x: Wide, labels: NDArray[Any], params: Params, limits: Limits) -> Exact:
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
    unweighted = {"alpha": None, "gamma": params["gamma"]}
    bend = scale * derivatives("sigmoid_focal_loss", unweighted, z, np.ones_like(z), True)[2]
    slope = np.abs(gradient[label])
    # Three roundings (x_j - x_c, logsumexp, their difference) of numbers as large as the row is
    # wide, to half an ULP each; exp makes them relative errors.
    rounding = 1.5 * limits.epsilon * (1 + np.ptp(x, axis=-1))
    spread = np.abs(share) * (np.abs(bend) * rounding)[:, None]
    # The gradient at the label is a sum over the others, each of which may be flushed to zero.
    flushed = x.shape[-1] * limits.tiny if limits.may_flush else 0.0
    bent = (np.abs(bend) + slope * xp.sigmoid(-np.abs(z)))[:, None]
    return Exact(
        value=Result(value, np.abs(value), slope * rounding),
        gradient=Result(
            gradient, np.abs(gradient), spread + np.abs(gradient) * rounding[:, None] + flushed
        ),
        second=Result(
            -bend[:, None] * share,
            np.abs(share) * bent,
            np.abs(share) * (slope * rounding)[:, None],
        ),
        pick=label.astype(np.float64),
    )


def smooth_l1(x: Wide, t: Wide, beta: float, limits: Limits) -> Exact:
    """Its slope, d / beta within [-1, 1]; at the kink of L1 any between is right."""
    value, difference = focal.numpy.smooth_l1_loss(x, t, beta), x - t
    slope = np.clip(difference / beta, -1, 1) if beta else np.sign(difference)
    zero = limits.tiny if limits.may_flush else 0.0
    kink = ((beta == 0) & (np.abs(difference) <= zero)).astype(x.dtype)
    return Exact(Result(value, value, 0 * value), Result(slope, np.abs(slope), 2 * kink))


def giou(a: Wide, b: Wide) -> Exact:
    """The gradient in `a` is that of the core on complex numbers: f(a + ih) = f(a) + ih f'(a).

    The square of h is 0 in floating point, so that there is no other error than rounding. NumPy
    orders complex numbers of equal real parts by the imaginary ones: where edges coincide it is
    the slope on the side of h, and any between those of both sides is right.
    """
    value = focal.numpy.giou_loss(a, b)
    one, other = (
        np.stack(
            [-boxes.giou(xp, a + 1j * h * (np.arange(4) == k), b + 0j).imag / h for k in range(4)],
            axis=-1,
        )
        for h in SIDES
    )
    # At most what an edge does to intersection and union, and to the hull.
    size = np.maximum(a[:, 2:] - a[:, :2], 0)
    area = np.maximum(size.prod(-1), (b[:, 2:] - b[:, :2]).prod(-1))[:, None]
    hull = np.maximum(a, b)[:, 2:] - np.minimum(a, b)[:, :2]
    terms = _ratio(size[:, ::-1], area) + _ratio(np.ones_like(hull), hull)
    return Exact(
        value=Result(value, np.maximum(value, 1), 0 * value),
        gradient=Result((one + other) / 2, np.tile(terms, 2), np.abs(one - other) / 2),
    )


def _ratio(a: Wide, b: Wide) -> Wide:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
