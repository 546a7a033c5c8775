"""Fixtures of the whole suite: the backends, and the hypothesis profile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # the helper modules beside this file

from backends import AUTODIFF, BACKENDS, CLOSED_FORM, Backend, load

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile("ci")  # `pytest --hypothesis-profile=thorough` searches further


@pytest.fixture(params=tuple(BACKENDS), scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn."""
    return load(request.param)


@pytest.fixture(params=AUTODIFF, scope="session")
def autodiff(request: pytest.FixtureRequest) -> Backend:
    """Every backend that differentiates, in turn."""
    return load(request.param)


@pytest.fixture(params=CLOSED_FORM, scope="session")
def closed_form(request: pytest.FixtureRequest) -> Backend:
    """Every backend with the closed-form derivatives, in turn."""
    return load(request.param)
