"""Constants for the start of training: prior bias, alpha from counts, the first loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from focal.core.checks import check_alpha, check_gamma, check_number

__all__ = ["expected_initial_loss", "inverse_frequency_alpha", "prior_bias"]


def prior_bias(pi: ArrayLike = 0.01) -> Any:
    r"""Bias of the last classification layer that makes every first score `pi`.

    .. math:: b = -\log\frac{1 - \pi}{\pi}, \qquad \sigma(b) = \pi

    With it the many background anchors start with a small loss and do not dominate the few objects.
    Without it plain cross entropy diverged in the paper's experiments.

    Args:
        pi: The prior probability of the rare class, in (0, 1). A number, or an array-like of
            one prior per class.

    Returns:
        A float for a number, a float64 NumPy array of the same shape for an array-like.

    Raises:
        TypeError: `pi` is not numeric.
        ValueError: a value is not inside (0, 1).

    Example:
        >>> import focal
        >>> focal.prior_bias(0.01)
        -4.59511985013459
        >>> focal.prior_bias([0.5, 0.01])
        array([ 0.        , -4.59511985])

    Source: Lin et al. 2017, section 4.1, "Initialization".
    """
    values = _numbers("prior_bias", "pi", pi)
    if not np.all((values > 0) & (values < 1)):
        raise ValueError(f"prior_bias: pi must lie inside (0, 1); got {pi!r}")
    bias = np.log(values) - np.log1p(-values)
    return float(bias) if bias.ndim == 0 else bias


def inverse_frequency_alpha(num_positive: ArrayLike, num_negative: ArrayLike) -> Any:
    r"""The alpha that gives both classes the same total weight.

    .. math:: \alpha = \frac{n_-}{n_+ + n_-}, \qquad \alpha\, n_+ = (1 - \alpha)\, n_-

    Args:
        num_positive: Number of positive examples, >= 0; a number or one per class.
        num_negative: Number of negative examples, >= 0; same shape.

    Returns:
        A float in [0, 1], or a float64 NumPy array of the same shape.

    Raises:
        TypeError: a count is not numeric.
        ValueError: a count is negative or not finite, both are 0, or the shapes differ.

    Example:
        >>> import focal
        >>> focal.inverse_frequency_alpha(100, 900)
        0.9

    Source: Lin et al. 2017, section 3.1: alpha "may be set by inverse class frequency".
    With focal loss smaller values work better (the paper uses 0.25 at gamma 2).
    """
    name = "inverse_frequency_alpha"
    positive = _numbers(name, "num_positive", num_positive)
    negative = _numbers(name, "num_negative", num_negative)
    if positive.shape != negative.shape:
        raise ValueError(
            f"{name}: num_negative must have the shape of num_positive; "
            f"got num_positive {positive.shape}, num_negative {negative.shape}"
        )
    for parameter, counts in (("num_positive", positive), ("num_negative", negative)):
        if not np.all((counts >= 0) & np.isfinite(counts)):
            raise ValueError(f"{name}: {parameter} must be finite and >= 0; got {counts}")
    if np.any(positive + negative == 0):
        raise ValueError(f"{name}: num_positive and num_negative must not both be 0")
    alpha = negative / (positive + negative)
    return float(alpha) if alpha.ndim == 0 else alpha


def expected_initial_loss(
    num_anchors: int,
    num_positives: int,
    num_classes: int = 1,
    pi: float | None = 0.01,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> float:
    r"""The classification loss of the first step, normalized by the positives.

    With every score equal to `pi`, K classes, N anchors and P positives,

    .. math:: \frac{P\,\alpha (1-\pi)^\gamma (-\log \pi)
              + (N K - P)(1-\alpha)\, \pi^\gamma (-\log(1-\pi))}{\max(1, P)}

    If the first loss is far from it, the prior bias is missing, alpha and 1 - alpha are swapped, or
    the normalizer is not the number of positives.

    Args:
        num_anchors: N >= 0, anchors that are not ignored, of the whole batch.
        num_positives: P in [0, N], anchors assigned to an object.
        num_classes: K >= 1.
        pi: Score that the bias stands for, in (0, 1). None: no prior, the bias is 0 and every
            first score 0.5.
        alpha: Weight of positives in [0, 1]; None or -1 turns it off.
        gamma: Focusing parameter, finite, >= 0.

    Returns:
        The loss as a float.

    Raises:
        TypeError: a parameter is not a number.
        ValueError: a parameter is out of its range.

    Example:
        >>> import focal
        >>> round(focal.expected_initial_loss(200_700, 50, 80), 2)
        1.37
        >>> round(focal.expected_initial_loss(200_700, 50, 80, pi=None))
        41734

    Source: arithmetic on equation 5 and section 4.1 of Lin et al. 2017.
    """
    name = "expected_initial_loss"
    anchors = check_number(name, "num_anchors", num_anchors, low=0)
    positives = check_number(name, "num_positives", num_positives, 0, anchors)
    classes = check_number(name, "num_classes", num_classes, low=1)
    a = check_alpha(name, alpha)
    g = check_gamma(name, gamma)
    p = 0.5 if pi is None else check_number(name, "pi", pi)
    if not 0 < p < 1:
        raise ValueError(f"{name}: pi must lie inside (0, 1) or be None; got {pi!r}")
    weight_positive, weight_negative = (1.0, 1.0) if a is None else (a, 1 - a)
    positive = weight_positive * (1 - p) ** g * -math.log(p)
    negative = weight_negative * p**g * -math.log1p(-p)
    total = positives * positive + (anchors * classes - positives) * negative
    return float(total / max(1.0, positives))


def class_prior_bias(function: str, pi: ArrayLike) -> np.ndarray[Any, Any]:
    """The prior bias of each class, for the bias of a layer."""
    bias = np.atleast_1d(prior_bias(pi))
    if bias.ndim != 1 or not bias.size:
        raise ValueError(
            f"{function}: pi must be a number or one per class; got shape {bias.shape}"
        )
    return bias


def tile_bias(
    function: str, bias: np.ndarray[Any, Any], shape: Sequence[int]
) -> np.ndarray[Any, Any]:
    """The bias of each class, repeated to the shape of a layer's bias."""
    if len(shape) != 1 or shape[0] % bias.size:
        raise ValueError(
            f"{function}: the length of the bias must be a multiple of that of pi ({bias.size}); "
            f"got shape {tuple(shape)}"
        )
    return np.tile(bias, shape[0] // bias.size)


def _numbers(function: str, parameter: str, value: ArrayLike) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        array = np.asarray(None)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{function}: {parameter} must be numeric; got {value!r}")
    return array.astype(np.float64)
