"""Fixtures of the whole suite: the backends, and the hypothesis profile."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from backends import (
    AUTODIFF,
    BACKENDS,
    CLOSED_FORM,
    REQUIRE_ALL,
    Backend,
    LeftOut,
    left_out,
    load,
)
from hypothesis import HealthCheck, settings

LONG = (
    "test_replicas",
    "test_keras",
    "test_survival",
    "test_benchmarks_gpu",
    "test_trainers",
    "test_cli",
    "test_run",
    "retinanet/test_torchvision",
    "torch/test_export",
    "retinanet/test_network",
)
"""Files that take minutes: they run whole programs, or compile much."""

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


def not_skipped(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Where everything must be installed, a missing import is a failure and not a skip."""
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, although FOCAL_REQUIRE_ALL is set: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A module that skips itself."""
    report = yield
    not_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A test that skips itself; a condition of the machine, declared as `skipif`, may."""
    report = yield
    left_out = call.excinfo is not None and call.excinfo.errisinstance(LeftOut)
    if item.get_closest_marker("skipif") is None and not left_out:
        not_skipped(report)
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, and none of the tests that are for a backend which is not to be tested."""
    mine, others = [], []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        (others if any(map(left_out, parameters)) else mine).append(item)
    # Two workers share the files; a long one at the end would leave the other without work.
    mine.sort(key=lambda item: not item.path.with_suffix("").as_posix().endswith(LONG))
    items[:] = mine
    config.hook.pytest_deselected(items=others)


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one: more gain nothing on small networks, and lose much where cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick_jax() -> Iterator[None]:
    """JAX compiles in half the time, and computes slower; in processes that are started, too."""

    def set_to(value: bool) -> None:
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_disable_most_optimizations", value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        set_to(True)
        yield
    set_to(False)


@pytest.fixture(scope="module")
def pytorch() -> Iterator[Callable[..., Any]]:
    """Calls a function of pytorch_side.py in a process where PyTorch is the only framework."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    import pytorch_side

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, pytorch_side.start) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module", autouse=True)
def fresh_caches() -> Iterator[None]:
    """What a file has compiled goes with it: no other file calls the same functions."""
    yield
    modules = sys.modules
    if "torch._dynamo" in modules:  # else it would be imported, and Triton with it
        modules["torch"].compiler.reset()
    if "jax" in modules:
        modules["jax"].clear_caches()
    if "keras" in modules:
        modules["keras"].utils.clear_session()
    gc.collect()
    if sys.platform == "linux":  # freed memory stays with the process otherwise
        ctypes.CDLL(None).malloc_trim(0)
