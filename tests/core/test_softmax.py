"""Softmax focal loss: the definition, the properties, the gradient."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from backends import AUTODIFF, Backend
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from precision import golden, promised_ulps, worst_ulps
from strategies import Rows, any_gammas, gammas, rows

import focal.numpy as reference

NAME = "softmax_focal_loss"
GOLDEN = golden("softmax_focal")
IGNORED = -100
BAD_ROW = np.array([np.inf, np.nan, -np.inf, np.inf])


def rounding(x: np.ndarray, gamma: float) -> Any:
    """How many ULP a loss or a gradient of these logits may be off, row by row.

    Differences of logits are rounded twice, to half an ULP each, and exp turns an absolute
    error d of a margin into a relative error d: once in the softmax, gamma + 1 times in FL.
    """
    span = np.ptp(x.astype(float), axis=-1)
    return promised_ulps(gamma) + 2 * (2 + gamma) * (1 + span)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['logits']}-{c['label']}-{c['gamma']}")
def test_float64_is_the_definition(backend: Backend, case: dict[str, Any]) -> None:
    x, labels, gamma = np.array([case["logits"]]), np.array([case["label"]]), case["gamma"]
    value = backend(NAME, x, labels, gamma=gamma)
    grad = backend.slope(NAME, x, labels, gamma=gamma)
    assert worst_ulps(value, [case["value"]], "float64") <= rounding(x, gamma)[0]
    assert worst_ulps(grad, [case["grad"]], "float64") <= rounding(x, gamma)[0]


def test_an_alpha_of_minus_1_is_off(backend: Backend) -> None:
    x, labels = np.array([[0.5, -1.0, 2.0], [1.0, 0.0, -3.0]]), np.array([0, 2])
    assert_array_equal(backend(NAME, x, labels, -1), backend(NAME, x, labels, None))


@given(rows(lowest_label=0), any_gammas)
def test_value_and_gradient_follow_the_reference(
    backend: Backend, example: Rows, gamma: float
) -> None:
    x, labels = example
    exact = reference.softmax_focal_loss(x.astype(float), labels, gamma=gamma)
    exact_grad = reference.softmax_focal_loss_grad(x.astype(float), labels, gamma=gamma)
    value = backend(NAME, x, labels, gamma=gamma)
    grad = backend.slope(NAME, x, labels, gamma=gamma)
    assert value.dtype == grad.dtype == np.float32
    allowed = rounding(x, gamma)
    for row in np.ndindex(labels.shape):
        assert worst_ulps(value[row], exact[row], "float32") <= allowed[row]
        assert worst_ulps(grad[row], exact_grad[row], "float32") <= allowed[row]


@given(rows(lowest_label=0, dtype="float64", bound=30.0), gammas)
def test_closed_form_is_the_differences(closed_form: Backend, example: Rows, gamma: float) -> None:
    x, labels = example
    grad = closed_form(f"{NAME}_grad", x, labels, gamma=gamma)
    h = 1e-3
    for j in range(x.shape[-1]):

        def at(step: float, j: int = j) -> np.ndarray:
            moved = x.copy()
            moved[..., j] += step
            return closed_form(NAME, moved, labels, gamma=gamma)

        by_differences = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        assert_allclose(grad[..., j], by_differences, rtol=0, atol=1e-9)


@given(rows(lowest_label=0, dtype="float64", bound=30.0), gammas)
def test_gradient_sums_to_zero(backend: Backend, example: Rows, gamma: float) -> None:
    """The loss does not change when all logits of a row move together."""
    x, labels = example
    grad = backend.slope(NAME, x, labels, gamma=gamma)
    assert_allclose(grad.sum(-1), 0, atol=1e-13)  # measured: 2e-14


@given(rows(lowest_label=0, dtype="float64", bound=64.0), gammas, st.integers(-1000, 1000))
def test_shift_invariant(backend: Backend, example: Rows, gamma: float, shift: int) -> None:
    x = np.round(example.x * 1024) / 1024  # so that the shift itself is exact
    expected = backend(NAME, x, example.labels, gamma=gamma)
    assert_array_equal(backend(NAME, x + shift, example.labels, gamma=gamma), expected)


@given(rows(lowest_label=0, dtype="float64"))
def test_gamma_zero_is_cross_entropy(backend: Backend, example: Rows) -> None:
    x, labels = example
    top = x.max(-1, keepdims=True)
    log_sum = top[..., 0] + np.log(np.exp(x - top).sum(-1))
    cross_entropy = log_sum - np.take_along_axis(x, labels[..., None], -1)[..., 0]
    got = backend(NAME, x, labels, gamma=0.0)
    assert_allclose(got, cross_entropy, rtol=1e-12, atol=1e-12)


@given(rows(lowest_label=0, dtype="float64", shapes=st.just(((6,), 2))), gammas)
def test_two_classes_are_the_sigmoid_of_the_difference(
    backend: Backend, example: Rows, gamma: float
) -> None:
    x, labels = example
    margin = x[..., 1] - x[..., 0]
    expected = backend("sigmoid_focal_loss", margin, labels, None, gamma)
    assert_allclose(backend(NAME, x, labels, gamma=gamma), expected, rtol=1e-13, atol=1e-307)
    slope = backend.slope("sigmoid_focal_loss", margin, labels, alpha=None, gamma=gamma)
    grad = backend.slope(NAME, x, labels, gamma=gamma)
    assert_allclose(grad, np.stack([-slope, slope], -1), rtol=1e-13, atol=1e-307)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_one_class_has_nothing_to_learn(backend: Backend, gamma: float) -> None:
    x, labels = np.array([[0.0], [-1000.0], [7.5]]), np.zeros(3, np.int64)
    assert_array_equal(backend(NAME, x, labels, gamma=gamma), np.zeros(3))
    assert_array_equal(backend.slope(NAME, x, labels, gamma=gamma), np.zeros((3, 1)))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("alpha", [None, 0.25, [0.5, 2.0, 0.0]])
def test_axis(backend: Backend, axis: int, alpha: Any) -> None:
    random = np.random.default_rng(0)
    x, labels = random.normal(size=(4, 5, 3)), random.integers(0, 3, (4, 5))
    labels[1, 2] = IGNORED
    moved = np.moveaxis(x, -1, axis)
    expected = backend(NAME, x, labels, alpha)
    assert_array_equal(backend(NAME, moved, labels, alpha, axis=axis), expected)
    grad = backend.slope(NAME, moved, labels, alpha=alpha, axis=axis)
    assert_array_equal(np.moveaxis(grad, axis, -1), backend.slope(NAME, x, labels, alpha=alpha))


@pytest.mark.parametrize("container", [list, tuple])
def test_alpha_per_class(backend: Backend, container: type) -> None:
    random = np.random.default_rng(1)
    x, labels = random.normal(size=(6, 3)), np.array([0, 1, 2, 2, IGNORED, 0])
    alpha = np.array([0.5, 2.0, 0.0])
    factors = np.where(labels == IGNORED, 0, alpha[labels % 3])
    losses = backend(NAME, x, labels) * factors
    assert_allclose(backend(NAME, x, labels, container(alpha)), losses, rtol=1e-15)
    mean = backend(NAME, x, labels, container(alpha), reduction="mean")
    assert_allclose(mean, losses.sum() / 5, rtol=1e-14)  # not divided by the alphas
    grad = backend.slope(NAME, x, labels, alpha=container(alpha))
    assert_allclose(grad, backend.slope(NAME, x, labels) * factors[:, None], rtol=1e-15)


def test_one_alpha_multiplies_every_loss(backend: Backend) -> None:
    x, labels = np.array([[1.0, 2.0], [0.0, -3.0]]), np.array([0, 1])
    assert_array_equal(backend(NAME, x, labels, 0.25), backend(NAME, x, labels) / 4)
    assert_array_equal(
        backend.slope(NAME, x, labels, alpha=0.25), backend.slope(NAME, x, labels) / 4
    )


@given(rows(lowest_label=-1, dtype="float64"))
def test_reductions(backend: Backend, example: Rows) -> None:
    x, labels = example
    options = {"ignore_index": -1}
    losses, slope = backend(NAME, x, labels, **options), backend.slope(NAME, x, labels, **options)
    assert_array_equal(losses[labels == -1], 0)
    for reduction, count in (("sum", 1), ("mean", max(1, (labels >= 0).sum()))):
        options["reduction"] = reduction
        total = backend(NAME, x, labels, **options)
        assert_allclose(total, losses.sum() / count, rtol=1e-14)
        assert total.shape == ()
        if backend.name in AUTODIFF:
            got = backend.slope(NAME, x, labels, **options)
            assert_allclose(got, slope / count, rtol=1e-13, atol=1e-307)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
def test_ignored_labels_leave_no_trace(backend: Backend, ignore_index: int) -> None:
    good = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0]])
    x, labels = np.stack([good[0], BAD_ROW, good[1]]), np.array([2, ignore_index, 1])
    options = {"ignore_index": ignore_index}
    kept = labels[[0, 2]]
    losses = backend(NAME, x, labels, **options)
    assert losses[1] == 0
    assert_array_equal(losses[[0, 2]], backend(NAME, good, kept))
    for reduction in ("sum", "mean"):
        got = backend(NAME, x, labels, reduction=reduction, **options)
        assert_allclose(got, backend(NAME, good, kept, reduction=reduction), rtol=1e-15)
    grad = backend.slope(NAME, x, labels, **options)
    assert_array_equal(grad[1], np.zeros(4))
    assert_array_equal(grad[[0, 2]], backend.slope(NAME, good, kept))


@pytest.mark.parametrize("labels", [np.full(3, IGNORED), np.zeros(0, np.int64)])
def test_nothing_to_learn(backend: Backend, labels: np.ndarray) -> None:
    x = np.full((len(labels), 2), np.nan, np.float32)
    assert_array_equal(backend.slope(NAME, x, labels), np.zeros_like(x))
    for reduction in ("mean", "sum"):
        assert backend(NAME, x, labels, reduction=reduction) == 0
        if backend.name in AUTODIFF:
            slope = backend.slope(NAME, x, labels, reduction=reduction)
            assert_array_equal(slope, np.zeros_like(x))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64"])
def test_labels_of_any_integer_type(backend: Backend, dtype: str) -> None:
    random = np.random.default_rng(2)
    x, labels = random.normal(size=(50, 3)), random.integers(0, 3, 50)
    ignore_index = 100
    labels[[3, 7]] = ignore_index
    for alpha, reduction in product((None, [1.0, 2.0, 3.0]), ("none", "mean", "sum")):
        arguments = (alpha, 2.0, reduction)
        got = backend(NAME, x, labels.astype(dtype), *arguments, ignore_index=ignore_index)
        assert_array_equal(got, backend(NAME, x, labels, *arguments, ignore_index=ignore_index))


def test_ignore_index_does_not_wrap_around(backend: Backend) -> None:
    """-100 is 156 modulo 256: class 156 of 200 is not ignored."""
    x, labels = np.zeros((2, 200)), np.array([156, 3], np.uint8)
    assert_array_equal(backend(NAME, x, labels), backend(NAME, x, labels.astype(np.int64)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_infinite_logit_of_the_label_costs_nothing(backend: Backend, gamma: float) -> None:
    x, labels = np.array([[np.inf, 0.0, 1.0], [0.0, -np.inf, -np.inf]]), np.array([0, 0])
    assert_array_equal(backend(NAME, x, labels, gamma=gamma), np.zeros(2))


def test_nan_stays_in_its_row(backend: Backend) -> None:
    x, labels = np.array([[np.nan, 0.0], [0.0, np.nan], [0.0, 1.0]]), np.array([0, 0, 0])
    assert_array_equal(np.isnan(backend(NAME, x, labels)), [True, True, False])
    assert_array_equal(np.isnan(backend.slope(NAME, x, labels)).any(-1), [True, True, False])


def test_half_types(backend: Backend) -> None:
    x = np.array([[1.0, -2.5, 0.25], [100.0, 0.0, -100.0], [-100.0, 0.0, 100.0]])
    labels = np.array([2, 0, 0])
    exact, exact_grad = backend(NAME, x, labels), backend.slope(NAME, x, labels)
    for dtype in backend.half_types:
        inputs, t = backend.asarray(x, dtype), backend.asarray(labels)
        loss = backend.F.softmax_focal_loss(inputs, t)
        assert backend.dtype(loss) == dtype
        assert worst_ulps(backend.numpy(loss), exact, dtype) <= 1
        assert worst_ulps(backend.slope(NAME, inputs, labels), exact_grad, dtype) <= 1
        for reduction in ("sum", "mean"):
            total = backend.F.softmax_focal_loss(inputs, t, reduction=reduction)
            assert backend.dtype(total) == "float32"
            expected = backend(NAME, x.astype(np.float32), labels, reduction=reduction)
            assert_allclose(backend.numpy(total), expected, rtol=1e-6)
