"""Every operand of every loss, in every framework: labels out of range, masked logits, arrays as
parameters, derivatives in targets and parameters."""

from __future__ import annotations

import re

import numpy as np
import pytest
from backends import Backend, NumPy
from numpy.testing import assert_allclose, assert_array_equal
from operands import DENSE, LABELLED, PARAMETERS, number, operands

INF = np.inf
NUMPY = NumPy()


def slope(autodiff: Backend, loss: str, x: np.ndarray, t: np.ndarray, **options) -> np.ndarray:
    t = autodiff.asarray(t)
    return autodiff.grad(lambda a: getattr(autodiff.F, loss)(a, t, **options), autodiff.asarray(x))


# ---------------------------------------------------------------- parameters that are arrays


@pytest.mark.parametrize(("loss", "parameter"), PARAMETERS)
def test_a_parameter_may_be_an_array(autodiff: Backend, loss: str, parameter: str) -> None:
    x, t = operands(loss)
    expected = NUMPY(loss, x, t, **{parameter: np.array(number(parameter))})
    array = autodiff.asarray(np.array(number(parameter)))
    got = getattr(autodiff.F, loss)(autodiff.asarray(x), autodiff.asarray(t), **{parameter: array})
    assert_allclose(autodiff.numpy(got), expected, rtol=1e-12)
    by_number = slope(autodiff, loss, x, t, **{parameter: number(parameter)})
    got = slope(autodiff, loss, x, t, **{parameter: array})
    assert_allclose(got, by_number, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("loss", "parameter"), PARAMETERS)
def test_the_derivative_in_a_parameter(
    autodiff: Backend, loss: str, parameter: str, reduction: str
) -> None:
    x, t = operands(loss)
    logits, targets = autodiff.asarray(x), autodiff.asarray(t)

    def of(value):
        return getattr(autodiff.F, loss)(logits, targets, reduction=reduction, **{parameter: value})

    at, step = number(parameter), 1e-6
    ahead, behind = (
        NUMPY(loss, x, t, reduction=reduction, **{parameter: at + d}).sum() for d in (step, -step)
    )
    got = autodiff.grad(of, autodiff.asarray(np.array(at)))
    assert_allclose(got, (ahead - behind) / (2 * step), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("loss", DENSE | LABELLED)
def test_the_derivative_in_gamma_is_finite_at_extremes(autodiff: Backend, loss: str) -> None:
    if "gamma" not in (DENSE | LABELLED)[loss]:
        return
    x = np.array([0, 20, -20, 100, -100, 1000, -1000, INF, -INF], np.float32)
    x = np.stack([x, -x], axis=1)
    t = np.ones_like(x) if loss in DENSE else np.zeros(len(x), np.int64)
    logits, targets = autodiff.asarray(x), autodiff.asarray(t)
    for at in (0.25, 2.0):
        got = autodiff.grad(
            lambda g: getattr(autodiff.F, loss)(logits, targets, gamma=g, reduction="sum"),
            autodiff.asarray(np.array(at, np.float32)),
        )
        assert np.isfinite(got)


def test_an_array_with_axes_is_no_parameter(autodiff: Backend) -> None:
    x, t = operands("sigmoid_focal_loss")
    with pytest.raises(
        ValueError, match=r"gamma must be a number or an array without axes; got sh"
    ):
        autodiff("sigmoid_focal_loss", x, t, gamma=np.array([1.0, 2.0]))
    with pytest.raises(TypeError, match=r"gamma must be a number or .* of a real type"):
        boolean = autodiff.asarray(np.array(True), "bool")
        autodiff.F.sigmoid_focal_loss(autodiff.asarray(x), autodiff.asarray(t), gamma=boolean)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("loss", DENSE)
def test_the_derivative_in_the_targets(autodiff: Backend, loss: str, reduction: str) -> None:
    x, t = operands(loss)
    logits, step = autodiff.asarray(x), 1e-6
    ahead, behind = (NUMPY(loss, x, t + d) for d in (step, -step))
    expected = (ahead - behind) / (2 * step) / (x.size if reduction == "mean" else 1)
    got = autodiff.grad(
        lambda y: getattr(autodiff.F, loss)(logits, y, reduction=reduction), autodiff.asarray(t)
    )
    assert_allclose(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", DENSE)
def test_the_derivative_in_the_targets_is_finite_at_extremes(autodiff: Backend, loss: str) -> None:
    x = np.array([0, 20, -20, 100, -100, 1000, -1000], np.float32)
    logits = autodiff.asarray(x)
    for y in (0.0, 0.5, 1.0):
        targets = autodiff.asarray(np.full(len(x), y, np.float32))
        got = autodiff.grad(lambda t: getattr(autodiff.F, loss)(logits, t), targets)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("loss", ["sigmoid_focal_loss", "balanced_cross_entropy"])
def test_a_target_out_of_range_changes_no_other_element(backend: Backend, loss: str) -> None:
    x = np.linspace(-4, 4, 1 << 16).astype(np.float32)
    y = np.zeros_like(x)
    plain = backend(loss, x, y)
    for wrong in (-1.0, 2.0, np.nan):
        y[:2] = wrong, 1.0
        alone = backend(loss, x[:2], y[:2])
        got = backend(loss, x, y)
        assert_allclose(got[:2], alone, rtol=1e-6)
        assert_allclose(got[2:], plain[2:], rtol=3e-6)


# ---------------------------------------------------------------- infinite and masked logits


@pytest.mark.parametrize("size", [INF, 2e38, 3.4e38])
def test_fl_star_of_large_logits(backend: Backend, size: float) -> None:
    x = np.array([size, -size], np.float32)
    finite = min(size, float(np.finfo(np.float32).max))
    for y, expected in ((0.0, [0.75 * finite, 0]), (1.0, [0, 0.25 * finite])):
        got = backend("sigmoid_focal_loss_star", x, np.full(2, y, np.float32))
        assert_allclose(got, np.array(expected, np.float32), rtol=1e-6)


MASKED = [-1e4, -1e6, -1e9, -1e30, float(np.finfo(np.float32).min), -INF]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("value", MASKED)
def test_softmax_gradient_where_the_label_is_masked(
    backend: Backend, value: float, gamma: float
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 1000)).astype(np.float32)
    labels = np.arange(4)
    x[0, 0] = value  # the label's own class
    x[1, [0, 5]] = value  # others
    x[2] += 1e4  # all of them large
    got = backend.slope("softmax_focal_loss", x, labels, gamma=gamma)
    assert_allclose(got.sum(1), 0, atol=2e-6)
    wide = x.astype(np.float64)
    expected = np.zeros_like(wide)
    for i, c in enumerate(labels):
        others = np.delete(wide[i], c)
        odds = np.exp(others - others.max())
        z = np.float64(x[i, c] - others.max()) - np.log(odds.sum())
        z = max(z, -1e30)
        s, p_t = 1 / (1 + np.exp(min(z, 700))), 1 / (1 + np.exp(min(-z, 700)))
        by_z = -(s**gamma) * (gamma * p_t * np.logaddexp(0, -z) + s)
        expected[i] = np.insert(-by_z * odds / odds.sum(), c, by_z)
    assert_allclose(got, expected, rtol=2e-5, atol=1e-12)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("loss", "label", "options", "expected"),
    [
        ("sparse_sigmoid_focal_loss", 3, {}, "lie in [0, 3) or be negative; got 3"),
        ("softmax_focal_loss", 3, {}, "lie in [0, 3) or be -100; got 3"),
        ("softmax_focal_loss", -1, {"ignore_index": 7}, "lie in [0, 3) or be 7; got -1"),
        ("softmax_focal_loss", -100, {"ignore_index": None}, "lie in [0, 3); got -100"),
    ],
)
def test_a_label_out_of_range_is_an_error(
    backend: Backend, loss: str, label: int, options: dict, expected: str
) -> None:
    x, labels = np.zeros((2, 3), np.float32), np.array([options.get("ignore_index") or 1, label])
    with pytest.raises(ValueError, match=re.escape(f"{loss}: labels must {expected}")):
        backend(loss, x, labels, **options)


def compiled(autodiff: Backend, function):
    """`function` as a graph of the framework."""
    if autodiff.name == "torch":
        return autodiff.torch.compile(function, fullgraph=True, backend="aot_eager")
    return autodiff.jax.jit(function) if autodiff.name == "jax" else autodiff.tf.function(function)


@pytest.mark.parametrize("loss", LABELLED)
def test_a_label_out_of_range_is_ignored_in_a_graph(autodiff: Backend, loss: str) -> None:
    x, _ = operands(loss)
    x = x.astype(np.float32)
    wrong, ignored = np.array([0, 3, 2, 1, 900, 0]), -2 if loss.startswith("sparse") else -100
    right = np.where(wrong > 2, ignored, wrong)
    graph = compiled(autodiff, lambda x, t: getattr(autodiff.F, loss)(x, t, reduction="mean"))
    got = autodiff.numpy(graph(autodiff.asarray(x), autodiff.asarray(wrong)))
    assert_allclose(got, autodiff(loss, x, right, reduction="mean"), rtol=1e-6)
    graph = compiled(autodiff, lambda x, t: getattr(autodiff.F, loss)(x, t))
    got = autodiff.numpy(graph(autodiff.asarray(x), autodiff.asarray(wrong)))
    assert_allclose(got, autodiff(loss, x, right), rtol=1e-5, atol=1e-9)
    assert_array_equal(got[right == ignored], 0)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("reduction", ["none", "mean", "positives"])
def test_the_class_axis_of_the_sparse_loss(backend: Backend, axis: int, reduction: str) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((4, 2, 3)), rng.integers(-2, 3, (4, 2))
    weight = rng.uniform(size=(2, 1))
    options = {"alpha": [0.1, 0.2, 0.9], "reduction": reduction, "label_smoothing": 0.1}
    expected = backend("sparse_sigmoid_focal_loss", x, labels, weight=weight, **options)
    moved = np.ascontiguousarray(np.moveaxis(x, -1, axis))
    weights = np.moveaxis(np.broadcast_to(weight, x.shape), -1, axis)
    got = backend(
        "sparse_sigmoid_focal_loss", moved, labels, weight=np.array(weights), axis=axis, **options
    )
    if reduction == "none":
        got = np.moveaxis(got, axis, -1)
    assert_allclose(got, expected, rtol=1e-12)
