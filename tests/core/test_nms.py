"""Greedy non-maximum suppression against the sequential loop."""

from __future__ import annotations

import importlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
from backends import Backend, load, namespace, without_box_kernels
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from strategies import boxes as box_lists

import focal.numpy as reference
from focal.core.nms import BLOCK, CHUNK, best, suppress
from focal.kernels import numpy_boxes

TAIL = 40
"""Boxes beyond the last whole block."""


def greedy(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """From the best score down, drop what a kept box overlaps; equal scores in order."""
    alive = np.ones(len(boxes), bool)
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if alive[i]:
            kept.append(i)
            overlap = reference.box_iou(boxes[i : i + 1], boxes)[0]
            alive &= ~(overlap > threshold)
            alive[i] = False
    return np.array(kept, dtype=np.int64)


def per_class(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, threshold: float
) -> np.ndarray:
    kept: list[int] = []
    for c in np.unique(classes):
        own = np.flatnonzero(classes == c)
        kept.extend(own[greedy(boxes[own], scores[own], threshold)])
    return np.array(sorted(kept, key=lambda i: (-scores[i], i)), dtype=np.int64)


def crowd(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of boxes, a third of them duplicates, with many equal scores."""
    random = np.random.default_rng(0)
    corner, side = random.uniform(0, 300, (n, 2)), random.uniform(10, 60, (n, 2))
    boxes = np.concatenate([corner, corner + side], axis=1)
    boxes[: n // 3] = boxes[random.integers(0, n, n // 3)]
    return boxes.astype("float32"), (random.integers(0, max(1, n // 4), n) / n).astype("float32")


@given(st.data(), box_lists(), st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]))
def test_small(backend: Backend, data: st.DataObject, boxes: np.ndarray, threshold: float) -> None:
    n = len(boxes)
    scores = np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), float)
    got = backend("nms", boxes, scores, threshold)
    assert_array_equal(got, greedy(boxes, scores, threshold))
    classes = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), np.int64)
    got = backend("batched_nms", boxes, scores, classes, threshold)
    assert_array_equal(got, per_class(boxes, scores, classes, threshold))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("n", [1, BLOCK, BLOCK + TAIL, 2 * BLOCK + TAIL])
def test_crowd(backend: Backend, n: int, threshold: float) -> None:
    boxes, scores = crowd(n)
    assert_array_equal(backend("nms", boxes, scores, threshold), greedy(boxes, scores, threshold))


def test_crowd_per_class(backend: Backend) -> None:
    boxes, scores = crowd(BLOCK + TAIL)
    classes = np.random.default_rng(1).integers(0, 3, len(boxes))
    got = backend("batched_nms", boxes, scores, classes, 0.5)
    assert_array_equal(got, per_class(boxes, scores, classes, 0.5))


def test_chain_across_blocks(backend: Backend) -> None:
    """Each box overlaps only its neighbors in the chain: every second one survives."""
    n, start, stop = BLOCK + TAIL, BLOCK - 41, BLOCK + TAIL
    x = 100.0 * np.arange(n)
    x[start:stop] = 2.0 * np.arange(stop - start) - 1000
    boxes = np.stack([x, np.zeros(n), x + 5, np.ones(n)], axis=1).astype("float32")
    kept = backend("nms", boxes, -np.arange(n, dtype="float32"), 0.4)
    expected = [i for i in range(n) if i < start or (i - start) % 2 == 0]
    assert_array_equal(kept, expected)


def test_rounds_between_two_looks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device PyTorch takes several rounds at once, although most need fewer."""
    boxes, scores = crowd(BLOCK + TAIL)
    backend = load("torch")
    without_box_kernels(backend, monkeypatch)
    operations = importlib.import_module("focal.torch._ops")
    monkeypatch.setattr(operations, "_rounds", lambda x: operations.DEVICE_ROUNDS)
    assert_array_equal(backend("nms", boxes, scores, 0.3), greedy(boxes, scores, 0.3))
    test_chain_across_blocks(backend)


def test_identical_boxes_leave_the_first(backend: Backend) -> None:
    boxes = np.tile([[1.0, 2.0, 3.0, 4.0]], (10, 1))
    assert_array_equal(backend("nms", boxes, np.full(10, 0.5), 0.5), [0])
    assert_array_equal(backend("nms", boxes, np.arange(10) / 10, 0.5), [9])
    assert_array_equal(backend("nms", boxes, np.arange(10) / 10, 1.0), np.arange(10)[::-1])


def test_overlap_at_the_threshold_is_kept(backend: Backend) -> None:
    boxes = np.array([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]])
    scores = np.array([2.0, 1.0])
    assert_array_equal(backend("nms", boxes, scores, 0.5), [0, 1])
    assert_array_equal(backend("nms", boxes, scores, 0.499), [0])


def test_many_boxes(backend: Backend) -> None:
    """Beyond what kept boxes are compared with at once."""
    boxes, scores = crowd(2 * CHUNK)
    boxes += 400 * np.random.default_rng(1).integers(0, 8, (len(boxes), 1)).astype("float32")
    kept = greedy(boxes, scores, 0.5)
    assert len(kept) > CHUNK + BLOCK
    assert_array_equal(backend("nms", boxes, scores, 0.5), kept)


def spread(kind: str, n: int) -> np.ndarray:
    """Boxes that overlap few others, or many, along one axis or both."""
    random = np.random.default_rng(4)
    line, zero = 10.0 * np.arange(n), np.zeros(n)
    column = np.stack([zero, line, zero + 400, line + 14], axis=1)
    square = np.stack([line % 300, 10 * (line // 300), line % 300 + 14, 10 * (line // 300) + 14], 1)
    heaps = square[random.integers(0, 20, n)] + random.normal(0, 1, (n, 4))
    crossed = np.where(random.random((n, 1)) < 0.5, column, column[:, [1, 0, 3, 2]])
    return {"column": column, "squares": square, "heaps": heaps, "crossed": crossed}[kind]


@pytest.mark.parametrize("kind", ["column", "squares", "heaps", "crossed"])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_only_neighbors_are_compared(name: str, kind: str) -> None:
    """On a CPU: boxes of several blocks, by the axis along which they are spread, and by class."""
    backend, n = load(name), 2 * numpy_boxes.BLOCK + TAIL
    random = np.random.default_rng(5)
    boxes = random.permutation(spread(kind, n)).astype("float32")
    boxes[::50, random.integers(0, 4)] = np.nan
    boxes[7::50] = boxes[7::50, [2, 1, 0, 3]]
    boxes[11::50, 2] = np.inf
    scores, classes = random.integers(0, n // 3, n) / n, random.integers(-2, 3, n)
    valid = np.flatnonzero(~np.isnan(boxes).any(axis=1))
    for threshold in (0.0, 0.1, 0.5):
        with np.errstate(invalid="ignore"):  # infinite boxes
            kept = valid[greedy(boxes[valid], scores[valid], threshold)]
            of_classes = valid[per_class(boxes[valid], scores[valid], classes[valid], threshold)]
        assert_array_equal(backend("nms", boxes, scores, threshold), kept)
        assert_array_equal(backend("batched_nms", boxes, scores, classes, threshold), of_classes)


@pytest.mark.parametrize("kind", ["column", "heaps", "crossed"])
def test_memory_is_not_quadratic(kind: str) -> None:
    peaks = []
    for n in (4000, 16_000):
        boxes = spread(kind, n).astype("float32")
        tracemalloc.start()
        reference.nms(boxes, np.arange(n, dtype="float32"), 0.5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]


def test_inverted_and_empty_boxes_suppress_nothing(backend: Backend) -> None:
    boxes = np.array(
        [[10.0, 0.0, 0.0, 10.0], [0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 5.0, 9.0], [10.0, 10.0, 0, 0]]
    )
    for threshold in (0.0, 0.5):
        assert_array_equal(backend("nms", boxes, -np.arange(4.0), threshold), [0, 1, 2, 3])


@pytest.mark.parametrize("column", range(4))
def test_a_box_with_nan_is_dropped(backend: Backend, column: int) -> None:
    boxes = np.tile([[0.0, 0.0, 10.0, 10.0]], (4, 1))
    boxes[0, column] = boxes[2, column] = np.nan
    scores = np.array([4.0, 3.0, 2.0, 1.0])
    assert_array_equal(backend("nms", boxes, scores, 0.5), [1])
    assert_array_equal(backend("nms", boxes[[0, 2]], scores[:2], 0.5), np.zeros(0))
    classes = np.array([0, 0, 1, 1])
    assert_array_equal(backend("batched_nms", boxes, scores, classes, 0.5), [1, 3])


def test_nan_scores_come_last(backend: Backend) -> None:
    boxes = np.array([[0.0, 0.0, 10.0, 10.0]] * 6)
    boxes[[1, 2, 4], :] += 100 * np.arange(1, 4)[:, None]
    scores = np.array([np.nan, np.nan, -np.inf, -np.inf, np.inf, 0.5])
    assert_array_equal(backend("nms", boxes, scores, 0.5), [4, 5, 2, 1])


def test_large_class_numbers_are_told_apart(backend: Backend) -> None:
    boxes, scores = np.array([[0.0, 0.0, 4.0, 4.0]] * 3), np.array([3.0, 2.0, 1.0])
    classes = np.array([2**30, 2**30 + 1, 2**30])
    assert_array_equal(backend("batched_nms", boxes, scores, classes, 0.5), [0, 1])


def test_batches_are_each_image_by_itself(backend: Backend) -> None:
    """As the detector calls it: sorted, with classes, a batch at once."""
    n = 2 * BLOCK + TAIL
    boxes = np.stack([crowd(n)[0], crowd(n)[0][::-1]])
    classes = np.random.default_rng(2).integers(0, 3, (2, n))
    arrays = backend.asarray(boxes), backend.asarray(classes, "int32")
    kept = backend.numpy(suppress(namespace(backend), *arrays, 0.5))
    for image in range(2):
        expected = per_class(boxes[image], -np.arange(n), classes[image], 0.5)
        assert_array_equal(np.flatnonzero(kept[image]), np.sort(expected))


@pytest.mark.parametrize("n", [1, 30, BLOCK, 2 * BLOCK + TAIL])
@pytest.mark.parametrize("most", [1, 30, 200])
def test_the_first_that_are_kept(backend: Backend, n: int, most: int) -> None:
    """Of lists that are full early, late and never, with boxes of NaN between and after."""
    most = min(most, n)
    boxes = np.stack([crowd(n)[0], crowd(n)[0], crowd(n)[0][::-1]])
    boxes[0, :, 0::2] += 100 * np.arange(n, dtype="float32")[:, None]  # nothing overlaps
    boxes[1, 3:9] = boxes[1, BLOCK // 2 : BLOCK + 5] = boxes[2, 120:] = np.nan
    classes = np.random.default_rng(3).integers(0, 2, (3, n))
    arrays = backend.asarray(boxes), backend.asarray(classes, "int32")
    found = best(namespace(backend), *arrays, 0.4, most)
    expected = backend.numpy(suppress(namespace(backend), *arrays, 0.4))
    for at, real, kept in zip(*(backend.numpy(x) for x in found), expected, strict=True):
        wanted = np.flatnonzero(kept)[:most]
        assert_array_equal(real, np.arange(most) < len(wanted))
        assert_array_equal(at[real], wanted)
    if n > BLOCK and most == 200:
        counts = expected.sum(axis=-1)
        assert counts[0] > most > counts[2]


def test_boxes_that_are_kept_have_a_gradient(autodiff: Backend) -> None:
    boxes, scores = crowd(BLOCK + TAIL)
    kept = greedy(boxes, scores, 0.5)
    scores = autodiff.asarray(scores)

    def total(boxes: Any) -> Any:
        at = autodiff.F.nms(boxes, scores, 0.5)[: len(kept)]
        return namespace(autodiff).take(1 * boxes, at, axis=0)

    gradient = autodiff.grad(total, autodiff.asarray(boxes))
    assert_array_equal(gradient, np.isin(np.arange(len(boxes)), kept)[:, None] * np.ones(4))


def test_empty(backend: Backend) -> None:
    none = np.zeros((0, 4)), np.zeros(0)
    assert backend("nms", *none, 0.5).shape == (0,)
    assert backend("batched_nms", *none, np.zeros(0, np.int64), 0.5).shape == (0,)


def test_half_types_do_not_overflow(backend: Backend) -> None:
    """The area of a box of 512 pixels is beyond the greatest float16 number."""
    boxes, scores = np.array([[0.0, 0.0, 512.0, 512.0]] * 2), np.array([1.0, 2.0])
    for dtype in backend.half_types:
        half = backend.asarray(boxes, dtype), backend.asarray(scores, dtype)
        assert_array_equal(backend.numpy(backend.F.nms(*half, 0.5)), [1])
