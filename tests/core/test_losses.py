"""The sigmoid losses: values and gradients against references, and their properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import AUTODIFF, CLOSED_FORM, Backend
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal, assert_array_max_ulp
from precision import golden, gradient_terms, hessian_terms, promised_ulps, worst_ulps
from strategies import (
    Examples,
    Rows,
    alphas,
    any_gammas,
    coarse_logits,
    coarse_targets,
    examples,
    gammas,
    rows,
)

import focal.numpy as reference
from focal.core.logarithm import log1p_from_minus_half, log1p_to_one

WITH_GRADIENT = ("sigmoid_focal_loss", "sigmoid_focal_loss_star")
DENSE = (*WITH_GRADIENT, "balanced_cross_entropy")
SPARSE = "sparse_sigmoid_focal_loss"
GOLDEN = golden("sigmoid_focal")
STAR = golden("sigmoid_focal_star")

PAPER = """
-4 4.0181499279 3.8749072380 3.5004557332 4.0000000281 -1.0863958531 -0.9990889488 -0.9999998875
-2 2.1269280110 1.6500781794 1.5242936758 2.0000838516 -1.0767137304 -0.9525741268 -0.9996646499
-1 1.3132616875 0.7018683034 0.6566308438 1.0045374820 -0.7682347232 -0.7310585786 -0.9820137900
 0 0.6931471806 0.1732867951 0.1566308438 0.1732867951 -0.2982867951 -0.2689414214 -0.5000000000
 1 0.3132616875 0.0226580575 0.0242936758 0.0045374820 -0.0525811300 -0.0474258732 -0.0179862100
 2 0.1269280110 0.0018035628 0.0033576742 0.0000838516 -0.0048709402 -0.0066928509 -0.0003353501
 4 0.0181499279 0.0000058716 0.0000617011 0.0000000281 -0.0000173505 -0.0001233946 -0.0000001125
"""


def golden_grid(table: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets, (targets, logits)."""
    y, x = np.meshgrid(table["targets"], table["logits"], indexing="ij")
    return x, y


def golden_values(key: str, alpha: float | None, gamma: float) -> np.ndarray:
    axes = [len(GOLDEN[axis]) for axis in ("alphas", "gammas", "targets", "logits")]
    values = np.reshape(GOLDEN[key], axes)
    return values[GOLDEN["alphas"].index(alpha), GOLDEN["gammas"].index(gamma)]


def dense_float32_logits() -> np.ndarray:
    """A grid over [-1000, 1000], a finer one where nothing underflows, random bit patterns."""
    bits = np.random.default_rng(0).integers(0, 2**32, 40_000, dtype=np.uint32)
    patterns = bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        patterns = patterns[np.abs(patterns) <= 1000]
    grids = np.linspace(-1000, 1000, 20_001), np.linspace(-110, 110, 44_001)
    return np.concatenate([*grids, patterns]).astype(np.float32)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    return (labels[..., None] == np.arange(classes)).astype(np.float64)


# ---------------------------------------------------------------- against references


@pytest.mark.parametrize("alpha", GOLDEN["alphas"])
@pytest.mark.parametrize("gamma", GOLDEN["gammas"])
def test_float64_is_the_definition(backend: Backend, alpha: float | None, gamma: float) -> None:
    """Value, gradient and, where it is a function, the second derivative."""
    (x, y), name = golden_grid(GOLDEN), "sigmoid_focal_loss"
    options = {"alpha": alpha, "gamma": gamma}
    found = {
        "value": (backend(name, x, y, **options), None),
        "grad": (backend.slope(name, x, y, **options), gradient_terms(x, y, alpha, gamma)),
    }
    if backend.name in CLOSED_FORM:
        hess = backend(f"{name}_hess", x, y, **options)
        found["hess"] = hess, hessian_terms(x, y, alpha, gamma)
    for key, (got, size) in found.items():
        expected = golden_values(key, alpha, gamma)
        assert worst_ulps(got, expected, "float64", size) <= promised_ulps(gamma), key


@pytest.mark.parametrize(("index", "setting"), list(enumerate(STAR["settings"])))
def test_star_is_the_definition(backend: Backend, index: int, setting: list[float]) -> None:
    x, y = golden_grid(STAR)
    gamma, beta = setting
    name, options = "sigmoid_focal_loss_star", {"alpha": None, "gamma": gamma, "beta": beta}
    shape = (len(STAR["settings"]), *x.shape)
    assert_allclose(
        backend(name, x, y, **options), np.reshape(STAR["value"], shape)[index], rtol=1e-14
    )
    # A soft target's gradient is a difference of terms below 1: absolute, not relative.
    assert_allclose(
        backend.slope(name, x, y, **options),
        np.reshape(STAR["grad"], shape)[index],
        rtol=1e-14,
        atol=1e-15,
    )


@pytest.mark.parametrize(("gamma", "beta"), [(0.5, 0.0), (2.0, 1.0), (3.75, -2.5)])
@given(examples("float32"), alphas)
def test_float32_star_follows_the_reference(
    backend: Backend, gamma: float, beta: float, example: Examples, alpha: float | None
) -> None:
    """gamma x and the sum with beta are each rounded to half an ULP, which exp makes relative."""
    x, y = example
    wide = x.astype(float), y.astype(float)
    name, options = "sigmoid_focal_loss_star", {"alpha": alpha, "gamma": gamma, "beta": beta}
    value, slope = backend(name, x, y, **options), backend.slope(name, x, y, **options)
    exact = reference.sigmoid_focal_loss_star(*wide, **options)
    exact_slope = reference.sigmoid_focal_loss_star_grad(*wide, **options)
    # A soft target's gradient is a difference of two terms, one for each class.
    negative, positive = (
        reference.sigmoid_focal_loss_star_grad(wide[0], np.full_like(wide[0], t), None, gamma, beta)
        for t in (0.0, 1.0)
    )
    weight = 1.0 if alpha in (None, -1) else alpha * wide[1] + (1 - alpha) * (1 - wide[1])
    size = weight * ((1 - wide[1]) * negative - wide[1] * positive)
    allowed = promised_ulps(gamma) + 2 * (np.abs(gamma * wide[0]) + abs(beta))
    for i in np.ndindex(x.shape):
        assert worst_ulps(value[i], exact[i], "float32") <= allowed[i]
        assert worst_ulps(slope[i], exact_slope[i], "float32", size[i]) <= allowed[i]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_float32_is_exact_to_the_promised_ulps(
    backend: Backend, gamma: float, target: float
) -> None:
    name, x = "sigmoid_focal_loss", dense_float32_logits()
    y = np.full_like(x, target)
    wide = x.astype(float), y.astype(float)
    value = backend(name, x, y, None, gamma)
    slope = backend.slope(name, x, y, alpha=None, gamma=gamma)
    assert value.dtype == slope.dtype == np.float32
    exact = reference.sigmoid_focal_loss(*wide, None, gamma)
    assert worst_ulps(value, exact, "float32") <= promised_ulps(gamma)
    exact_slope = reference.sigmoid_focal_loss_grad(*wide, None, gamma)
    assert worst_ulps(slope, exact_slope, "float32") <= promised_ulps(gamma)
    if backend.name in CLOSED_FORM:
        # Where p q is a normal number: beyond, it has lost its digits.
        near = np.abs(x) <= 87
        wide = wide[0][near], wide[1][near]
        hess = backend(f"{name}_hess", x[near], y[near], None, gamma)
        exact_hess, size = (
            reference.sigmoid_focal_loss_hess(*wide, None, gamma),
            hessian_terms(*wide, None, gamma),
        )
        assert worst_ulps(hess, exact_hess, "float32", size) <= promised_ulps(gamma)


@pytest.mark.parametrize("gamma", [0.1, 1.7, 2.3])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_float32_rounds_gamma_but_nothing_else(
    backend: Backend, gamma: float, target: float
) -> None:
    """The loss is that of the float32 nearest to gamma, which m^gamma feels at large logits."""
    x = dense_float32_logits()
    y = np.full_like(x, target)
    nearest = float(np.float32(gamma))
    exact = reference.sigmoid_focal_loss(x.astype(float), y.astype(float), None, nearest)
    got = backend("sigmoid_focal_loss", x, y, None, gamma)
    assert worst_ulps(got, exact, "float32") <= promised_ulps(gamma)


def test_paper_table(backend: Backend) -> None:
    x, *columns = np.array([line.split() for line in PAPER.split("\n") if line], float).T
    ce, focal, star_2_1, star_4_0, d_focal, d_star_2_1, d_star_4_0 = columns
    y = np.ones_like(x)
    star = "sigmoid_focal_loss_star"

    def close(got: np.ndarray, expected: np.ndarray) -> None:
        assert_allclose(got, expected, rtol=0, atol=5.1e-11)  # half of the last digit printed

    close(backend("balanced_cross_entropy", x, y, None), ce)
    close(backend("sigmoid_focal_loss", x, y, None), focal)
    close(backend(star, x, y, None, 2.0, 1.0), star_2_1)
    close(backend(star, x, y, None, 4.0, 0.0), star_4_0)
    close(backend.slope("sigmoid_focal_loss", x, y, alpha=None), d_focal)
    close(backend.slope(star, x, y, alpha=None, gamma=2.0, beta=1.0), d_star_2_1)
    close(backend.slope(star, x, y, alpha=None, gamma=4.0, beta=0.0), d_star_4_0)


def test_paper_factors(backend: Backend) -> None:
    """At gamma 2: p_t = 0.9 has 100 times less loss than cross entropy, 0.5 four times less."""
    p = np.array([0.9, 0.5])
    x = np.log(p / (1 - p))
    focal = backend("sigmoid_focal_loss", x, np.ones(2), None, 2.0)
    assert_allclose(-np.log(p) / focal, [100, 4], rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(st.data(), alphas, any_gammas)
def test_value_and_gradient_follow_the_reference(
    backend: Backend, dtype: str, data: st.DataObject, alpha: float | None, gamma: float
) -> None:
    x, y = data.draw(examples(dtype))
    wide = x.astype(float), y.astype(float)
    value = backend("sigmoid_focal_loss", x, y, alpha, gamma)
    slope = backend.slope("sigmoid_focal_loss", x, y, alpha=alpha, gamma=gamma)
    exact = reference.sigmoid_focal_loss(*wide, alpha, gamma)
    exact_slope = reference.sigmoid_focal_loss_grad(*wide, alpha, gamma)
    size = gradient_terms(*wide, alpha, gamma)
    assert value.dtype == slope.dtype == x.dtype
    assert worst_ulps(value, exact, dtype) <= promised_ulps(gamma)
    assert worst_ulps(slope, exact_slope, dtype, size) <= promised_ulps(gamma)


@given(examples("float32", coarse_targets, coarse_logits), alphas, gammas)
def test_half_types_are_computed_in_float32(
    backend: Backend, example: Examples, alpha: float | None, gamma: float
) -> None:
    x, y = example
    wide = x.astype(float), y.astype(float)
    exact = reference.sigmoid_focal_loss(*wide, alpha, gamma)
    exact_slope = reference.sigmoid_focal_loss_grad(*wide, alpha, gamma)
    size = gradient_terms(*wide, alpha, gamma)
    for dtype in backend.half_types:
        inputs, targets = backend.asarray(x, dtype), backend.asarray(y, dtype)
        loss = backend.F.sigmoid_focal_loss(inputs, targets, alpha, gamma)
        slope = backend.slope("sigmoid_focal_loss", inputs, targets, alpha=alpha, gamma=gamma)
        assert backend.dtype(loss) == dtype
        assert worst_ulps(backend.numpy(loss), exact, dtype) <= 1
        assert worst_ulps(slope, exact_slope, dtype, size) <= 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_types_are_reduced_in_float32(backend: Backend, reduction: str) -> None:
    """The sum is beyond the greatest float16 number."""
    x, y = np.full((40, 50), 100.0), np.zeros((40, 50))
    labels = np.full(40, -1)
    total = 100.0 * (x.size if reduction == "sum" else 1)
    for dtype in backend.half_types:
        inputs, targets = backend.asarray(x, dtype), backend.asarray(y, dtype)
        dense = backend.F.sigmoid_focal_loss(inputs, targets, None, 2.0, reduction)
        sparse = backend.F.sparse_sigmoid_focal_loss(
            inputs, backend.asarray(labels), None, 2.0, reduction
        )
        for loss in (dense, sparse):
            assert backend.dtype(loss) == "float32"
            assert_allclose(backend.numpy(loss), total, rtol=1e-6)


# ---------------------------------------------------------------- derivatives by differences


def differences(function: Any, x: np.ndarray) -> np.ndarray:
    """Fourth-order central differences; good to about 1e-11 for functions of size 1."""
    h = 1e-3
    near, far = function(x + h) - function(x - h), function(x + 2 * h) - function(x - 2 * h)
    return (8 * near - far) / (12 * h)


@given(examples("float64", elements=st.floats(-30, 30)), alphas, gammas)
def test_closed_forms_are_the_differences(
    closed_form: Backend, example: Examples, alpha: float | None, gamma: float
) -> None:
    x, y = example
    options = {"alpha": alpha, "gamma": gamma}
    name = "sigmoid_focal_loss"
    grad = closed_form(f"{name}_grad", x, y, **options)
    hess = closed_form(f"{name}_hess", x, y, **options)
    assert_allclose(grad, differences(lambda v: closed_form(name, v, y, **options), x), atol=1e-9)
    by_differences = differences(lambda v: closed_form(f"{name}_grad", v, y, **options), x)
    assert_allclose(hess, by_differences, atol=1e-9)


@given(examples("float64", elements=st.floats(-30, 30)), alphas, st.floats(0.1, 5))
def test_star_closed_form_is_the_differences(
    closed_form: Backend, example: Examples, alpha: float | None, gamma: float
) -> None:
    x, y = example
    options = {"alpha": alpha, "gamma": gamma, "beta": 0.5}
    name = "sigmoid_focal_loss_star"
    grad = closed_form(f"{name}_grad", x, y, **options)
    assert_allclose(grad, differences(lambda v: closed_form(name, v, y, **options), x), atol=1e-9)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("alpha", [None, -1, 0.5])
@given(examples("float64", coarse_targets), gammas)
def test_symmetric_in_the_classes(
    backend: Backend, alpha: float | None, example: Examples, gamma: float
) -> None:
    x, y = example
    name, options = "sigmoid_focal_loss", {"alpha": alpha, "gamma": gamma}
    assert_array_equal(backend(name, x, y, **options), backend(name, -x, 1 - y, **options))
    assert_array_equal(
        backend.slope(name, x, y, **options), -backend.slope(name, -x, 1 - y, **options)
    )


@given(examples("float64"), alphas)
def test_gamma_zero_is_cross_entropy(
    backend: Backend, example: Examples, alpha: float | None
) -> None:
    x, y = example
    loss = backend("sigmoid_focal_loss", x, y, alpha, 0.0)
    weight = 1.0 if alpha in (None, -1) else alpha * y + (1 - alpha) * (1 - y)
    cross_entropy = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    assert worst_ulps(loss, weight * cross_entropy, "float64") <= promised_ulps(0)
    assert_array_equal(backend("balanced_cross_entropy", x, y, alpha), loss)


@given(examples("float64"), alphas)
def test_star_with_unit_slope_is_cross_entropy(
    backend: Backend, example: Examples, alpha: float | None
) -> None:
    x, y = example
    loss = backend("sigmoid_focal_loss_star", x, y, alpha, 1.0, 0.0)
    cross_entropy = backend("balanced_cross_entropy", x, y, alpha)
    assert worst_ulps(loss, cross_entropy, "float64") <= promised_ulps(0)


@pytest.mark.parametrize("off", [None, -1, -1.0])
def test_alpha_off(backend: Backend, off: float | None) -> None:
    x, y = np.array([-1.0, 2.0]), np.array([1.0, 0.0])
    half = backend("sigmoid_focal_loss", x, y, alpha=0.5)
    assert_array_equal(backend("sigmoid_focal_loss", x, y, alpha=off), 2 * half)


def test_alpha_weighs_positives(backend: Backend) -> None:
    x, y = np.zeros(2), np.array([1.0, 0.0])
    assert_allclose(backend("balanced_cross_entropy", x, y) / np.log(2), [0.75, 0.25], rtol=1e-15)
    assert_allclose(
        backend("sigmoid_focal_loss", x, y, gamma=0.0) / np.log(2), [0.25, 0.75], rtol=1e-15
    )


def test_no_overflow_at_the_greatest_numbers(backend: Backend) -> None:
    for dtype in ("float32", "float64"):
        x = np.array([np.finfo(dtype).max, np.finfo(dtype).min])
        right, wrong = np.array([1.0, 0.0], dtype), np.array([0.0, 1.0], dtype)
        for gamma in (0.0, 0.5, 2.0, 1.7):
            options = {"alpha": None, "gamma": gamma}
            assert_array_equal(backend("sigmoid_focal_loss", x, right, **options), [0, 0])
            assert_array_equal(backend("sigmoid_focal_loss", x, wrong, **options), np.abs(x))
            slope = backend.slope("sigmoid_focal_loss", x, right, **options)
            assert_array_equal(slope, [0, 0])
            slope = backend.slope("sigmoid_focal_loss", x, wrong, **options)
            assert_array_equal(slope, [1, -1])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 1.7])
def test_infinite_logits_on_the_right_side_cost_nothing(backend: Backend, gamma: float) -> None:
    x, y = np.array([np.inf, -np.inf]), np.array([1.0, 0.0])
    assert_array_equal(backend("sigmoid_focal_loss", x, y, None, gamma), [0, 0])
    assert_array_equal(backend.slope("sigmoid_focal_loss", x, y, alpha=None, gamma=gamma), [0, 0])


def test_nan_stays_in_its_place(backend: Backend) -> None:
    x, y = np.array([np.nan, 0.0, 1.0]), np.array([1.0, np.nan, 1.0])
    for gamma in (0.0, 0.5, 2.0):
        loss = backend("sigmoid_focal_loss", x, y, 0.25, gamma)
        slope = backend.slope("sigmoid_focal_loss", x, y, alpha=0.25, gamma=gamma)
        assert_array_equal(np.isnan(loss), [True, True, False])
        assert_array_equal(np.isnan(slope), [True, True, False])


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64", "float64"])
def test_targets_of_any_real_type(backend: Backend, dtype: str) -> None:
    x = np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)
    y = np.array([[0, 1, 1, 0], [1, 0, 1, 1]], np.float32)
    for name in DENSE:
        for reduction in ("none", "mean", "sum"):
            loss = backend(name, x, y.astype(dtype), reduction=reduction)
            assert loss.dtype == np.float32
            assert_array_equal(loss, backend(name, x, y, reduction=reduction))
    for name in WITH_GRADIENT:
        slope = backend.slope(name, x, y.astype(dtype))
        assert slope.dtype == np.float32
        assert_array_equal(slope, backend.slope(name, x, y))


# ---------------------------------------------------------------- reductions and weights


@pytest.mark.parametrize("name", DENSE)
@given(examples("float64"))
def test_reductions(backend: Backend, name: str, example: Examples) -> None:
    x, y = example
    total = backend(name, x, y).sum()
    assert_allclose(backend(name, x, y, reduction="sum"), total, rtol=1e-14)
    mean = backend(name, x, y, reduction="mean")
    assert_allclose(mean, total / max(1, x.size), rtol=1e-14)
    assert mean.shape == ()
    if backend.name in AUTODIFF:
        slope = backend.slope(name, x, y)
        assert_array_equal(backend.slope(name, x, y, reduction="sum"), slope)
        of_mean = backend.slope(name, x, y, reduction="mean")
        assert_allclose(of_mean, slope / max(1, x.size), rtol=1e-14)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1), (4,), (), (1, 1, 1), (2, 1, 4)])
def test_weight_broadcasts(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 3, 4)), random.random((2, 3, 4))
    weight = random.random(shape)
    expected = backend(name, x, y) * weight
    assert_allclose(backend(name, x, y, weight=weight), expected, rtol=1e-15)
    total = backend(name, x, y, weight=weight, reduction="sum")
    assert_allclose(total, expected.sum(), rtol=1e-14)
    mean = backend(name, x, y, weight=weight, reduction="mean")
    assert_allclose(mean, expected.mean(), rtol=1e-14)
    if name in WITH_GRADIENT:
        slope = backend.slope(name, x, y, weight=weight)
        assert_allclose(slope, backend.slope(name, x, y) * weight, rtol=1e-15)


def test_weight_keeps_the_type_of_the_logits(backend: Backend) -> None:
    x, y = np.zeros(3, np.float32), np.ones(3, np.float32)
    for weight in (np.ones(3), np.array([1, 0, 2]), np.array([True, False, True])):
        loss = backend("sigmoid_focal_loss", x, y, weight=weight)
        assert loss.dtype == np.float32
        assert_array_equal(loss, backend("sigmoid_focal_loss", x, y) * weight)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, np.float32)
    assert backend(name, x, x).shape == shape
    assert backend(name, x, x, reduction="sum") == 0
    assert backend(name, x, x, reduction="mean") == 0
    if name in WITH_GRADIENT:
        assert backend.slope(name, x, x).shape == shape


# ---------------------------------------------------------------- integer labels


def rounding(backend: Backend, gamma: float) -> float:
    """Units in the last place by which the same formula may differ from itself.

    The frameworks have vector and scalar code for exp, log and powers, which differ in the last
    bit; the length of the data decides which of them a number meets. NumPy has one code.
    """
    return 0 if backend.name in ("numpy", "array_api_strict") else 2 + 2 * gamma


@given(rows(lowest_label=-1), alphas, gammas)
def test_sparse_is_dense_with_one_hot_targets(
    backend: Backend, example: Rows, alpha: float | None, gamma: float
) -> None:
    x, labels = example
    y, options = one_hot(labels, x.shape[-1]), {"alpha": alpha, "gamma": gamma}
    sparse, dense = (SPARSE, x, labels), ("sigmoid_focal_loss", x, y)
    for call in (backend, backend.slope) if backend.name in AUTODIFF else (backend,):
        got, expected = call(*sparse, **options), call(*dense, **options)
        assert_array_max_ulp(got, expected, rounding(backend, gamma))


@given(rows(dtype="float64"))
def test_sparse_reductions(backend: Backend, example: Rows) -> None:
    x, labels = example
    losses = backend(SPARSE, x, labels)
    assert_array_equal(losses[labels < -1], 0)
    slope = backend.slope(SPARSE, x, labels) if backend.name in AUTODIFF else None
    for reduction, count in (
        ("sum", 1),
        ("mean", (labels >= -1).sum() * x.shape[-1]),
        ("positives", (labels >= 0).sum()),
    ):
        reduced = backend(SPARSE, x, labels, reduction=reduction)
        assert_allclose(reduced, losses.sum() / max(1, count), rtol=1e-14)
        if slope is not None:
            got = backend.slope(SPARSE, x, labels, reduction=reduction)
            assert_allclose(got, slope / max(1, count), rtol=1e-14)


BAD_ROW = np.array([np.inf, np.nan, -np.inf, np.inf])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "positives"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_ignored_rows_leave_no_trace(backend: Backend, reduction: str, gamma: float) -> None:
    good = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0]])
    x, labels = np.stack([good[0], BAD_ROW, good[1]]), np.array([2, -2, -1])
    options = {"gamma": gamma, "reduction": reduction}
    loss = backend(SPARSE, x, labels, **options)
    expected = backend(SPARSE, good, labels[[0, 2]], **options)
    if reduction == "none":
        assert_array_equal(loss[1], np.zeros(4))
        loss = loss[[0, 2]]
    assert_allclose(loss, expected, rtol=1e-15)
    if backend.name in AUTODIFF:
        slope = backend.slope(SPARSE, x, labels, **options)
        expected = backend.slope(SPARSE, good, labels[[0, 2]], **options)
        assert_array_equal(slope[1], np.zeros(4))
        assert_allclose(slope[[0, 2]], expected, rtol=1e-15)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "positives"])
@pytest.mark.parametrize("labels", [np.full(3, -2), np.zeros(0, np.int64)])
def test_nothing_but_ignored_rows(backend: Backend, reduction: str, labels: np.ndarray) -> None:
    x = np.full((len(labels), 2), np.nan, np.float32)
    loss = backend(SPARSE, x, labels, reduction=reduction)
    assert_array_equal(loss, np.zeros_like(x) if reduction == "none" else 0)
    if backend.name in AUTODIFF:
        slope = backend.slope(SPARSE, x, labels, reduction=reduction)
        assert_array_equal(slope, np.zeros_like(x))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "positives"])
def test_sparse_labels_of_any_type(backend: Backend, reduction: str, dtype: str) -> None:
    """Unsigned labels have no background and nothing ignored; -1 must not wrap around to 255."""
    random = np.random.default_rng(2)
    x, labels = random.normal(size=(50, 3)), random.integers(0 if dtype == "uint8" else -2, 3, 50)
    got = backend(SPARSE, x, labels.astype(dtype), reduction=reduction)
    assert_array_equal(got, backend(SPARSE, x, labels, reduction=reduction))


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (4,), ()])
def test_sparse_weight(backend: Backend, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(3)
    x, labels = random.normal(size=(3, 4)), np.array([1, -1, -2])
    weight = random.random(shape)
    expected = backend(SPARSE, x, labels) * weight
    assert_allclose(backend(SPARSE, x, labels, weight=weight), expected, rtol=1e-15)
    total = backend(SPARSE, x, labels, weight=weight, reduction="positives")
    assert_allclose(total, expected.sum(), rtol=1e-14)
    total = backend(SPARSE, x, labels, weight=weight, reduction="mean")
    assert_allclose(total, expected.sum() / 8, rtol=1e-14)


def test_sparse_without_leading_axes(backend: Backend) -> None:
    x = np.array([1.0, -1.0, 2.0])
    loss = backend(SPARSE, x, np.array(1), reduction="positives")
    dense = backend("sigmoid_focal_loss", x, np.array([0, 1, 0]), reduction="sum")
    assert_allclose(loss, dense, rtol=1e-15)


@pytest.mark.parametrize(
    ("function", "end", "ulp"), [(log1p_from_minus_half, -0.5, 1.1), (log1p_to_one, 1.0, 2.1)]
)
def test_the_logarithms_of_compiled_losses(function, end: float, ulp: float) -> None:
    """One float32 number in 1,000 between 0 and the end, one in 4 of the last binade."""
    last = int(np.float32(abs(end)).view(np.uint32))
    binade = np.arange(last - (1 << 23), last + 1, 4)
    patterns = np.concatenate([np.arange(0, binade[0], 1000), binade])
    x = np.copysign(patterns.astype(np.uint32).view(np.float32), np.float32(end))
    exact = np.log1p(x.astype(np.float64))
    unit = np.spacing(np.abs(exact).astype(np.float32))
    assert np.max(np.abs(function(x) - exact) / unit) < ulp
