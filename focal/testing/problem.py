"""What a loss is asked, and what it must answer."""

from __future__ import annotations

from typing import Any

import numpy as np

import focal.numpy
from focal.testing.exact import Exact, Result, elementwise
from focal.testing.exact_rows import giou, smooth_l1, softmax
from focal.testing.grid import (
    Grid,
    boxes_grid,
    dense_grid,
    difference_grid,
    softmax_grid,
    sparse_grid,
)
from focal.testing.ulp import LIMITS

__all__ = ["exact", "grid_of", "reduced"]

Params = dict[str, Any]
REDUCED = 1000
"""Rows of a reduced loss, all of them ordinary: an extreme one would drown the others."""
ORDINARY = 8.0


def grid_of(reference: str, dtype: str, soft_targets: bool, seed: int) -> Grid:
    """The grid of a reference."""
    if reference == "sparse_sigmoid_focal_loss":
        return sparse_grid(dtype, seed)
    if reference == "softmax_focal_loss":
        return softmax_grid(dtype, seed)
    if reference == "smooth_l1_loss":
        return difference_grid(dtype, seed)
    if reference == "giou_loss":
        return boxes_grid(dtype, seed)
    return dense_grid(dtype, soft_targets, seed)


def exact(reference: str, params: Params, dtype: str, grid: Grid, second: bool) -> Exact:
    """The reference on a grid, perhaps with its second derivative.

    All numbers but alpha are rounded to the type that the loss is computed in, as a framework
    does with a Python number; m^gamma feels it at large logits.
    """
    wide = np.longdouble if dtype == "float64" else np.float64
    params = _typed(params, dtype)
    x = grid.inputs.astype(wide)
    limits = LIMITS[dtype]._replace(epsilon=min(LIMITS[dtype].epsilon, LIMITS["float32"].epsilon))
    if reference == "softmax_focal_loss":
        return softmax(x, grid.targets, params, limits)
    if reference == "smooth_l1_loss":
        return smooth_l1(x, grid.targets.astype(wide), params["beta"], limits)
    if reference == "giou_loss":
        return giou(x, grid.targets.astype(wide))
    smoothing = params.get("label_smoothing", 0.0)
    y = grid.target_of_logit.astype(wide) * (1 - smoothing) + smoothing / 2
    sparse = reference == "sparse_sigmoid_focal_loss"
    targets = grid.targets if sparse else grid.targets.astype(wide)
    return elementwise(reference, params, x, targets, y, limits, second)


def reduced(
    reference: str, params: Params, dtype: str, grid: Grid, exact: Exact, reduction: str
) -> tuple[Grid, Exact]:
    """Some rows of a grid, and what a reduction makes of the loss there."""
    ordinary = np.abs(grid.inputs).reshape(len(grid.inputs), -1).max(-1) <= ORDINARY
    rows = np.random.default_rng(0).permutation(np.flatnonzero(ordinary))[:REDUCED]
    x, t, y = grid.inputs[rows], grid.targets[rows], grid.target_of_logit[rows]
    few = Grid(x, t, y, {reduction: np.ones(len(rows), bool)})

    value, gradient = (Result(*(a[rows] for a in r)) for r in (exact.value, exact.gradient))
    loss = getattr(focal.numpy, reference)
    total = loss(x, t, reduction="sum", **params)
    share = loss(x, t, reduction=reduction, **params) / total  # of a mean, 1 / count
    epsilon = min(LIMITS[dtype].epsilon, LIMITS["float32"].epsilon)
    # Each addition is a rounding of the sum; a gradient is multiplied once more.
    added = value.slack.sum() + value.size.size / 2 * epsilon * value.size.sum()
    more = gradient.slack + 2 * LIMITS[dtype].epsilon * gradient.size
    return few, Exact(
        Result(share * value.exact.sum(), share * value.size.sum(), share * added),
        Result(share * gradient.exact, share * gradient.size, share * more),
    )


def _typed(params: Params, dtype: str) -> Params:
    number = float if dtype == "float64" else lambda v: float(np.float32(v))
    return {name: v if name == "alpha" else number(v) for name, v in params.items()}
