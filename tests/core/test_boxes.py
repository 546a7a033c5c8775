"""Boxes: overlaps, the R-CNN code, and the losses of box regression."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from backends import Backend, load
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from precision import LIMITS, golden, worst_ulps
from strategies import Examples, boxes, examples, logits

import focal.numpy as reference

GOLDEN = golden("boxes")
AWKWARD = np.array(
    [
        [0.0, 0.0, 4.0, 4.0],
        [0.0, 0.0, 4.0, 4.0],  # identical
        [4.0, 0.0, 8.0, 4.0],  # shares an edge
        [8.0, 8.0, 9.0, 9.0],  # disjoint
        [1.0, 1.0, 2.0, 2.0],  # inside
        [3.0, 3.0, 3.0, 3.0],  # a point
        [0.0, 2.0, 9.0, 2.0],  # a line
        [3.0, 3.0, 3.0, 3.0],
    ]
)


# ---------------------------------------------------------------- overlaps


def test_overlaps_are_the_definition(backend: Backend) -> None:
    b = np.array(GOLDEN["boxes"])
    assert_allclose(backend("box_iou", b, b), GOLDEN["iou"], rtol=1e-14, atol=1e-16)
    assert_allclose(backend("generalized_box_iou", b, b), GOLDEN["giou"], rtol=1e-13)


@given(boxes())
def test_area(backend: Backend, a: np.ndarray) -> None:
    expected = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in a]
    assert_array_equal(backend("box_area", a), np.array(expected))


@given(boxes(), boxes())
def test_iou(backend: Backend, a: np.ndarray, b: np.ndarray) -> None:
    iou = backend("box_iou", a, b)
    assert iou.shape == (len(a), len(b))
    assert ((iou >= 0) & (iou <= 1)).all()
    assert_array_equal(iou, backend("box_iou", b, a).T)
    with_itself = np.diag(backend("box_iou", a, a))
    assert_array_equal(with_itself, backend("box_area", a) > 0)


@given(boxes(), boxes())
def test_giou(backend: Backend, a: np.ndarray, b: np.ndarray) -> None:
    giou = backend("generalized_box_iou", a, b)
    assert ((giou >= -1) & (giou <= 1)).all()
    assert (giou <= backend("box_iou", a, b)).all()
    assert_array_equal(giou, backend("generalized_box_iou", b, a).T)


@given(boxes(), boxes(), st.integers(-64, 64), st.sampled_from([0.25, 2.0, 8.0]))
def test_overlaps_do_not_depend_on_place_or_scale(
    backend: Backend, a: np.ndarray, b: np.ndarray, shift: int, scale: float
) -> None:
    for name in ("box_iou", "generalized_box_iou"):
        moved = backend(name, (a + shift) * scale, (b + shift) * scale)
        assert_array_equal(moved, backend(name, a, b))


@pytest.mark.parametrize("name", ["box_iou", "generalized_box_iou"])
def test_overlaps_of_batches(backend: Backend, name: str) -> None:
    random = np.random.default_rng(0)
    a, b = np.sort(random.normal(size=(2, 3, 5, 2, 2)), axis=-2).reshape(2, 3, 5, 4)
    batched = backend(name, a, b)
    assert batched.shape == (3, 5, 5)
    for i in range(3):
        assert_array_equal(batched[i], backend(name, a[i], b[i]))
    assert_array_equal(backend(name, a, b[0])[2], backend(name, a[2], b[0]))


@pytest.mark.parametrize("name", ["box_iou", "generalized_box_iou"])
def test_half_types_do_not_overflow(backend: Backend, name: str) -> None:
    """The area of a box of 512 pixels is beyond the greatest float16 number."""
    a = np.array([[0.0, 0.0, 512.0, 512.0], [0.0, 0.0, 512.0, 256.0]])
    for dtype in backend.half_types:
        half = backend.asarray(a, dtype)
        got = backend.numpy(getattr(backend.F, name)(half, half))
        assert_allclose(got, backend(name, a, a), rtol=1e-2)


INVERTED = np.array([[10.0, 0.0, 0.0, 10.0], [0.0, 10.0, 10.0, 0.0], [10.0, 10.0, 0.0, 0.0]])


def test_inverted_boxes_overlap_nothing(backend: Backend) -> None:
    """Even where the sum of the areas is 0, or negative."""
    solid = np.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 5.0, 5.0]])
    for a, b in ((INVERTED, solid), (solid, INVERTED), (INVERTED, INVERTED)):
        assert_array_equal(backend("box_iou", a, b), np.zeros((len(a), len(b))))


# ---------------------------------------------------------------- integers, and no boxes


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_integer_boxes_are_taken_as_float32(backend: Backend, dtype: str) -> None:
    whole = np.array([[0, 0, 4, 4], [2, 0, 6, 4], [2, 2, 3, 3], [0, 0, 200, 250]], dtype)
    exact = whole.astype(np.float32)
    scores, classes = np.arange(4, dtype=np.float32), np.array([0, 1, 0, 1])
    for name, arguments, others in (
        ("box_area", 1, ()),
        ("box_iou", 2, ()),
        ("generalized_box_iou", 2, ()),
        ("giou_loss", 2, ()),
        ("encode_boxes", 2, ()),
        ("clip_boxes", 1, ((100, 150),)),
        ("nms", 1, (scores, 0.3)),
        ("batched_nms", 1, (scores, classes, 0.3)),
        ("match_anchors", 2, ()),
        ("assign_targets", 2, (classes,)),
    ):
        expected = backend(name, *[exact] * arguments, *others)
        got = backend(name, *[whole] * arguments, *others)
        for a, b in zip(
            *(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True
        ):
            assert a.dtype == b.dtype
            assert_array_equal(a, b)
    assert backend("clip_boxes", whole, (100, 150)).dtype == np.float32
    assert_array_equal(backend("encode_boxes", whole, exact), np.zeros((4, 4)))
    assert_array_equal(backend("decode_boxes", np.zeros((4, 4), np.float32), whole), exact)


def test_image_sizes_are_whole_numbers_of_any_type(backend: Backend) -> None:
    expected = backend("clip_boxes", AWKWARD, (5, 6))
    for size in ((5.0, 6), (np.float32(5), np.int64(6)), np.array([5, 6]), [5, 6.0]):
        clipped = backend.F.clip_boxes(backend.asarray(AWKWARD), size)
        assert_array_equal(backend.numpy(clipped), expected)
        anchors = backend.numpy(backend.F.anchors(size))
        assert_array_equal(anchors, backend("anchors", (5, 6)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_boxes_have_results_and_gradients(autodiff: Backend, dtype: str) -> None:
    none, some = autodiff.asarray(AWKWARD[:0], dtype), autodiff.asarray(AWKWARD[:3], dtype)
    F = autodiff.F
    for function, shape in (
        (F.box_area, (0,)),
        (lambda x: F.box_iou(x, some), (0, 3)),
        (lambda x: F.box_iou(some, x), (3, 0)),
        (lambda x: F.box_iou(x, x), (0, 0)),
        (lambda x: F.generalized_box_iou(x, some), (0, 3)),
        (lambda x: F.generalized_box_iou(some, x), (3, 0)),
        (lambda x: F.encode_boxes(x, none), (0, 4)),
        (lambda x: F.encode_boxes(x, some[:1]), (0, 4)),
        (lambda x: F.decode_boxes(x, none), (0, 4)),
        (lambda x: F.clip_boxes(x, (5, 6)), (0, 4)),
        (lambda x: F.giou_loss(x, none), (0,)),
        (lambda x: F.giou_loss(x, none, "sum"), ()),
        (lambda x: F.giou_loss(x, none, "mean"), ()),
        (lambda x: F.smooth_l1_loss(x, none), (0, 4)),
        (lambda x: F.smooth_l1_loss(x, none, reduction="mean"), ()),
    ):
        result = autodiff.numpy(function(none))
        assert result.shape == shape
        assert result.sum() == 0
        gradient = autodiff.grad(function, none)
        assert gradient.shape == (0, 4)
        assert gradient.dtype == dtype


# ---------------------------------------------------------------- kinks


def test_the_gradient_at_a_kink(autodiff: Backend) -> None:
    """What PyTorch's abs, clamp, maximum and minimum have there, in every framework."""
    slope, two = autodiff.slope, np.array([[0.0, 0.0, 2.0, 2.0]])
    zero = np.zeros(3)
    assert_array_equal(slope("smooth_l1_loss", zero, zero, beta=0.0), zero)
    around = np.array([0.0, 1.0, -1.0])
    assert_array_equal(slope("smooth_l1_loss", around, zero, beta=0.0), around)
    assert_array_equal(slope("smooth_l1_loss", zero, zero, beta=1.0), zero)

    # A clamp passes the gradient at its limits.
    edges = autodiff.asarray(np.array([[0.0, 0.0, 6.0, 5.0], [-1.0, 0.0, 7.0, 6.0]]))
    clipped = autodiff.grad(lambda x: autodiff.F.clip_boxes(x, (5, 6)), edges)
    assert_array_equal(clipped, [[1, 1, 1, 1], [0, 1, 0, 0]])
    deltas = autodiff.asarray(np.array([[0.0, 0.0, 1.0, 1.0]]))
    decode = partial(autodiff.F.decode_boxes, anchors=autodiff.asarray(two), clip=1.0)
    assert_allclose(autodiff.grad(lambda x: decode(x)[..., 2:], deltas)[0, 2:], [math.e] * 2)

    # So boxes that touch are pulled together, as if they overlapped; equal edges share by halves.
    touching = np.array([[2.0, 1.0, 4.0, 3.0]])  # d(w h) / dx2 = h = 1, over a union of 8
    assert_array_equal(slope("box_iou", two, touching), [[0, 0, 1 / 8, 0]])
    assert_array_equal(slope("box_iou", two, np.array([[2.0, 0.0, 4.0, 2.0]])), [[0, 0, 1 / 4, 0]])
    corner = np.array([[2.0, 2.0, 4.0, 4.0]])
    assert_array_equal(slope("box_iou", two, corner), [[0, 0, 0, 0]])
    for name in ("box_iou", "generalized_box_iou", "giou_loss"):
        assert_array_equal(slope(name, two, two), [[0, 0, 0, 0]])
    higher = np.array([[0.0, 0.0, 2.0, 4.0]])  # x1, y1 and x2 are equal
    # I = 4, U = 8; dI = (-1, -1, 1, 2), dU = dA - dI = (-1, -1, 1, 0)
    expected = np.array([[-1 / 16, -1 / 16, 1 / 16, 1 / 4]])
    assert_array_equal(slope("box_iou", two, higher), expected)
    # The hull is the higher box: dC = (-2, -1, 2, 0), C = U = 8; minus d(C - U) / C
    hull = np.array([[-1 / 8, 0, 1 / 8, 0]])
    assert_array_equal(slope("generalized_box_iou", two, higher), expected - hull)
    assert_array_equal(slope("giou_loss", two, higher), hull - expected)


# ---------------------------------------------------------------- the R-CNN code


def test_code_is_the_definition(backend: Backend) -> None:
    solid = np.array(GOLDEN["boxes"][:-1])
    encoded = backend("encode_boxes", solid[:, None], solid)
    assert_allclose(encoded, GOLDEN["encode"], rtol=1e-13, atol=1e-15)
    decoded = backend("decode_boxes", np.array(GOLDEN["deltas"])[:, None], solid)
    assert_allclose(decoded, GOLDEN["decode"], rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10.0, 10.0, 5.0, 5.0), (0.5, 1, 2, 4)])
@given(st.data())
def test_round_trip(
    backend: Backend, weights: tuple[float, float, float, float], data: st.DataObject
) -> None:
    a = data.draw(boxes(min_side=1))
    anchors = data.draw(boxes(len(a), min_side=1))
    deltas = backend("encode_boxes", a, anchors, weights)
    back = backend("decode_boxes", deltas, anchors, weights)
    assert_allclose(back, a, rtol=0, atol=1e-12)
    assert_allclose(deltas, backend("encode_boxes", a, anchors) * weights, rtol=1e-14)


def test_anchor_has_no_offset_from_itself(backend: Backend) -> None:
    a = AWKWARD[:5]
    assert_array_equal(backend("encode_boxes", a, a), np.zeros_like(a))
    assert_array_equal(backend("decode_boxes", np.zeros_like(a), a), a)


def test_decode_clips_sizes_from_above_only(backend: Backend) -> None:
    anchor = np.array([[0.0, 0.0, 16.0, 16.0]])
    deltas = np.array([[0, 0, 1e3, 5.0], [0, 0, -1e3, -5.0], [0, 0, math.log(62.5), 0]])
    x1, y1, x2, y2 = backend("decode_boxes", deltas, anchor).T
    assert_allclose(x2 - x1, [1000, 0, 1000], rtol=1e-14)
    assert_allclose(y2 - y1, [1000, 16 * math.exp(-5), 16], rtol=1e-14)
    x1, y1, x2, y2 = backend("decode_boxes", deltas, anchor, clip=math.log(2)).T
    assert_allclose(x2 - x1, [32, 0, 32], rtol=1e-14)
    x1, y1, x2, y2 = backend("decode_boxes", deltas, anchor, (1, 1, 1e4, 1)).T
    assert_allclose((x2 - x1)[:2], 16 * np.exp([0.1, -0.1]), rtol=1e-13)  # weights come first


def test_boxes_without_area_have_finite_codes(backend: Backend) -> None:
    anchors = np.tile([[0.0, 0.0, 8.0, 8.0]], (len(AWKWARD), 1))
    for dtype in ("float32", "float64"):
        codes = backend("encode_boxes", AWKWARD.astype(dtype), anchors.astype(dtype))
        assert np.isfinite(codes).all()


@given(boxes(), st.integers(1, 40), st.integers(1, 40))
def test_clip(backend: Backend, a: np.ndarray, height: int, width: int) -> None:
    clipped = backend("clip_boxes", a, (height, width))
    assert_array_equal(clipped, np.clip(a, 0, [width, height, width, height]))
    assert_array_equal(backend("clip_boxes", clipped, (height, width)), clipped)


# ---------------------------------------------------------------- losses


def test_giou_loss_pairs_the_boxes(backend: Backend) -> None:
    expected = 1 - np.diag(backend("generalized_box_iou", AWKWARD, AWKWARD[::-1].copy()))
    losses = backend("giou_loss", AWKWARD, AWKWARD[::-1].copy())
    assert_array_equal(losses, expected)
    assert ((losses >= 0) & (losses <= 2)).all()
    for reduction, total in (("sum", expected.sum()), ("mean", expected.mean())):
        got = backend("giou_loss", AWKWARD, AWKWARD[::-1].copy(), reduction)
        assert_allclose(got, total, rtol=1e-14)
    for reduction in ("sum", "mean"):
        assert backend("giou_loss", AWKWARD[:0], AWKWARD[:0], reduction) == 0


def test_giou_loss_of_simple_boxes(backend: Backend) -> None:
    a = np.array([[0.0, 0.0, 2.0, 2.0]] * 4)
    b = np.array([[0.0, 0, 2, 2], [2, 0, 4, 2], [4, 0, 6, 2], [1, 0, 3, 2]])
    assert_allclose(backend("giou_loss", a, b), [0, 1, 4 / 3, 2 / 3], rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_giou_loss_has_a_finite_gradient_everywhere(autodiff: Backend, dtype: str) -> None:
    first = np.repeat(AWKWARD, len(AWKWARD), axis=0).astype(dtype)
    second = np.tile(AWKWARD, (len(AWKWARD), 1)).astype(dtype)
    for scale in (1e-3, 1.0, 1e3):
        a, b = autodiff.asarray(first * scale), autodiff.asarray(second * scale)
        by_first = autodiff.grad(lambda x, b=b: autodiff.F.giou_loss(x, b), a)
        by_second = autodiff.grad(lambda x, a=a: autodiff.F.giou_loss(a, x), b)
        assert np.isfinite(by_first).all()
        assert np.isfinite(by_second).all()


def test_giou_loss_pulls_disjoint_boxes_together(autodiff: Backend) -> None:
    far = np.array([[10.0, 0.0, 12.0, 2.0]])
    gradient = autodiff.slope("giou_loss", far, np.array([[0.0, 0.0, 2.0, 2.0]]))
    assert gradient[0, 0] + gradient[0, 2] > 0  # a step against it moves the box to the left


VALUES = st.floats(-8, 8, width=16) | st.sampled_from([0.0, 1.0, -1.0, 0.11])


@given(hnp.arrays("float64", (7,), elements=VALUES), hnp.arrays("float64", (7,), elements=VALUES))
def test_smooth_l1_is_the_definition(backend: Backend, x: np.ndarray, y: np.ndarray) -> None:
    d = np.abs(x - y)
    assert_array_equal(backend("smooth_l1_loss", x, y, 0.0), d)
    for beta in (0.11, 1.0, 3.0):
        expected = np.where(d < beta, d * d / (2 * beta), d - beta / 2)
        assert_allclose(backend("smooth_l1_loss", x, y, beta), expected, rtol=1e-14, atol=1e-300)
        for reduction, total in (("sum", expected.sum()), ("mean", expected.mean())):
            got = backend("smooth_l1_loss", x, y, beta, reduction)
            assert_allclose(got, total, rtol=1e-14)


@pytest.mark.parametrize("beta", [0.11, 1.0, 5.0])
def test_smooth_l1_is_smooth_at_beta(autodiff: Backend, beta: float) -> None:
    x = beta * np.array([-1, -1 + 1e-9, 1 - 1e-9, 1, 1 + 1e-9, 0])
    loss = autodiff("smooth_l1_loss", x, np.zeros(6), beta)
    assert_allclose(loss, [*[beta / 2] * 5, 0], rtol=3e-9)
    slope = autodiff.slope("smooth_l1_loss", x, np.zeros(6), beta=beta)
    assert_allclose(slope, [-1, -1, 1, 1, 1, 0], rtol=2e-9)


@pytest.mark.parametrize("beta", [0.0, 0.11, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_smooth_l1_is_that_of_torch(beta: float, reduction: str) -> None:
    backend = load("torch")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 50))
    x[:3] = y[:3]
    targets = backend.asarray(y)

    def theirs(inputs: object) -> object:
        smooth_l1_loss = backend.torch.nn.functional.smooth_l1_loss
        return smooth_l1_loss(inputs, targets, beta=beta, reduction=reduction)

    ours = backend("smooth_l1_loss", x, y, beta, reduction)
    assert_allclose(ours, backend.numpy(theirs(backend.asarray(x))), rtol=1e-14)
    slope = backend.slope("smooth_l1_loss", x, y, beta=beta, reduction=reduction)
    assert_allclose(slope, backend.grad(theirs, backend.asarray(x)), rtol=1e-14)


@pytest.mark.parametrize("beta", [0.0, 0.109375, 1.0])
@given(examples("float32", logits()))
def test_smooth_l1_of_float32_is_exact(backend: Backend, beta: float, example: Examples) -> None:
    """x - y is rounded once, squared, and multiplied by two rounded numbers."""
    x, y = example
    exact = reference.smooth_l1_loss(x.astype(float), y.astype(float), beta)
    got = backend("smooth_l1_loss", x, y, beta)
    assert got.dtype == np.float32
    # Below the smallest normal number a square may be flushed before 1 / (2 beta) enlarges it.
    normal = (exact >= LIMITS["float32"][1] * 8) | (exact == 0)
    assert worst_ulps(got[normal], exact[normal], "float32") <= 5
    assert_allclose(got[~normal], exact[~normal], rtol=0, atol=8 * LIMITS["float32"][1])


@pytest.mark.parametrize("beta", [0.0, 0.109375])
@given(examples("float32", logits()))
def test_smooth_l1_gradient_of_float32_is_that_of_float64(
    autodiff: Backend, beta: float, example: Examples
) -> None:
    """To an ULP of 1, the size of its terms; XLA takes a subnormal difference for 0."""
    x, y = example
    if autodiff.name == "jax":
        distance = np.abs(x - y)
        assume(not ((distance > 0) & (distance < np.finfo(np.float32).tiny)).any())
    exact = autodiff.slope("smooth_l1_loss", x.astype(float), y.astype(float), beta=beta)
    got = autodiff.slope("smooth_l1_loss", x, y, beta=beta)
    assert worst_ulps(got, exact, "float32", np.ones_like(exact)) <= 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@given(st.data())
def test_giou_of_float32_is_exact(backend: Backend, scale: float, data: st.DataObject) -> None:
    """To a few ULP of 1, the size of its terms."""
    a, b = (data.draw(boxes(count=10)).astype(np.float32) * np.float32(scale) for _ in range(2))
    exact = reference.giou_loss(a.astype(float), b.astype(float))
    got = backend("giou_loss", a, b)
    assert got.dtype == np.float32
    assert worst_ulps(got, exact, "float32", np.ones_like(exact)) <= 4


@pytest.mark.parametrize("name", ["smooth_l1_loss", "giou_loss"])
def test_losses_of_half_types(backend: Backend, name: str) -> None:
    a = np.array([[0.0, 0.0, 512.0, 512.0], [0.0, 0.0, 512.0, 256.0]])
    b = a[::-1].copy()
    for dtype in backend.half_types:
        half = backend.asarray(a, dtype), backend.asarray(b, dtype)
        loss = getattr(backend.F, name)(*half)
        assert backend.dtype(loss) == dtype
        assert_allclose(backend.numpy(loss), backend(name, a, b), rtol=1e-2)
        total = getattr(backend.F, name)(*half, reduction="sum")
        assert backend.dtype(total) == "float32"
        assert_allclose(backend.numpy(total), backend(name, a, b).sum(), rtol=1e-6)


def test_smooth_l1_takes_integer_targets(backend: Backend) -> None:
    x, y = np.array([0.5, 3.0], np.float32), np.array([0, 1])
    assert_array_equal(backend("smooth_l1_loss", x, y), np.array([0.125, 1.5], np.float32))
    assert backend("smooth_l1_loss", x[:0], y[:0], reduction="mean") == 0
