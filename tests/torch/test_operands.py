"""What PyTorch can do to a loss: in place, twice, forward, batched, compiled, scripted, faked."""

from __future__ import annotations

import numpy as np
import pytest
from operands import DENSE, LABELLED, PARAMETERS, number, operands

torch = pytest.importorskip("torch")
F = pytest.importorskip("focal.torch")
_dispatch = pytest.importorskip("focal.torch._dispatch")
_blocks = pytest.importorskip("focal.torch._blocks")

LOSSES = list(DENSE | LABELLED)
EXTREMES = [float("inf"), -float("inf"), 1000.0, -1000.0, 100.0, -100.0, 20.0, 0.0]


def tensors(loss, dtype=torch.float64, rows=6):
    x, t = (torch.tensor(a[:rows]) for a in operands(loss))
    return x.to(dtype), t.to(dtype) if loss in DENSE else t


# ---------------------------------------------------------------- ordinary tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [*LOSSES, "smooth_l1_loss"])
def test_a_loss_may_be_changed_in_place(loss, dtype):
    x, t = tensors("balanced_cross_entropy" if loss == "smooth_l1_loss" else loss, dtype)
    function = getattr(F, loss)
    for logits in (x, x[:, None].expand(6, 2, 3).transpose(0, 1)):
        targets = t if logits is x else t.expand(2, *t.shape)
        logits = logits.clone().requires_grad_()
        value = function(logits, targets)
        factor = torch.linspace(0.5, 2, value.numel(), dtype=dtype).view(value.shape)
        (expected,) = torch.autograd.grad((value * factor)[1:].sum(), logits)
        value = function(logits, targets)
        value *= factor
        value[0] = 0
        value.masked_fill_(torch.zeros_like(value, dtype=torch.bool), 1)
        (got,) = torch.autograd.grad(value.sum(), logits)
        torch.testing.assert_close(got, expected)
        assert not function(logits, targets)._is_view()


def test_a_loss_keeps_the_layout_of_its_logits():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    loss = F.sigmoid_focal_loss(x, torch.zeros_like(x))
    assert loss.stride() == x.stride()
    loss.mul_(2).sum().backward()
    assert x.grad.stride() == x.stride()


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("loss", DENSE)
def test_all_derivatives_in_logits_and_targets(loss, reduction):
    both = [a.requires_grad_() for a in tensors(loss, rows=1)]

    def function(x, t):
        return getattr(F, loss)(x, t, reduction=reduction)

    assert torch.autograd.gradcheck(function, both, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, both, check_fwd_over_rev=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("loss", "parameter"), PARAMETERS)
def test_all_derivatives_in_logits_and_a_parameter(loss, parameter, reduction):
    x, t = tensors(loss, rows=2)
    value = torch.tensor(number(parameter), dtype=x.dtype, requires_grad=True)

    def function(x, value):
        return getattr(F, loss)(x, t, reduction=reduction, **{parameter: value})

    both = x.requires_grad_(), value
    assert torch.autograd.gradcheck(function, both, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, both, check_fwd_over_rev=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode_over_forward_mode(loss, reduction):
    x, t = tensors(loss)

    def function(x):
        return getattr(F, loss)(x, t, reduction=reduction)

    expected = torch.func.jacrev(torch.func.jacrev(function))(x)
    got = torch.func.jacfwd(torch.func.jacfwd(function))(x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("loss", DENSE)
def test_the_tangent_of_the_targets(loss):
    x, t = tensors(loss)
    direction = torch.ones_like(t)
    for reduction in ("none", "sum"):
        _, tangent = torch.func.jvp(
            lambda t, r=reduction: getattr(F, loss)(x, t, reduction=r), (t,), (direction,)
        )
        expected = torch.func.grad(lambda t: getattr(F, loss)(x, t).sum())(t)
        torch.testing.assert_close(tangent, expected if reduction == "none" else expected.sum())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_pullbacks_of_a_call_under_no_grad(loss, reduction):
    x, t = tensors(loss)
    with torch.no_grad():
        value, pull = torch.func.vjp(lambda x: getattr(F, loss)(x, t, reduction=reduction), x)
    one = torch.ones_like(value)
    (expected,) = pull(one)
    fixed = torch.func.vmap(lambda _: pull(one)[0])(torch.zeros(2))
    scaled = torch.func.vmap(lambda s: pull(s * one)[0])(torch.tensor([1.0, 3.0]).to(x))
    torch.testing.assert_close(fixed, torch.stack([expected, expected]))
    torch.testing.assert_close(scaled, torch.stack([expected, 3 * expected]))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("loss", DENSE)
def test_second_derivatives_at_extremes_are_finite(loss, reduction):
    x = torch.tensor(EXTREMES, requires_grad=True)
    for y in (0.0, 0.3, 1.0):
        value = getattr(F, loss)(x, torch.full_like(x, y), reduction=reduction).sum()
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x)
        assert slope.isfinite().all() and bend.isfinite().all()


# ---------------------------------------------------------------- compiled


@pytest.fixture
def nothing_compiled():
    """PyTorch counts compilations by line of code, which all cases of a test share."""
    torch.compiler.reset()


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_gradients_in_targets_and_parameters(nothing_compiled, loss):
    x, t = tensors(loss, torch.float32)
    (parameter, *_) = (DENSE | LABELLED)[loss]
    learned = torch.tensor(number(parameter), requires_grad=True)
    operands = [x.requires_grad_(), learned]
    if loss in DENSE:
        operands.append(t.requires_grad_())

    def function(x, t, learned):
        return getattr(F, loss)(x, t, reduction="mean", **{parameter: learned})

    graph = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(x, t, learned), operands)
    got = torch.autograd.grad(graph(x, t, learned), operands)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_dynamic_shapes_compile(nothing_compiled, loss):
    function = getattr(F, loss)
    graph = torch.compile(
        lambda x, t: function(x, t, reduction="sum"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (6, 5, 4):
        x, t = (a[:rows] for a in tensors(loss, torch.float32))
        x = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(x, t, reduction="sum"), x)
        (got,) = torch.autograd.grad(graph(x, t), x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("loss", "parameter"), [(a, b) for a, b in PARAMETERS if "gamma" in b or b == "beta"]
)
def test_a_schedule_does_not_compile_anew(nothing_compiled, loss, parameter, as_tensor):
    x, t = tensors(loss, torch.float32)
    compilations = []

    def count(graph, _):
        compilations.append(graph)
        return graph.forward

    function = getattr(F, loss)
    graph = torch.compile(
        lambda x, t, value: function(x, t, reduction="sum", **{parameter: value}),
        fullgraph=True,
        backend=count,
    )
    x.requires_grad_()
    for value in (3.0, 2.5, 1.5, 1.25, 1.75):
        number = torch.tensor(value) if as_tensor else value
        (got,) = torch.autograd.grad(graph(x, t, number), x)
        (expected,) = torch.autograd.grad(function(x, t, reduction="sum", **{parameter: value}), x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # PyTorch itself compiles a Python number once as it is and once as a variable.
    assert len(compilations) == (1 if as_tensor else 2)


# ---------------------------------------------------------------- tensors that are not plain


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_fake_tensors(loss):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, t = torch.empty(6, 3, requires_grad=True), torch.zeros(6, 3)
        t = t if loss in DENSE else torch.zeros(6, dtype=torch.int64)
        for reduction in ("none", "mean"):
            getattr(F, loss)(x, t, reduction=reduction).sum().backward()
    assert x.grad.shape == x.shape


SHARDED_LATER = pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.11"),
    reason="PyTorch cannot share out an operation of this loss yet",
)
SHARDED = [
    pytest.param(loss, marks=SHARDED_LATER)
    if loss in ("sigmoid_focal_loss_star", "softmax_focal_loss")
    else loss
    for loss in LOSSES
]


@pytest.mark.parametrize("loss", SHARDED)
def test_losses_of_distributed_tensors(loss, tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, t = tensors(loss, torch.float32)
        shared, targets = (distribute_tensor(a.clone(), mesh, [Shard(0)]) for a in (x, t))
        for reduction in ("none", "sum"):
            shared, x = shared.detach().requires_grad_(), x.detach().requires_grad_()
            value = getattr(F, loss)(shared, targets, reduction=reduction).sum()
            expected = getattr(F, loss)(x, t, reduction=reduction).sum()
            torch.testing.assert_close(value.full_tensor(), expected)
            got = torch.autograd.grad(value, shared)[0].full_tensor()
            torch.testing.assert_close(got, torch.autograd.grad(expected, x)[0])
    finally:
        torch.distributed.destroy_process_group()


def test_without_private_names_the_results_stay(monkeypatch):
    def results():
        out = []
        for loss in LOSSES:
            x, t = tensors(loss, torch.float32)
            x.requires_grad_()
            value = getattr(F, loss)(x, t)
            seeds = torch.stack([torch.ones_like(value), 2 * torch.ones_like(value)])
            out += torch.autograd.grad(value, x, seeds, is_grads_batched=True)
            out += torch.autograd.grad(getattr(F, loss)(x, t, reduction="sum"), x)
        return out

    expected = results()
    for name, gone in (
        ("WRAPPED", None),
        ("is_in_torch_dispatch_mode", lambda: True),
        ("get_interpreter_stack", None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_dispatch, name, gone)
            torch.testing.assert_close(results(), expected)


def test_blocks_do_not_show():
    """A formula without a kernel, and softmax, over several blocks and a rest."""
    n = _blocks.CPU_BLOCK // 2 * 5 + 17
    x = torch.linspace(-9, 9, n, requires_grad=True)
    y = torch.linspace(0, 1, n)
    value = F.quality_focal_loss(x, y)
    (slope,) = torch.autograd.grad(value.sum(), x)
    half = n // 2 + 3
    parts = [F.quality_focal_loss(a, b) for a, b in ((x[:half], y[:half]), (x[half:], y[half:]))]
    assert torch.equal(value, torch.cat(parts))
    assert torch.equal(slope, torch.autograd.grad(sum(p.sum() for p in parts), x)[0])
    rows = x[: n // 7 * 7].detach().view(-1, 7).requires_grad_()
    labels = torch.arange(len(rows)) % 7
    value = F.softmax_focal_loss(rows, labels)
    (slope,) = torch.autograd.grad(value.sum(), rows)
    half = rows[:1000].detach().requires_grad_()
    part = F.softmax_focal_loss(half, labels[:1000])
    torch.testing.assert_close(value[:1000], part)
    torch.testing.assert_close(slope[:1000], torch.autograd.grad(part.sum(), half)[0])


# ---------------------------------------------------------------- modules


def modules():
    return {
        "sigmoid_focal_loss": F.SigmoidFocalLoss,
        "sigmoid_focal_loss_star": F.SigmoidFocalLossStar,
        "balanced_cross_entropy": F.BalancedCrossEntropyLoss,
        "quality_focal_loss": F.QualityFocalLoss,
        "varifocal_loss": F.VarifocalLoss,
        "heatmap_focal_loss": F.HeatmapFocalLoss,
        "asymmetric_loss": F.AsymmetricLoss,
        "sparse_sigmoid_focal_loss": F.SparseSigmoidFocalLoss,
        "softmax_focal_loss": F.SoftmaxFocalLoss,
    }


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated")
def test_a_model_with_a_module_is_scripted(loss):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.criterion = modules()[loss]()

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.criterion(self.layer(x), t)

    model = Model()
    x, t = tensors(loss, torch.float32)
    scripted = torch.jit.script(model)
    expected = torch.autograd.grad(model(x, t), model.layer.weight)
    got = torch.autograd.grad(scripted(x, t), scripted.layer.weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("make", [F.SigmoidFocalLoss, F.SparseSigmoidFocalLoss, F.SoftmaxFocalLoss])
def test_alphas_as_a_tensor_move_with_the_module(make):
    alphas = torch.tensor([0.1, 0.2, 0.9])
    module = make(alpha=alphas)
    assert torch.equal(module.state_dict()["alpha"], alphas)
    assert module.to("meta").alpha.device.type == "meta"
    x = torch.empty(2, 3, device="meta")
    labels = torch.empty(2, device="meta", dtype=torch.int64)
    targets = x if make is F.SigmoidFocalLoss else labels
    assert module(x, targets).device.type == "meta"
    assert make(alpha=alphas)(x, targets).device.type == "meta"  # left behind, and still taken


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: F.SigmoidFocalLossStar(gamma=0), ValueError, "StarFL: gamma must be > 0"),
        (lambda: F.AsymmetricLoss(margin=1.0), ValueError, "margin must be < 1; got 1.0"),
        (lambda: F.SoftmaxFocalLoss(axis="x"), TypeError, "axis must be an integer; got 'x'"),
        (lambda: F.SoftmaxFocalLoss(alpha=-3), ValueError, "alpha must be a finite number >= 0"),
        (lambda: F.SigmoidFocalLoss(alpha=[0.1, 5.0]), ValueError, r"alpha .* in \[0, 1\]; got 5"),
        (lambda: F.QualityFocalLoss(beta=None), TypeError, "beta must be a number; got None"),
        (lambda: F.GIoULoss(reduction="avg"), ValueError, "GIoULoss: reduction must be one of"),
    ],
)
def test_wrong_parameters_are_found_when_a_module_is_made(make, error, message):
    with pytest.raises(error, match=message.replace("StarFL", "SigmoidFocalLossStar")):
        make()


def test_a_learned_gamma_is_a_parameter_of_the_module():
    gamma = torch.nn.Parameter(torch.tensor(2.0))
    module = F.SigmoidFocalLoss(gamma=gamma)
    assert [name for name, _ in module.named_parameters()] == ["gamma"]
    x, t = tensors("sigmoid_focal_loss", torch.float32)
    module(x, t).backward()
    step = np.float32(1e-2)
    ahead, behind = (F.sigmoid_focal_loss(x, t, gamma=2 + d).mean() for d in (step, -step))
    assert gamma.grad.item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-3)
