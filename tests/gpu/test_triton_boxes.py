"""The kernels for boxes against the core: on a GPU, or without one in Triton's interpreter.

`make test-gpu` runs this file on a GPU, `tests/torch/test_triton_boxes.py` in the interpreter.
"""

import os

import numpy as np
import pytest
import torch

import focal.torch as F
from focal.core.nms import suppress
from focal.kernels import torch_boxes
from focal.torch import _pointwise
from focal.torch._namespace import xp

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
LOW_QUALITY = [False, True, 0.45]
THRESHOLDS = [0.0, 0.3, 1.0]


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """Sends matching and suppression to the kernels, and counts."""
    calls = []

    def spy(name, kernel):
        def run(*arguments):
            calls.append(name)
            with np.errstate(all="ignore"):  # a GPU does not warn; the interpreter does, by NumPy
                return kernel(*arguments)

        monkeypatch.setattr(torch_boxes, name, run)

    spy("match", torch_boxes.match)
    spy("suppress", torch_boxes.suppress)
    monkeypatch.setattr(_pointwise, "TRITON_DEVICE", DEVICE)
    with np.errstate(all="ignore"):
        assert _pointwise._triton_on(torch.ones(1, device=DEVICE).device) is not None
    return calls


def by_the_core(function, *arguments, **options):
    """The result of the formula, on a CPU."""
    device, _pointwise.TRITON_DEVICE = _pointwise.TRITON_DEVICE, "none"
    try:
        return function(
            *(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments), **options
        )
    finally:
        _pointwise.TRITON_DEVICE = device


def equal(function, *arguments, **options):
    """The result by the kernels, after comparing it with that of the core."""
    expected = by_the_core(function, *arguments, **options)
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    for got, other in zip(*map(as_tuple, (function(*moved, **options), expected)), strict=True):
        assert (got.dtype, got.shape) == (other.dtype, other.shape)
        assert torch.equal(got.cpu(), other)
    return expected


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def boxes(seed: int, *shape: int, grid: bool, extent: float = 60.0) -> torch.Tensor:
    """Boxes of which some are none; on a grid, most overlaps are equal to another."""
    random = np.random.default_rng(seed)
    low, side = random.uniform(-5, extent, (*shape, 2)), random.uniform(1, 40, (*shape, 2))
    made = np.concatenate([low, low + side], axis=-1)
    if grid:
        made = np.round(made / 8) * 8  # some become empty
    kind = random.integers(0, 24, shape)
    made[kind == 0] = 0
    made[kind == 1, random.integers(0, 4)] = np.nan
    made[kind == 2, 2] = np.inf
    made[kind == 3] = made[kind == 3][:, [2, 3, 0, 1]]
    return torch.from_numpy(made.astype(np.float32))


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 9), (2, 1, 5)])
def test_matching_is_that_of_the_core(kernels_run, shape, low_quality, grid):
    anchors, truth = boxes(0, 1100, grid=grid), boxes(1, *shape, grid=grid)
    for thresholds in ((0.5, 0.4), (0.0, 0.0), (1.0, 0.3)):
        match = equal(F.match_anchors, anchors, truth, *thresholds, low_quality)
    assert kernels_run == ["match"] * 3
    assert (match >= -2).all() and (match < shape[-1]).all()


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@pytest.mark.parametrize("count", [1, 2, 1023, 1024, 1025])
def test_any_number_of_anchors(count, low_quality):
    anchors = boxes(2, count, grid=False)
    equal(F.match_anchors, anchors, boxes(3, 2, 6, grid=False), allow_low_quality=low_quality)


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_targets_are_those_of_the_core(kernels_run, low_quality):
    anchors, truth = F.anchors((96, 128)).float(), boxes(4, 3, 12, grid=False, extent=90.0)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (3, 12)))
    assigned, deltas = by_the_core(
        F.assign_targets, anchors, truth, labels, allow_low_quality=low_quality
    )
    got = F.assign_targets(
        *(a.to(DEVICE) for a in (anchors, truth, labels)), allow_low_quality=low_quality
    )
    assert kernels_run == ["match"]
    assert torch.equal(got[0].cpu(), assigned) and (assigned >= 0).any()
    # A GPU has logarithms of its own.
    rtol = 0 if DEVICE == "cpu" else 1e-6
    torch.testing.assert_close(got[1].cpu(), deltas, rtol=rtol, atol=rtol)


def test_overlaps_at_a_threshold():
    """IoUs of exactly the number that the threshold becomes in float32."""
    truth = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    heights = torch.tensor([0.0, 5.0, 8.0, 9.0, 10.0, 20.0])
    anchors = torch.zeros(6, 4)
    anchors[:, 2], anchors[:, 3] = 10.0, heights
    for foreground, background in ((0.5, 0.4), (0.4, 0.4), (0.4, 0.25), (1.0, 0.45)):
        equal(F.match_anchors, anchors, truth, foreground, background)
        equal(F.match_anchors, anchors, truth, foreground, background, background)


def test_boxes_far_from_zero_and_large_ones():
    """Areas that overflow, unions that do, and coordinates that lose their last digits."""
    scale = torch.tensor([1e-30, 1e-19, 1e-3, 1e3, 1e9, 1e18, 1.8e19, 3e38]).repeat_interleave(9)
    anchors = boxes(5, 72, grid=False) * scale[:, None]
    anchors[::7] += 1e6
    for low_quality in LOW_QUALITY:
        equal(F.match_anchors, anchors, anchors[::2], 0.5, 0.4, low_quality)
    equal(F.nms, anchors, torch.arange(72.0), 0.3)


# ---------------------------------------------------------------- suppression


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("with_classes", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2, 31), (2, 32), (1, 3, 33), (100,)])
def test_suppression_is_that_of_the_core(kernels_run, shape, with_classes, grid):
    crowd = boxes(6, *shape, grid=grid)
    classes = torch.from_numpy(np.random.default_rng(1).integers(0, 3, shape))
    classes = classes + 2**40 if with_classes else None
    for threshold in THRESHOLDS:
        keep = equal(suppress, xp, crowd, classes, threshold)
        assert keep.shape == shape
    assert kernels_run == ["suppress"] * len(THRESHOLDS)


def test_a_long_chain():
    """Each box overlaps its neighbors alone: every second one stays."""
    x = 2.0 * torch.arange(300.0)
    chain = torch.stack([x, torch.zeros(300), x + 5, torch.ones(300)], dim=1)
    assert torch.equal(equal(F.nms, chain, -x, 0.4), torch.arange(0, 300, 2))


def test_indices_of_the_boxes_that_stay(kernels_run):
    crowd, random = boxes(7, 150, grid=False), np.random.default_rng(2)
    scores = torch.from_numpy(random.integers(0, 40, 150) / 40).float()
    scores[::9] = float("nan")
    classes = torch.from_numpy(random.integers(0, 3, 150))
    equal(F.nms, crowd, scores, 0.5)
    equal(F.batched_nms, crowd, scores, classes, 0.5)
    losses = scores.nan_to_num(0.5)
    equal(F.hard_example_mask, losses, 20, boxes=crowd, iou_threshold=0.5)
    assert kernels_run == ["suppress"] * 3


# ---------------------------------------------------------------- what they take


def test_half_types_are_computed_in_float32(kernels_run):
    big = torch.tensor([[0.0, 0.0, 512.0, 512.0], [0.0, 0.0, 512.0, 128.0]])
    for dtype in (torch.float16, torch.bfloat16):
        half = big.to(dtype)
        assert equal(F.match_anchors, half, half).tolist() == [0, 1]
        assert equal(F.nms, half, torch.tensor([1.0, 2.0]), 0.5).tolist() == [1, 0]
    assert kernels_run == ["match", "suppress"] * 2


def test_any_memory_layout():
    anchors, truth = boxes(8, 300, grid=False), boxes(9, 2, 7, grid=False)
    strided = torch.stack([anchors, anchors], dim=-1)[..., 0]
    equal(F.match_anchors, strided, truth.transpose(0, 1).contiguous().transpose(0, 1))
    equal(F.nms, strided[::2], torch.arange(150.0), 0.5)


def test_what_is_left_to_the_core(kernels_run, monkeypatch):
    anchors, truth = boxes(10, 40, grid=False).to(DEVICE), boxes(11, 5, grid=False).to(DEVICE)
    scores = torch.arange(40.0, device=DEVICE)
    F.match_anchors(anchors.double(), truth)
    F.match_anchors(anchors, truth[:0])
    F.match_anchors(anchors[:0], truth)
    F.nms(anchors.double(), scores, 0.5)
    F.nms(anchors[:0], scores[:0], 0.5)
    monkeypatch.setattr(torch_boxes, "MOST", 39)
    F.nms(anchors, scores, 0.5)
    assert kernels_run == []


def test_a_traced_graph_has_the_formula_in_it(kernels_run):
    from torch.fx.experimental.proxy_tensor import make_fx

    anchors, truth = boxes(12, 40, grid=False).to(DEVICE), boxes(13, 5, grid=False).to(DEVICE)
    graph = make_fx(lambda *pair: F.match_anchors(*pair))(anchors, truth)
    each = torch.func.vmap(lambda truth: F.match_anchors(anchors, truth))(truth[None])
    assert kernels_run == []
    assert torch.equal(graph(anchors, truth), F.match_anchors(anchors, truth))
    assert torch.equal(each[0], F.match_anchors(anchors, truth))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_the_host_waits_for_nothing():
    anchors, truth = boxes(14, 5000, grid=False).cuda(), boxes(15, 2, 20, grid=False).cuda()
    labels = torch.zeros(2, 20, dtype=torch.int64, device="cuda")
    crowd, scores = boxes(16, 2, 1000, grid=False).cuda(), torch.rand(1000, device="cuda")
    F.assign_targets(anchors, truth, labels, allow_low_quality=True)
    suppress(xp, crowd, None, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        F.assign_targets(anchors, truth, labels, allow_low_quality=True)
        suppress(xp, crowd, None, 0.5)
        F.hard_example_mask(scores, 100, boxes=crowd[0], iou_threshold=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
