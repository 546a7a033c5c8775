"""Matching, target assignment and sampling, each against plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import Backend, load, namespace, without_box_kernels
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from strategies import boxes, lengths

import focal.numpy as reference
from focal import AnchorConfig

LOW_QUALITY = [False, True, 0.0, 0.2, 0.45]
MATCH = "match_anchors"


def matched(
    anchors: np.ndarray,
    truth: np.ndarray,
    foreground: float = 0.5,
    background: float = 0.4,
    low_quality: bool | float = False,
) -> np.ndarray:
    """The rules of match_anchors, one anchor at a time."""
    iou = reference.box_iou(anchors, truth)
    result = []
    for i in range(len(anchors)):
        best, index = 0.0, -1
        for j in range(len(truth)):
            if iou[i, j] > best:
                best, index = iou[i, j], j
        label = -2
        if best < background or best == 0:
            label = -1
        if best >= foreground and best > 0:
            label = index
        if low_quality is not False:
            floor = 0.0 if low_quality is True else low_quality
            for j in range(len(truth)):
                top = max(iou[:, j])
                if top > 0 and top >= floor and iou[i, j] == top:
                    label = index
        result.append(label)
    return np.array(result, dtype=np.int64)


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@given(boxes(), boxes())
def test_match_is_the_plain_rule(
    backend: Backend, low_quality: bool | float, anchors: np.ndarray, truth: np.ndarray
) -> None:
    for thresholds in ((0.5, 0.4), (0.3, 0.3), (0.25, 0.0), (0.0, 0.0), (1.0, 0.5)):
        got = backend(MATCH, anchors, truth, *thresholds, low_quality)
        assert_array_equal(got, matched(anchors, truth, *thresholds, low_quality))


def test_thresholds(backend: Backend) -> None:
    """IoU with the one box is h / 20, exactly at the thresholds too."""
    truth = np.array([[0.0, 0.0, 10.0, 20.0]])
    heights = np.array([0, 5, 8 - 1e-9, 8, 9, 10 - 1e-9, 10, 20])
    anchors = np.array([[0.0, 0.0, 10.0, h] for h in heights])
    assert_array_equal(backend(MATCH, anchors, truth), [-1, -1, -1, -2, -2, -2, 0, 0])
    assert_array_equal(backend(MATCH, anchors, truth, 0.4, 0.4), [-1, -1, -1, 0, 0, 0, 0, 0])
    assert_array_equal(backend(MATCH, anchors, truth, 1.0, 0.0), [-1, -2, -2, -2, -2, -2, -2, 0])


def test_the_first_of_equal_boxes_wins(backend: Backend) -> None:
    anchors = np.array([[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 6.0, 4.0]])
    truth = np.array([[9.0, 9.0, 10.0, 10.0], *anchors[[1, 0, 0, 1]]])
    assert_array_equal(backend(MATCH, anchors, truth), [2, 1])
    between = np.array([[1.0, 0.0, 5.0, 4.0]])
    assert_array_equal(backend(MATCH, between, truth), [1])


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_no_boxes_and_no_anchors(backend: Backend, low_quality: bool | float) -> None:
    anchors, none = np.array([[0.0, 0.0, 4.0, 4.0]] * 3), np.zeros((0, 4))
    options = {"allow_low_quality": low_quality}
    assert_array_equal(backend(MATCH, anchors, none, **options), [-1, -1, -1])
    assert backend(MATCH, none, anchors, **options).shape == (0,)
    assert backend(MATCH, anchors, np.zeros((2, 0, 4)), **options).shape == (2, 3)


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@given(boxes(), boxes())
def test_padding_matches_nothing(
    backend: Backend, low_quality: bool | float, anchors: np.ndarray, truth: np.ndarray
) -> None:
    padded = np.concatenate([truth, np.zeros((10 - len(truth), 4))])
    options = {"allow_low_quality": low_quality}
    expected = backend(MATCH, anchors, truth, **options)
    assert_array_equal(backend(MATCH, anchors, padded, **options), expected)


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_batch_is_each_image_by_itself(backend: Backend, low_quality: bool | float) -> None:
    anchors, truth, labels = scene(images=6)
    got = backend(MATCH, anchors, truth, allow_low_quality=low_quality)
    assigned, deltas = backend("assign_targets", anchors, truth, labels, 0.5, 0.4, low_quality)
    assert got.shape == assigned.shape == (6, len(anchors))
    for i in range(6):
        one = backend(MATCH, anchors, truth[i], allow_low_quality=low_quality)
        assert_array_equal(got[i], one)
        alone = backend("assign_targets", anchors, truth[i], labels[i], 0.5, 0.4, low_quality)
        assert_array_equal(assigned[i], alone[0])
        assert_array_equal(deltas[i], alone[1])


@pytest.mark.parametrize("low_quality", [False, True])
def test_boxes_without_a_proper_area_match_nothing(
    backend: Backend, low_quality: bool | float
) -> None:
    """Inverted, NaN, infinite: as if they were not there, and no anchor is NaN for them."""
    good, nan, inf = [0.0, 0.0, 10.0, 10.0], np.nan, np.inf
    anchors = np.array([good, [20.0, 0.0, 30.0, 10.0]])
    bad = [
        [10.0, 0.0, 0.0, 10.0],  # its area is minus the first anchor's
        [0.0, 10.0, 10.0, 0.0],
        [30.0, 10.0, 20.0, 0.0],  # inverted twice: an area above 0
        *([nan if i == k else x for i, x in enumerate(good)] for k in range(4)),
        [0.0, 0.0, inf, 10.0],
        [-inf, 0.0, 5.0, 10.0],
    ]
    options = {"allow_low_quality": low_quality}
    for box in bad:
        for truth, expected in (([box, good], [1, -1]), ([good, box], [0, -1]), ([box], [-1, -1])):
            truth = np.array(truth)
            assert_array_equal(backend(MATCH, anchors, truth, **options), expected)
            batch = backend(MATCH, anchors, np.stack([truth, truth]), **options)
            assert_array_equal(batch, [expected] * 2)
            with np.errstate(invalid="ignore"):  # NumPy warns of the infinite one
                labels, deltas = backend("assign_targets", anchors, truth, np.arange(len(truth)))
            assert_array_equal(labels, expected)
            assert_array_equal(deltas, np.zeros((2, 4)))
        # The same of an anchor
        got = backend(MATCH, np.array([box, good]), np.array([good]), **options)
        assert_array_equal(got, [-1, 0])


def test_anchors_of_one_type_and_boxes_of_another(backend: Backend) -> None:
    anchors, truth, labels = scene()
    expected = backend("assign_targets", anchors.astype(float), truth, labels)[0]
    got, _ = backend("assign_targets", anchors.astype(np.float32), truth, labels)
    assert_array_equal(got, expected)


def test_half_types_do_not_overflow(backend: Backend) -> None:
    """The area of a box of 512 pixels is beyond the greatest float16 number."""
    anchors = np.array([[0.0, 0.0, 512.0, 512.0], [0.0, 0.0, 512.0, 128.0]])
    for dtype in backend.half_types:
        half = backend.asarray(anchors, dtype)
        assert_array_equal(backend.numpy(backend.F.match_anchors(half, half)), [0, 1])


AT_ONCE = 4
"""Boxes in one operation, in the tests of groups."""


def crowded(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Boxes on a coarse grid, so that most overlaps are equal to another; some are no boxes."""
    low = random.integers(0, 6, (*shape, 2))
    boxes_ = np.concatenate([low, low + random.integers(1, 4, (*shape, 2))], axis=-1) * 8.0
    kind = random.integers(0, 8, shape)
    boxes_[kind == 0] = 0
    boxes_[kind == 1, 2] = np.nan
    return boxes_


@pytest.mark.parametrize("low_quality", [False, True, 0.45])
@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 41])
def test_groups_of_boxes_match_as_single_ones(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, count: int, low_quality: bool | float
) -> None:
    random = np.random.default_rng(count)
    anchors, truth = crowded(random, 150), crowded(random, 2, count)
    options = {"allow_low_quality": low_quality}
    one_by_one = backend(MATCH, anchors, truth, **options)
    for image in range(2):
        expected = matched(anchors, truth[image], low_quality=low_quality)
        assert_array_equal(one_by_one[image], expected)
    without_box_kernels(backend, monkeypatch)
    monkeypatch.setattr(namespace(backend), "boxes_at_once", lambda boxes: AT_ONCE)
    assert_array_equal(backend(MATCH, anchors, truth, **options), one_by_one)
    assert_array_equal(backend(MATCH, anchors, truth[0], **options), one_by_one[0])
    assert backend(MATCH, anchors[:0], truth, **options).shape == (2, 0)
    assert backend(MATCH, anchors, truth[:, :0], **options).shape == (2, 150)


def test_the_first_of_equal_boxes_wins_across_groups(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors = np.array([[0.0, 0.0, 4.0, 4.0], [20.0, 0.0, 24.0, 4.0]])
    without_box_kernels(backend, monkeypatch)
    monkeypatch.setattr(namespace(backend), "boxes_at_once", lambda boxes: AT_ONCE)
    for first in range(12):
        truth = np.tile(anchors[0], (13, 1))
        truth[:first] = [9.0, 9.0, 10.0, 10.0]
        truth[first] = anchors[1]
        for low_quality in (False, True):
            got = backend(MATCH, anchors, truth, allow_low_quality=low_quality)
            assert_array_equal(got, [first + 1, first])


@pytest.mark.parametrize("low_quality", [False, True, 0.45])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_tiles_near_a_box_give_what_all_anchors_give(
    name: str, monkeypatch: pytest.MonkeyPatch, low_quality: bool | float
) -> None:
    """On a CPU: a grid of anchors, whose tiles are passed over, and the same in random order."""
    backend, random = load(name), np.random.default_rng(6)
    grid = reference.anchors((100, 130), AnchorConfig(strides=(8, 32), sizes=(16.0, 96.0)))
    mixed = random.permutation(np.concatenate([grid, crowded(random, 60)]))
    truth = crowded(random, 3, 30) + np.append(random.uniform(-20, 90, 2), [0, 0])[[0, 1, 0, 1]]
    truth[1, :10] = truth[1, 10:20]  # the first of equals wins
    truth[2] = 0
    labels = random.integers(0, 9, truth.shape[:2])
    cases = [
        (anchors, boxes, own)
        for anchors in (grid, mixed)
        for boxes, own in ((truth, labels), (truth[0], labels[0]), (truth[2:], labels[2:]))
    ]
    found = [backend("assign_targets", *case, allow_low_quality=low_quality) for case in cases]
    without_box_kernels(backend, monkeypatch)
    for case, both in zip(cases, found, strict=True):
        with np.errstate(all="ignore"):  # deltas of anchors without area, which match nothing
            expected = backend("assign_targets", *case, allow_low_quality=low_quality)
        assert_array_equal(both[0], expected[0])
        assert_array_equal(both[1], expected[1])
    assert (found[0][0] >= 0).any() and (found[-1][0] == -1).all()


# ---------------------------------------------------------------- assignment


def scene(images: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchors of a small image, and crowded boxes with labels."""
    config = AnchorConfig(strides=(8, 16), sizes=(16, 32))
    anchors = reference.anchors((64, 64), config).astype(float)
    random = np.random.default_rng(0)
    lead = (12,) if images is None else (images, 12)
    corner, side = random.uniform(0, 48, (*lead, 2)), random.uniform(8, 40, (*lead, 2))
    truth = np.concatenate([corner, corner + side], axis=-1)
    return anchors, truth, random.integers(0, 5, lead)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10.0, 10.0, 5.0, 5.0)])
def test_deltas_lead_back_to_the_boxes(
    backend: Backend, weights: tuple[float, float, float, float]
) -> None:
    anchors, truth, labels = scene()
    match = backend(MATCH, anchors, truth)
    assigned, deltas = backend("assign_targets", anchors, truth, labels, weights=weights)
    positive = match >= 0
    assert positive.any()
    assert not positive.all()
    assert_array_equal(assigned[positive], labels[match[positive]])
    assert_array_equal(assigned[~positive], match[~positive])
    assert_array_equal(deltas[~positive], 0)
    decoded = backend("decode_boxes", deltas, anchors, weights)
    assert_allclose(decoded[positive], truth[match[positive]], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_labels_of_any_integer_type(backend: Backend, dtype: str) -> None:
    """A type without a sign cannot hold background, so the result must have one."""
    anchors, truth, labels = scene()
    expected, _ = backend("assign_targets", anchors, truth, labels)
    got, _ = backend("assign_targets", anchors, truth, labels.astype(dtype))
    assert_array_equal(got, expected)


def test_image_without_objects_is_background(backend: Backend) -> None:
    anchors, *_ = scene()
    for boxes_, labels in (
        (np.zeros((0, 4)), np.zeros(0, np.int64)),
        (np.zeros((3, 4)), np.zeros(3, np.int64)),
        (np.zeros((2, 0, 4)), np.zeros((2, 0), np.int64)),
    ):
        assigned, deltas = backend("assign_targets", anchors, boxes_, labels)
        assert assigned.shape == (*boxes_.shape[:-2], len(anchors))
        assert deltas.shape == (*assigned.shape, 4)
        assert (assigned == -1).all()
        assert_array_equal(deltas, 0)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_deltas_have_the_type_of_the_boxes(backend: Backend, count: int, dtype: str) -> None:
    anchors = np.array([[0.0, 0.0, 4.0, 4.0]], dtype)
    labels, deltas = backend("assign_targets", anchors, anchors[:count], np.zeros(count, int))
    assert deltas.dtype == dtype
    assert labels.dtype == np.int64


# ---------------------------------------------------------------- sampling

LABELS = hnp.arrays(np.int64, lengths, elements=st.integers(-2, 2))


@given(LABELS, st.integers(0, 12), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_subsample_is_the_plain_rule(
    backend: Backend, labels: np.ndarray, count: int, share: float
) -> None:
    noise = np.random.default_rng(len(labels)).integers(0, 6, labels.shape) / 8  # with ties
    order = np.argsort(noise, kind="stable")
    positives = [i for i in order if labels[i] >= 0][: int(count * share)]
    negatives = [i for i in order if labels[i] == -1][: count - len(positives)]
    expected = np.full_like(labels, -2)
    for i in (*positives, *negatives):
        expected[i] = labels[i]
    assert_array_equal(backend("subsample", labels, count, share, noise=noise), expected)


def test_subsample_without_noise(backend: Backend) -> None:
    labels = np.tile(np.random.default_rng(0).integers(-2, 3, 500), (4, 1))
    samples = [backend("subsample", labels, 64) for _ in range(3)]
    for got in samples:
        assert_array_equal((got >= 0).sum(-1), 16)
        assert_array_equal((got == -1).sum(-1), 48)
        kept = got > -2
        assert_array_equal(got[kept], labels[kept])
    # Every image of every call is a draw of its own.
    rows = [tuple(np.flatnonzero(row > -2)) for got in samples for row in got]
    assert len(set(rows)) == 12


def test_subsample_draws_from_the_generator_of_torch() -> None:
    backend = load("torch")
    torch, subsample = backend.torch, backend.F.subsample
    labels = torch.zeros(200, dtype=torch.int64)

    def sample(seed: int, draw: Any = subsample) -> np.ndarray:
        torch.manual_seed(seed)
        return backend.numpy(draw(labels, 20, 1.0))

    assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()
    compiled = torch.compile(subsample, fullgraph=True, backend="eager")
    samples = [backend.numpy(compiled(labels, 20, 1.0)) for _ in range(3)]
    assert (samples[0] != samples[1]).any()
    assert (samples[1] != samples[2]).any()
    each = torch.func.vmap(lambda t: subsample(t, 20, 1.0), randomness="different")
    first, second = backend.numpy(each(torch.stack([labels, labels])))
    assert (first != second).any()


# ---------------------------------------------------------------- hard examples


def hardest(losses: np.ndarray, candidates: list[int], count: int | None) -> list[int]:
    return sorted(candidates, key=lambda i: (-losses[i], i))[:count]


def survivors(losses: np.ndarray, crowd: np.ndarray, threshold: float) -> list[int]:
    """Greedy NMS by loss, one box at a time."""
    iou, kept = reference.box_iou(crowd, crowd), []
    for i in hardest(losses, list(range(len(losses))), None):
        if all(iou[i, j] <= threshold for j in kept):
            kept.append(i)
    return kept


def mask(n: int, taken: list[int]) -> np.ndarray:
    return np.isin(np.arange(n), taken)


LOSSES = hnp.arrays("float64", lengths, elements=st.integers(0, 9).map(float))
LIMITS = st.none() | st.integers(0, 10)


@given(st.data(), LOSSES, LIMITS, st.sampled_from([0.0, 0.5, 0.7]))
def test_ohem_is_the_plain_rule(
    backend: Backend, data: st.DataObject, losses: np.ndarray, limit: int | None, threshold: float
) -> None:
    n = len(losses)
    crowd = data.draw(boxes(n, extent=16))
    got = backend("hard_example_mask", losses, limit)
    assert_array_equal(got, mask(n, hardest(losses, list(range(n)), limit)))
    got = backend("hard_example_mask", losses, limit, boxes=crowd, iou_threshold=threshold)
    kept = survivors(losses, crowd, threshold)
    assert_array_equal(got, mask(n, hardest(losses, kept, limit)))


@given(st.data(), LOSSES, LIMITS, st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_one_to_three_is_the_plain_rule(
    backend: Backend, data: st.DataObject, losses: np.ndarray, limit: int | None, ratio: float
) -> None:
    n = len(losses)
    positive = data.draw(hnp.arrays(bool, n))
    most = None if limit is None else int(limit / (1 + ratio))
    positives = hardest(losses, list(np.flatnonzero(positive)), most)
    quota = int(ratio * len(positives))
    negatives = hardest(losses, list(np.flatnonzero(~positive)), quota)
    got = backend("hard_example_mask", losses, limit, positive=positive, negative_ratio=ratio)
    assert_array_equal(got, mask(n, [*positives, *negatives]))


def test_losses_that_are_nan_are_never_taken(backend: Backend) -> None:
    losses = np.array([np.nan, 1.0, np.nan, 2.0])
    assert_array_equal(backend("hard_example_mask", losses, 3), [False, True, False, True])


def test_examples_whose_box_is_nan_are_never_taken(backend: Backend) -> None:
    crowd = np.array([[0.0, 0.0, 4.0, 4.0]] * 3)
    crowd[0, 3] = np.nan
    got = backend("hard_example_mask", np.array([3.0, 2.0, 1.0]), boxes=crowd, iou_threshold=0.5)
    assert_array_equal(got, [False, True, False])


def test_ranks_are_counted_exactly_in_half_types(backend: Backend) -> None:
    """float16 has no odd numbers beyond 2048, bfloat16 none beyond 256."""
    losses, positive = np.zeros(4500), np.arange(4500) < 1001
    for dtype in backend.half_types:
        got = backend.F.hard_example_mask(
            backend.asarray(losses, dtype),
            positive=backend.asarray(positive),
            negative_ratio=3,
        )
        assert backend.numpy(got).sum() == 1001 + 3003
