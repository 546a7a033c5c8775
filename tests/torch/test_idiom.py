"""What PyTorch users do with a loss: transforms, compilation, autocast, layouts, modules."""

import io
import math
import pickle
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import focal.numpy as reference  # noqa: E402
import focal.torch as F  # noqa: E402
from focal.core import formulas  # noqa: E402
from focal.kernels import torch_cpu  # noqa: E402
from focal.torch._namespace import xp  # noqa: E402

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]
EXTREMES = [-1000.0, -100.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 100.0, 1000.0]


def logits(*shape: int, dtype: "torch.dtype" = torch.float32, scale: float = 3.0) -> "torch.Tensor":
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def soft(*shape: int, dtype: "torch.dtype" = torch.float32) -> "torch.Tensor":
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)


def dense_losses(gamma: float):
    """Every dense loss as f(x, y) without reduction."""
    return {
        "focal": lambda x, y, r="none": F.sigmoid_focal_loss(x, y, 0.25, gamma, r),
        "star": lambda x, y, r="none": F.sigmoid_focal_loss_star(x, y, 0.25, gamma + 0.5, 1.0, r),
        "balanced": lambda x, y, r="none": F.balanced_cross_entropy(x, y, 0.75, r),
        "quality": lambda x, y, r="none": F.quality_focal_loss(x, y, gamma, r),
        "varifocal": lambda x, y, r="none": F.varifocal_loss(x, y, 0.75, gamma, r),
        "heatmap": lambda x, y, r="none": F.heatmap_focal_loss(x, y, gamma, 4.0, r),
        "asymmetric": lambda x, y, r="none": F.asymmetric_loss(x, y, 1.0, gamma, 0.05, r),
    }


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", dense_losses(2.0))
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_and_gradgradcheck(name, gamma, reduction):
    loss = dense_losses(gamma)[name]
    x = torch.cat([logits(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)])
    x.requires_grad_()
    y = torch.cat([soft(4, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)])
    assert torch.autograd.gradcheck(lambda x: loss(x, y, reduction), (x,))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, y, reduction), (x,))
    assert torch.autograd.gradcheck(
        lambda x: loss(x, y, reduction), (x,), check_forward_ad=True, check_batched_grad=True
    )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck_sparse_and_softmax(gamma):
    x = logits(5, 3, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 2, -1, -2, 1])
    for reduction in ("none", "mean", "sum", "positives"):
        f = lambda x, r=reduction: F.sparse_sigmoid_focal_loss(x, labels, 0.25, gamma, r)  # noqa: E731
        assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (x,))
    chosen = torch.tensor([0, 2, -100, 1, 1])
    for reduction in ("none", "mean", "sum"):
        f = lambda x, r=reduction: F.softmax_focal_loss(x, chosen, [1, 2, 3], gamma, r)  # noqa: E731
        assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_torch_func_transforms_agree_with_the_closed_forms(gamma):
    from torch.func import grad, hessian, jacfwd, jvp, vmap

    x, y = torch.tensor(EXTREMES, dtype=torch.float64), soft(9, dtype=torch.float64).round()
    slope = torch.from_numpy(reference.sigmoid_focal_loss_grad(x.numpy(), y.numpy(), 0.25, gamma))
    bend = torch.from_numpy(reference.sigmoid_focal_loss_hess(x.numpy(), y.numpy(), 0.25, gamma))

    def total(x, y):
        return F.sigmoid_focal_loss(x, y, 0.25, gamma, "sum")

    def each(x, y):
        return F.sigmoid_focal_loss(x, y, 0.25, gamma)

    torch.testing.assert_close(grad(total)(x, y), slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(vmap(grad(total))(x, y), slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(vmap(grad(each))(x, y), slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        jvp(lambda x: each(x, y), (x,), (torch.ones_like(x),))[1], slope, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(jacfwd(total)(x, y), slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(hessian(total)(x, y), bend.diag(), rtol=1e-10, atol=1e-300)
    torch.testing.assert_close(vmap(total)(x[:, None], y[:, None]), each(x, y))
    torch.testing.assert_close(
        vmap(total, in_dims=(1, None))(logits(9, 4, dtype=torch.float64), y),
        torch.stack([total(c, y) for c in logits(9, 4, dtype=torch.float64).T]),
    )


def test_vmap_of_the_sparse_loss_is_a_loop_of_it():
    x = logits(4, 6, 3)
    labels = torch.randint(-2, 3, (4, 6), generator=torch.Generator().manual_seed(2))
    for reduction in ("none", "sum", "mean", "positives"):
        f = lambda x, t, r=reduction: F.sparse_sigmoid_focal_loss(x, t, reduction=r)  # noqa: E731
        torch.testing.assert_close(
            torch.func.vmap(f)(x, labels),
            torch.stack([f(a, b) for a, b in zip(x, labels, strict=True)]),
        )


def assert_compiled_equals_eager(functions, x):
    """In one graph, where each function has logits of its own."""

    def all_of_them(*xs):
        return [f(x) for f, x in zip(functions, xs, strict=True)]

    torch._dynamo.reset()
    eager, compiled = ([x.clone().requires_grad_() for _ in functions] for _ in range(2))
    a, b = all_of_them(*eager), torch.compile(all_of_them, fullgraph=True)(*compiled)
    sum(a).backward()
    sum(b).backward()
    torch.testing.assert_close(b, a, rtol=1e-5, atol=0)
    slopes = [x.grad for x in compiled], [x.grad for x in eager]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compile_fullgraph_equals_eager(reduction):
    x, y = torch.tensor(EXTREMES * 2), torch.tensor([0.0] * 9 + [1.0] * 9)
    rows, labels = (6, 3), torch.tensor([0, 1, -1, -2, 1, 0])
    chosen, alphas = labels.clamp(min=0), [0.1, 0.5, 0.9]

    def losses(gamma):
        return [
            lambda x: F.sigmoid_focal_loss(x, y, 0.25, gamma, reduction),
            lambda x: F.sparse_sigmoid_focal_loss(x.view(rows), labels, 0.25, gamma, reduction),
            lambda x: F.softmax_focal_loss(x.view(rows), chosen, None, gamma, reduction),
        ]

    relatives = [
        lambda x: F.quality_focal_loss(x, y, 0.5, reduction),
        lambda x: F.varifocal_loss(x, y, 0.75, 0.5, reduction),
        lambda x: F.heatmap_focal_loss(x, y, 0.5, 4.0, reduction),
        lambda x: F.asymmetric_loss(x, y, 1.0, 0.5, 0.05, reduction),
        lambda x: F.sparse_sigmoid_focal_loss(
            x.view(rows), labels, alphas, 0.5, reduction, label_smoothing=0.1
        ),
        lambda x: F.softmax_focal_loss(
            x.view(rows), chosen, None, 0.5, reduction, label_smoothing=0.1
        ),
    ]
    between = soft(18)
    targets = [
        lambda x: F.sigmoid_focal_loss(x, y == 1, 0.1, 0.5, reduction),
        lambda x: F.sigmoid_focal_loss(x, y.int(), None, 2.0, reduction, label_smoothing=0.1),
        lambda x: F.sigmoid_focal_loss(x, between, 0.1, 0.5, reduction),
        lambda x: F.sigmoid_focal_loss(x.double(), between, 0.25, 2.0, reduction),
    ]
    functions = [*losses(0.0), *losses(0.5), *losses(2.0), *relatives, *targets]
    assert_compiled_equals_eager([lambda x, f=f: f(x).sum() for f in functions], x)


def test_export_equals_eager():
    class Model(torch.nn.Module):
        def forward(self, x, y, t):
            return (
                F.sigmoid_focal_loss(x, y, reduction="mean"),
                F.sparse_sigmoid_focal_loss(x, t, reduction="positives"),
                F.softmax_focal_loss(x, t.clamp(min=0)),
            )

    arguments = (logits(4, 3), soft(4, 3), torch.tensor([0, -1, 2, -2]))
    exported = torch.export.export(Model(), arguments)
    for a, b in zip(exported.module()(*arguments), Model()(*arguments), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    x, y = logits(32, 4), soft(32, 4)
    with torch.autocast("cpu", dtype=dtype):
        inside = F.sigmoid_focal_loss(x, y)
        from_half = F.sigmoid_focal_loss(x.to(dtype), y)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, F.sigmoid_focal_loss(x, y))
    assert torch.equal(from_half, F.sigmoid_focal_loss(x.to(dtype), y))


def layouts():
    base = logits(2, 3, 8, 6)
    yield "channels last", base.contiguous(memory_format=torch.channels_last)
    yield "permuted", base.permute(3, 1, 0, 2)
    yield "sliced", logits(4, 6, 8, 12)[::2, ::2, :, ::2]
    yield "expanded", logits(1, 3, 1, 6).expand(2, 3, 8, 6)
    yield "scalar", logits(1)[0]
    yield "empty", logits(0, 3)


@pytest.mark.parametrize(
    ("name", "x"), list(layouts()), ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_memory_layouts(name, x, reduction):
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    x = x.detach().requires_grad_()
    plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    a = F.sigmoid_focal_loss(x, y, reduction=reduction)
    b = F.sigmoid_focal_loss(plain, y, reduction=reduction)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        torch.autograd.grad(a.sum(), x)[0], torch.autograd.grad(b.sum(), plain)[0]
    )
    if reduction == "none" and name in ("channels last", "permuted"):
        assert a.stride() == x.stride()


def test_many_blocks_equal_one_row_at_a_time(monkeypatch):
    x, y = logits(40, 7), soft(40, 7)
    labels = torch.randint(-2, 7, (40,), generator=torch.Generator().manual_seed(4))
    expected = [F.sigmoid_focal_loss(x, y), F.sparse_sigmoid_focal_loss(x, labels)]
    monkeypatch.setattr(torch_cpu, "FEW", 0)
    for block in (1, 7, 50):
        monkeypatch.setattr(torch_cpu, "BLOCK", block)
        torch.testing.assert_close(F.sigmoid_focal_loss(x, y), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(
            F.sparse_sigmoid_focal_loss(x, labels), expected[1], rtol=1e-6, atol=0
        )
        leaf = x.clone().requires_grad_()
        F.sigmoid_focal_loss(leaf, y, reduction="sum").backward()
        slope = reference.sigmoid_focal_loss_grad(x.numpy(), y.numpy())
        torch.testing.assert_close(leaf.grad, torch.from_numpy(slope), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("targets", ["hard", "soft", "labels"])
@pytest.mark.parametrize("alpha", [None, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_passes_on_a_cpu_equal_the_formula(gamma, alpha, targets, smoothing):
    formula = formulas.SigmoidFocal(alpha, gamma, smoothing)
    extremes = [0.0, 1e-30, 0.3, 20.0, 88.0, 100.0, 1000.0, math.inf]
    x = torch.tensor([s * e for e in extremes for s in (1, -1)], dtype=torch.float64)
    x = torch.cat([x, logits(84, dtype=torch.float64)]).reshape(20, 5)
    if targets == "labels":
        t = torch.arange(20) % 7 - 2
        formula = formulas.Sparse(formula)
    else:
        t = soft(20, 5, dtype=torch.float64)
        t = (t > 0.5).double() if targets == "hard" else t
    if targets != "labels":
        x, t = x.reshape(-1), t.reshape(-1)
    kernels = torch_cpu.Kernels(xp)
    expected = formula.value_and_grad(xp, x, t)
    slope = kernels.slope(formula, x, t, torch.ones((), dtype=x.dtype))
    torch.testing.assert_close(kernels.value(formula, x, t), expected[0], rtol=1e-14, atol=0)
    # Smoothed, the slope is 0 at some logit, and next to it a difference of numbers near s / 2.
    close = {"rtol": 1e-14, "atol": 1e-16 if smoothing else 0}
    torch.testing.assert_close(slope, expected[1], **close)
    value, slope = kernels.few(formula, x, t)
    torch.testing.assert_close(value, expected[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(slope, expected[1], **close)
    assert torch.equal(kernels.few(formula, x, t, with_slope=False)[0], value)


@pytest.mark.parametrize("size", [1, 1000, 50_001])
@pytest.mark.parametrize(
    "positives", ["none", "one", "the last", "few", "many", "all", "a soft one"]
)
def test_listed_positives_change_nothing(monkeypatch, positives, size):
    """Blocks of any number of positives, listed or masked, and those of other formulas."""
    monkeypatch.setattr(torch_cpu, "WORTH_LISTING", 0)
    monkeypatch.setattr(torch_cpu, "BLOCK", 7_000)
    generator = torch.Generator().manual_seed(size)
    x = 5 * torch.randn(size, generator=generator, dtype=torch.float64)
    share = {"few": 0.01, "a soft one": 0.01, "many": 0.3, "all": 1.0}.get(positives, 0.0)
    t = (torch.rand(size, generator=generator) < share).double()
    if positives == "one":
        t[size // 2] = 1
    if positives == "the last":
        t[-1] = 1
    if positives == "a soft one":
        t[size // 3] = 0.25
    kernels = torch_cpu.Kernels(xp)
    listed = positives not in ("many", "all", "a soft one")
    if size > 1:
        assert (torch_cpu._rare(t) is not None) == listed
    for alpha in (None, 0.1, 0.25, 1.0):
        for gamma in (0.0, 0.5, 2.0, 3.3):
            formula = formulas.SigmoidFocal(alpha, gamma)
            value, slope = formula.value_and_grad(xp, x, t)
            total, of_total = kernels.total_and_slope(formula, x, t)
            torch.testing.assert_close(total, value.sum(), rtol=1e-13, atol=0)
            torch.testing.assert_close(of_total, slope, rtol=1e-13, atol=0)
            torch.testing.assert_close(kernels.value(formula, x, t), value, rtol=1e-13, atol=0)
            scaled = kernels.slope(formula, x, t, x)
            torch.testing.assert_close(scaled, slope * x, rtol=1e-13, atol=0)


@pytest.mark.parametrize("size", [30, 60_000])
def test_the_default_device_does_not_matter(size):
    x, y = logits(size), soft(size).round()
    labels = torch.zeros(size // 2, dtype=torch.int64)
    compiled = torch.compile(F.softmax_focal_loss)
    expected = F.sigmoid_focal_loss(x, y), F.softmax_focal_loss(x.view(-1, 2), labels)
    with torch.device("meta"):
        got = F.sigmoid_focal_loss(x, y), compiled(x.view(-1, 2), labels)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=2e-6, atol=0)


def test_a_trace_does_not_see_values():
    x, y = logits(5, 3), soft(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x, y: F.sigmoid_focal_loss(x, y), (x, y.round()))
    torch.testing.assert_close(traced(x, y), F.sigmoid_focal_loss(x, y))


def test_backward_twice_and_under_create_graph():
    x, y = logits(10, dtype=torch.float64).requires_grad_(), soft(10, dtype=torch.float64)
    loss = 3 * F.sigmoid_focal_loss(x, y, reduction="mean")
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    (third,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, first)
    (bend,) = torch.autograd.grad(third.sum(), x)
    expected = reference.sigmoid_focal_loss_hess(x.detach().numpy(), y.numpy()) * 3 / 10
    torch.testing.assert_close(bend, torch.from_numpy(expected))


def test_third_derivative_at_zero_is_right():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    y = torch.ones(1, dtype=torch.float64)
    (d1,) = torch.autograd.grad(F.sigmoid_focal_loss(x, y, None).sum(), x, create_graph=True)
    (d2,) = torch.autograd.grad(d1, x, create_graph=True)
    (d3,) = torch.autograd.grad(d2, x)
    step = 1e-4
    around = reference.sigmoid_focal_loss_hess(np.array([-step, step]), np.ones(2), None)
    assert d3.item() == pytest.approx((around[1] - around[0]) / (2 * step), rel=1e-6)


def test_forward_keeps_only_the_arguments():
    x, y = logits(50, 8).requires_grad_(), soft(50, 8)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.sigmoid_focal_loss(x, y)
    pointers = {tensor.data_ptr() for tensor in kept}
    assert pointers == {x.data_ptr(), y.data_ptr()}


def test_no_gradient_no_work():
    x = logits(5)
    assert not F.sigmoid_focal_loss(x, soft(5), reduction="sum").requires_grad
    with torch.no_grad():
        loss = F.sigmoid_focal_loss(x.requires_grad_(), soft(5), reduction="sum")
    assert not loss.requires_grad
    with torch.inference_mode():
        F.sigmoid_focal_loss(x, soft(5), reduction="sum")


TARGETS = {
    "targets": soft(6, 3),
    "labels": torch.tensor([0, 1, -1, -2, 2, 0]),
    "classes": torch.tensor([0, 1, 2, -100, 2, 0]),
}
ALPHAS = [0.1, 0.2, 0.9]
MODULES = [
    ("targets", F.SigmoidFocalLoss(0.5, 1.0), F.sigmoid_focal_loss, (0.5, 1.0, "mean")),
    ("targets", F.SigmoidFocalLoss(ALPHAS), F.sigmoid_focal_loss, (ALPHAS, 2.0, "mean")),
    ("labels", F.SparseSigmoidFocalLoss(), F.sparse_sigmoid_focal_loss, (0.25, 2.0, "positives")),
    ("classes", F.SoftmaxFocalLoss([1, 2, 3]), F.softmax_focal_loss, ([1, 2, 3], 2.0, "mean")),
    ("targets", F.SigmoidFocalLossStar(), F.sigmoid_focal_loss_star, (0.25, 2.0, 1.0, "mean")),
    ("targets", F.BalancedCrossEntropyLoss(), F.balanced_cross_entropy, (0.75, "mean")),
    ("targets", F.QualityFocalLoss(1.5), F.quality_focal_loss, (1.5, "mean")),
    ("targets", F.VarifocalLoss(0.5, 1.0), F.varifocal_loss, (0.5, 1.0, "mean")),
    ("targets", F.HeatmapFocalLoss(1.0, 3.0), F.heatmap_focal_loss, (1.0, 3.0, "positives")),
    ("targets", F.AsymmetricLoss(0.5, 2, 0.1), F.asymmetric_loss, (0.5, 2, 0.1, "mean")),
]
"""What each takes for targets, a module, its function, and the arguments of the function."""


@pytest.mark.parametrize(("kind", "module", "function", "arguments"), MODULES)
def test_modules_equal_their_functions(kind, module, function, arguments):
    x, t = logits(6, 3), TARGETS[kind]
    expected = function(x, t, *arguments)
    assert torch.equal(module(x, t), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, t), expected)
    assert not list(module.parameters()) and not module.state_dict()
    assert any(parameter in repr(module) for parameter in ("alpha", "beta", "gamma"))


def test_modules_compile_in_one_graph():
    def giou(x):
        boxes = torch.cat([x[:, :2], x[:, :2] + 1 + x[:, 1:].abs()], 1)
        return F.GIoULoss()(boxes, boxes.detach().roll(1, 0))

    modules = [lambda x, m=m, kind=kind: m(x, TARGETS[kind]) for kind, m, *_ in MODULES]
    assert_compiled_equals_eager([*modules, giou], logits(6, 3))


@pytest.mark.parametrize(("kind", "module", "function", "arguments"), MODULES)
def test_an_exported_module_gives_the_loss_of_any_batch(kind, module, function, arguments):
    rows, other = {0: torch.export.Dim("rows")}, "targets" if kind == "targets" else "labels"
    exported = torch.export.export(
        module, (logits(6, 3), TARGETS[kind]), dynamic_shapes={"inputs": rows, other: rows}
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    again = torch.export.load(io.BytesIO(file.getvalue())).module()
    x = torch.cat([logits(6, 3), torch.tensor(EXTREMES).view(3, 3)]).requires_grad_()
    t = torch.cat([TARGETS[kind], TARGETS[kind][1:4]])
    torch.testing.assert_close(again(x, t), function(x, t, *arguments))
    # The gradient is that of the operations, one by one: at ordinary logits the same.
    ordinary = logits(6, 3).requires_grad_()
    by_export, by_focal = (
        torch.autograd.grad(loss(ordinary, TARGETS[kind]), ordinary)[0] for loss in (again, module)
    )
    torch.testing.assert_close(by_export, by_focal, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("kind", ["targets", "labels"])
def test_an_exported_sigmoid_focal_loss_has_the_exact_gradient(kind, gamma, reduction, strict):
    """At every logit, 0 and the extremes among them, in a graph that needs nothing of focal."""
    module = F.SigmoidFocalLoss if kind == "targets" else F.SparseSigmoidFocalLoss
    module = module(0.25, gamma, reduction)
    x = torch.tensor([EXTREMES, [-x for x in EXTREMES], [5.0] * 9]).T
    t = soft(9, 3).round() if kind == "targets" else torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, -2])
    exported = torch.export.export(module, (x, t), strict=strict)
    operations = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert all(operation.namespace == "aten" for operation in operations)
    results = []
    for loss in (module, exported.module()):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(loss(leaf, t).sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-38)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_a_graph_of_loss_and_gradient_has_the_registered_derivative(gamma):
    from functorch.compile import aot_function, nop
    from torch.fx.experimental.proxy_tensor import make_fx

    def loss(x, t):
        return F.sparse_sigmoid_focal_loss(x, t, 0.25, gamma, reduction="sum")

    def slope(x, t):
        return torch.autograd.grad(loss(x, t), x)[0]

    x, t = torch.tensor(EXTREMES)[:, None].requires_grad_(), torch.tensor([-1, 0, -2] * 3)
    # The formula itself, as in a trace: plain tensors have faster paths, which round differently.
    formula = formulas.Sparse(formulas.SigmoidFocal(0.25, gamma))
    _, expected = formula.value_and_grad(xp, x.detach(), t)
    assert torch.equal(make_fx(slope)(x, t)(x, t), expected)
    torch.testing.assert_close(slope(x, t), expected, rtol=1e-6, atol=1e-38)
    ahead = aot_function(loss, fw_compiler=nop, bw_compiler=nop)
    torch.testing.assert_close(
        torch.autograd.grad(ahead(x, t), x)[0], expected, rtol=1e-6, atol=1e-38
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the check of the shapes
def test_torchscript_has_the_loss_as_a_call_of_python():
    """It does not write an `autograd.Function` to a file; it can call one."""
    criterion = F.SigmoidFocalLoss(gamma=0.5)
    traced = torch.jit.trace(criterion, (logits(6, 3), soft(6, 3)))
    x, y = torch.tensor(EXTREMES).view(3, 3).requires_grad_(), soft(3, 3).round()
    expected = criterion(x, y)
    (slope,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(traced(x, y), expected)
    torch.testing.assert_close(torch.autograd.grad(traced(x, y), x)[0], slope)
    with pytest.raises(RuntimeError, match="Could not export Python function call"):
        torch.jit.save(traced, io.BytesIO())

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x, y):
            return self.criterion(self.layer(x), y)

        @torch.jit.ignore
        def criterion(self, x, y):
            # type: (torch.Tensor, torch.Tensor) -> torch.Tensor
            return criterion(x, y)

    network = Network()
    loss = torch.jit.script(network)(logits(6, 3), soft(6, 3))
    loss.backward()
    (by_script,) = torch.autograd.grad(
        criterion(network.layer(logits(6, 3)), soft(6, 3)), network.layer.weight
    )
    torch.testing.assert_close(network.layer.weight.grad, by_script)


def test_suppression_traces_as_a_loop_of_the_graph():
    """`fixed_point` asks the device for the end of its loop: recorded, it is a `while_loop`."""
    from focal.core.nms import suppress

    generator = torch.Generator().manual_seed(5)
    corner = torch.rand(2, 300, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 8 + 24 * torch.rand(2, 300, 2, generator=generator)], -1)
    classes = torch.randint(0, 2, (2, 300), generator=generator)

    class Suppress(torch.nn.Module):
        def forward(self, boxes, classes):
            return suppress(xp, boxes, classes, 0.4)

    expected = Suppress()(boxes, classes)
    assert 20 < expected.sum() < 300
    batch = {0: torch.export.Dim("batch", min=1)}
    exported = torch.export.export(Suppress(), (boxes, classes), dynamic_shapes=(batch, batch))
    again = exported.module()
    assert torch.equal(again(boxes, classes), expected)
    assert torch.equal(again(boxes[:1], classes[:1]), expected[:1])
    # A chain, in which each box overlaps the next: as many rounds as there are boxes.
    start = torch.arange(300.0).view(1, 300, 1) * 5
    chain = torch.cat([start, start * 0, start + 10, start * 0 + 10], -1)
    found = again(chain, torch.zeros(1, 300, dtype=torch.int64))
    assert torch.equal(found, Suppress()(chain, torch.zeros(1, 300, dtype=torch.int64)))
    compiled = torch.compile(Suppress(), fullgraph=True)
    assert torch.equal(compiled(boxes, classes), expected)


def test_module_checks_its_parameters_when_made():
    message = "SigmoidFocalLoss: gamma must be a finite number >= 0; got -1"
    with pytest.raises(ValueError, match=message):
        F.SigmoidFocalLoss(gamma=-1)
    with pytest.raises(ValueError, match=r"SparseSigmoidFocalLoss: reduction must be one of"):
        F.SparseSigmoidFocalLoss(reduction="avg")


def test_init_prior_bias():
    layer = torch.nn.Conv2d(4, 6, 3)
    assert F.init_prior_bias_(layer) is layer
    torch.testing.assert_close(torch.sigmoid(layer.bias), torch.full((6,), 0.01))
    F.init_prior_bias_(layer, [0.01, 0.1, 0.5])
    torch.testing.assert_close(torch.sigmoid(layer.bias), torch.tensor([0.01, 0.1, 0.5] * 2))
    assert layer.bias.requires_grad
    with pytest.raises(ValueError, match=r"a multiple of that of pi \(4\); got shape \(6,\)"):
        F.init_prior_bias_(layer, [0.1] * 4)
    with pytest.raises(TypeError, match="one-dimensional bias; got Conv2d"):
        F.init_prior_bias_(torch.nn.Conv2d(4, 6, 3, bias=False))
