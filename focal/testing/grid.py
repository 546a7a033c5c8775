"""The inputs and targets that a loss is checked at.

An axis is divided into equal parts. The grid has each edge and a random point in each part, so an
error in any interval as wide as a part is found, also one that is absent at round numbers. For
logits there are three such divisions, finer near 0.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focal.testing.ulp import LIMITS, rounded

__all__ = ["Grid", "dense_grid", "difference_grid", "grid_of", "softmax_grid", "sparse_grid"]

Wide = NDArray[np.float64]
RANGES = ((8.0, 4096), (128.0, 8192), (4096.0, 4096))
"""Logits in [-size, size], and the number of parts."""
PARTS = 4096
"""Parts of [0, 1] that soft targets are drawn from."""
EXTREMES = (1.0, 17.0, 20.0, 88.0, 100.0, 1000.0)
HUNDREDTHS = np.arange(1, 100) / 100
POWERS = 2.0 ** -np.arange(3, 25, 3)
"""Targets near 0, and as far from 1."""
ROWS = (-1000.0, -100.0, -20.0, -1.0, 0.0, 17.0, 88.0, 1000.0)
CLASSES = 3
LARGEST = {"float16": 14}
"""Exponent of the largest logits, by default 64: no loss needs to overflow there."""
CORNERS = {
    "the same": (0, 0, 1, 1),
    "shared edges": (0, 0, 2, 1),
    "inside": (0.25, 0.25, 0.75, 0.5),
    "touching": (1, 0, 2, 1),
    "far": (64, 64, 65, 66),
    "no width": (0.5, 0.25, 0.5, 0.75),
    "no area": (0.5, 0.5, 0.5, 0.5),
}
"""Boxes that are paired with (0, 0, 1, 1)."""


class Grid(NamedTuple):
    """Inputs, targets, and the kinds of targets that are reported separately.

    `target_of_logit` is the target in [0, 1] of each logit, where there is one. `kinds` are masks
    of the first axis, by name.
    """

    inputs: Wide
    targets: NDArray[Any]
    target_of_logit: Wide
    kinds: dict[str, NDArray[np.bool_]]


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


def dense_grid(dtype: str, soft: bool, seed: int) -> Grid:
    """Every logit with target 0, with target 1, and with a soft target."""
    random = np.random.default_rng(seed)
    axis = np.concatenate([_extremes(dtype), _powers(dtype, random), *_ranges(random)])
    axis = np.unique(rounded(axis, dtype))
    x, y = np.tile(axis, 2), np.repeat([0.0, 1.0], len(axis))
    hard = len(x)
    if soft:
        special = np.concatenate([HUNDREDTHS, POWERS, 1 - POWERS])
        pairs = [tuple(map(np.ravel, np.meshgrid(_extremes(dtype), special)))]
        pairs += [(part, _soft(len(part), random)) for part in _ranges(random)]
        powers = _powers(dtype, random)
        pairs.append((powers, _soft(len(powers), random)))
        x = np.concatenate([x, *(rounded(part, dtype) for part, _ in pairs)])
        y = np.concatenate([y, *(rounded(part, dtype) for _, part in pairs)])
    kinds = {"hard": np.arange(len(x)) < hard}
    return Grid(x, y, y, kinds | {"soft": ~kinds["hard"]} if soft else kinds)


def sparse_grid(dtype: str, seed: int) -> Grid:
    """Rows of three logits, each with every label: ignored (-2), background (-1), a class."""
    random = np.random.default_rng(seed)
    parts = [_extremes(dtype), _powers(dtype, random), *_ranges(random)]
    return _with_labels(rounded(_rows(parts, random), dtype), np.arange(-2, CLASSES))


def softmax_grid(dtype: str, seed: int) -> Grid:
    """Rows of three logits, extremes in every order among them, each with every label."""
    random = np.random.default_rng(seed)
    extremes = np.array(list(itertools.product(ROWS, repeat=CLASSES)))
    rows = np.concatenate([extremes, _rows(_ranges(random), random)])
    return _with_labels(rounded(rows, dtype), np.arange(CLASSES))


def difference_grid(dtype: str, seed: int) -> Grid:
    """Inputs with target 0, and with a target of similar magnitude."""
    random = np.random.default_rng(seed)
    parts = [_extremes(dtype), _powers(dtype, random), *_ranges(random)]
    x = rounded(np.concatenate(parts), dtype)
    t = rounded(np.concatenate([random.permutation(part) for part in parts]), dtype)
    zero = np.arange(2 * len(x)) < len(x)
    x, t = np.tile(x, 2), np.concatenate([np.zeros_like(t), t])
    return Grid(x, t, t, {"zero": zero, "any": ~zero})


def boxes_grid(dtype: str, seed: int) -> Grid:
    """Pairs of boxes of all sizes, disjoint, overlapping and nested; then special cases."""
    random = np.random.default_rng(seed)

    def axis(low: float, high: float) -> Wide:
        return random.permutation(_strata(low, high, PARTS, random))

    scale = 2.0 ** axis(-4, 10)[:, None]
    pairs = []
    for _ in range(2):
        corner = np.stack([axis(-2, 2), axis(-2, 2)], -1)
        size = 2.0 ** np.stack([axis(-2, 1), axis(-2, 1)], -1)
        pairs.append(scale * np.concatenate([corner, corner + size], -1))
    others = np.array(list(CORNERS.values()), np.float64)
    ones = np.tile([0.0, 0.0, 1.0, 1.0], (len(others), 1))
    a = rounded(np.concatenate([pairs[0], ones, others]), dtype)
    b = rounded(np.concatenate([pairs[1], others, ones]), dtype)
    return Grid(a, b, b, {"boxes": np.ones(len(a), bool)})


def _strata(low: float, high: float, parts: int, random: np.random.Generator) -> Wide:
    """The edges of the parts of an interval, and a random point in each part."""
    step = (high - low) / parts
    edges = low + step * np.arange(parts + 1)
    return np.concatenate([edges, edges[:-1] + step * random.random(parts)])


def _ranges(random: np.random.Generator) -> list[Wide]:
    return [_strata(-size, size, parts, random) for size, parts in RANGES]


def _soft(count: int, random: np.random.Generator) -> Wide:
    """Targets in all parts of [0, 1], in random order."""
    return random.permutation(np.resize(_strata(0, 1, PARTS, random)[1:-1], count))


def _extremes(dtype: str) -> Wide:
    """0, the smallest numbers, and the logits where losses break."""
    epsilon, tiny, _ = LIMITS[dtype]
    sizes = np.array([tiny * epsilon, tiny / 2, tiny, epsilon**2, epsilon, *EXTREMES])
    return np.concatenate([-sizes, [0.0], sizes])


def _powers(dtype: str, random: np.random.Generator) -> Wide:
    """A random number between any two consecutive powers of two, of both signs."""
    exponents = np.arange(np.log2(LIMITS[dtype].tiny), LARGEST.get(dtype, 64))
    return np.concatenate([s * 2.0 ** (exponents + random.random(len(exponents))) for s in (-1, 1)])


def _rows(parts: list[Wide], random: np.random.Generator) -> Wide:
    """Logits of one part side by side, every third in each column, in random order."""
    rows = []
    for part in parts:
        columns = [random.permutation(part[k::CLASSES]) for k in range(CLASSES)]
        rows.append(np.stack([np.resize(c, len(columns[0])) for c in columns], axis=-1))
    return np.concatenate(rows)


def _with_labels(rows: Wide, labels: NDArray[np.int64]) -> Grid:
    x, t = np.tile(rows, (len(labels), 1)), np.repeat(labels, len(rows))
    one_hot = (t[:, None] == np.arange(CLASSES)).astype(np.float64)
    return Grid(x, t, one_hot, {"labels": np.ones(len(x), bool)})
