"""The logits and targets that a loss is tried on."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focal.testing.ulp import LIMITS, rounded

__all__ = ["Grid", "dense_grid", "softmax_grid", "sparse_grid"]

HARD = (0.0, 1.0)
SOFT = (2.0**-10, 2.0**-4, 0.25, 0.5, 0.75, 1 - 2.0**-4, 1 - 2.0**-7)
ROWS = (-1000.0, -100.0, -20.0, -1.0, 0.0, 17.0, 88.0, 1000.0)
CLASSES = 3


class Grid(NamedTuple):
    """Logits, targets or labels as a loss takes them, and the target of each logit."""

    inputs: NDArray[np.float64]
    targets: NDArray[Any]
    target_of_logit: NDArray[np.float64]


def dense_grid(dtype: str, soft: bool) -> Grid:
    """Every logit with every hard (or every soft) target, in one axis."""
    x, y = np.meshgrid(_logits(dtype), rounded(SOFT if soft else HARD, dtype))
    return Grid(x.ravel(), y.ravel(), y.ravel())


def sparse_grid(dtype: str) -> Grid:
    """Rows of three logits, each with every label: ignored (-2), background (-1), a class."""
    x = np.random.default_rng(0).permutation(_logits(dtype))
    rows = x[: len(x) // CLASSES * CLASSES].reshape(-1, CLASSES)
    return _with_labels(rows, np.arange(-2, CLASSES))


def softmax_grid(dtype: str) -> Grid:
    """Rows of three extremes in every order, and of close logits, each with every label."""
    extremes = np.array(list(itertools.product(ROWS, repeat=CLASSES)))
    close = np.random.default_rng(0).uniform(-20, 20, (500, CLASSES))
    return _with_labels(rounded(np.concatenate([extremes, close]), dtype), np.arange(CLASSES))


def _logits(dtype: str) -> NDArray[np.float64]:
    """The extremes, and a dense grid between them."""
    epsilon, tiny, _ = LIMITS[dtype]
    near_zero = [0.0, tiny * epsilon, tiny / 2, tiny, epsilon**2, epsilon]
    extremes = np.array([*near_zero, 1.0, 17.0, 20.0, 88.0, 100.0, 1000.0])
    dense = [np.linspace(-40, 40, 1601), np.linspace(-110, 110, 881)]
    return np.unique(rounded(np.concatenate([-extremes, extremes, *dense]), dtype))


def _with_labels(rows: NDArray[np.float64], labels: NDArray[np.int64]) -> Grid:
    x, t = np.tile(rows, (len(labels), 1)), np.repeat(labels, len(rows))
    return Grid(x, t, (t[:, None] == np.arange(CLASSES)).astype(np.float64))
