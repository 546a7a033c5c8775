"""What users rely on wherever a framework differentiates: hard targets, half types, pickling."""

from __future__ import annotations

import importlib
import pickle

import numpy as np
import pytest
from backends import Backend
from numpy.testing import assert_allclose, assert_array_equal

import focal.numpy as reference


def test_the_gradient_in_hard_targets_is_that_of_the_formula(autodiff: Backend) -> None:
    """Of the binary cross entropy it is -x, on the boundary as well."""
    x, y = np.array([-4.0, -0.3, 0.0, 0.3, 1.0, 5.0]), np.array([0.0, 1.0, 0.2, 0.5, 0.0, 1.0])
    logits = autodiff.asarray(x)
    for reduction in ("none", "sum"):
        by_y = autodiff.grad(
            lambda y, r=reduction: autodiff.F.sigmoid_focal_loss(logits, y, None, 0.0, r),
            autodiff.asarray(y),
        )
        assert_allclose(by_y, -x, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gradient_of_a_sum_of_half_types_is_that_of_float32(
    autodiff: Backend, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    narrow = autodiff.asarray(3 * rng.standard_normal((64, 8)), dtype)
    y = autodiff.asarray(rng.integers(0, 2, (64, 8)), "float32")

    def total(x):
        return autodiff.F.sigmoid_focal_loss(x, y, reduction="sum")

    wide = autodiff.grad(total, autodiff.asarray(autodiff.numpy(narrow), "float32"))
    expected = autodiff.numpy(autodiff.asarray(wide, dtype))
    got = autodiff.grad(total, narrow)
    assert got.dtype == expected.dtype
    assert_array_equal(got, expected)


def test_small_half_gradients_survive_the_scale_of_a_loss(autodiff: Backend) -> None:
    """Unscaled, this one is a subnormal float16."""
    x, y = autodiff.asarray(np.array([-7.0]), "float16"), autodiff.asarray(np.zeros(1))
    got = autodiff.grad(lambda x: autodiff.F.sigmoid_focal_loss(x, y, reduction="sum") * 65536.0, x)
    expected = reference.sigmoid_focal_loss_grad(np.array([-7.0]), np.zeros(1)) * 65536
    assert_allclose(got, expected, rtol=2e-3)


def test_functions_pickle_by_name(autodiff: Backend) -> None:
    function = importlib.import_module(autodiff.F.__name__).sigmoid_focal_loss
    assert pickle.loads(pickle.dumps(function)) is function
