"""Hypothesis strategies: logits with forced extremes, soft targets, boxes.

Shapes and exponents come from short lists, values from everywhere: it is in values that a loss
goes wrong, while a framework that compiles does so anew for every shape and every exponent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

EXTREMES = (0.0, 20.0, -20.0, 100.0, -100.0, 1000.0, -1000.0)

# gamma 0, 0.5, 1 and 2 have a branch of their own; a fraction of 1 is where naive formulas fail
gammas = st.sampled_from([0.0, 0.5, 1.0, 2.0, 0.125, 3.75, 8.0])
any_gammas = gammas | st.floats(0, 8, width=16)  # exact in every type
alphas = st.sampled_from([None, -1, 0.0, 0.001, 0.25, 0.5, 1.0])
shapes = st.sampled_from([(5,), (3, 0), (2, 3, 4)])
lengths = st.sampled_from([0, 1, 10])
rows_and_classes = st.sampled_from([((4,), 1), ((0,), 3), ((2, 3), 5)])


def logits(width: int = 32, bound: float = 1000.0) -> st.SearchStrategy[float]:
    extremes = [x for x in EXTREMES if abs(x) <= bound]
    return st.sampled_from(extremes) | st.floats(-bound, bound, width=width)


# Exact in every type, bfloat16 too, and 1 - y is exact as well
coarse_logits = st.sampled_from(EXTREMES) | st.integers(-256, 256).map(lambda k: k / 4)
coarse_targets = st.integers(0, 64).map(lambda k: k / 64)
hard_targets = st.sampled_from([0.0, 1.0])
soft_targets = hard_targets | st.sampled_from([0.5, 2.0**-10]) | st.floats(0, 1, width=16)


class Examples(NamedTuple):
    x: np.ndarray
    y: np.ndarray


@st.composite
def examples(
    draw: Any,
    dtype: str = "float32",
    targets: st.SearchStrategy[float] = soft_targets,
    elements: st.SearchStrategy[float] | None = None,
) -> Examples:
    """Logits and targets of one shape."""
    shape = draw(shapes)
    if elements is None:
        elements = logits(8 * np.dtype(dtype).itemsize)
    x = draw(hnp.arrays(dtype, shape, elements=elements))
    y = draw(hnp.arrays(dtype, shape, elements=targets))
    return Examples(x, y)


class Rows(NamedTuple):
    x: np.ndarray
    labels: np.ndarray


@st.composite
def rows(
    draw: Any,
    lowest_label: int = -2,
    dtype: str = "float32",
    bound: float = 1000.0,
    shapes: st.SearchStrategy[tuple[tuple[int, ...], int]] = rows_and_classes,
) -> Rows:
    """Logits (..., K) and a label for each row."""
    shape, classes = draw(shapes)
    width = 8 * np.dtype(dtype).itemsize
    x = draw(hnp.arrays(dtype, (*shape, classes), elements=logits(width, bound)))
    labels = draw(hnp.arrays(np.int64, shape, elements=st.integers(lowest_label, classes - 1)))
    return Rows(x, labels)


@st.composite
def boxes(draw: Any, count: int | None = None, min_side: int = 0, extent: int = 64) -> np.ndarray:
    """(N, 4) boxes on a grid of quarter pixels, so that ties and shared edges are common."""
    n = draw(lengths) if count is None else count
    corner = hnp.arrays(np.int64, (n, 2), elements=st.integers(-extent, extent))
    side = hnp.arrays(np.int64, (n, 2), elements=st.integers(4 * min_side, 2 * extent))
    low, size = draw(corner), draw(side)
    return np.concatenate([low, low + size], axis=1) / 4
