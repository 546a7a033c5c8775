"""What runs on a GPU, without one: on fake CUDA tensors, which have devices but no values."""

from __future__ import annotations

import numpy as np
import pytest
from operands import DENSE, LABELLED

torch = pytest.importorskip("torch")
F = pytest.importorskip("focal.torch")
traffic = pytest.importorskip("benchmarks.traffic")

from focal.retinanet import PRESETS, TrainConfig  # noqa: E402
from focal.retinanet.torch import trainer as backend  # noqa: E402
from focal.retinanet.torch.network import GroupNorm  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
DEVICES = ["cuda:0", "cuda:1"]
CPU = torch.device("cpu")


def tensors(device):
    x = torch.zeros(6, 3, device=device, requires_grad=True)
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    return x, labels, torch.zeros(6, 3, device=device)


# ---------------------------------------------------------------- the counter itself


def counted(run):
    with traffic.fake_cuda():
        x = torch.zeros(256, 4, device="cuda:0")
        with traffic.Traffic() as found:
            run(x)
    return found


def test_what_is_counted():
    nbytes = 256 * 4 * 4
    found = counted(lambda x: (x + x).view(-1)[1:])
    assert dict(found.launches) == {"add": 1} and dict(found.bytes) == {"add": 3 * nbytes}
    assert counted(lambda x: x + x[:1].expand_as(x)).bytes["add"] == 2 * nbytes + 16
    assert found.peak == nbytes and not found.waits
    both = counted(lambda x: (x + 1) + (x + 2))
    assert both.peak == 3 * nbytes and both.live == 0
    one_by_one = counted(lambda x: x.add(1).add(2).add(3).add(4))
    assert one_by_one.peak == 2 * nbytes
    assert dict(counted(lambda x: x.cpu()).waits) == {"_to_copy": 1}
    assert dict(counted(lambda x: torch.ones(3).to(x.device)).waits) == {"_to_copy": 1}
    pinned = counted(lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True))
    waited_for = counted(lambda x: torch.ones(3).pin_memory().to(x.device))
    gaps = counted(lambda x: torch.ones(3, 2)[:, :1].pin_memory().to(x.device, non_blocking=True))
    assert waited_for.waits and gaps.waits
    assert dict(counted(lambda x: x[x > 0]).waits) == {"index": 1}
    assert dict(counted(lambda x: torch.nonzero(x)).waits) == {"nonzero": 1}
    assert not pinned.waits and dict(pinned.launches) == {"_to_copy": 1}


def test_a_mixture_of_devices_is_an_error():
    with pytest.raises(RuntimeError, match="cuda:0"):
        counted(lambda x: x + torch.ones(4))
    with pytest.raises(RuntimeError, match="cuda:1"):
        counted(lambda x: x + torch.ones(4, device="cuda:1"))


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [*DENSE, *LABELLED])
def test_losses_stay_on_their_device_and_nobody_waits(loss, dtype, device):
    with traffic.fake_cuda(device), traffic.Traffic() as counted:
        x, labels, y = tensors(device)
        x = x.detach().to(dtype).requires_grad_()
        t = y.to(dtype) if loss in DENSE else labels
        for reduction in ("none", "sum", "mean"):
            value = getattr(F, loss)(x, t, reduction=reduction).sum()
            (first,) = torch.autograd.grad(value, x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x)
        assert value.device == first.device == second.device == torch.device(device)
    assert counted.devices == {torch.device(device)}
    assert not counted.waits and counted.launches


@pytest.mark.parametrize("loss", ["sigmoid_focal_loss", "sparse_sigmoid_focal_loss"])
@pytest.mark.parametrize("kind", ["list", "array", "tensor", "scalar tensor", "own device"])
def test_alphas_follow_the_logits(loss, kind):
    with traffic.fake_cuda(), traffic.Traffic() as counted:
        x, labels, y = tensors("cuda:0")
        alphas = {
            "list": [0.1, 0.2, 0.3],
            "array": np.array([0.1, 0.2, 0.3]),
            "tensor": torch.tensor([0.1, 0.2, 0.3]),
            "scalar tensor": torch.tensor(0.25),
            "own device": torch.zeros(3, device="cuda:0"),
        }
        t = y if loss.startswith("sigmoid") else labels
        value = getattr(F, loss)(x, t, alpha=alphas[kind], reduction="sum")
        value.backward()
        assert value.device == x.grad.device == torch.device("cuda:0")
    assert sum(counted.waits.values()) <= (kind != "own device")


# ---------------------------------------------------------------- boxes


def boxes_of(count, device):
    return torch.zeros(count, 4, device=device)


WAITS = {"nms": 1, "batched_nms": 1}
"""How often the host waits: for the number of boxes. The rest waits for nothing."""
BOXES = {
    "assign_targets": lambda d: F.assign_targets(
        boxes_of(50, d), boxes_of(33, d)[None], torch.zeros(1, 33, dtype=torch.int64, device=d)
    ),
    "match_anchors": lambda d: F.match_anchors(
        boxes_of(50, d), boxes_of(3, d), allow_low_quality=True
    ),
    "encode and decode": lambda d: F.decode_boxes(
        F.encode_boxes(boxes_of(5, d), boxes_of(5, d)), boxes_of(5, d)
    ),
    "clip_boxes": lambda d: F.clip_boxes(boxes_of(5, d), (10, 10)),
    "box_iou": lambda d: F.box_iou(boxes_of(5, d), boxes_of(3, d)),
    "giou_loss": lambda d: F.giou_loss(boxes_of(5, d), boxes_of(5, d)),
    "smooth_l1_loss": lambda d: F.smooth_l1_loss(boxes_of(5, d), boxes_of(5, d)),
    "subsample": lambda d: F.subsample(
        torch.zeros(9, dtype=torch.int64, device=d), 4, noise=torch.zeros(9, device=d)
    ),
    "num_positives": lambda d: F.num_positives(torch.zeros(9, dtype=torch.int64, device=d)),
    "hard_example_mask": lambda d: F.hard_example_mask(
        torch.zeros(400, device=d), 10, boxes=boxes_of(400, d), iou_threshold=0.5
    ),
    "nms": lambda d: F.nms(boxes_of(400, d), torch.zeros(400, device=d), 0.5),
    "batched_nms": lambda d: F.batched_nms(
        boxes_of(400, d),
        torch.zeros(400, device=d),
        torch.zeros(400, dtype=torch.int64, device=d),
        0.5,
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", BOXES)
def test_boxes_stay_on_their_device(function, device):
    with traffic.fake_cuda(device), traffic.counted() as found:
        BOXES[function](device)
    assert found.devices - {CPU} == {torch.device(device)}
    assert sum(found.waits.values()) <= WAITS.get(function, 0), found.waits


# ---------------------------------------------------------------- the detector

TINY, R50 = (
    PRESETS[name].detector.replace(classes=("a", "b"), image_size=(64, 64))
    for name in ("tiny", "r50")
)
RUN = TrainConfig(batch_size=4, precision="bfloat16")
STEPS = {
    "r50": (R50, RUN),
    "float32": (R50.replace(norm="batch", backbone="resnet18"), RUN.replace(precision="float32")),
    "groups": (R50.replace(norm="group", head_norm="group", box_loss="giou"), RUN),
    "ohem": (TINY.replace(loss="ohem", normalizer="image"), RUN),
    "everything": (
        TINY.replace(normalizer="ema", allow_low_quality=True),
        RUN.replace(optimizer="adamw", ema=0.99, accumulate=2, recompute=True, clip_norm=1.0),
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing_and_stays_on_its_device(name, device):
    config, run = STEPS[name]
    with traffic.fake_cuda(device):
        trainer = traffic.trainer_on(device, config, run)
        batch = traffic.example_batch(run, config.image_size, 3)
        with traffic.counted():  # makes what is made once: anchors, the optimizer's state
            trainer.step(0, batch, 0.01)
        with traffic.counted() as found:
            losses = trainer.step(1, batch, 0.01)
        assert {x.device for x in losses.values()} == {torch.device(device)}
    assert found.devices - {CPU} == {torch.device(device)}
    assert not found.waits


def test_an_array_with_gaps_is_moved_without_waiting():
    with traffic.fake_cuda("cuda:0"), traffic.counted() as found:
        gaps = torch.ones(3, 2)[:, :1]  # of NumPy, a fake copy would have none
        assert backend._moved(gaps, torch.device("cuda:0")).shape == (3, 1)
    assert not found.waits and found.launches


def test_group_norm_stays_in_the_half_type_under_autocast():
    with traffic.fake_cuda():
        norm = traffic.on_fake_device(GroupNorm(4, 8), "cuda:0")
        x = torch.zeros(2, 8, 5, 4, dtype=torch.bfloat16, device="cuda:0")
        with torch.autocast("cuda", torch.bfloat16), traffic.Traffic() as found:
            assert norm(x).dtype == torch.bfloat16
    assert dict(found.launches) == {"_to_copy": 2, "native_group_norm": 1}  # weight and bias


def test_steps_and_inference_are_without_tf32(monkeypatch):
    """Forward and backward; the settings are those of the process before and after."""
    cudnn, seen = torch.backends.cudnn, []

    def look(*_):
        seen.append((cudnn.conv.fp32_precision, cudnn.benchmark))

    before = cudnn.conv.fp32_precision, cudnn.benchmark
    config, run = STEPS["float32"]
    with traffic.fake_cuda(), traffic.counted():
        trainer = traffic.trainer_on("cuda:0", config, run)
        trainer.model.register_forward_hook(look)
        trainer.model.backbone.body.conv1.weight.register_hook(look)
        trainer.step(0, traffic.example_batch(run, config.image_size, 3), 0.01)
        assert seen == [("ieee", True)] * 2
        seen.clear()
        images = np.zeros((1, 64, 64, 3), np.uint8)
        with pytest.raises(RuntimeError):  # fake results have no values to return
            backend.raw_outputs(trainer.model, images)
        with pytest.raises(RuntimeError):
            backend.detect(trainer.model, images, np.full((1, 2), 64))
    assert seen == [("ieee", True)] * 2
    assert (cudnn.conv.fp32_precision, cudnn.benchmark) == before


@pytest.mark.parametrize("device", DEVICES)
def test_detection_waits_for_its_results_alone(device):
    config = R50.replace(candidates=600)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    with traffic.fake_cuda(device):
        model = traffic.trainer_on(device, config, RUN).model.eval()
        model.anchors(config.image_size)  # once in a run
        with traffic.counted() as found, torch.inference_mode():
            sizes = backend._moved(np.full((2, 2), 64), model.scale.device)
            detections = backend.detections_of(model, images, sizes)
        assert {x.device for x in detections} == {torch.device(device)}
    assert found.devices - {CPU} == {torch.device(device)}
    assert not found.waits
