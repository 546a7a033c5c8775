"""Measuring errors in units in the last place (ULP)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from folders import TESTS

from focal.testing.ulp import LIMITS


def golden(name: str) -> Any:
    """A table of tests/golden."""
    return json.loads((TESTS / "golden" / f"{name}.json").read_text())


def promised_ulps(gamma: float) -> float:
    """The documented bound on the error of a loss and of its gradient."""
    return 6 + 4 * gamma


def worst_ulps(got: Any, reference: Any, dtype: str, size: Any = None) -> float:
    """Greatest error of `got` in ULP of `size`, by default of the reference itself.

    A sum whose terms cancel is accurate to a few ULP of the terms only; `size` is then the sum of
    their absolute values. Below the smallest normal number a framework may flush to zero, so an
    error as large as that number is allowed there.
    """
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    assert got.shape == reference.shape
    assert np.isfinite(got).all()
    epsilon, tiny, _ = LIMITS[dtype]
    size = np.abs(reference) if size is None else np.asarray(size, np.float64)
    _, exponent = np.frexp(np.maximum(size, tiny))
    error = np.abs(got - reference)
    in_ulps = error / np.ldexp(epsilon, exponent - 1)
    below = np.where(error <= tiny, 0.0, np.inf)
    return float(np.max(np.where(size >= tiny, in_ulps, below), initial=0))


def _parts(x: Any, y: Any) -> tuple[Any, ...]:
    """p, q, m, cross entropy and |k| in float64; k = (1 - 2 y) p q / m."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    e = np.exp(-np.abs(x))
    p, q = np.where(x >= 0, 1, e) / (1 + e), np.where(x >= 0, e, 1) / (1 + e)
    m = y * q + (1 - y) * p
    ce = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    k = np.abs(1 - 2 * y) * np.divide(p * q, m, out=np.zeros_like(m), where=m > 0)
    return p, q, m, ce, k


def _alpha_factor(y: Any, alpha: float | None) -> Any:
    return 1.0 if alpha is None or alpha == -1 else alpha * y + (1 - alpha) * (1 - y)


def gradient_terms(x: Any, y: Any, alpha: float | None, gamma: float) -> Any:
    """Sum of the absolute terms of dFL/dx; for hard targets that is |dFL/dx| itself."""
    p, q, m, ce, k = _parts(x, y)
    return _alpha_factor(y, alpha) * m**gamma * (gamma * k * ce + (1 - y) * p + y * q)


def hessian_terms(x: Any, y: Any, alpha: float | None, gamma: float) -> Any:
    """Sum of the absolute terms of d2FL/dx2."""
    p, q, m, ce, k = _parts(x, y)
    d = (1 - y) * p + y * q
    terms = gamma * k * (ce * (gamma * k + q + p + k) + 2 * d) + p * q
    return _alpha_factor(y, alpha) * m**gamma * terms
