"""focal.testing: it passes our own losses, catches what is wrong with others, and counts right."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from backends import Backend, load
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from precision import gradient_terms

import focal.numpy
from focal.numpy._namespace import xp
from focal.testing import LossReport, check_loss
from focal.testing.grid import RANGES, dense_grid, difference_grid, softmax_grid, sparse_grid
from focal.testing.reference import REFERENCES, exact, parameters_of
from focal.testing.ulp import allowed_ulp, power_of_two, rounded

Loss = Callable[..., Any]


def public(backend: Backend) -> Any:
    """The functions as users have them: those of the JAX backend switch types on."""
    return importlib.import_module(f"focal.{backend.name}")


def unnamed(loss: Loss, **params: Any) -> Loss:
    """The loss with its parameters built in, so that it is checked at them alone."""
    return lambda x, t: loss(x, t, **params)


def check_own(
    backend: Backend, reference: str, dtype: str = "float32", **params: Any
) -> LossReport:
    loss = unnamed(getattr(public(backend), reference), **params)
    return check_loss(loss, reference, backend.name, dtype=dtype, **params)


def changed(change: Callable[[Any, Any, Any], Any], reference: str = "sigmoid_focal_loss") -> Loss:
    """NumPy's loss as change(inputs, targets, loss) makes it, in the loss's type."""
    own = getattr(focal.numpy, reference)

    def loss(x: Any, t: Any) -> Any:
        value = own(x, t)
        return np.asarray(change(x, t, value), value.dtype)

    return loss


def failure(*args: Any, **kwargs: Any) -> str:
    """The table of a check that fails."""
    with pytest.raises(AssertionError) as caught:
        check_loss(*args, **kwargs)
    return str(caught.value)


def cells(table: str, targets: str, what: str) -> dict[str, float]:
    """The numbers of one line of a table."""
    line = next(line.split() for line in table.splitlines() if line.split()[:2] == [targets, what])
    names = ("ulp", "allowed", "relative", "beyond", "nan", "infinite")
    return dict(zip(names, map(float, line[2:]), strict=True))


# ---------------------------------------------------------------- our own losses


def test_every_public_loss_is_a_reference() -> None:
    public = {name for name in focal.numpy.__all__ if name.endswith(("_loss", "_loss_star"))}
    assert set(REFERENCES) == public - {"expected_initial_loss"} | {"balanced_cross_entropy"}


@pytest.mark.parametrize("reference", REFERENCES)
def test_own_losses_are_within_the_bound(autodiff: Backend, reference: str) -> None:
    """At several values of all parameters; in JAX, which compiles each anew, at the defaults."""
    loss = getattr(public(autodiff), reference)
    if autodiff.name == "jax" and reference != "sigmoid_focal_loss":
        loss = unnamed(loss)
    report = check_loss(loss, reference, autodiff.name)
    assert report.passed
    assert {part.gradient_status for part in report.parts} == {"passed"}
    seconds = {part.second_status for part in report.parts if part.targets not in ("mean", "sum")}
    unchecked = reference in ("smooth_l1_loss", "giou_loss")
    assert seconds == {"not checked" if unchecked else "close"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_own_loss_is_within_the_bound_in_every_type(autodiff: Backend, dtype: str) -> None:
    report = check_own(autodiff, "sigmoid_focal_loss", dtype, alpha=0.3, gamma=1.7)
    assert [part.targets for part in report.parts] == ["hard", "soft"]
    assert {part.second_status for part in report.parts} == {"close"}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("reference", REFERENCES[1:])
def test_other_losses_are_within_the_bound_in_other_types(reference: str, dtype: str) -> None:
    torch = load("torch")
    params = {"label_smoothing": 0.1} if reference == "softmax_focal_loss" else {}
    assert check_own(torch, reference, dtype, **params).passed


@pytest.mark.parametrize("reference", REFERENCES)
def test_numpy_has_values_only(reference: str) -> None:
    report = check_loss(getattr(focal.numpy, reference), reference, "numpy")
    assert report.passed
    for part in report.parts:
        assert part.gradient is None
        assert part.gradient_status.startswith("not available")


@pytest.mark.parametrize("smoothing", [1e-9, 0.5, 1.0])
def test_all_of_label_smoothing(smoothing: float) -> None:
    for reference in ("sigmoid_focal_loss", "sparse_sigmoid_focal_loss", "softmax_focal_loss"):
        assert check_own(load("torch"), reference, label_smoothing=smoothing).passed


# ---------------------------------------------------------------- broken losses are caught

NAMES = ("where", "abs", "exp", "log", "log1p", "sigmoid", "clip", "sum")


def ops(backend: Backend) -> Any:
    """What a loss is written with, in a framework: `NAMES`, our losses `F`, and a few more."""
    if backend.name == "numpy":
        module, others = np, {"sigmoid": xp.sigmoid, "constant": lambda x: x}
    elif backend.name == "torch":
        module, others = backend.torch, {"constant": backend.torch.Tensor.detach}
    elif backend.name == "jax":
        module, nn = backend.jax.numpy, backend.jax.nn
        others = {"sigmoid": nn.sigmoid, "constant": backend.jax.lax.stop_gradient}
    else:
        module, math = backend.tf, backend.tf.math
        others = {"log": math.log, "log1p": math.log1p, "constant": module.stop_gradient}
        others |= {"clip": module.clip_by_value, "sum": module.reduce_sum}
    found = {name: getattr(module, name, None) for name in NAMES} | others

    def half(x: Any) -> Any:
        """To float16 and back."""
        if backend.name == "torch":
            return x.half().float()
        if backend.name == "tensorflow":
            return module.cast(module.cast(x, "float16"), "float32")
        return x.astype("float16").astype("float32")

    def sloped(x: Any, scale: Any) -> Any:
        """The logits, with another derivative."""
        return found["constant"](x) + scale * (x - found["constant"](x))

    def ce(x: Any, y: Any) -> Any:
        return public(backend).balanced_cross_entropy(x, y, None)

    return SimpleNamespace(F=public(backend), half=half, sloped=sloped, ce=ce, **found)


def alpha_t(y: Any) -> Any:
    return 0.25 * y + 0.75 * (1 - y)


def textbook(o: Any, x: Any, y: Any, gamma: float = 2.0) -> Any:
    """(1 - p_t)^gamma ce with p = sigmoid(x): 1 - p_t is 0 beyond |x| = 17."""
    p = o.sigmoid(x)
    return alpha_t(y) * (1 - y * p - (1 - y) * (1 - p)) ** gamma * o.ce(x, y)


def two_terms(o: Any, x: Any, y: Any, log_p: Any, log_q: Any) -> Any:
    """Focal loss of these logarithms of p and 1 - p."""
    q, p = o.sigmoid(-x), o.sigmoid(x)
    return -0.25 * y * q**2 * log_p - 0.75 * (1 - y) * p**2 * log_q


def clipped(o: Any, x: Any) -> Any:
    return o.clip(o.sigmoid(x), 1e-7, 1 - 1e-7)


Fault = Callable[[Any, Loss, Any, Any], Any]
BROKEN: dict[str, dict[str, Fault]] = {
    "sigmoid_focal_loss": {
        "wrong sign": lambda o, f, x, y: -f(x, y),
        "targets swapped": lambda o, f, x, y: f(x, 1 - y),
        "logits negated": lambda o, f, x, y: f(-x, y),
        "alpha swapped": lambda o, f, x, y: f(x, y, 0.75),
        "no alpha": lambda o, f, x, y: f(x, y, None),
        "alpha rounded at soft targets": lambda o, f, x, y: (
            o.where(y > 0.5, 0.25, 0.75) * f(x, y, None)
        ),
        "gamma off by one": lambda o, f, x, y: f(x, y, gamma=3.0),
        "gamma a little off": lambda o, f, x, y: f(x, y, gamma=2.0005),
        "p_t instead of 1 - p_t": lambda o, f, x, y: (
            alpha_t(y) * (y * o.sigmoid(x) + (1 - y) * o.sigmoid(-x)) ** 2 * o.ce(x, y)
        ),
        "no factor": lambda o, f, x, y: alpha_t(y) * o.ce(x, y),
        "factor without derivative": lambda o, f, x, y: (
            alpha_t(y) * o.constant(y * o.sigmoid(-x) + (1 - y) * o.sigmoid(x)) ** 2 * o.ce(x, y)
        ),
        "1 - p_t": lambda o, f, x, y: textbook(o, x, y),
        "no clamp under the logarithm": lambda o, f, x, y: two_terms(
            o, x, y, o.log(o.sigmoid(x)), o.log(1 - o.sigmoid(x))
        ),
        "1e-8 under the logarithm": lambda o, f, x, y: two_terms(
            o, x, y, o.log(o.sigmoid(x) + 1e-8), o.log(o.sigmoid(-x) + 1e-8)
        ),
        "softplus that overflows": lambda o, f, x, y: two_terms(
            o, x, y, -o.log1p(o.exp(-x)), -o.log1p(o.exp(x))
        ),
        "logits clamped to 50": lambda o, f, x, y: f(o.clip(x, -50.0, 50.0), y),
        "logits clamped to 1000": lambda o, f, x, y: f(o.clip(x, -1000.0, 1000.0), y),
        "sigmoid twice": lambda o, f, x, y: f(o.sigmoid(x), y),
        "targets rounded": lambda o, f, x, y: f(x, o.where(y > 0.5, 0 * y + 1, 0 * y)),
        "wrong only near target .3": lambda o, f, x, y: (
            o.where(o.abs(y - 0.3) < 5e-4, 1.01, 1.0) * f(x, y)
        ),
        "wrong only near logit 60.03": lambda o, f, x, y: (
            o.where(o.abs(x - 60.03) < 0.05, 1.01, 1.0) * f(x, y)
        ),
        "wrong only beyond 1001": lambda o, f, x, y: o.where(o.abs(x) > 1001, 1.01, 1.0) * f(x, y),
        "slope wrong near logit 60.03": lambda o, f, x, y: f(
            o.sloped(x, o.where(o.abs(x - 60.03) < 0.05, 1.01, 1.0)), y
        ),
        "slope wrong at target 0 and logit -3": lambda o, f, x, y: f(
            o.sloped(x, o.where((o.abs(x + 3) < 0.01) & (y == 0), 1.01, 1.0)), y
        ),
        "slope off by 1e-5": lambda o, f, x, y: f(o.sloped(x, 1.00001), y),
        "slope cut at 1e-3": lambda o, f, x, y: f(o.sloped(x, o.where(o.abs(x) > 10, 0.0, 1.0)), y),
        "slope of |x| at 0": lambda o, f, x, y: f(o.sloped(x, o.where(x == 0, 0.0, 1.0)), y),
        "computed in float16": lambda o, f, x, y: o.half(f(x, y)),
        "divided by the positives": lambda o, f, x, y: f(x, y) / o.sum(y),
        "NaN at 0 logits": lambda o, f, x, y: f(x, y) + 0 * x / x,
        "mean": lambda o, f, x, y: f(x, y, reduction="mean"),
        "sum": lambda o, f, x, y: f(x, y, reduction="sum"),
        "broadcast": lambda o, f, x, y: f(x[:, None] + 0 * x, y[:, None] + 0 * y),
    },
    "balanced_cross_entropy": {
        "probability clipped": lambda o, f, x, y: (
            -0.75 * y * o.log(clipped(o, x)) - 0.25 * (1 - y) * o.log(1 - clipped(o, x))
        ),
    },
    "sigmoid_focal_loss_star": {
        "without beta": lambda o, f, x, y: f(x, y, beta=0.0),
        "beta not mirrored": lambda o, f, x, y: (
            0.25 * y * f(x, 0 * y + 1, None) + 0.75 * (1 - y) * f(x, 0 * y, None, beta=-1.0)
        ),
    },
    "quality_focal_loss": {
        "exponent off": lambda o, f, x, y: f(x, y, 2.001),
        "that of FL": lambda o, f, x, y: o.F.sigmoid_focal_loss(x, y, None),
        "score without derivative": lambda o, f, x, y: (
            o.abs(o.constant(o.sigmoid(x)) - y) ** 2 * o.ce(x, y)
        ),
    },
    "varifocal_loss": {
        "alpha for the positives": lambda o, f, x, y: o.where(y > 0, 0.75, 1.0) * f(x, y),
        "quality left out": lambda o, f, x, y: o.where(y > 0, o.ce(x, y), f(x, y)),
    },
    "heatmap_focal_loss": {
        "peak from .99 on": lambda o, f, x, y: f(x, o.where(y > 0.99, 0 * y + 1, y)),
        "penalty off": lambda o, f, x, y: f(x, y, beta=3.0),
    },
    "asymmetric_loss": {
        "no margin": lambda o, f, x, y: f(x, y, margin=0.0),
        "gammas swapped": lambda o, f, x, y: f(x, y, 4.0, 1.0),
    },
    "sparse_sigmoid_focal_loss": {
        "ignored rows count": lambda o, f, x, t: f(x, o.where(t < -1, -1 + 0 * t, t)),
        "background ignored": lambda o, f, x, t: f(x, o.where(t == -1, -2 + 0 * t, t)),
    },
    "softmax_focal_loss": {
        "exponent off": lambda o, f, x, t: f(x, t, gamma=2.002),
        "labels shifted": lambda o, f, x, t: f(x, o.where(t == 2, 0 * t, t + 1)),
        "slope of one label": lambda o, f, x, t: f(
            o.sloped(x, o.where(t == 2, 1.01, 1.0)[:, None]), t
        ),
    },
    "smooth_l1_loss": {
        "pieces that do not meet": lambda o, f, x, t: o.where(
            o.abs(x - t) < 1, 0.5 * (x - t) ** 2, o.abs(x - t)
        ),
        "slope lost near 0": lambda o, f, x, t: f(
            o.sloped(x, o.where(o.abs(x - t) < 1e-3, 0.99, 1.0)), t
        ),
    },
    "giou_loss": {
        "IoU": lambda o, f, a, b: 1 - o.F.box_iou(a[:, None], b[:, None])[:, 0, 0],
        "slope of one edge": lambda o, f, a, b: f(o.sloped(a, o.where(a < 0, 1.001, 1.0)), b),
    },
}
"""By reference and name: losses written with the operations `o` and our own loss `f`."""


def broken(backend: Backend, reference: str, fault: str) -> Loss:
    o = ops(backend)
    own = getattr(o.F, reference)
    return lambda x, t: BROKEN[reference][fault](o, own, x, t)


@pytest.mark.parametrize(
    ("reference", "fault"), [(name, fault) for name, faults in BROKEN.items() for fault in faults]
)
def test_a_broken_loss_is_caught(autodiff: Backend, reference: str, fault: str) -> None:
    with pytest.raises((AssertionError, ValueError)) as caught:
        check_loss(broken(autodiff, reference, fault), reference, autodiff.name)
    unreduced = fault in ("mean", "sum", "broadcast")
    expected = "fn must return the unreduced loss" if unreduced else "FAILED"
    assert expected in str(caught.value)


@np.errstate(all="ignore")
@pytest.mark.parametrize(
    "fault", [f for f in BROKEN["sigmoid_focal_loss"] if "slope" not in f and "derivative" not in f]
)
def test_a_broken_focal_loss_of_numpy_is_caught(fault: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_loss(broken(load("numpy"), "sigmoid_focal_loss", fault), backend="numpy")


def test_a_power_below_1_is_caught(autodiff: Backend) -> None:
    """The textbook's gradient is NaN where 1 - p_t is 0."""
    loss = functools.partial(textbook, ops(autodiff), gamma=0.5)
    table = failure(unnamed(loss), backend=autodiff.name, gamma=0.5)
    assert cells(table, "hard", "gradient")["nan"] > 100
    assert cells(table, "hard", "value")["relative"] == 1
    assert "got nan, inf ULP" in table


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_a_missing_alpha_is_caught(autodiff: Backend, alpha: float) -> None:
    loss = unnamed(functools.partial(public(autodiff).sigmoid_focal_loss, alpha=None))
    table = failure(loss, backend=autodiff.name, alpha=alpha)
    for what in ("value", "gradient"):
        assert cells(table, "hard", what)["relative"] == pytest.approx(3, rel=1e-3)


def test_half_types_must_not_be_computed_in(autodiff: Backend) -> None:
    o = ops(autodiff)

    def in_half(x: Any, y: Any) -> Any:
        q = o.sigmoid(-x)
        return y * q * q * -o.log(o.sigmoid(x)) + (1 - y) * 0

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
    loss = unnamed(focal.numpy.sigmoid_focal_loss)
    worst = max(part.value.ulp for part in check_loss(loss, backend="numpy").parts)
    assert check_loss(loss, backend="numpy", max_ulp=np.ceil(worst)).max_ulp == np.ceil(worst)
    assert "bound of 1 ULP: FAILED" in failure(loss, backend="numpy", max_ulp=1)


def test_a_harmless_error_is_allowed_by_its_size() -> None:
    """exp(gamma log q) has an error that grows with log q, where the result is e^-30."""
    functional = load("torch").torch.nn.functional

    def of_logarithms(x: Any, y: Any) -> Any:
        log_p, log_q = functional.logsigmoid(x), functional.logsigmoid(-x)
        positive, negative = (2 * log_q).exp() * -log_p, (2 * log_p).exp() * -log_q
        return 0.25 * y * positive + 0.75 * (1 - y) * negative

    assert "FAILED" in failure(of_logarithms, soft_targets=False)
    assert check_loss(of_logarithms, soft_targets=False, atol=1e-10).passed
    assert "FAILED" in failure(of_logarithms, soft_targets=False, atol=1e-20)


def test_no_absolute_tolerance_allows_nan() -> None:
    loss = changed(lambda x, y, value: np.where(x == 0, np.nan, value))
    table = failure(loss, backend="numpy", atol=1e6)
    assert cells(table, "hard", "value")["beyond"] == cells(table, "hard", "value")["nan"] == 2


def test_a_result_beyond_the_largest_number_may_be_infinite() -> None:
    """8,192 times 9 is no float16."""
    loss = np.errstate(over="ignore")(unnamed(focal.numpy.varifocal_loss, alpha=9.0))
    assert check_loss(loss, "varifocal_loss", "numpy", "float16", alpha=9.0).passed

    def negative(x: Any, y: Any) -> Any:
        value = loss(x, y)
        return np.where(np.isinf(value), -value, value)

    assert "got -inf" in failure(negative, "varifocal_loss", "numpy", "float16", alpha=9.0)


def test_no_gradient_is_a_failure() -> None:
    torch = load("torch")

    def detached(x: Any, y: Any) -> Any:
        return torch.F.sigmoid_focal_loss(x.detach(), y)

    assert "gradient, hard: not available: RuntimeError" in failure(detached)

    tensorflow = load("tensorflow")

    def constant(x: Any, y: Any) -> Any:
        return tensorflow.F.sigmoid_focal_loss(tensorflow.tf.stop_gradient(x), y)

    assert "not available: LookupError" in failure(constant, backend="tensorflow")


def test_a_value_that_is_wrong_without_a_gradient_is_caught() -> None:
    torch = load("torch")

    def loss(x: Any, y: Any) -> Any:
        value = torch.F.sigmoid_focal_loss(x, y)
        return value if x.requires_grad else 1.01 * value

    table = failure(loss)
    assert cells(table, "hard", "value")["relative"] == pytest.approx(0.01, rel=1e-3)
    assert "gradient, hard: passed" in table


def test_a_jax_loss_that_cannot_be_traced_runs_as_it_is() -> None:
    jax = load("jax")

    def loss(x: Any, y: Any) -> Any:
        assert bool((y >= 0).all())
        return public(jax).sigmoid_focal_loss(x, y)

    report = check_loss(loss, backend="jax")
    assert report.passed
    assert {part.second_status for part in report.parts} == {"close"}


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
    assert report.passed
    assert all(part.second_status.startswith("not available: ") for part in report.parts)

    class Wrong(Kernel):
        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            x, y = ctx.saved_tensors
            slope = torch.tensor(plain.sigmoid_focal_loss_grad(x.detach().numpy(), y.numpy()))
            return grad * slope * (x - x.detach() + 1), None

    report = check_loss(Wrong.apply)
    assert report.passed
    assert all(part.second_status.startswith("not close: ") for part in report.parts)


# ---------------------------------------------------------------- narrow bands

KINDS = {
    "0": lambda y: y == 0,
    "1": lambda y: y == 1,
    "soft": lambda y: (y > 0) & (y < 1),
}
bands = st.builds(
    lambda size, place: (size * (2 * place - 1), size / 500),
    st.sampled_from([size for size, _ in RANGES]),
    st.floats(0, 0.999),
)
"""Where a band starts and how wide it is: a thousandth of an axis."""


@given(band=bands, kind=st.sampled_from(sorted(KINDS)), half=st.booleans())
@example(band=(59.93, 0.2), kind="soft", half=False)
@example(band=(-1001.0, -3095.0), kind="0", half=False)
@example(band=(1001.0, 8.0), kind="1", half=True)
@settings(deadline=None, max_examples=40)
def test_a_fault_in_any_band_of_logits_is_found(
    band: tuple[float, float], kind: str, half: bool
) -> None:
    low, high = sorted((band[0], band[0] + band[1]))
    bad = changed(
        lambda x, y, value: np.where(
            (x >= low) & (x <= high) & KINDS[kind](y), value * 1.01 + 0.01, value
        )
    )
    table = failure(bad, backend="numpy", dtype="float16" if half else "float32")
    part, other = ("soft", "hard") if kind == "soft" else ("hard", "soft")
    assert cells(table, part, "value")["beyond"] > 0
    assert cells(table, other, "value")["beyond"] == 0


@given(place=st.floats(0, 1), dtype=st.sampled_from(["float16", "float32"]))
@example(place=0.3, dtype="float32")
@settings(deadline=None, max_examples=40)
def test_a_fault_in_any_band_of_targets_is_found(place: float, dtype: str) -> None:
    low, high = 0.999 * place, 0.999 * place + 0.001
    assume(low > 0 and high < 1)
    loss = changed(lambda x, y, value: np.where((y >= low) & (y <= high), value * 1.01, value))
    assert cells(failure(loss, backend="numpy", dtype=dtype), "soft", "value")["beyond"] > 0


@given(band=bands, kind=st.sampled_from(sorted(KINDS)))
@settings(deadline=None, max_examples=15)
def test_a_wrong_slope_in_any_band_of_logits_is_found(band: tuple[float, float], kind: str) -> None:
    torch = load("torch")
    low, high = band[0], band[0] + band[1]

    def loss(x: Any, y: Any) -> Any:
        bad = (x >= low) & (x <= high) & KINDS[kind](y)
        return torch.F.sigmoid_focal_loss(x, y) + 0.01 * bad * (x - x.detach())

    table = failure(loss)
    part = "soft" if kind == "soft" else "hard"
    assert cells(table, part, "gradient")["beyond"] > 0
    assert cells(table, part, "value")["beyond"] == 0


@given(band=bands, label=st.integers(-2, 2), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_the_other_grids_have_every_logit_with_every_kind_of_target(
    band: tuple[float, float], label: int, seed: int
) -> None:
    low, high = band[0], band[0] + band[1]
    for grid in (sparse_grid("float32", seed), softmax_grid("float32", seed)):
        labeled = grid.inputs[grid.targets == max(label, int(grid.targets.min()))]
        assert ((labeled >= low) & (labeled <= high)).any(0).all()
    grid = difference_grid("float16" if seed % 2 else "float32", seed)
    for mask in grid.kinds.values():
        assert ((grid.inputs[mask] >= low) & (grid.inputs[mask] <= high)).any()


def test_a_seed_draws_its_own_numbers() -> None:
    first, again, other = (dense_grid("float32", soft=True, seed=seed) for seed in (0, 0, 1))
    assert_array_equal(first.inputs, again.inputs)
    assert_array_equal(first.targets, again.targets)
    assert not np.array_equal(first.targets, other.targets)

    number = np.setdiff1d(first.inputs, other.inputs)[1000]
    off_at_one_number = changed(lambda x, y, v: np.where(x == np.float32(number), 2 * v + 1, v))
    assert "FAILED" in failure(off_at_one_number, backend="numpy")
    assert check_loss(off_at_one_number, backend="numpy", seed=1).passed


# ---------------------------------------------------------------- parameters by name


def recorded(loss: Loss, seen: dict[str, list[Any]]) -> Loss:
    """A loss of alpha and gamma that notes what it is given."""

    def noting(x: Any, y: Any, gamma: float = 1.5, alpha: float = 0.5) -> Any:
        if len(x) > 1000:
            seen.setdefault("gamma", []).append(gamma)
            seen.setdefault("alpha", []).append(alpha)
        return loss(x, y, alpha, gamma)

    return noting


def test_parameters_that_are_taken_by_name_are_given() -> None:
    seen: dict[str, list[Any]] = {}
    report = check_loss(recorded(focal.numpy.sigmoid_focal_loss, seen), backend="numpy")
    assert (seen["gamma"][0], seen["alpha"][0]) == (1.5, 0.5)
    assert set(seen["gamma"]) == {1.5, 0.0, 0.5, 1.0, 2.0, 3.7}
    assert set(seen["alpha"]) == {0.5, 0.1, 0.25, 0.75}
    assert [(s["gamma"], s["alpha"]) for s in report.settings] == list(
        zip(*seen.values(), strict=True)
    )
    assert report.params == {"alpha": 0.5, "gamma": 1.5, "label_smoothing": 0.0}
    assert report.max_ulp == allowed_ulp("float32", 3.7)


def test_a_parameter_that_is_set_is_given_as_it_is() -> None:
    seen: dict[str, list[Any]] = {}
    loss = recorded(focal.numpy.sigmoid_focal_loss, seen)
    report = check_loss(loss, backend="numpy", gamma=0.75)
    assert set(seen["gamma"]) == {0.75}
    assert len(set(seen["alpha"])) == 4
    check_loss(loss, backend="numpy", gamma=0.75, alpha=0.3)
    assert set(seen["alpha"][len(report.settings) :]) == {0.3}


def test_a_parameter_that_is_built_in_is_not_given() -> None:
    loss = functools.partial(focal.numpy.sigmoid_focal_loss, gamma=0.5)
    assert "FAILED" in failure(unnamed(loss), backend="numpy")
    assert check_loss(unnamed(loss), backend="numpy", gamma=0.5).passed

    def positional(x: Any, y: Any, gamma: float = 0.5, /) -> Any:
        return focal.numpy.sigmoid_focal_loss(x, y, gamma=gamma)

    assert len(check_loss(positional, backend="numpy", gamma=0.5).settings) == 1


@pytest.mark.parametrize("wrong", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_a_fault_at_one_value_of_a_parameter_is_found(wrong: float) -> None:
    def loss(x: Any, y: Any, gamma: float) -> Any:
        return (1 + 0.001 * (gamma == wrong)) * focal.numpy.sigmoid_focal_loss(x, y, gamma=gamma)

    table = failure(loss, backend="numpy")
    assert f"gamma={wrong}, label_smoothing=0.0, input" in table


def test_none_is_given_where_it_is_the_default() -> None:
    def with_none(x: Any, labels: Any, alpha: Any = None) -> Any:
        return focal.numpy.softmax_focal_loss(x, labels, alpha)

    def without(x: Any, labels: Any, alpha: float) -> Any:
        return focal.numpy.softmax_focal_loss(x, labels, float(alpha))

    for loss, first in ((with_none, {None}), (without, set())):
        found = check_loss(loss, "softmax_focal_loss", "numpy").settings
        assert {setting["alpha"] for setting in found} == {0.1, 0.25, 0.75} | first


@pytest.mark.parametrize("reference", ["sigmoid_focal_loss", "giou_loss"])
def test_a_reduction_is_checked(reference: str) -> None:
    torch = load("torch")
    own = getattr(torch.F, reference)

    def right(x: Any, y: Any, reduction: str = "mean") -> Any:
        return own(x, y, reduction=reduction)

    assert [p.targets for p in check_loss(right, reference).parts][-2:] == ["mean", "sum"]

    def over_one_less(x: Any, y: Any, reduction: str = "mean") -> Any:
        scale = len(x) / (len(x) - 1) if reduction == "mean" else 1
        return scale * own(x, y, reduction=reduction)

    table = failure(over_one_less, reference)
    assert cells(table, "mean", "value")["beyond"] == 1
    assert cells(table, "mean", "gradient")["beyond"] > 0
    assert cells(table, "sum", "value")["beyond"] == 0
    assert "mean value, expected" in table


def test_what_a_loss_raises_says_what_it_was_given() -> None:
    def loss(x: Any, y: Any, gamma: float = 2.0) -> Any:
        if gamma == 0.5:
            raise ZeroDivisionError("no")
        return focal.numpy.sigmoid_focal_loss(x, y, gamma=gamma)

    with pytest.raises(ZeroDivisionError) as caught:
        check_loss(loss, backend="numpy")
    assert caught.value.__notes__ == ["It was called with {'gamma': 0.5}."]


def test_parameters_default_to_those_of_the_reference() -> None:
    loss = unnamed(focal.numpy.sigmoid_focal_loss_star)
    report = check_loss(loss, "sigmoid_focal_loss_star", "numpy")
    assert report.params == {"alpha": 0.25, "gamma": 2.0, "beta": 1.0}
    assert report.settings == (report.params,)
    assert report.max_ulp == 14
    assert parameters_of("giou_loss") == {}


# ---------------------------------------------------------------- the report


def test_the_report_names_the_worst_places() -> None:
    def loss(x: Any, y: Any, gamma: float = 2.0) -> Any:
        value = focal.numpy.sigmoid_focal_loss(x, y, gamma=gamma)
        value = np.where((x == -20) & (y == 0.25) & (gamma == 1), np.nan, value)
        return np.where((x == 17) & (y == 1), np.float32(2) * value, value)

    with pytest.raises(AssertionError) as caught:
        check_loss(loss, backend="numpy")
    table = str(caught.value)
    base = "alpha=0.25, gamma=1.0, label_smoothing=0.0"
    assert f"soft value, {base}, input -20, target 0.25: expected " in table
    assert "got nan, inf ULP (10 allowed)" in table
    assert "label_smoothing=0.0, input 17, target 1: expected " in table
    assert "5 settings of the parameters, largest bound of 20.8 ULP: FAILED" in table


def test_the_place_of_a_row_has_all_of_it() -> None:
    def change(x: Any, labels: Any, value: Any) -> Any:
        return np.where((x == [-20, 17, 0]).all(1) & (labels == 1), 1, value)

    table = failure(changed(change, "softmax_focal_loss"), "softmax_focal_loss", "numpy")
    assert "labels value, input (-20, 17, 0), target 1: expected " in table
    torch = load("torch")

    def slope(a: Any, b: Any) -> Any:
        same = (a == torch.torch.tensor([0.0, 0, 1, 1])).all(1) & (b[:, 0] == 64)
        return torch.F.giou_loss(a, b) + same * (a[:, 2] - a[:, 2].detach())

    table = failure(slope, "giou_loss")
    assert "boxes gradient, input (0, 0, 1, 1)[2], target (64, 64, 65, 66): expected" in table


def test_a_report_of_a_loss_that_passes() -> None:
    report = check_loss(unnamed(focal.numpy.sigmoid_focal_loss), backend="numpy")
    worst = report.parts[0].value.places[0]
    assert (worst.ulp, worst.allowed) == (report.parts[0].value.ulp, 14)
    got = focal.numpy.sigmoid_focal_loss(np.float32([worst.inputs]), np.float32([worst.targets]))
    assert got[0] == worst.got
    assert abs(worst.got - worst.expected) / worst.expected < 14 * 2.0**-23
    assert "input" not in str(report)
    assert str(report).endswith("bound of 14 ULP: passed")


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
        ({"atol": -1e-9}, "check_loss: atol must be a finite number >= 0; got -1e-09"),
        ({"seed": -1}, "check_loss: seed must be >= 0; got -1"),
        ({"seed": 0.5}, "check_loss: seed must be an integer; got 0.5"),
        ({"gamma": -1}, "sigmoid_focal_loss: gamma must be a finite number >= 0; got -1"),
        ({"alpha": 2}, r"sigmoid_focal_loss: alpha must lie in \[0, 1\], or be None"),
        (
            {"beta": 1.0},
            "check_loss: params must be among those of sigmoid_focal_loss, alpha, gamma, "
            "label_smoothing; got beta",
        ),
        (
            {"reference": "giou_loss", "beta": 1.0},
            "check_loss: params must be among those of giou_loss, which has none; got beta",
        ),
        (
            {"reference": "sigmoid_focal_loss_star", "gamma": 0},
            "sigmoid_focal_loss_star: gamma must be > 0",
        ),
        (
            {"reference": "softmax_focal_loss", "alpha": [1.0, 2.0, 3.0]},
            "check_loss: alpha must be a number; got list",
        ),
        (
            {"fn": lambda x, y: x.sum()},
            r"check_loss: fn must return the unreduced loss, of shape \(5,\) for inputs \(5,\); "
            r"got \(\)",
        ),
        (
            {"fn": lambda x, t: x[:, :1] + t, "reference": "sparse_sigmoid_focal_loss"},
            r"unreduced loss, of shape \(5, 3\) for inputs \(5, 3\); got \(5, 5\)",
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
    grid = dense_grid("float32", soft=True, seed=0)
    params = {"alpha": 0.25, "gamma": gamma, "label_smoothing": 0.0}
    found = exact("sigmoid_focal_loss", params, "float32", grid, second=False)
    expected = gradient_terms(grid.inputs, grid.targets, 0.25, gamma)
    assert_allclose(found.gradient.size, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(
    ("dtype", "smallest"),
    [("float16", -24), ("bfloat16", -133), ("float32", -149), ("float64", -1074)],
)
def test_the_grid_has_the_extremes(dtype: str, smallest: int) -> None:
    grid = dense_grid(dtype, soft=False, seed=0)
    for x, y in product((0, 1, 17, 20, 88, 100, 1000), (0, 1)):
        assert ((grid.inputs == x) & (grid.targets == y)).any()
        assert ((grid.inputs == -x) & (grid.targets == y)).any()
    assert_array_equal(rounded(grid.inputs, dtype), grid.inputs)
    assert np.abs(grid.inputs[grid.inputs != 0]).min() == 2.0**smallest
