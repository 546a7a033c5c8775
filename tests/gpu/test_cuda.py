"""What needs a GPU: not collected by default, run by `make test-gpu`."""

import importlib.util
import os

import numpy as np
import pytest
import torch

import focal.torch as F
from focal.retinanet import PRESETS, build, load, predict, raw_outputs, save
from focal.retinanet.data import ShapesDataset
from focal.retinanet.training.loop import train

# JAX would take most of the GPU's memory at its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
GPU = "cuda"


def jax_sees_a_gpu() -> bool:
    if importlib.util.find_spec("jax") is None:
        return False
    import jax

    try:
        return bool(jax.devices(GPU))
    except RuntimeError:
        return False


needs_jax = pytest.mark.skipif("not jax_sees_a_gpu()", reason="JAX sees no GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_losses_equal_those_of_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1000, 80, generator=generator) * 5).to(dtype)
    y = torch.rand(1000, 80, generator=generator).round()
    labels = torch.randint(-2, 80, (1000,), generator=generator)
    for f, t in ((F.sigmoid_focal_loss, y), (F.sparse_sigmoid_focal_loss, labels)):
        here, there = x.clone().requires_grad_(), x.cuda().requires_grad_()
        a, b = f(here, t, reduction="sum"), f(there, t.cuda(), reduction="sum")
        a.backward()
        b.backward()
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=0)
        torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-2, atol=1e-7)


def test_targets_and_nms_equal_those_of_the_cpu():
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(500, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + torch.rand(500, 2, generator=generator) * 40], dim=1)
    scores = torch.rand(500, generator=generator)
    assert torch.equal(F.nms(boxes.cuda(), scores.cuda(), 0.5).cpu(), F.nms(boxes, scores, 0.5))
    anchors = F.anchors((128, 128))
    here = F.match_anchors(anchors, boxes[:20], allow_low_quality=True)
    there = F.match_anchors(anchors.cuda(), boxes[:20].cuda(), allow_low_quality=True)
    assert torch.equal(there.cpu(), here)


def test_the_detector_trains_and_agrees_with_the_cpu(tmp_path):
    detector, run = PRESETS["tiny"]
    detector = detector.replace(image_size=(64, 64), classes=("circle", "square", "triangle"))
    run = run.replace(steps=20, batch_size=4, crop=None, precision="float32")
    data = ShapesDataset("train", size=(64, 64), num_images=16)
    model = train(detector, run, data, None, tmp_path, device="cuda")
    images = [np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)]
    here = build(detector, device="cpu")
    here.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    for a, b in zip(raw_outputs(model, images), raw_outputs(here, images), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert len(predict(model, images)) == 1


@needs_jax
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_losses_of_jax_equal_those_of_the_cpu(dtype):
    import jax

    import focal.jax as FJ

    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1000, 80)) * 5).astype(np.float32)
    labels = rng.integers(-2, 80, 1000)
    cases = (
        (FJ.sigmoid_focal_loss, (labels[:, None] == np.arange(80)).astype(np.float32)),
        (FJ.sparse_sigmoid_focal_loss, labels),
    )
    for f, t in cases:
        found = []
        for device in ("cpu", GPU):
            place = jax.devices(device)[0]
            both = jax.jit(jax.value_and_grad(lambda x, t, f=f: f(x, t, reduction="sum")))
            operands = jax.device_put((jax.numpy.asarray(x).astype(dtype), t), place)
            found.append([np.asarray(a, np.float32) for a in both(*operands)])
        (loss, slope), (loss_there, slope_there) = found
        rtol = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(loss_there, loss, rtol=rtol)
        np.testing.assert_allclose(slope_there, slope, rtol=1e-2, atol=1e-7)


@needs_jax
def test_the_detector_of_jax_trains_and_agrees_with_the_cpu(tmp_path):
    detector, run = PRESETS["tiny"]
    detector = detector.replace(image_size=(64, 64), classes=("circle", "square", "triangle"))
    run = run.replace(steps=20, batch_size=4, crop=None, precision="float32")
    data = ShapesDataset("train", size=(64, 64), num_images=16)
    model = train(detector, run, data, None, tmp_path, backend="jax", device=GPU)
    images = [np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)]
    save(model, tmp_path / "copy.safetensors")
    here = load(tmp_path / "copy.safetensors", "torch", device="cpu")
    for a, b in zip(raw_outputs(model, images), raw_outputs(here, images), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert len(predict(model, images)) == 1
