"""benchmarks.exhaustive: the loss at every number of a type; what it counts, and how it resumes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import AUTODIFF, load
from numpy.testing import assert_allclose, assert_array_equal

import focal.numpy
from benchmarks import exhaustive, sweep
from benchmarks.exhaustive import main
from benchmarks.sweep import Settings, Tally
from focal.core.formulas import SigmoidFocal
from focal.numpy._namespace import xp
from focal.testing.frameworks import FRAMEWORKS
from focal.testing.ulp import allowed_ulp

STRIDE = 4099


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("backend_name", ["numpy", *AUTODIFF])
def test_float32_sweep_with_a_stride(backend_name: str, alpha: float | None) -> None:
    load(backend_name)
    settings = Settings(backend_name, "float32", (0.0, 0.5, 2.0), alpha, STRIDE)
    record = exhaustive.exhaustive(settings, 1, None, "")
    assert record["passed"]
    assert record["logits"] == -(-(2**32) // STRIDE)
    # So little of the bound would mean that nothing was compared.
    assert min(found["loss"]["ulp"] for found in record["gammas"].values()) > 1


def test_float32_sweep_of_compiled_pytorch() -> None:
    pytest.importorskip("torch")
    settings = Settings("torch", "float32", (2.0,), 0.25, STRIDE, compiled=True)
    record = exhaustive.exhaustive(settings, 1, None, "")
    assert record["passed"]
    assert min(found["loss"]["ulp"] for found in record["gammas"].values()) > 1


HALVES = [("numpy", "float16"), *product(AUTODIFF, ("float16", "bfloat16"))]


@pytest.mark.parametrize(("backend_name", "dtype"), HALVES)
def test_every_half_number(backend_name: str, dtype: str) -> None:
    load(backend_name)
    settings = Settings(backend_name, dtype, (0.0, 0.5, 2.0), 0.25, 1)
    record = exhaustive.exhaustive(settings, 1, None, "")
    assert record["passed"]
    assert record["logits"] == 2**16


@np.errstate(invalid="ignore")  # NaN
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend_name", FRAMEWORKS)
def test_every_half_number_is_converted_exactly(backend_name: str, dtype: str) -> None:
    """Subnormal ones too, which some frameworks flush to zero."""
    load(backend_name)
    framework = FRAMEWORKS[backend_name]()
    if dtype not in framework.dtypes:
        return
    numbers = sweep._numbers(np.arange(2**16).astype(np.uint16), dtype)
    assert_array_equal(framework.numpy(framework.asarray(numbers, dtype)), numbers)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_the_reference_of_a_sweep_is_the_loss_at_both_targets(gamma: float) -> None:
    w = np.concatenate([np.linspace(-800, 800, 4001), [1e-300, -1e-300, 0.0]])
    value, slope = SigmoidFocal(None, gamma).background_and_grad(xp, w)
    for target, sign in ((0.0, 1), (1.0, -1)):
        arguments = sign * w, np.full_like(w, target), None, gamma
        expected = focal.numpy.sigmoid_focal_loss(*arguments)
        assert_allclose(value, expected, rtol=1e-14, atol=1e-300)
        expected = focal.numpy.sigmoid_focal_loss_grad(*arguments)
        assert_allclose(sign * slope, expected, rtol=1e-14, atol=1e-300)


def swept(monkeypatch: pytest.MonkeyPatch, change: Any) -> tuple[Tally, Tally]:
    """The tallies of NumPy's loss with loss and gradient changed by change(x, y, loss, grad)."""
    own = sweep.own_loss

    def changed(*args: Any) -> Any:
        return lambda x, y: change(x, y, *own(*args)(x, y))

    monkeypatch.setattr(sweep, "own_loss", changed)
    settings = Settings("numpy", "float32", (0.0,), None, 2**16)  # every bfloat16 number
    return sweep.sweep(settings, 0, sweep.patterns(settings))[0]


def test_a_sweep_finds_the_largest_error(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 0.78125

    def change(x: Any, y: Any, loss: Any, grad: Any) -> Any:
        return np.where((x == at) & (y == 1), loss * (1 + 2.0**-15), loss), grad

    loss, gradient = swept(monkeypatch, change)
    assert (loss.logit, loss.target) == (at, 1)
    assert 120 < loss.ulp < 600
    assert not loss.passed(6)
    assert gradient.passed(6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x, y, loss, grad: (loss, np.abs(grad)), "ulp"),
        (lambda x, y, loss, grad: (loss, np.where(np.abs(x) > 1000, np.nan, grad)), "not_finite"),
        (lambda x, y, loss, grad: (loss, np.where(np.abs(x) > 1e38, np.inf, grad)), "not_finite"),
        (lambda x, y, loss, grad: (loss, np.where(grad == 0, np.nan, grad)), "not_finite"),
        (lambda x, y, loss, grad: (loss, np.nan_to_num(grad)), "nan_lost"),
        (
            lambda x, y, loss, grad: (
                loss,
                np.where(np.isinf(x) & (grad == 0), 1 - 2 * y, grad),
            ),
            "limit_missed",
        ),
        (lambda x, y, loss, grad: (loss, np.where(np.isinf(x), 0, grad)), "limit_missed"),
        (lambda x, y, loss, grad: (loss, np.where(grad == 0, 2e-38, grad)), "beyond"),
        (lambda x, y, loss, grad: (loss, np.where(np.abs(grad) < 2e-38, 0, grad)), "ulp"),
    ],
)
def test_a_sweep_sees_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, change: Any, expected: str
) -> None:
    loss, gradient = swept(monkeypatch, change)
    assert loss.passed(6)
    assert not gradient.passed(6)
    assert getattr(gradient, expected) > (6 if expected == "ulp" else 0)


def test_a_sweep_counts_what_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(x: Any, y: Any, loss: Any, grad: Any) -> Any:
        return loss, np.where(np.abs(grad) < 2.0**-126, 0, grad)

    loss, gradient = swept(monkeypatch, change)
    assert (loss.flushed, gradient.flushed > 0) == (0, True)
    assert gradient.passed(6)


# ---------------------------------------------------------------- the command


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "PIECE", 10_000)


def test_a_killed_sweep_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_pieces(monkeypatch)
    settings = Settings("numpy", "float16", (0.5, 2.0), 0.25, 1)
    expected = exhaustive.exhaustive(settings, 1, None, "")
    done = []

    def killed(settings: Settings, first: int, last: int) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(first)
        return sweep.sweep(settings, first, last)

    out = tmp_path / "record.json"
    monkeypatch.setattr(exhaustive, "sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        exhaustive.exhaustive(settings, 1, out, "")
    assert not out.exists()
    assert len(json.loads((tmp_path / "record.json.part").read_text())["done"]) == 3

    def counted(settings: Settings, first: int, last: int) -> Any:
        done.append(first)
        return sweep.sweep(settings, first, last)

    monkeypatch.setattr(exhaustive, "sweep", counted)
    record = exhaustive.exhaustive(settings, 1, out, "")
    assert sorted(done) == list(range(0, 2**16, 10_000))
    assert record["gammas"] == expected["gammas"]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_the_state_of_another_sweep_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "record.json"
    state = exhaustive._State(Settings("numpy", "float16", (0.5,), None, 1), tmp_path / "x.part")
    state.add(0, [(Tally(ulp=99.0), Tally())], 1.0)
    (tmp_path / "x.part").rename(tmp_path / "record.json.part")
    settings = Settings("numpy", "float16", (2.0,), None, 1)
    assert exhaustive.exhaustive(settings, 1, out, "")["passed"]


def test_two_processes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    settings = Settings("numpy", "float16", (0.5, 2.0), None, 2)
    one, two = (exhaustive.exhaustive(settings, jobs, None, "")["gammas"] for jobs in (1, 2))
    assert one == two


def test_tallies_add_up_in_any_order() -> None:
    tallies = [Tally(2.0, 1.0, 0, flushed=3), Tally(2.0, -1.0, 1), Tally(1.0, 5.0, 1, nan_lost=2)]
    sums = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        total = Tally()
        for i in order:
            total.add(tallies[i])
        sums.append(total)
    assert sums[0] == sums[1] == sums[2] == Tally(2.0, 1.0, 0, flushed=3, nan_lost=2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "record.json"
    given = f"--backend numpy --dtype float16 --gamma 0 2 --jobs 1 --out {out}"
    assert main(given.split()) == 0
    printed = capsys.readouterr().out
    assert "numpy, float16: 65536 logits with target 0 and 1" in printed
    assert printed.endswith(": passed\n")
    record = json.loads(out.read_text())
    assert record["command"] == f"python -m benchmarks.exhaustive {given}"
    assert list(record["gammas"]) == ["0", "2"]
    assert record["versions"]["numpy"] == np.__version__
    assert {"date", "machine", "seconds", "alpha", "stride"} <= set(record)


def test_the_command_fails_where_an_error_is_beyond_the_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exhaustive, "sweep", lambda *_: [(Tally(ulp=14.5), Tally())])
    assert allowed_ulp("float32", 2.0) == 14
    assert main(["--backend", "numpy", "--stride", "65537", "--jobs", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backend numpy --dtype bfloat16", "dtype must be one that numpy has; got 'bfloat16'"),
        ("--gamma -1", "gamma must be a finite number >= 0; got -1.0"),
        ("--alpha 3", "alpha must lie in [0, 1], or be None or -1 to turn it off; got 3.0"),
        ("--stride 0", "stride must be >= 1; got 0"),
        ("--backend jax --compile", "compile is for torch only; got backend 'jax'"),
        ("--jobs 0", "jobs must be >= 1; got 0"),
    ],
)
def test_bad_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options.split())
    assert stop.value.code == 2
    assert f"exhaustive: {message}" in capsys.readouterr().err
