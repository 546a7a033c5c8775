"""The relatives of focal loss, alpha per class and label smoothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import AUTODIFF, Backend
from numpy.testing import assert_allclose, assert_array_equal
from precision import golden, promised_ulps, worst_ulps

import focal.numpy as reference
from focal.core import variant_formulas
from focal.numpy._namespace import xp as numpy_xp

GOLDEN = golden("variants")
FORMULAS = {
    "quality_focal_loss": variant_formulas.QualityFocal,
    "varifocal_loss": variant_formulas.Varifocal,
    "heatmap_focal_loss": variant_formulas.HeatmapFocal,
    "asymmetric_loss": variant_formulas.Asymmetric,
}
NAMES = tuple(FORMULAS)
CASES = [(name, i) for name in NAMES for i in range(len(GOLDEN[name]["settings"]))]
DENSE, SPARSE, SOFTMAX = "sigmoid_focal_loss", "sparse_sigmoid_focal_loss", "softmax_focal_loss"
EXTREMES = [0.0, 20.0, -20.0, 100.0, -100.0, 1000.0, -1000.0]
TARGETS = [0.0, 2.0**-10, 0.5, 1.0]
ALPHAS = [0.1, 0.5, 0.9]


def case(name: str, index: int) -> tuple[list[float], np.ndarray, np.ndarray, dict[str, Any]]:
    """Parameters, logits, targets and the exact numbers."""
    y, x = np.meshgrid(GOLDEN["targets"], GOLDEN["logits"], indexing="ij")
    table = GOLDEN[name]
    shape = (len(table["settings"]), *x.shape)
    exact = {key: np.reshape(table[key], shape)[index] for key in ("value", "grad", "hess")}
    return table["settings"][index], x, y, exact


def grad(autodiff: Backend, name: str, x: np.ndarray, t: np.ndarray, *args: Any, **options: Any):
    loss, labels = getattr(autodiff.F, name), autodiff.asarray(t)
    return autodiff.grad(lambda a: loss(a, labels, *args, **options), autodiff.asarray(x))


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Logits (8, 3) and labels with background and ignored ones."""
    x = np.random.default_rng(0).normal(size=(8, 3)) * 4
    x[0], x[1] = [100.0, -100.0, 0.0], [-1000.0, 1000.0, 20.0]
    return x, np.array([0, 1, -1, -2, 2, 0, 1, -1])


# ---------------------------------------------------------------- the relatives


@pytest.mark.parametrize(("name", "index"), CASES)
def test_float64_is_the_definition(backend: Backend, name: str, index: int) -> None:
    """Soft targets subtract a score that is near, so the bound is not `promised_ulps`."""
    setting, x, y, exact = case(name, index)
    assert_allclose(backend(name, x, y, *setting), exact["value"], rtol=3e-15)  # measured: 9 ULP
    if backend.name in AUTODIFF:
        slope = grad(backend, name, x, y, *setting)  # measured: 24 ULP where two terms cancel
        assert_allclose(slope, exact["grad"], rtol=1e-14)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_hess_is_that_of_the_definition(name: str, index: int) -> None:
    setting, x, y, exact = case(name, index)
    hess = FORMULAS[name](*setting).hess(numpy_xp, x, y)
    assert_allclose(hess, exact["hess"], rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_float32_is_exact_to_the_promised_ulps(
    backend: Backend, gamma: float, target: float
) -> None:
    """For hard targets. A margin is subtracted from the score, which costs digits."""
    x = np.linspace(-110, 110, 4001, dtype=np.float32)
    y, wide = np.full_like(x, target), x.astype(float)
    for name, setting, exponent, factor in (
        ("quality_focal_loss", [gamma], gamma, 1),
        ("varifocal_loss", [0.5, gamma], *((0.0, 1) if target else (gamma, 0.5))),
        ("heatmap_focal_loss", [gamma, 4.0], gamma, 1),
        ("asymmetric_loss", [gamma, gamma, 0.0], gamma, 1),
    ):
        exact = getattr(reference, name)(wide, y.astype(float), *setting)
        got = backend(name, x, y, *setting)
        assert got.dtype == np.float32
        assert worst_ulps(got, exact, "float32") <= promised_ulps(gamma)
        if backend.name in AUTODIFF:
            exact = factor * reference.sigmoid_focal_loss_grad(wide, y, None, exponent)
            got = grad(backend, name, x, y, *setting)
            assert got.dtype == np.float32
            assert worst_ulps(got, exact, "float32") <= promised_ulps(gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_finite_at_extremes(autodiff: Backend, name: str, gamma: float) -> None:
    """In every type, at p = y too, value, gradient and curvature."""
    y, x = map(np.ravel, np.meshgrid(TARGETS, EXTREMES, indexing="ij"))
    setting = {"varifocal_loss": (0.75, gamma), "asymmetric_loss": (gamma, gamma, 0.05)}.get(
        name, (gamma,)
    )
    loss = getattr(autodiff.F, name)
    for dtype in autodiff.dtypes:
        inputs, targets = autodiff.asarray(x, dtype), autodiff.asarray(y, dtype)
        assert autodiff.dtype(loss(inputs, targets, *setting)) == dtype
        assert np.isfinite(autodiff.numpy(loss(inputs, targets, *setting))).all()
        slope = autodiff.grad(lambda a, y=targets: loss(a, y, *setting), inputs)
        assert np.isfinite(slope).all()
        total = loss(inputs, targets, *setting, reduction="sum")
        assert autodiff.dtype(total) == ("float64" if dtype == "float64" else "float32")
    for narrow in (np.float32, np.float64):
        hess = FORMULAS[name](*setting, *([4.0] if name.startswith("heat") else []))
        assert np.isfinite(hess.hess(numpy_xp, x.astype(narrow), y.astype(narrow))).all()


def test_quality_is_zero_where_the_score_is_the_target(backend: Backend) -> None:
    x, y = np.zeros(2), np.full(2, 0.5)
    assert_array_equal(backend("quality_focal_loss", x, y), [0, 0])
    if backend.name in AUTODIFF:
        for beta in (0.5, 1.0, 2.0):
            assert_array_equal(grad(backend, "quality_focal_loss", x, y, beta=beta), [0, 0])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.75])
def test_hard_targets_are_focal_loss(backend: Backend, gamma: float) -> None:
    x = np.concatenate([EXTREMES, np.linspace(-9, 9, 50)])
    y = (np.arange(x.size) % 2).astype(float)
    focal = backend(DENSE, x, y, None, gamma)
    close = {"rtol": 1e-14, "atol": 1e-300}
    assert_allclose(backend("quality_focal_loss", x, y, gamma), focal, **close)
    assert_allclose(backend("heatmap_focal_loss", x, y, gamma, 3.0), focal, **close)
    assert_allclose(backend("asymmetric_loss", x, y, gamma, gamma, 0.0), focal, **close)
    positive = backend(DENSE, x, y, None, 0.0)
    varifocal = backend("varifocal_loss", x, y, 0.3, gamma)
    assert_allclose(varifocal, np.where(y > 0, positive, 0.3 * focal), **close)


def test_asymmetric_drops_easy_negatives_and_missing_labels(autodiff: Backend) -> None:
    name, x, y = "asymmetric_loss", np.array([-3.0, 0.0, 40.0]), np.zeros(3)
    assert autodiff(name, x, y)[0] == 0
    slope = grad(autodiff, name, x, y)
    assert slope[0] == 0 and slope[1] > 0.01 and 0 < slope[2] < 1e-15


def test_heatmap_normalizer(backend: Backend) -> None:
    x, y = np.linspace(-2, 2, 6), np.array([1.0, 0.9, 0.0, 1.0, 1.0, 0.5])
    for targets in (y, y == 1, (y == 1).astype(np.int64)):
        total = backend("heatmap_focal_loss", x, targets).sum()
        mean = backend("heatmap_focal_loss", x, targets, reduction="positives")
        assert_allclose(mean, total / 3, rtol=1e-15)
    nothing = backend("heatmap_focal_loss", x, 0 * y, reduction="positives")
    assert_allclose(nothing, backend("heatmap_focal_loss", x, 0 * y).sum(), rtol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_reductions_weights_types_and_nothing(backend: Backend, name: str) -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 3, 4)), random.random((2, 3, 4)).round(1)
    each = backend(name, x, y)
    assert_allclose(backend(name, x, y, reduction="sum"), each.sum(), rtol=1e-14)
    assert_allclose(backend(name, x, y, reduction="mean"), each.mean(), rtol=1e-14)
    for shape in ((4,), (3, 1), ()):
        weight = random.random(shape)
        assert_allclose(backend(name, x, y, weight=weight), each * weight, rtol=1e-15)
    for dtype in ("bool", "int32"):
        hard = (y > 0.5).astype(dtype)
        assert_array_equal(backend(name, x, hard), backend(name, x, hard.astype(float)))
    nothing = np.zeros((0, 3), np.float32)
    assert backend(name, nothing, nothing).shape == (0, 3)
    assert backend(name, nothing, nothing, reduction="mean") == 0
    wrong = backend(name, np.array([np.nan, 0.0, 1.0]), np.array([1.0, np.nan, 1.0]))
    assert_array_equal(np.isnan(wrong), [True, True, False])


def test_formulas_of_equal_numbers_stay_apart(autodiff: Backend) -> None:
    """They are the static arguments of one compiled function."""
    x, y = np.array([0.3, -0.7]), np.array([0.2, 1.0])
    pairs = (("varifocal_loss", DENSE), ("heatmap_focal_loss", "varifocal_loss"))
    for first, second in pairs:
        a, b = autodiff(first, x, y, 0.75, 2.0), autodiff(second, x, y, 0.75, 2.0)
        assert_array_equal(a == b, [False, False])
        assert_allclose(b, getattr(reference, second)(x, y, 0.75, 2.0), rtol=1e-14)
        assert_allclose(a, getattr(reference, first)(x, y, 0.75, 2.0), rtol=1e-14)


# ---------------------------------------------------------------- one alpha per class


@pytest.mark.parametrize(
    ("gamma", "smoothing"), [(0.0, 0.125), (0.5, 0.0), (2.0, 0.125), (5.0, 0.0)]
)
def test_alpha_per_class_is_one_alpha_in_each_column(
    backend: Backend, gamma: float, smoothing: float
) -> None:
    x, _ = rows()
    y = np.random.default_rng(2).choice([0.0, 0.3, 1.0], x.shape)
    options = {"gamma": gamma, "label_smoothing": smoothing}
    columns = [backend(DENSE, x[:, k], y[:, k], alpha=a, **options) for k, a in enumerate(ALPHAS)]
    expected = np.stack(columns, -1)
    for alpha in (ALPHAS, tuple(ALPHAS), backend.asarray(np.array(ALPHAS))):
        assert_allclose(backend(DENSE, x, y, alpha=alpha, **options), expected, rtol=2e-15)
    for reduction in ("sum", "mean"):
        got = backend(DENSE, x, y, ALPHAS, reduction=reduction, **options)
        assert_allclose(got, getattr(expected, reduction)(), rtol=1e-14)
    weight = np.arange(3.0)
    got = backend(DENSE, x, y, ALPHAS, weight=weight, **options)
    assert_allclose(got, expected * weight, rtol=2e-15)
    slopes = [
        backend.slope(DENSE, x[:, k], y[:, k], alpha=a, **options) for k, a in enumerate(ALPHAS)
    ]
    got = backend.slope(DENSE, x, y, alpha=ALPHAS, **options)
    assert_allclose(got, np.stack(slopes, -1), rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("alpha", [0.25, ALPHAS])
@pytest.mark.parametrize("smoothing", [0.0, 0.125, 1.0])
def test_labels_are_one_hot_targets(backend: Backend, alpha: Any, smoothing: float) -> None:
    x, labels = rows()
    y = (labels[:, None] == np.arange(3)).astype(float)
    keep = labels >= -1
    options = {"alpha": alpha, "gamma": 0.5, "label_smoothing": smoothing}
    dense = backend(DENSE, x, y, **options) * keep[:, None]
    close = {"rtol": 1e-13, "atol": 1e-300}
    assert_allclose(backend(SPARSE, x, labels, **options), dense, **close)
    for reduction, count in (("sum", 1), ("mean", 3 * keep.sum()), ("positives", 5)):
        got = backend(SPARSE, x, labels, reduction=reduction, **options)
        assert_allclose(got, dense.sum() / count, **close)
    if backend.name in AUTODIFF:
        slope = backend.slope(DENSE, x, y, **options) * keep[:, None]
        assert_allclose(grad(backend, SPARSE, x, labels, **options), slope, **close)
        got = grad(backend, SPARSE, x, labels, reduction="positives", **options)
        assert_allclose(got, slope / 5, **close)
        fine = x.astype(np.float32)  # where PyTorch has a kernel for what these options are not
        got = grad(backend, SPARSE, fine, labels, reduction="sum", **options)
        assert_allclose(got, slope, rtol=1e-5, atol=1e-37)


def test_alpha_per_class_keeps_the_type_of_the_logits(backend: Backend) -> None:
    x, labels = rows()
    x = x.clip(-8, 8).round(1)
    y = (labels[:, None] == np.arange(3)).astype(float)
    for dtype in backend.dtypes:
        inputs = backend.asarray(x, dtype)
        for name, t in ((DENSE, y), (SPARSE, labels)):
            loss = getattr(backend.F, name)(inputs, backend.asarray(t), ALPHAS)
            assert backend.dtype(loss) == dtype
            exact = getattr(reference, name)(backend.numpy(inputs).astype(float), t, ALPHAS)
            limit = 1 if dtype in backend.half_types else promised_ulps(2)
            assert worst_ulps(backend.numpy(loss), exact, dtype) <= limit


@pytest.mark.parametrize("order", ["grad", "hess"])
def test_closed_forms_with_alpha_per_class(closed_form: Backend, order: str) -> None:
    x, labels = rows()
    y = (labels[:, None] == np.arange(3)).astype(float)
    name = f"{DENSE}_{order}"
    plain = closed_form(name, x, 0.8 * y + 0.1, None)
    share = np.array(ALPHAS) * (0.8 * y + 0.1) + (1 - np.array(ALPHAS)) * (0.9 - 0.8 * y)
    got = closed_form(name, x, y, ALPHAS, label_smoothing=0.2, weight=np.arange(3.0))
    assert_allclose(got, plain * share * np.arange(3.0), rtol=1e-12, atol=1e-300)


# ---------------------------------------------------------------- label smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.125, 1.0])
@pytest.mark.parametrize("dtype", ["bool", "int64", "float64"])
def test_smoothing_moves_targets_to_a_half(backend: Backend, smoothing: float, dtype: str) -> None:
    x, labels = rows()
    y = (labels[:, None] == np.arange(3)).astype(dtype)
    moved = y * (1 - smoothing) + smoothing / 2
    got = backend(DENSE, x, y, gamma=0.5, label_smoothing=smoothing)
    # Hard targets have a faster way in PyTorch, which rounds differently.
    assert_allclose(got, backend(DENSE, x, moved, gamma=0.5), rtol=2e-15)
    slope = backend.slope(DENSE, x, y, gamma=0.5, label_smoothing=smoothing)
    assert_allclose(slope, backend.slope(DENSE, x, moved, gamma=0.5), rtol=1e-14, atol=1e-15)


SMOOTHED = golden("softmax_focal_smoothed")


@pytest.mark.parametrize("classes", [1, 3, 4])
def test_smoothed_softmax_is_the_mixture_of_all_labels(backend: Backend, classes: int) -> None:
    table = [c for c in SMOOTHED if len(c["logits"]) == classes]
    x, labels, value, slope = (
        np.array([c[key] for c in table]) for key in ("logits", "label", "value", "grad")
    )
    options = {"gamma": table[0]["gamma"], "label_smoothing": table[0]["smoothing"]}
    close = {"rtol": 1e-13, "atol": 1e-300}
    assert_allclose(backend(SOFTMAX, x, labels, **options), value, **close)
    if backend.name in AUTODIFF:
        got = grad(backend, SOFTMAX, x, labels, **options)
        assert_allclose(got, slope, rtol=1e-12, atol=1e-15)  # a difference of terms near 1


@pytest.mark.parametrize("alpha", [None, 0.25, [0.5, 2.0, 1.0]])
def test_smoothed_softmax_mixes_alphas_and_leaves_ignored_rows(
    autodiff: Backend, alpha: Any
) -> None:
    x, labels = rows()
    s, options = 0.125, {"alpha": alpha, "gamma": 0.5, "ignore_index": -1}
    labels = labels.clip(min=-1)
    each = [autodiff(SOFTMAX, x, np.full(8, k), **options) for k in range(3)]
    own = np.where(labels >= 0, np.stack(each)[labels.clip(min=0), np.arange(8)], 0)
    expected = np.where(labels >= 0, (1 - s) * own + s * sum(each) / 3, 0)
    got = autodiff(SOFTMAX, x, labels, label_smoothing=s, **options)
    assert_allclose(got, expected, rtol=1e-13, atol=1e-300)
    bad = np.where(labels[:, None] < 0, np.nan, x)
    assert_array_equal(autodiff(SOFTMAX, bad, labels, label_smoothing=s, **options), got)
    slope = grad(autodiff, SOFTMAX, bad, labels, label_smoothing=s, **options)
    assert_array_equal(slope, grad(autodiff, SOFTMAX, x, labels, label_smoothing=s, **options))
    assert_array_equal(slope[labels < 0], 0)
    assert_allclose(slope.sum(-1), 0, atol=1e-13)


def test_smoothed_softmax_on_another_axis_and_at_extremes(autodiff: Backend) -> None:
    x, labels = rows()
    labels, loss = labels.clip(min=0), autodiff.F.softmax_focal_loss
    options, t = {"gamma": 0.5, "label_smoothing": 0.1}, autodiff.asarray(labels)
    inputs = autodiff.asarray(x, "float16")
    assert np.isfinite(autodiff.numpy(loss(inputs, t, **options))).all()
    assert np.isfinite(autodiff.grad(lambda a: loss(a, t, **options), inputs)).all()
    moved = autodiff(SOFTMAX, x.T, labels, axis=0, label_smoothing=0.1)
    assert_array_equal(moved, autodiff(SOFTMAX, x, labels, label_smoothing=0.1))
