"""The kernels of Triton: on a GPU, or without one in Triton's interpreter.

`make test-gpu` runs this file on a GPU, `tests/torch/test_triton.py` in the interpreter.
"""

import gc
import os

import numpy as np
import pytest
import torch
import triton.language as tl
from precision import gradient_terms, promised_ulps, worst_ulps

import focal.numpy as reference
import focal.torch as F
from focal.core.formulas import SigmoidFocal, Sparse
from focal.kernels import torch_triton
from focal.torch import _pointwise
from focal.torch._namespace import xp

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
GAMMAS = [0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 3.7, 5.0]
ALPHAS = [None, 0.25, 1.0]
HALVES = [torch.float16, torch.bfloat16]
EXTREMES = [s * e for e in (0.0, 1e-30, 1e-3, 1.0, 20.0, 87.0, 100.0, 1000.0) for s in (1, -1)]


@pytest.fixture(autouse=True)
def rounding_of_a_gpu(monkeypatch):
    """Gives the interpreter the errors that NVIDIA documents for its instructions.

    2 ULP for ex2.approx.ftz and rsqrt.approx.ftz, 1 for sqrt.approx.ftz, of either sign or none, a
    different one for neighbors; numbers below the normal ones are 0; fma rounds once. A product in
    a sum becomes fma, as the compiler makes it, also where the product is used elsewhere.
    """
    if DEVICE != "cpu":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def approximate(function, ulps):
        def operation(self, a):
            exact = function(a.data.astype(np.float64)).astype(np.float32)
            exact[np.abs(exact) < np.finfo(np.float32).tiny] = 0
            signs = np.arange(exact.size).reshape(exact.shape) % 3 - 1
            error = np.where(np.isfinite(exact) & (exact != 0), ulps * signs, 0).astype(np.int32)
            return TensorHandle((exact.view(np.int32) + error).view(np.float32), a.dtype.scalar)

        return operation

    def fma(self, a, b, c):
        a, b, c = (operand.data.astype(np.float64) for operand in (a, b, c))
        return TensorHandle((a * b + c).astype(np.float32), tl.float32)

    multiply = InterpreterBuilder.create_fmul

    def fmul(self, a, b):
        product = multiply(self, a, b)
        product.factors = a.data.astype(np.float64), b.data.astype(np.float64)
        return product

    def fused(add, sign):
        def operation(self, a, b):
            total = add(self, a, b)
            for product, other, of_product, of_other in ((a, b, 1, sign), (b, a, sign, 1)):
                if hasattr(product, "factors") and total.data.dtype == np.float32:
                    exact = of_product * np.multiply(*product.factors) + of_other * other.data
                    return TensorHandle(exact.astype(np.float32), total.dtype)
            return total

        return operation

    monkeypatch.setattr(InterpreterBuilder, "create_fmul", fmul)
    for name, sign in (("create_fadd", 1), ("create_fsub", -1)):
        add = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, fused(add, sign))
    for name, function, ulps in (
        ("exp2", np.exp2, 2),
        ("rsqrt", lambda a: 1 / np.sqrt(a), 2),
        ("sqrt", np.sqrt, 1),
    ):
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", approximate(function, ulps))
    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch, rounding_of_a_gpu):
    """Sends the losses to the kernels, and counts."""
    calls = []
    launch = torch_triton._launch

    def spy(task, *more, **options):
        calls.append((task, *options))
        with np.errstate(all="ignore"):  # a GPU does not warn; the interpreter does, by NumPy
            launch(task, *more, **options)

    monkeypatch.setattr(_pointwise, "TRITON_DEVICE", DEVICE)
    monkeypatch.setattr(torch_triton, "_launch", spy)
    _pointwise._triton_on(torch.ones(1, device=DEVICE).device)  # it tries a kernel, once
    calls.clear()
    return calls


def logits(n: int = 1009) -> torch.Tensor:
    """The extremes, then ordinary ones; 1009 is a prime, and less than a block."""
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(n, generator=generator) * 6
    return torch.cat([torch.tensor(EXTREMES), ordinary])[:n].to(DEVICE)


def targets(kind: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    soft = torch.rand(like.shape, generator=generator)
    dtype = {"soft": torch.float32, "hard": torch.float32}.get(kind) or getattr(torch, kind)
    return (soft if kind == "soft" else soft > 0.5).to(DEVICE, dtype)


def labels(rows: int, classes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(-2, classes, (rows,), generator=generator)
    return drawn.to(DEVICE, dtype)


def plain(formula, x, t):
    """Loss and derivative by the formula of the core, in the precision of x."""
    return formula.value_and_grad(xp, x, t.to(x.dtype) if t.shape == x.shape else t)


def on_host(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


# ---------------------------------------------------------------- the formulas


def keeps_the_promise(x: torch.Tensor, t: torch.Tensor, alpha: float | None, gamma: float) -> None:
    """Asserts that the errors of loss and gradient are at most the documented ones."""
    formula = SigmoidFocal(alpha, gamma)
    value = torch_triton.value(formula, x, t)
    slope = torch_triton.slope(formula, x, t, torch.ones((), device=DEVICE))
    x, y = on_host(x), on_host(t)
    expected = reference.sigmoid_focal_loss(x, y, alpha, gamma)
    assert worst_ulps(on_host(value), expected, "float32") <= promised_ulps(gamma)
    expected = reference.sigmoid_focal_loss_grad(x, y, alpha, gamma)
    terms = gradient_terms(x, y, alpha, gamma)
    assert worst_ulps(on_host(slope), expected, "float32", terms) <= promised_ulps(gamma)


@pytest.mark.parametrize("kind", ["hard", "soft", "bool", "int64"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_dense_kernels_keep_the_promised_precision(gamma, alpha, kind):
    x = logits(2029)
    keeps_the_promise(x, targets(kind, x), alpha, gamma)


@pytest.mark.parametrize("classes", [1, 7, 80])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_sparse_kernels_keep_the_promised_precision(gamma, alpha, classes):
    formula, rows = Sparse(SigmoidFocal(alpha, gamma)), 2029 // classes
    x, t = logits(rows * classes).view(rows, classes), labels(rows, classes)
    value = torch_triton.value(formula, x, t)
    slope = torch_triton.slope(formula, x, t, torch.ones((), device=DEVICE))
    counted = (t >= -1)[:, None].expand_as(x)
    assert not value[~counted].any() and not slope[~counted].any()
    y = on_host(t[:, None] == torch.arange(classes, device=DEVICE))
    x = on_host(x)
    keep = counted.cpu().numpy()
    expected = reference.sigmoid_focal_loss(x, y, alpha, gamma) * keep
    assert worst_ulps(on_host(value), expected, "float32") <= promised_ulps(gamma)
    expected = reference.sigmoid_focal_loss_grad(x, y, alpha, gamma) * keep
    assert worst_ulps(on_host(slope), expected, "float32") <= promised_ulps(gamma)


def test_an_alpha_near_an_end_is_exact():
    x = logits()
    for alpha, t in ((1e-3, torch.ones_like(x)), (0.999, torch.zeros_like(x))):
        value = torch_triton.value(SigmoidFocal(alpha, 1.0), x, t)
        expected = reference.sigmoid_focal_loss(on_host(x), on_host(t), alpha, 1.0)
        assert worst_ulps(on_host(value), expected, "float32") <= promised_ulps(1.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_half_types_are_rounded_once_at_the_end(gamma, kind, dtype):
    formula, x = SigmoidFocal(0.25, gamma), logits().to(dtype)
    t = targets(kind, x).to(dtype)
    scale = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    value = torch_triton.value(formula, x, t)
    slope = torch_triton.slope(formula, x, t, scale)
    assert value.dtype == slope.dtype == dtype
    x, y, factor = on_host(x), on_host(t), on_host(scale)
    name = str(dtype).removeprefix("torch.")
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    bound = 1.01 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.51
    expected = reference.sigmoid_focal_loss(x, y, 0.25, gamma)
    assert worst_ulps(on_host(value), expected, name) <= bound
    expected = reference.sigmoid_focal_loss_grad(x, y, 0.25, gamma) * factor
    terms = gradient_terms(x, y, 0.25, gamma) * factor
    assert worst_ulps(on_host(slope), expected, name, terms) <= bound


@pytest.mark.parametrize("kind", ["int8", "hard", "soft"])
@pytest.mark.parametrize("gamma", [0.1, 0.3, 1.5, 3.7, 5.0, 10.0])
def test_an_exponent_without_code_of_its_own(gamma, kind):
    """From m of 1e-38 to m of 1, and around the middle, where the logarithm changes its parts."""
    x = torch.cat([torch.linspace(-a, a, 8000) for a in (1.0, 20.0, 88.0)]).to(DEVICE)
    keeps_the_promise(x, targets(kind, x), None, gamma)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["int8", "soft"])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0, 5.0])
def test_every_number_of_a_half_type(gamma, kind, dtype):
    """Before rounding to the half type the error is 1/100 of the last digit it has."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()].to(DEVICE)
    name = str(dtype).removeprefix("torch.")
    formula, out = SigmoidFocal(0.25, gamma), torch.empty(len(x), device=DEVICE)
    drawn = targets(kind, x)
    for t in (drawn, 1 - drawn):
        y, logit = on_host(t), on_host(x)
        value = on_host(torch_triton.value(formula, x, t, out=out))
        expected = reference.sigmoid_focal_loss(logit, y, 0.25, gamma)
        assert worst_ulps(value, expected, name) <= 0.01
        slope = torch_triton.slope(formula, x, t, torch.ones((), device=DEVICE), out=out)
        expected = reference.sigmoid_focal_loss_grad(logit, y, 0.25, gamma)
        terms = gradient_terms(logit, y, 0.25, gamma)
        assert worst_ulps(on_host(slope), expected, name, terms) <= 0.01


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_sum_of_a_half_type_is_one_of_float32(gamma, dtype):
    """Also where all logits are equal, and with them their errors."""
    for at in (-12.0, -3.0, 0.0, 0.75, 5.0, None):
        x = logits(5003)[16:] if at is None else torch.full((5003,), at, device=DEVICE)
        x = x.to(dtype)
        for t in (targets("int8", x), targets("soft", x)):
            got = torch_triton.total(SigmoidFocal(0.25, gamma), x, t).item()
            expected = reference.sigmoid_focal_loss(on_host(x), on_host(t), 0.25, gamma).sum()
            assert got == pytest.approx(expected, rel=2e-6 + 1e-6 * gamma)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_infinite_logits_have_the_limits_of_the_formula(gamma, dtype):
    infinity = float("inf")
    x = torch.tensor([[infinity, -infinity]] * 3, device=DEVICE, dtype=dtype)
    cases = [
        (SigmoidFocal(0.25, gamma), torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.3, 0.3]])),
        (Sparse(SigmoidFocal(0.25, gamma)), torch.tensor([-1, 0, 1])),
    ]
    for formula, t in cases:
        t = t.to(DEVICE)
        value = torch_triton.value(formula, x, t)
        slope = torch_triton.slope(formula, x, t, torch.ones((), device=DEVICE))
        expected = plain(formula, x.float(), t)
        for a, b in zip((value, slope), expected, strict=True):
            rtol = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(a, b.to(dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "int32", "float64", "bfloat16"])
def test_every_type_of_targets(kind):
    x, hard = logits(), targets("hard", logits())
    expected = torch_triton.value(SigmoidFocal(0.25, 2.0), x, hard)
    t = targets(kind, x)
    assert torch_triton.takes(x, t)
    torch.testing.assert_close(
        torch_triton.value(SigmoidFocal(0.25, 2.0), x, t), expected, rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_every_type_of_labels(dtype):
    x, t = logits(1000).view(200, 5), labels(200, 5).clamp(min=0)
    formula = Sparse(SigmoidFocal(0.25, 2.0))
    expected = torch_triton.value(formula, x, t)
    assert torch.equal(torch_triton.value(formula, x, t.to(dtype)), expected)
    total = torch_triton.total(formula, x, t.to(dtype))
    torch.testing.assert_close(total, expected.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [1, 2, 1009, 1024, 1025, 5003])
def test_any_number_of_logits(n):
    formula, x = SigmoidFocal(0.25, 2.0), logits(n)
    t = targets("soft", x)
    value = torch_triton.value(formula, x, t)
    total = torch_triton.total(formula, x, t)
    assert (value.shape, total.shape, total.dtype) == (x.shape, (), torch.float32)
    torch.testing.assert_close(total.double(), value.double().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [0, 7, 80])
def test_indices_of_64_bits(monkeypatch, classes):
    """They are for more than 2^30 logits, which the interpreter cannot take."""
    x, t, formula = logits(5040), targets("soft", logits(5040)), SigmoidFocal(0.25, 2.0)
    if classes:
        x, t, formula = x.view(-1, classes), labels(5040 // classes, classes), Sparse(formula)
    expected = torch_triton.value(formula, x, t)
    monkeypatch.setattr(torch_triton, "IN_32_BITS", 0)
    assert torch.equal(torch_triton.value(formula, x, t), expected)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_nan_stays_one(gamma):
    x, t = torch.tensor([float("nan"), 1.0], device=DEVICE), torch.ones(2, device=DEVICE)
    formula, one = SigmoidFocal(0.25, gamma), torch.ones((), device=DEVICE)
    for a, b in ((x, t), (t, x)):
        assert torch_triton.value(formula, a, b).isnan().tolist() == [True, False]
        assert torch_triton.slope(formula, a, b, one).isnan().tolist() == [True, False]
    # Also with hard targets, but not in a row that is ignored.
    for dtype in (torch.float32, *HALVES):
        logit = x.to(dtype)
        assert torch_triton.value(formula, logit, t.bool()).isnan().tolist() == [True, False]
        assert torch_triton.slope(formula, logit, t.bool(), one).isnan().tolist() == [True, False]
        for label, expected in ((1, [True, False]), (-1, [True, False]), (-2, [False, False])):
            row = Sparse(formula), logit[None], torch.tensor([label], device=DEVICE)
            assert torch_triton.value(*row)[0].isnan().tolist() == expected
            assert torch_triton.slope(*row, one)[0].isnan().tolist() == expected
            assert torch_triton.total(*row).isnan().item() == any(expected)


# ---------------------------------------------------------------- through the losses


def gradients(loss, x):
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "positives"])
def test_losses_use_the_kernels_and_equal_those_without(monkeypatch, kernels_run, reduction, dtype):
    x = logits(1200).to(dtype).view(20, 12, 5)
    t, y = labels(240, 5).view(20, 12), targets("hard", x)
    cases = [lambda x: F.sparse_sigmoid_focal_loss(x, t, reduction=reduction)]
    if reduction != "positives":
        cases.append(lambda x: F.sigmoid_focal_loss(x, y, reduction=reduction))
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for case in cases:
        kernels_run.clear()
        got = gradients(case, x)
        assert kernels_run == [("value" if reduction == "none" else "sum",), ("slope",)]
        with monkeypatch.context() as patch:
            patch.setattr(_pointwise, "TRITON_DEVICE", "none")
            expected = gradients(case, x)
        for a, b in zip(got, expected, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            torch.testing.assert_close(a, b, rtol=rtol, atol=torch.finfo(dtype).tiny)


def layouts():
    base = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    yield "channels last", base.contiguous(memory_format=torch.channels_last)
    yield "permuted", base.permute(3, 1, 0, 2)
    yield "sliced", torch.randn(4, 6, 8, 12)[::2, ::2, :, ::2]
    yield "strided", torch.randn(40)[::2]
    yield "expanded", torch.randn(1, 3, 1, 6).expand(2, 3, 8, 6)
    yield "one number", torch.randn(1, 1).expand(4, 5)
    yield "scalar", base[0, 0, 0, 0]
    yield "empty", base[:0]


@pytest.mark.parametrize(("name", "x"), list(layouts()), ids=[name for name, _ in layouts()])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_memory_layouts(name, x, reduction):
    x = x.to(DEVICE)
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    scale = torch.rand(x.shape if reduction == "none" else (), device=DEVICE)
    got = gradients(lambda x: F.sigmoid_focal_loss(x, y, reduction=reduction) * scale, x)
    expected = gradients(
        lambda x: F.sigmoid_focal_loss(x, y, reduction=reduction) * scale, x.contiguous()
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    rows = F.sparse_sigmoid_focal_loss(x, y[..., 0].long()) if x.ndim else None
    if rows is not None:
        same = F.sparse_sigmoid_focal_loss(x.contiguous(), y[..., 0].long())
        torch.testing.assert_close(rows, same, rtol=0, atol=0)


def test_one_number_for_all_logits_is_not_spread_out(kernels_run):
    """The gradient that `loss.sum()` hands back is such a number, in the shape of the logits."""
    for x in (logits(), logits(1000).view(2, 5, 100).permute(2, 0, 1)):
        x.requires_grad_()
        F.sigmoid_focal_loss(x, targets("hard", x)).sum().backward()
        F.sparse_sigmoid_focal_loss(
            x[None], labels(1, 5).expand(x[None].shape[:-1])
        ).sum().backward()
    assert kernels_run == [("value",), ("slope",)] * 4


def test_second_derivatives_and_transforms_equal_the_closed_forms():
    from torch.func import grad, hessian, jvp, vmap

    x = logits(60)[16:] / 6
    y = targets("soft", x)
    host = on_host(x), on_host(y)
    slope = torch.from_numpy(reference.sigmoid_focal_loss_grad(*host)).float().to(DEVICE)
    bend = torch.from_numpy(reference.sigmoid_focal_loss_hess(*host)).float().to(DEVICE)

    def total(x, y):
        return F.sigmoid_focal_loss(x, y, reduction="sum")

    near = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(grad(total)(x, y), slope, **near)
    torch.testing.assert_close(vmap(grad(total))(x, y), slope, **near)
    torch.testing.assert_close(hessian(total)(x, y), bend.diag(), **near)
    each = jvp(lambda x: F.sigmoid_focal_loss(x, y), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(each, slope, **near)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(leaf, y), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(first, slope, **near)
    torch.testing.assert_close(second, bend, **near)
    loss = total(leaf, y)
    seeds = torch.tensor([1.0, 2.0], device=DEVICE)
    (both,) = torch.autograd.grad(loss, leaf, seeds, is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack([slope, 2 * slope]), **near)


def test_the_gradient_in_learned_targets(monkeypatch):
    x, y = logits(60)[16:], targets("soft", logits(60)[16:])
    got = gradients(lambda y: F.sigmoid_focal_loss(x, y, reduction="sum"), y)
    monkeypatch.setattr(_pointwise, "TRITON_DEVICE", "none")
    expected = gradients(lambda y: F.sigmoid_focal_loss(x, y, reduction="sum"), y)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_what_the_kernels_leave_to_the_formula(kernels_run):
    x, y = logits(), targets("hard", logits())
    assert F.sigmoid_focal_loss(x.double(), y).dtype == torch.float64
    F.sigmoid_focal_loss_star(x, y)
    F.softmax_focal_loss(x.view(1, -1), torch.zeros(1, dtype=torch.int64, device=DEVICE))
    F.sigmoid_focal_loss(x[:0], y[:0])
    assert kernels_run == []


def test_a_traced_graph_has_the_formula_in_it(kernels_run):
    """A kernel that a tracer does not see would be missing from the graph."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    x, y = logits(), targets("hard", logits())
    graph = make_fx(lambda x: F.sigmoid_focal_loss(x, y, reduction="sum"))(x)
    with FakeTensorMode() as mode:
        fake = F.sigmoid_focal_loss(mode.from_tensor(x), mode.from_tensor(y))
    assert kernels_run == [] and fake.shape == x.shape
    got, expected = graph(2 * x), F.sigmoid_focal_loss(2 * x, y, reduction="sum")
    torch.testing.assert_close(got, expected)


def test_the_same_each_time():
    x, y = logits(100_003).requires_grad_(), targets("soft", logits(100_003))
    losses = [F.sigmoid_focal_loss(x, y, reduction="sum") for _ in range(3)]
    slopes = [torch.autograd.grad(loss, x)[0] for loss in losses]
    assert all(torch.equal(losses[0], loss) for loss in losses)
    assert all(torch.equal(slopes[0], slope) for slope in slopes)


# ---------------------------------------------------------------- on a GPU only

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@needs_gpu
def test_compiled_without_a_break():
    x, y, t = logits(1000).view(200, 5), targets("hard", logits(1000).view(200, 5)), labels(200, 5)

    def both(x):
        dense = F.sigmoid_focal_loss(x, y, reduction="mean")
        return dense + F.sparse_sigmoid_focal_loss(x, t, reduction="positives")

    got, expected = gradients(torch.compile(both, fullgraph=True), x), gradients(both, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@needs_gpu
def test_in_a_cuda_graph():
    x = logits(1000).view(200, 5).requires_grad_()
    y, t = targets("hard", x), labels(200, 5)

    def step():
        loss = F.sigmoid_focal_loss(x, y, reduction="mean")
        loss = loss + F.sparse_sigmoid_focal_loss(x, t, reduction="positives")
        return loss, torch.autograd.grad(loss, x)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_extra_memory_is_that_of_the_gradient(dtype, sparse):
    x = torch.randn(100_000, 80, device=DEVICE, dtype=dtype).requires_grad_()
    t = labels(100_000, 80) if sparse else targets("int8", x)
    loss = F.sparse_sigmoid_focal_loss if sparse else F.sigmoid_focal_loss
    loss(x, t, reduction="sum").backward()
    x.grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(x, t, reduction="sum").backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1.01 * x.nbytes  # one partial sum per program, and rounding


@needs_gpu
def test_more_logits_than_32_bits_count():
    n = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 4 * n:
        pytest.skip("needs 8 GiB")
    x = torch.zeros(n, device=DEVICE, dtype=torch.bfloat16)
    t = torch.zeros(n, device=DEVICE, dtype=torch.int8)
    x[-1] = 1000.0
    total = torch_triton.total(SigmoidFocal(None, 0.0), x, t)
    # All logits have the same error, for which the docstring of the kernels has a bound.
    assert total.item() == pytest.approx((n - 1) * np.log(2) + 1000.0, rel=2e-6)


@needs_gpu
def test_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, y = logits().to("cuda:1"), targets("hard", logits()).to("cuda:1")
    torch.testing.assert_close(
        F.sigmoid_focal_loss(x, y).cpu(), F.sigmoid_focal_loss(x.cpu(), y.cpu()), rtol=1e-5, atol=0
    )
