"""focal.testing: it passes our own losses, catches what is wrong with others, and counts right."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import AUTODIFF, Backend, load
from numpy.testing import assert_allclose, assert_array_equal
from precision import gradient_terms

import focal.numpy
from focal.core.formulas import SigmoidFocal
from focal.numpy._namespace import xp
from focal.testing import LossReport, check_loss, exhaustive, frameworks, sweep
from focal.testing.__main__ import main
from focal.testing.grid import dense_grid
from focal.testing.references import REFERENCES, exact
from focal.testing.sweep import Settings, Tally
from focal.testing.ulp import allowed_ulp, power_of_two, rounded

STRIDE = 4099


def check_own(
    backend: Backend, reference: str, dtype: str = "float32", **params: Any
) -> LossReport:
    loss = getattr(backend.F, reference)
    return check_loss(
        lambda x, t: loss(x, t, **params), reference, backend.name, dtype=dtype, **params
    )


def failure(*args: Any, **kwargs: Any) -> str:
    """The table of a check that fails."""
    with pytest.raises(AssertionError) as caught:
        check_loss(*args, **kwargs)
    return str(caught.value)


def cells(table: str, targets: str, what: str) -> dict[str, float]:
    """The numbers of one line of a table."""
    line = next(line.split() for line in table.splitlines() if line.split()[:2] == [targets, what])
    names = ("ulp", "allowed", "relative", "logit", "target", "nan", "infinite")
    return dict(zip(names, map(float, line[2:]), strict=True))


# ---------------------------------------------------------------- our own losses


@pytest.mark.parametrize("reference", REFERENCES)
def test_own_losses_are_within_the_bound(autodiff: Backend, reference: str) -> None:
    params = {} if reference == "balanced_cross_entropy" else {"gamma": 0.5}
    report = check_own(autodiff, reference, **params)
    assert report.kept
    assert {part.gradient_status for part in report.parts} == {"kept"}
    assert {part.second_status for part in report.parts} == {"close"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_own_loss_is_within_the_bound_in_every_type(autodiff: Backend, dtype: str) -> None:
    report = check_own(autodiff, "sigmoid_focal_loss", dtype, alpha=0.3, gamma=1.7)
    assert [part.targets for part in report.parts] == ["hard", "soft"]
    assert {part.second_status for part in report.parts} == {"close"}


@pytest.mark.parametrize("reference", REFERENCES)
def test_numpy_has_values_only(reference: str) -> None:
    report = check_loss(getattr(focal.numpy, reference), reference, "numpy", "float64")
    assert report.kept
    for part in report.parts:
        assert part.gradient is None
        assert part.gradient_status.startswith("not available")


def test_parameters_default_to_those_of_the_reference() -> None:
    report = check_loss(focal.numpy.sigmoid_focal_loss_star, "sigmoid_focal_loss_star", "numpy")
    assert report.params == {"alpha": 0.25, "gamma": 2.0, "beta": 1.0}
    assert report.max_ulp == 14


# ---------------------------------------------------------------- what is wrong with others


def sigmoid(backend: Backend, x: Any) -> Any:
    if backend.name == "torch":
        return x.sigmoid()
    return backend.jax.nn.sigmoid(x) if backend.name == "jax" else backend.tf.sigmoid(x)


def log(backend: Backend, x: Any) -> Any:
    if backend.name == "torch":
        return x.log()
    return backend.jax.numpy.log(x) if backend.name == "jax" else backend.tf.math.log(x)


def clip(backend: Backend, x: Any, low: float, high: float) -> Any:
    if backend.name == "torch":
        return x.clamp(low, high)
    clip = backend.jax.numpy.clip if backend.name == "jax" else backend.tf.clip_by_value
    return clip(x, low, high)


def test_the_textbook_formula_is_caught(autodiff: Backend) -> None:
    """(1 - p_t)^gamma ce with p = sigmoid(x): 1 - p_t is 0 beyond |x| = 17."""

    def textbook(x: Any, y: Any) -> Any:
        p = sigmoid(autodiff, x)
        p_t = y * p + (1 - y) * (1 - p)
        ce = autodiff.F.balanced_cross_entropy(x, y, alpha=None)
        return (1 - p_t) ** 0.5 * ce

    table = failure(textbook, backend=autodiff.name, alpha=None, gamma=0.5)
    gradient = cells(table, "hard", "gradient")
    assert gradient["nan"] > 100
    assert cells(table, "hard", "value")["relative"] == 1
    assert "NOT KEPT" in table


def test_a_clipped_probability_is_caught(autodiff: Backend) -> None:
    """A hard positive at x = -20 has no gradient, though its loss looks harmless."""

    def clipped(x: Any, y: Any) -> Any:
        p = clip(autodiff, sigmoid(autodiff, x), 1e-7, 1 - 1e-7)
        return -y * log(autodiff, p) - (1 - y) * log(autodiff, 1 - p)

    table = failure(clipped, "balanced_cross_entropy", autodiff.name, alpha=None)
    gradient = cells(table, "hard", "gradient")
    assert gradient["relative"] >= 1
    assert gradient["nan"] == gradient["infinite"] == 0
    assert "beyond the bound" in table


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_a_missing_alpha_is_caught(autodiff: Backend, alpha: float) -> None:
    loss = autodiff.F.sigmoid_focal_loss
    table = failure(lambda x, y: loss(x, y, alpha=None), backend=autodiff.name, alpha=alpha)
    for what in ("value", "gradient"):
        assert cells(table, "hard", what)["relative"] == pytest.approx(3, rel=1e-3)


def test_a_swapped_target_is_caught() -> None:
    loss = focal.numpy.balanced_cross_entropy
    table = failure(lambda x, y: loss(x, 1 - y), "balanced_cross_entropy", "numpy")
    assert "NOT KEPT" in table


def test_half_types_must_not_be_computed_in(autodiff: Backend) -> None:
    def in_half(x: Any, y: Any) -> Any:
        q = sigmoid(autodiff, -x)
        return y * q * q * -log(autodiff, sigmoid(autodiff, x)) + (1 - y) * 0

    table = failure(in_half, backend=autodiff.name, dtype="float16", alpha=None)
    assert cells(table, "hard", "value")["allowed"] == 1


def test_soft_targets_can_be_left_out() -> None:
    def hard_only(x: Any, y: Any) -> Any:
        return focal.numpy.sigmoid_focal_loss(x, np.round(y))

    report = check_loss(hard_only, backend="numpy", soft_targets=False)
    assert [part.targets for part in report.parts] == ["hard"]
    table = failure(hard_only, backend="numpy")
    assert cells(table, "hard", "value")["ulp"] <= 14 < cells(table, "soft", "value")["ulp"]


def test_max_ulp_replaces_the_bound() -> None:
    loss = focal.numpy.sigmoid_focal_loss
    worst = max(part.value.ulp for part in check_loss(loss, backend="numpy").parts)
    assert check_loss(loss, backend="numpy", max_ulp=np.ceil(worst)).max_ulp == np.ceil(worst)
    assert "bound of 1 ULP: NOT KEPT" in failure(loss, backend="numpy", max_ulp=1)


def test_no_gradient_is_a_failure() -> None:
    torch = load("torch")

    def detached(x: Any, y: Any) -> Any:
        return torch.F.sigmoid_focal_loss(x.detach(), y)

    assert "gradient, hard targets: not available: RuntimeError" in failure(detached)

    tensorflow = load("tensorflow")

    def constant(x: Any, y: Any) -> Any:
        return tensorflow.F.sigmoid_focal_loss(tensorflow.tf.stop_gradient(x), y)

    assert "not available: LookupError" in failure(constant, backend="tensorflow")


def test_the_second_derivative_is_reported_and_does_not_decide() -> None:
    torch = load("torch").torch
    plain = focal.numpy

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, y: Any) -> Any:
            ctx.save_for_backward(x, y)
            return torch.tensor(plain.sigmoid_focal_loss(x.detach().numpy(), y.numpy()))

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Any) -> Any:
            x, y = (a.detach().numpy() for a in ctx.saved_tensors)
            return grad * torch.tensor(plain.sigmoid_focal_loss_grad(x, y)), None

    report = check_loss(Kernel.apply)
    assert report.kept
    assert all(part.second_status.startswith("not available: ") for part in report.parts)

    class Wrong(Kernel):
        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            x, y = ctx.saved_tensors
            slope = torch.tensor(plain.sigmoid_focal_loss_grad(x.detach().numpy(), y.numpy()))
            return grad * slope * (x - x.detach() + 1), None

    report = check_loss(Wrong.apply)
    assert report.kept
    assert all(part.second_status.startswith("not close: ") for part in report.parts)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fn": 3}, "check_loss: fn must be callable; got 3"),
        ({"reference": "dice_loss"}, "check_loss: reference must be one of 'sigmoid_focal_loss'"),
        ({"backend": "mxnet"}, "check_loss: backend must be one of 'numpy', 'torch', 'jax'"),
        ({"dtype": "int8"}, "check_loss: dtype must be one of 'float16', 'bfloat16', 'float32'"),
        ({"dtype": "bfloat16"}, "check_loss: dtype must be one that numpy has; got 'bfloat16'"),
        ({"max_ulp": -1}, "check_loss: max_ulp must be a finite number >= 0; got -1"),
        ({"max_ulp": "4"}, "check_loss: max_ulp must be a number; got '4'"),
        ({"gamma": -1}, "check_loss: gamma must be a finite number >= 0; got -1"),
        ({"alpha": 2}, r"check_loss: alpha must lie in \[0, 1\], or be None"),
        (
            {"beta": 1.0},
            "check_loss: params must be among those of sigmoid_focal_loss, alpha, gamma; got beta",
        ),
        (
            {"reference": "sigmoid_focal_loss_star", "gamma": 0},
            "check_loss: gamma must be > 0",
        ),
        (
            {"reference": "softmax_focal_loss", "alpha": [1.0, 2.0, 3.0]},
            "check_loss: alpha must be a number; got list",
        ),
        (
            {"fn": lambda x, y: x.sum()},
            r"check_loss: fn must return a loss of shape \(\d+,\); got \(\)",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    given = {"fn": focal.numpy.sigmoid_focal_loss, "backend": "numpy"} | arguments
    with pytest.raises((TypeError, ValueError), match=message):
        check_loss(**given)


# ---------------------------------------------------------------- how it measures


def test_power_of_two() -> None:
    sizes = np.array([0.0, 1.0, 1.5, 2.0, 0.75, 2.0**-1074])
    assert_array_equal(power_of_two(sizes), [0, 1, 1, 2, 0.5, 2.0**-1074])


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    torch = load("torch").torch
    values = np.random.default_rng(0).normal(size=2000) * 2.0 ** np.arange(-100, 100).repeat(10)
    values = np.concatenate([values, [0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8]])
    expected = torch.tensor(values).float().to(torch.bfloat16).double().numpy()
    assert_array_equal(rounded(values, "bfloat16"), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_nearest_number_is_half_a_unit_off(dtype: str) -> None:
    def nearest(x: Any, y: Any) -> Any:
        return focal.numpy.sigmoid_focal_loss(x.astype(float), y.astype(float)).astype(dtype)

    for part in check_loss(nearest, backend="numpy", dtype=dtype).parts:
        assert 0.49 < part.value.ulp <= 0.5


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_terms_of_a_gradient_are_those_of_its_formula(gamma: float) -> None:
    grid = dense_grid("float32", soft=True)
    found = exact("sigmoid_focal_loss", {"alpha": 0.25, "gamma": gamma}, "float32", grid)
    expected = gradient_terms(grid.inputs, grid.targets, 0.25, gamma)
    assert_allclose(found.gradient_size, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_grid_holds_the_extremes(dtype: str) -> None:
    grid = dense_grid(dtype, soft=False)
    for x in (0.0, 1.0, 17.0, 20.0, 88.0, 100.0, 1000.0):
        for y in (0.0, 1.0):
            assert ((grid.inputs == x) & (grid.targets == y)).any()
            assert ((grid.inputs == -x) & (grid.targets == y)).any()
    assert_array_equal(rounded(grid.inputs, dtype), grid.inputs)
    smallest = np.abs(grid.inputs[grid.inputs != 0]).min()
    assert (
        smallest
        == {
            "float16": 2.0**-24,
            "bfloat16": 2.0**-133,
            "float32": 2.0**-149,
            "float64": 2.0**-1074,
        }[dtype]
    )


# ---------------------------------------------------------------- every number of a type


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("backend_name", ["numpy", *AUTODIFF])
def test_float32_sweep_with_a_stride(backend_name: str, alpha: float | None) -> None:
    load(backend_name)
    settings = Settings(backend_name, "float32", (0.0, 0.5, 2.0), alpha, STRIDE)
    record = exhaustive.exhaustive(settings, 1, None, "")
    assert record["kept"]
    assert record["logits"] == -(-(2**32) // STRIDE)
    # So little of the bound would mean that nothing was compared.
    assert min(found["loss"]["ulp"] for found in record["gammas"].values()) > 1


HALVES = [("numpy", "float16"), *product(AUTODIFF, ("float16", "bfloat16"))]


@pytest.mark.parametrize(("backend_name", "dtype"), HALVES)
def test_every_half_number(backend_name: str, dtype: str) -> None:
    load(backend_name)
    settings = Settings(backend_name, dtype, (0.0, 0.5, 2.0), 0.25, 1)
    record = exhaustive.exhaustive(settings, 1, None, "")
    assert record["kept"]
    assert record["logits"] == 2**16


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
    own = frameworks.NumPy.own_loss

    def changed(self: Any, alpha: Any, gamma: float) -> Any:
        function = own(self, alpha, gamma)
        return lambda x, y: change(x, y, *function(x, y))

    monkeypatch.setattr(frameworks.NumPy, "own_loss", changed)
    settings = Settings("numpy", "float32", (0.0,), None, 2**16)  # every bfloat16 number
    return sweep.sweep(settings, 0, sweep.patterns(settings))[0]


def test_a_sweep_finds_the_largest_error(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 0.78125

    def change(x: Any, y: Any, loss: Any, grad: Any) -> Any:
        return np.where((x == at) & (y == 1), loss * (1 + 2.0**-15), loss), grad

    loss, gradient = swept(monkeypatch, change)
    assert (loss.logit, loss.target) == (at, 1)
    assert 120 < loss.ulp < 600
    assert not loss.kept(6)
    assert gradient.kept(6)


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
    assert loss.kept(6)
    assert not gradient.kept(6)
    assert getattr(gradient, expected) > (6 if expected == "ulp" else 0)


def test_a_sweep_counts_what_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(x: Any, y: Any, loss: Any, grad: Any) -> Any:
        return loss, np.where(np.abs(grad) < 2.0**-126, 0, grad)

    loss, gradient = swept(monkeypatch, change)
    assert (loss.flushed, gradient.flushed > 0) == (0, True)
    assert gradient.kept(6)


# ---------------------------------------------------------------- the command


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "PIECE", 10_000)


def test_a_killed_sweep_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    assert exhaustive.exhaustive(settings, 1, out, "")["kept"]


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
    given = f"exhaustive --backend numpy --dtype float16 --gamma 0 2 --jobs 1 --out {out}"
    assert main(given.split()) == 0
    printed = capsys.readouterr().out
    assert "numpy, float16: 65536 logits with target 0 and 1" in printed
    assert "bound kept" in printed
    record = json.loads(out.read_text())
    assert record["command"] == f"python -m focal.testing {given}"
    assert list(record["gammas"]) == ["0", "2"]
    assert record["versions"]["numpy"] == np.__version__
    assert {"date", "machine", "seconds", "alpha", "stride"} <= set(record)


def test_the_command_fails_where_the_bound_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exhaustive, "sweep", lambda *_: [(Tally(ulp=14.5), Tally())])
    assert allowed_ulp("float32", 2.0) == 14
    assert main(["exhaustive", "--backend", "numpy", "--stride", "65537", "--jobs", "1"]) == 1
    assert "NOT KEPT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backend numpy --dtype bfloat16", "dtype must be one that numpy has; got 'bfloat16'"),
        ("--gamma -1", "gamma must be a finite number >= 0; got -1.0"),
        ("--alpha 3", "alpha must lie in [0, 1], or be None or -1 to turn it off; got 3.0"),
        ("--stride 0", "stride must be >= 1; got 0"),
        ("--jobs 0", "jobs must be >= 1; got 0"),
    ],
)
def test_bad_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["exhaustive", *options.split()])
    assert stop.value.code == 2
    assert f"exhaustive: {message}" in capsys.readouterr().err
