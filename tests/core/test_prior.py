"""The constants for the start of training."""

from __future__ import annotations

import math

import numpy as np
import pytest
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from precision import golden

import focal


def test_prior_bias_is_the_definition() -> None:
    for pi, bias in golden("prior_bias"):
        assert focal.prior_bias(pi) == pytest.approx(bias, rel=1e-15, abs=1e-16)
    assert focal.prior_bias() == -4.59511985013459
    assert type(focal.prior_bias(0.3)) is float


@given(st.floats(1e-300, 1 - 1e-12))
def test_sigmoid_of_the_bias_is_the_prior(pi: float) -> None:
    assert 1 / (1 + math.exp(-focal.prior_bias(pi))) == pytest.approx(pi, rel=1e-12)


def test_prior_bias_per_class() -> None:
    priors = [[0.5, 0.01], [0.1, 0.99]]
    biases = focal.prior_bias(priors)
    assert biases.dtype == np.float64
    assert_array_equal(biases, [[focal.prior_bias(p) for p in row] for row in priors])


def test_prior_of_the_paper(backend: Backend) -> None:
    """At pi = 0.01, per logit: what paper and library call the point of the prior."""
    x = np.full(1, focal.prior_bias(0.01))
    background, foreground = np.zeros(1), np.ones(1)
    assert_allclose(backend("balanced_cross_entropy", x, background, None), 0.0100503359, 5e-9)
    assert_allclose(backend("sigmoid_focal_loss", x, background), 7.53775e-7, 1e-6)
    assert_allclose(backend("sigmoid_focal_loss", x, foreground), 1.12838, 5e-6)


def test_inverse_frequency_alpha() -> None:
    assert focal.inverse_frequency_alpha(100, 900) == 0.9
    assert focal.inverse_frequency_alpha(0, 5) == 1.0
    assert focal.inverse_frequency_alpha(5, 0) == 0.0
    assert type(focal.inverse_frequency_alpha(1, 1)) is float
    assert_array_equal(focal.inverse_frequency_alpha([1, 3], [3, 1]), [0.75, 0.25])


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_inverse_frequency_alpha_balances(positives: int, negatives: int) -> None:
    alpha = focal.inverse_frequency_alpha(positives, negatives)
    assert alpha * positives == pytest.approx((1 - alpha) * negatives, rel=1e-6)


@pytest.mark.parametrize("pi", [0.01, 0.3, None])
@pytest.mark.parametrize("alpha", [None, -1, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("positives", [0, 1, 7])
def test_expected_initial_loss_is_the_loss(
    backend: Backend, pi: float | None, alpha: float | None, gamma: float, positives: int
) -> None:
    n, classes = 40, 3
    labels = np.full(n, -1)
    labels[:positives] = np.arange(positives) % classes
    bias = 0.0 if pi is None else focal.prior_bias(pi)
    x = np.full((n + 2, classes), bias)
    labels = np.append(labels, [-2, -2])  # ignored anchors do not count
    actual = backend("sparse_sigmoid_focal_loss", x, labels, alpha, gamma, "positives")
    expected = focal.expected_initial_loss(n, positives, classes, pi, alpha, gamma)
    assert_allclose(actual, expected, rtol=1e-13)


def test_expected_initial_loss_of_a_detector() -> None:
    """200,700 anchors, 80 classes, 50 of the anchors positive: with and without the prior."""
    with_prior = focal.expected_initial_loss(200_700, 50, 80)
    negatives = 200_700 * 80 - 50
    by_hand = 1.1283785 + negatives * 7.537752e-7 / 50
    assert with_prior == pytest.approx(by_hand, rel=1e-5)
    assert focal.expected_initial_loss(200_700, 50, 80, pi=None) > 1000 * with_prior
