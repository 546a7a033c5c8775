"""The PyTorch network: torchvision's names, shapes and order; what PyTorch alone has."""

import contextlib
import math

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

import focal.torch
from focal.core.anchors import AnchorConfig
from focal.retinanet.architecture import BACKBONES
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.torch import trainer as backend_torch
from focal.retinanet.torch.network import (
    FrozenBatchNorm2d,
    GroupNorm,
    RetinaNet,
    build_network,
    load_state,
    state,
)

COCO = tuple(f"class {i}" for i in range(91))  # torchvision counts a background
V1 = RetinaNetConfig(classes=COCO, norm="frozen_batch", p6_from="p5")
V2 = RetinaNetConfig(classes=COCO, norm="batch", p6_from="c5", head_norm="group")
TINY = RetinaNetConfig(
    classes=("a", "b", "c"),
    backbone="tiny",
    norm="batch",
    levels=(3, 4, 5),
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(20.0, 40.0, 80.0)),
    channels=64,
    head_depth=2,
)
SMALL = TINY.replace(channels=16, head_depth=1, levels=(3, 4, 5, 6, 7), anchors=AnchorConfig())


@pytest.fixture(scope="module")
def tiny():
    """A tiny network in evaluation mode; not to be changed."""
    return build_network(TINY, seed=0).eval()


def meta(config):
    """The network without memory for its weights: names and shapes only."""
    with torch.device("meta"):
        return RetinaNet(config)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# Names, shapes and totals


def torchvision_shapes(v2):
    """The state dict of torchvision's ResNet-50 RetinaNets, from its published architecture."""
    shapes = {}

    def conv(name, inputs, outputs, kernel, bias):
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        if v2:
            shapes[f"{name}.num_batches_tracked"] = ()

    conv("backbone.body.conv1", 3, 64, 7, False)
    norm("backbone.body.bn1", 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            name = f"backbone.body.layer{stage}.{block}"
            sizes = ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1))
            for i, size in enumerate(sizes, start=1):
                conv(f"{name}.conv{i}", *size, False)
                norm(f"{name}.bn{i}", size[1])
            if block == 0:
                conv(f"{name}.downsample.0", inputs, 4 * width, 1, False)
                norm(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    for i, inputs in enumerate((512, 1024, 2048)):
        conv(f"backbone.fpn.inner_blocks.{i}.0", inputs, 256, 1, True)
        conv(f"backbone.fpn.layer_blocks.{i}.0", 256, 256, 3, True)
    conv("backbone.fpn.extra_blocks.p6", 2048 if v2 else 256, 256, 3, True)
    conv("backbone.fpn.extra_blocks.p7", 256, 256, 3, True)
    for head, last, outputs in (
        ("classification_head", "cls_logits", 9 * 91),
        ("regression_head", "bbox_reg", 9 * 4),
    ):
        for i in range(4):
            conv(f"head.{head}.conv.{i}.0", 256, 256, 3, not v2)
            if v2:
                shapes[f"head.{head}.conv.{i}.1.weight"] = (256,)
                shapes[f"head.{head}.conv.{i}.1.bias"] = (256,)
        conv(f"head.{head}.{last}", 256, outputs, 3, True)
    return shapes


@pytest.mark.parametrize(("config", "v2"), [(V1, False), (V2, True)])
def test_names_and_shapes_are_torchvisions(config, v2):
    own = {name: tuple(x.shape) for name, x in meta(config).state_dict().items()}
    assert own == torchvision_shapes(v2)


def test_parameter_totals_are_the_published_ones():
    # torchvision's count is of parameters. In v1 the norms are frozen, hence buffers, and not in
    # the count: as batch norms they are 53,120 parameters more. In v2 they are in it.
    assert parameters(meta(V1)) == 34_014_999
    assert parameters(meta(V1.replace(norm="batch"))) == 34_014_999 + 53_120
    assert parameters(meta(V2)) == 38_198_935


@pytest.mark.parametrize(
    ("backbone", "classifier"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnext101_32x8d", 88_791_336),
    ],
)
def test_backbones_are_the_published_classifiers_without_their_last_layer(backbone, classifier):
    body = meta(V2.replace(backbone=backbone)).backbone.body
    last_layer = 1000 * (BACKBONES[backbone].channels[-1] + 1)
    assert parameters(body) == classifier - last_layer


def test_tiny_is_tiny(tiny):
    assert parameters(tiny) == 930_447


def test_group_norm_needs_no_statistics():
    names = meta(TINY.replace(norm="group")).state_dict()
    assert not any("running" in name for name in names)
    assert "backbone.body.layer1.0.downsample.1.weight" in names


# Outputs


@pytest.mark.parametrize("size", [(64, 64), (75, 101), (129, 97)])
@pytest.mark.parametrize("levels", [(3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 7)])
@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_every_cell_has_its_anchors(size, levels, p6_from):
    strides = tuple(2**n for n in levels)
    anchors = AnchorConfig(strides=strides, sizes=tuple(4.0 * s for s in strides))
    config = SMALL.replace(levels=levels, p6_from=p6_from, anchors=anchors)
    model = build_network(config, seed=0).eval()
    logits, deltas = model(images(2, 3, *size))
    cells = sum(math.ceil(size[0] / 2**n) * math.ceil(size[1] / 2**n) for n in levels)
    assert logits.shape == (2, 9 * cells, 3)
    assert deltas.shape == (2, 9 * cells, 4)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_larger_backbones_run(backbone):
    model = build_network(SMALL.replace(backbone=backbone, norm="frozen_batch"), seed=0)
    logits, deltas = model(images(1, 3, 65, 40))
    assert logits.shape == (1, 9 * (9 * 5 + 5 * 3 + 3 * 2 + 2 + 1), 3)
    assert logits.isfinite().all() and deltas.isfinite().all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_order_is_level_row_column_anchor(memory_format):
    config = SMALL.replace(head_depth=0, anchors=AnchorConfig(scales=(1.0,), ratios=(0.5, 2.0)))
    head = build_network(config, seed=0).head
    # A head that adds to each output channel a code of its own: the channels of one anchor are
    # neighbors. The maps hold a code of level, row and column.
    for last in (head.classification_head.cls_logits, head.regression_head.bbox_reg):
        torch.nn.init.zeros_(last.weight)
        last.weight.data[:, 0, 1, 1] = 1
        last.bias.data = torch.arange(float(last.out_channels))
    sizes = ((3, 5), (2, 3), (1, 2))
    levels = []
    for level, (height, width) in enumerate(sizes):
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        code = 10_000 * level + 1_000 * rows + 100 * columns
        levels.append(
            code.expand(2, 16, height, width).float().contiguous(memory_format=memory_format)
        )
    for subnet, values in (("classification_head", 3), ("regression_head", 4)):
        expected = [
            [10_000 * level + 1_000 * row + 100 * column + values * a + v for v in range(values)]
            for level, (height, width) in enumerate(sizes)
            for row in range(height)
            for column in range(width)
            for a in range(2)
        ]
        out = head[subnet](levels)
        np.testing.assert_array_equal(out.detach().numpy(), [expected, expected])


def test_memory_format_changes_nothing(tiny):
    x = images(2, 3, 64, 96)
    for plain, last in zip(tiny(x), tiny(x.to(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(plain, last, atol=1e-5, rtol=1e-5)


def test_p6_source_is_the_configs():
    for source, channels in (("c5", 128), ("p5", 16)):
        p6 = meta(SMALL.replace(p6_from=source)).backbone.fpn.extra_blocks["p6"]
        assert p6.in_channels == channels


def test_p7_is_from_the_rectified_p6_and_p6_stays_as_it_is():
    fpn = build_network(SMALL, seed=0).backbone.fpn
    features = [images(1, c, s, s, seed=c) for c, s in ((64, 8), (128, 4), (128, 2))]
    *_, p6, p7 = fpn(features)
    assert (p6 < 0).any()
    torch.testing.assert_close(p7, fpn.extra_blocks["p7"](p6.clamp(min=0)))


def test_the_pyramid_upsamples_to_odd_sizes_by_nearest():
    fpn = build_network(TINY.replace(channels=8), seed=0).backbone.fpn
    features = [images(1, c, s, s, seed=s) for c, s in ((64, 9), (128, 5), (128, 3))]
    inner = [block(c) for block, c in zip(fpn.inner_blocks, features, strict=True)]
    index = torch.arange(5) * 3 // 5
    p4 = fpn.layer_blocks[1](inner[1] + inner[2][:, :, index][:, :, :, index])
    torch.testing.assert_close(fpn(features)[1], p4)


def test_every_parameter_learns():
    model = build_network(SMALL.replace(head_norm="group"), seed=0)
    logits, deltas = model(images(2, 3, 128, 128))
    (logits.square().sum() + deltas.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("norm", ["batch", "frozen_batch", "group"])
def test_half_precision_stays_near(norm):
    model = build_network(TINY.replace(norm=norm), seed=0).eval()
    x = images(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    for full, low in zip(model(x), half, strict=True):
        assert low.dtype == torch.bfloat16
        # The logits lie at -4.6, where bfloat16 has steps of 1/32.
        torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0)


def test_it_is_captured_as_one_graph(tiny):
    x = images(2, 3, 65, 64)
    expected = tiny(x)
    compiled = torch.compile(tiny, backend="eager", fullgraph=True)
    exported = torch.export.export(tiny, (x,)).module()
    for run in (compiled, exported):
        for a, b in zip(run(x), expected, strict=True):
            torch.testing.assert_close(a, b)


# Normalization


def test_frozen_batch_norm_in_function_transforms():
    from torch.func import grad, vmap

    norm, x = FrozenBatchNorm2d(2), images(2, 3, 2, 4, 4).requires_grad_()
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    slope = torch.tensor([1 / 2, 1 / 3])[:, None, None].expand(3, 2, 4, 4)
    near = {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(grad(lambda x: norm(x).sum())(x[0]), slope, **near)
    each = vmap(grad(lambda x: norm(x).sum()))(x)
    torch.testing.assert_close(each, slope.expand(2, 3, 2, 4, 4), **near)


def test_frozen_batch_norm_is_batch_norm_in_evaluation():
    norm, frozen = torch.nn.BatchNorm2d(6).eval(), FrozenBatchNorm2d(6)
    tensors = {name: images(6, seed=i) for i, name in enumerate(frozen.state_dict())}
    tensors["running_var"] = tensors["running_var"].abs()
    norm.load_state_dict(tensors)
    frozen.load_state_dict(tensors)
    x = 3 + images(2, 6, 5, 4)
    torch.testing.assert_close(frozen(x), norm(x))
    x = x.to(memory_format=torch.channels_last)
    assert frozen(x).is_contiguous(memory_format=torch.channels_last)
    assert frozen(x.bfloat16()).dtype == torch.bfloat16
    assert not list(frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_batch_norm_saves_no_feature_map_and_keeps_type_and_layout(dtype):
    norm, frozen = torch.nn.BatchNorm2d(6).eval(), FrozenBatchNorm2d(6)
    tensors = {name: images(6, seed=i).abs() for i, name in enumerate(frozen.state_dict())}
    norm.load_state_dict(tensors)
    frozen.load_state_dict(tensors)
    x = images(2, 6, 5, 4).to(dtype, memory_format=torch.channels_last)
    shapes, gradients = [], []

    def keep(a):
        shapes.append(a.shape)
        return a

    for module in (norm, frozen):
        leaf = x.clone().requires_grad_()
        shapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
            y = module(leaf)
        upstream = images(2, 6, 5, 4, seed=7).to(dtype, memory_format=torch.channels_last)
        gradients.append(torch.autograd.grad(y, leaf, upstream)[0])
    assert shapes == [(6,)] * 3
    assert gradients[1].dtype == dtype
    assert gradients[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("autocast", [False, True])
def test_group_norm_keeps_type_and_layout(autocast):
    norm = GroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(3))
    x = images(2, 8, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    low = x.detach().bfloat16().requires_grad_()
    y = norm(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        half = norm(low)
    assert half.dtype == torch.bfloat16
    for a in (y, half):
        assert a.is_contiguous(memory_format=torch.channels_last)
        a.float().square().sum().backward()
    torch.testing.assert_close(half.float(), y, rtol=0.02, atol=0.02)
    torch.testing.assert_close(low.grad.float(), x.grad, rtol=0.05, atol=0.1)
    assert low.grad.dtype == torch.bfloat16


# What a run keeps


def test_anchors_are_made_once_and_serve_training_after_inference():
    model = build_network(SMALL, seed=0)
    with torch.inference_mode():
        first = model.anchors((64, 96))
    assert model.anchors((64, 96)) is first and not first.is_inference()
    assert model.anchors((96, 64)) is not first
    torch.testing.assert_close(first, focal.torch.anchors((64, 96), SMALL.anchors))
    assert "scale" not in model.state_dict() and "shift" not in model.state_dict()


# Settings of the process


def settings_of_cudnn(cudnn):
    return cudnn.conv.fp32_precision, cudnn.allow_tf32, cudnn.benchmark


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="since PyTorch 2.9")
@pytest.mark.parametrize("allowed", [True, False])
def test_convolutions_on_a_gpu_are_float32_and_the_settings_come_back(allowed):
    cudnn = torch.backends.cudnn
    before = settings_of_cudnn(cudnn)
    try:
        cudnn.allow_tf32 = allowed
        own = settings_of_cudnn(cudnn)
        with backend_torch._convolutions(torch.device("cuda:1")):
            assert (cudnn.conv.fp32_precision, cudnn.benchmark) == ("ieee", True)
        assert settings_of_cudnn(cudnn) == own
        with pytest.raises(KeyError), backend_torch._convolutions(torch.device("cuda")):
            raise KeyError
        assert settings_of_cudnn(cudnn) == own
        with backend_torch._convolutions(torch.device("cpu")):
            assert settings_of_cudnn(cudnn) == own
    finally:
        cudnn.allow_tf32 = before[1]
    assert settings_of_cudnn(cudnn) == before


def test_bfloat16_is_for_gpus_that_multiply_it(monkeypatch):
    asked = []

    def supported(including_emulation=True):
        return including_emulation or asked[-1].index == 1

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda d: asked.append(d) or contextlib.nullcontext())
    assert backend_torch._fast_precision(torch.device("cuda:0")) == "float32"
    assert backend_torch._fast_precision(torch.device("cuda:1")) == "bfloat16"


# State


def test_the_global_generator_is_kept():
    before = torch.random.get_rng_state()
    build_network(SMALL, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_batch_and_frozen_norm_share_their_weights():
    tensors = state(build_network(SMALL, seed=0))
    load_state(build_network(SMALL.replace(norm="frozen_batch"), seed=1), tensors)


# Releases of PyTorch


def test_bfloat16_is_for_processors_that_are_known_to_be_faster_with_it(monkeypatch):
    cpu = torch.device("cpu")
    none: dict[str, object] = {}
    amd = {"cpu_name": "AMD Zen 4", "avx512_bf16": True, "amx_bf16": False}
    intel = {**amd, "cpu_name": "Intel Xeon"}
    for found, fast in [
        (none, False),
        (amd, True),
        ({**amd, "avx512_bf16": False}, False),
        (intel, False),
        ({**intel, "amx_bf16": True}, True),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", found.copy, raising=False)
        assert backend_torch._fast_precision(cpu) == ("bfloat16" if fast else "float32"), found
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as before PyTorch 2.11
    assert backend_torch._fast_precision(cpu) == "float32"
