"""The sigmoid losses: values and gradients against references, and their properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from precision import golden, gradient_terms, hessian_terms, promised_ulps, worst_ulps
from strategies import Examples, Rows, alphas, examples, gammas, hard_targets, rows

import focal.numpy as reference

GOLDEN = golden("sigmoid_focal")
STAR = golden("sigmoid_focal_star")
# Measured: 7 for the gradient and 9 for the second derivative, at gamma 5.
FLOAT64_ULPS = {"value": promised_ulps, "grad": promised_ulps, "hess": lambda g: 6 + 4 * g}

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
def test_float64_value_is_the_definition(
    backend: Backend, alpha: float | None, gamma: float
) -> None:
    x, y = golden_grid(GOLDEN)
    got = backend("sigmoid_focal_loss", x, y, alpha, gamma)
    assert worst_ulps(got, golden_values("value", alpha, gamma), "float64") <= promised_ulps(gamma)


@pytest.mark.parametrize("alpha", GOLDEN["alphas"])
@pytest.mark.parametrize("gamma", GOLDEN["gammas"])
def test_float64_gradient_is_that_of_the_definition(
    backend: Backend, alpha: float | None, gamma: float
) -> None:
    x, y = golden_grid(GOLDEN)
    got = backend.slope("sigmoid_focal_loss", x, y, alpha=alpha, gamma=gamma)
    expected, size = golden_values("grad", alpha, gamma), gradient_terms(x, y, alpha, gamma)
    assert worst_ulps(got, expected, "float64", size) <= promised_ulps(gamma)


@pytest.mark.parametrize("alpha", GOLDEN["alphas"])
@pytest.mark.parametrize("gamma", GOLDEN["gammas"])
def test_float64_hess_is_that_of_the_definition(
    closed_form: Backend, alpha: float | None, gamma: float
) -> None:
    x, y = golden_grid(GOLDEN)
    got = closed_form("sigmoid_focal_loss_hess", x, y, alpha, gamma)
    expected, size = golden_values("hess", alpha, gamma), hessian_terms(x, y, alpha, gamma)
    assert worst_ulps(got, expected, "float64", size) <= promised_ulps(gamma)


@pytest.mark.parametrize(("index", "setting"), enumerate(STAR["settings"]))
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


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_float32_is_exact_to_the_promised_ulps(
    backend: Backend, gamma: float, target: float
) -> None:
    x = dense_float32_logits()
    y = np.full_like(x, target)
    exact = reference.sigmoid_focal_loss(x.astype(float), y.astype(float), None, gamma)
    got = backend("sigmoid_focal_loss", x, y, None, gamma)
    assert got.dtype == np.float32
    assert worst_ulps(got, exact, "float32") <= promised_ulps(gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_float32_gradient_is_exact_to_the_promised_ulps(
    backend: Backend, gamma: float, target: float
) -> None:
    x = dense_float32_logits()
    y = np.full_like(x, target)
    exact = reference.sigmoid_focal_loss_grad(x.astype(float), y.astype(float), None, gamma)
    got = backend.slope("sigmoid_focal_loss", x, y, alpha=None, gamma=gamma)
    assert got.dtype == np.float32
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
@given(st.data(), alphas, gammas)
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


@given(examples("float16"), alphas, gammas)
def test_half_types_are_the_rounded_float32(
    backend: Backend, example: Examples, alpha: float | None, gamma: float
) -> None:
    x, y = example
    wide = x.astype(float), y.astype(float)
    exact = reference.sigmoid_focal_loss(*wide, alpha, gamma)
    exact_slope = reference.sigmoid_focal_loss_grad(*wide, alpha, gamma)
    size = gradient_terms(*wide, alpha, gamma)
    for dtype in backend.half_types:
        if dtype == "bfloat16":
            x = np.where(np.abs(x) <= 256, np.round(x), 0)  # what bfloat16 holds exactly
            continue
        inputs, targets = backend.asarray(x, dtype), backend.asarray(y, dtype)
        loss = backend.F.sigmoid_focal_loss(inputs, targets, alpha, gamma)
        slope = backend.slope("sigmoid_focal_loss", inputs, targets, alpha=alpha, gamma=gamma)
        assert backend.dtype(loss) == dtype
        assert worst_ulps(backend.numpy(loss), exact, dtype) <= 1
        assert worst_ulps(slope, exact_slope, dtype, size) <= 1
