"""Softmax focal loss with label smoothing in one pass: definition and derivatives."""

from itertools import product

import numpy as np
import pytest
from precision import promised_ulps

torch = pytest.importorskip("torch")

import focal.numpy as reference  # noqa: E402
import focal.torch as F  # noqa: E402

S = 0.1


def smoothed(x, labels, gamma=2.0, reduction="none", alpha=None):
    return F.softmax_focal_loss(x, labels, alpha, gamma, reduction, label_smoothing=S)


def rows(dtype, scale, classes=7, count=200):
    random = np.random.default_rng(3)
    x = random.normal(size=(count, classes)) * scale
    x[0], x[1, 1:] = 0, x[1, 1]  # ties of all, and of all but one
    x[2], x[3, 0] = np.arange(classes) * 50, 40
    return torch.tensor(x, dtype=dtype), torch.from_numpy(random.integers(0, classes, count))


def definition(x, labels, gamma):
    """Loss and gradient in float64, and the sum of the sizes of the gradient's terms."""
    x, labels = x.double().numpy(), labels.numpy()
    value, slope, size = 0, 0, 0
    for k in range(x.shape[1]):
        chosen = np.full_like(labels, k)
        share = S / x.shape[1] + (1 - S) * (labels == k)
        grad = reference.softmax_focal_loss_grad(x, chosen, gamma=gamma) * share[:, None]
        value = value + share * reference.softmax_focal_loss(x, chosen, gamma=gamma)
        slope, size = slope + grad, size + abs(grad)
    return value, slope, size


@pytest.mark.parametrize("compile", [False, True])
def test_loss_and_gradient_are_the_definition(compile):
    torch.compiler.reset()
    function = torch.compile(smoothed, fullgraph=True) if compile else smoothed
    gammas = (2.0,) if compile else (0.0, 0.5, 1.0, 1.5, 2.0)
    for gamma, scale in product(gammas, (1.0, 30.0)):
        x, labels = rows(torch.float32, scale)
        value, slope, size = definition(x, labels, gamma)
        x.requires_grad_()
        got = function(x, labels, gamma)
        got.sum().backward()
        allowed = promised_ulps(gamma) * np.finfo(np.float32).eps
        assert (abs(got.detach().numpy() - value) <= allowed * value).all()
        tiny = np.finfo(np.float32).smallest_normal
        assert (abs(x.grad.numpy() - slope) <= allowed * size + tiny).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_all_derivatives_of_the_smoothed_loss(gamma, reduction):
    x = rows(torch.float64, 1.0, classes=3, count=5)[0].requires_grad_()
    labels = torch.tensor([0, 2, -100, 1, 1])

    def loss(x):
        return smoothed(x, labels, gamma, reduction, alpha=0.25)

    assert torch.autograd.gradcheck(loss, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, (x,))
    total = loss(x).sum()
    first, second = (torch.autograd.grad(total, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    by_func = torch.func.grad(lambda x: loss(x).sum())(x.detach())
    torch.testing.assert_close(first, by_func, rtol=1e-13, atol=1e-16)


def test_blocks_of_rows_and_rows_without_a_label(monkeypatch):
    from focal.torch import _blocks

    x, labels = rows(torch.float32, 3.0, count=100)
    labels[::7] = -100
    x[::7] = torch.nan
    results = []
    for block in (1 << 18, 70):
        monkeypatch.setattr(_blocks, "CPU_BLOCK", block)
        leaf = x.clone().requires_grad_()
        losses = smoothed(leaf, labels)
        losses.sum().backward()
        with torch.no_grad():
            assert torch.equal(smoothed(x, labels), losses)
        results.append((losses.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    assert not results[0][1][::7].any() and not results[0][0][::7].any()


def test_masked_classes_and_half_types():
    x = torch.tensor([[0.0, 1.0, -torch.inf], [1000.0, -1000.0, 0.0], [torch.inf, 0.0, 1e4]])
    labels = torch.tensor([0, 0, 0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        loss = smoothed(leaf, labels)
        assert loss.dtype == dtype
        loss.sum().backward()
        assert leaf.grad.isfinite().all()
    assert loss[1].isfinite()


def test_second_derivatives_are_finite_where_one_class_is_far_ahead():
    x, labels = torch.tensor([[0.0, 20.0, 100.0], [0.0, -300.0, 300.0]]), torch.tensor([0, 1])
    bend = torch.func.hessian(lambda x: smoothed(x, labels, reduction="sum"))(x)
    assert bend.isfinite().all() and bend[0, 1, 0, 1] != 0


def test_the_gradient_at_a_masked_class_is_that_of_a_large_finite_logit():
    """In one pass, and over the margins of all classes."""
    x, labels = torch.tensor([[2.0, -torch.inf, 1.0]]), torch.tensor([0])
    gradients = []
    for alpha, gamma in ((None, 2.0), ([1.0, 1.0, 1.0], 2.0), (None, torch.tensor(2.0))):
        leaf = x.clone().requires_grad_()
        loss = smoothed(leaf, labels, gamma, "sum", alpha)
        gradients += torch.autograd.grad(loss, leaf, create_graph=True)
    assert gradients[0][0, 1].item() == pytest.approx(-S / 3, rel=1e-6)
    for got in gradients[1:]:
        torch.testing.assert_close(got, gradients[0], rtol=2e-6, atol=0)


def test_other_exponents_compile_and_export_in_one_graph():
    torch.compiler.reset()
    x, labels = rows(torch.float32, 1.0, count=5)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(smoothed, fullgraph=True, backend=backend)
    for gamma in (1.5, 1.6, 1.7, 1.8, 5.0):
        torch.testing.assert_close(
            compiled(x, labels, gamma), smoothed(x, labels, gamma), rtol=2e-6, atol=0
        )
    assert len(graphs) <= 2

    class Loss(torch.nn.Module):
        def forward(self, x, labels):
            return smoothed(x, labels)

    program = torch.export.export(Loss(), (x, labels), strict=True)
    torch.testing.assert_close(program.module()(x, labels), smoothed(x, labels), rtol=2e-6, atol=0)


def test_vmap_over_logits_and_around_them():
    x, labels = rows(torch.float64, 1.0, count=6)
    x, labels = x.reshape(2, 3, 7), labels.reshape(2, 3)
    for loss in (smoothed, F.softmax_focal_loss):
        torch.testing.assert_close(torch.vmap(loss)(x, labels), loss(x, labels), rtol=1e-13, atol=0)
        scaled = torch.vmap(lambda w, loss=loss: w * loss(x, labels))(torch.arange(3.0))
        torch.testing.assert_close(scaled[2], 2 * loss(x, labels), rtol=1e-13, atol=0)
