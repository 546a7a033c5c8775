"""Targets and objective of a batch, against the same done image by image, anchor by anchor."""

import importlib
import math

import numpy as np
import pytest

import focal.numpy as F
from focal.core.anchors import AnchorConfig
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.objective import Targets, losses, targets

CONFIG = RetinaNetConfig(
    classes=("a", "b", "c"),
    image_size=(64, 48),
    levels=(3, 4, 5),
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(10.0, 20.0, 40.0), scales=(1.0,)),
    box_beta=0.1,
)
ANCHORS = F.anchors(CONFIG.image_size, CONFIG.anchors)


@pytest.fixture(params=("numpy", "torch"))
def library(request):
    """The frameworks that detectors run on."""
    pytest.importorskip(request.param)
    return importlib.import_module(f"focal.{request.param}")


def array(library, x):
    return library.xp.constant(np.asarray(x), None)


def own_normalizer(library, target, config):
    """Of a batch alone: its images, or its positives."""
    if config.normalizer == "image":
        return target.labels.shape[0]
    return library.num_positives(target.labels)


def run(library, batch, config, normalizer=None):
    """Targets and losses of a batch in a framework, as NumPy arrays, and the positives."""
    logits, deltas, boxes, labels = (array(library, x) for x in batch)
    anchors = array(library, ANCHORS)
    target = targets(library, anchors, boxes, labels, config)
    if normalizer is None:
        normalizer = own_normalizer(library, target, config)
    found = losses(library, logits, deltas, anchors, target, config, normalizer)
    target = Targets(*map(np.asarray, target))
    return target, [*(float(x) for x in found), int((target.labels >= 0).sum())]


def make_batch(seed=0, counts=(7, 0, 4), rows=8):
    """Random outputs, and boxes near anchors so that all of positive, ignored and background occur.

    Image i has `counts[i]` boxes; the rest of the `rows` is padding.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, 2, (len(counts), len(ANCHORS), 3)).astype(np.float32)
    deltas = rng.normal(0, 0.5, (len(counts), len(ANCHORS), 4)).astype(np.float32)
    boxes = np.zeros((len(counts), rows, 4), np.float32)
    labels = np.full((len(counts), rows), -1)
    for image, count in enumerate(counts):
        near = ANCHORS[rng.choice(len(ANCHORS), count, replace=False)]
        boxes[image, :count] = near + rng.uniform(-2, 2, (count, 4))
        labels[image, :count] = rng.integers(0, 3, count)
    return logits, deltas, boxes, labels


def naive_labels(boxes, labels, config):
    """Label and matched box of every anchor of one image: one anchor at a time."""
    real = labels >= 0
    boxes, labels = boxes[real], labels[real]
    overlaps = F.box_iou(ANCHORS, boxes) if len(boxes) else np.zeros((len(ANCHORS), 0))
    assigned, matched = [], []
    for row in overlaps:
        best = int(row.argmax()) if len(row) else None
        forced = False
        if config.allow_low_quality is not False:
            floor = float(config.allow_low_quality) if config.allow_low_quality is not True else 0
            forced = any(
                row[j] == overlaps[:, j].max() and row[j] > 0 and row[j] >= floor
                for j in range(len(row))
            )
        if best is not None and (row[best] >= config.foreground or forced):
            assigned.append(labels[best])
        elif best is None or row[best] < config.background:
            assigned.append(-1)
        else:
            assigned.append(-2)
        matched.append(boxes[best] if assigned[-1] >= 0 else np.zeros(4, np.float32))
    return np.array(assigned), np.array(matched)


def naive_image(logits, deltas, boxes, labels, config):
    """Sums of one image: classification, box, positives; in float64."""
    assigned, matched = naive_labels(boxes, labels, config)
    used, positive = assigned != -2, assigned >= 0
    onehot = (assigned[:, None] == np.arange(3)).astype(np.float64)
    classification = F.sigmoid_focal_loss(
        logits[used].astype(np.float64), onehot[used], config.alpha, config.gamma, "sum"
    )
    deltas, anchors = deltas[positive].astype(np.float64), ANCHORS[positive].astype(np.float64)
    matched = matched[positive].astype(np.float64)
    if config.box_loss == "giou":
        box = F.giou_loss(F.decode_boxes(deltas, anchors), matched, "sum")
    else:
        wanted = F.encode_boxes(matched, anchors)
        box = F.smooth_l1_loss(deltas, wanted, config.box_beta, "sum")
    return np.array([classification, box * config.box_weight, positive.sum()])


def naive(batch, config, normalizer=None):
    images = np.array([naive_image(*image, config) for image in zip(*batch, strict=True)])
    count = images[:, 2].sum()
    if config.normalizer == "image":
        parts = (images[:, :2] / np.maximum(images[:, 2:], 1)).mean(axis=0)
    else:
        parts = images[:, :2].sum(axis=0) / max(1, count if normalizer is None else normalizer)
    return [*parts, count]


CONFIGS = {
    "paper": CONFIG,
    "L1": CONFIG.replace(box_beta=0.0),
    "giou": CONFIG.replace(box_loss="giou"),
    "box weight": CONFIG.replace(box_weight=2.5),
    "cross entropy": CONFIG.replace(alpha=None, gamma=0.0),
    "low quality": CONFIG.replace(allow_low_quality=True, foreground=0.7, background=0.3),
    "low quality above a floor": CONFIG.replace(allow_low_quality=0.65, foreground=0.8),
    "each image": CONFIG.replace(normalizer="image"),
    "each image, giou": CONFIG.replace(normalizer="image", box_loss="giou", box_weight=2.0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_is_the_sum_of_its_anchors(library, config, seed):
    batch = make_batch(seed)
    target, found = run(library, batch, config)
    for image in range(3):
        assigned, _ = naive_labels(batch[2][image], batch[3][image], config)
        np.testing.assert_array_equal(target.labels[image], assigned)
    expected = naive(batch, config)
    assert expected[2] >= 4 and (target.labels == -2).any()  # the batch has something to test
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_deltas_lead_from_the_anchor_to_its_box(library, seed):
    batch = make_batch(seed)
    target, _ = run(library, batch, CONFIG)
    for image in range(3):
        assigned, matched = naive_labels(batch[2][image], batch[3][image], CONFIG)
        positive = assigned >= 0
        reached = F.decode_boxes(target.deltas[image], ANCHORS)
        np.testing.assert_allclose(reached[positive], matched[positive], rtol=1e-5, atol=1e-4)
        assert not target.deltas[image][~positive].any()


@pytest.mark.parametrize("normalizer", [1.0, 2.5, 37.5])
@pytest.mark.parametrize("word", ["batch", "ema"])
def test_a_normalizer_of_the_callers(library, normalizer, word):
    batch = make_batch()
    _, found = run(library, batch, CONFIG.replace(normalizer=word), normalizer)
    assert found == pytest.approx(naive(batch, CONFIG, normalizer), rel=1e-5)


def test_replicas_with_the_common_normalizer_add_up_to_the_whole_batch(library):
    batch = make_batch(counts=(5, 1, 0, 2))
    _, whole = run(library, batch, CONFIG)
    halves = [
        run(library, [x[part] for x in batch], CONFIG, normalizer=whole[2])[1]
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert np.sum(halves, axis=0) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_padding_does_nothing(library, config):
    logits, deltas, boxes, labels = make_batch(counts=(4, 2), rows=4)
    longer = np.pad(boxes, ((0, 0), (0, 9), (0, 0)))
    padded = logits, deltas, longer, np.pad(labels, ((0, 0), (0, 9)), constant_values=-1)
    target, found = run(library, (logits, deltas, boxes, labels), config)
    padded_target, padded_found = run(library, padded, config)
    np.testing.assert_array_equal(padded_target.labels, target.labels)
    np.testing.assert_array_equal(padded_target.deltas, target.deltas)
    assert padded_found == found


@pytest.mark.parametrize("rows", [0, 8])
@pytest.mark.parametrize("normalizer", ["batch", "image"])
def test_images_without_boxes_are_background(library, rows, normalizer):
    batch = make_batch(counts=(0, 0), rows=rows)
    config = CONFIG.replace(normalizer=normalizer)
    target, found = run(library, batch, config)
    assert (target.labels == -1).all()
    assert found == pytest.approx(naive(batch, config), rel=1e-5)
    assert found[0] > 0 and found[1:] == [0, 0]


def test_the_namespaces_agree():
    pytest.importorskip("torch")
    import focal.torch

    batch = make_batch(3, counts=(3, 0, 6))
    for config in CONFIGS.values():
        ours, theirs = run(F, batch, config), run(focal.torch, batch, config)
        np.testing.assert_array_equal(ours[0].labels, theirs[0].labels)
        np.testing.assert_allclose(ours[0].deltas, theirs[0].deltas, rtol=1e-6, atol=1e-6)
        assert theirs[1] == pytest.approx(ours[1], rel=1e-6)


# Gradients


def gradients(batch, config):
    """Gradient of classification + box in the logits and the deltas, and the targets."""
    torch = pytest.importorskip("torch")
    import focal.torch

    logits, deltas, boxes, labels = (torch.tensor(x) for x in batch)
    logits.requires_grad_()
    deltas.requires_grad_()
    anchors = torch.tensor(ANCHORS)
    target = targets(focal.torch, anchors, boxes, labels, config)
    normalizer = own_normalizer(focal.torch, target, config)
    parts = losses(focal.torch, logits, deltas, anchors, target, config, normalizer)
    found = torch.autograd.grad(parts.classification + parts.box, (logits, deltas))
    return [x.numpy() for x in found], Targets(*(x.numpy() for x in target))


@pytest.mark.parametrize("normalizer", ["batch", "image"])
def test_the_gradient_is_the_closed_form(normalizer):
    batch = make_batch()
    config = CONFIG.replace(normalizer=normalizer, box_weight=1.5)
    (by_logits, by_deltas), target = gradients(batch, config)
    positive = target.labels >= 0
    if normalizer == "image":
        scale = 3 * np.maximum(1, positive.sum(axis=1))[:, None, None]
    else:
        scale = positive.sum()

    onehot = (target.labels[..., None] == np.arange(3)).astype(np.float32)
    slope = F.sigmoid_focal_loss_grad(batch[0], onehot, config.alpha, config.gamma)
    slope[target.labels == -2] = 0
    np.testing.assert_allclose(by_logits, slope / scale, rtol=1e-5, atol=1e-9)

    slope = np.clip((batch[1] - target.deltas) / config.box_beta, -1, 1) * config.box_weight
    slope[~positive] = 0
    np.testing.assert_allclose(by_deltas, slope / scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_without_boxes_nothing_pulls_at_the_deltas(config):
    logits, deltas, boxes, labels = make_batch(counts=(0, 0))
    extreme = np.where(deltas > 0, np.float32(1e4), np.float32(-1e4))  # what decoding could spoil
    (by_logits, by_deltas), _ = gradients((logits, extreme, boxes, labels), config)
    assert not by_deltas.any()
    assert np.isfinite(by_logits).all() and (by_logits > 0).any()


def test_extreme_outputs_have_finite_losses_and_gradients(library):
    logits, deltas, boxes, labels = make_batch()
    batch = logits * 1e4, deltas * 1e3, boxes, labels
    for config in CONFIGS.values():
        assert all(math.isfinite(x) for x in run(library, batch, config)[1])
        assert all(np.isfinite(x).all() for x in gradients(batch, config)[0])


# Batches with nothing to find, in every framework that differentiates


@pytest.mark.parametrize("normalizer", ["batch", "image"])
@pytest.mark.parametrize("labels", [(-1, -1), (-2, -2), (-1, -2)], ids=str)
def test_batches_without_positives(autodiff, labels, normalizer):
    """All background, all ignored, and one image of each: finite, and the closed form's slope."""
    library = importlib.import_module(f"focal.{autodiff.name}")
    config = CONFIG.replace(normalizer=normalizer)
    logits, deltas, _, _ = make_batch(counts=(0, 0))
    assigned = np.repeat(np.array(labels, np.int32)[:, None], len(ANCHORS), axis=1)
    wanted = np.zeros_like(deltas)

    def total(logits, deltas):
        target = Targets(autodiff.asarray(assigned), autodiff.asarray(wanted))
        anchors = autodiff.asarray(ANCHORS)
        normalizer = own_normalizer(library, target, config)
        parts = losses(library, logits, deltas, anchors, target, config, normalizer)
        return parts.classification + parts.box

    x, d = autodiff.asarray(logits), autodiff.asarray(deltas)
    scale = 2 if normalizer == "image" else 1
    loss = F.sigmoid_focal_loss(logits, np.zeros_like(logits), config.alpha, config.gamma)
    slope = F.sigmoid_focal_loss_grad(logits, np.zeros_like(logits), config.alpha, config.gamma)
    used = (assigned == -1)[..., None]
    expected = float((loss * used).sum()) / scale
    assert float(autodiff.numpy(total(x, d))) == pytest.approx(expected, rel=1e-5, abs=0)
    by_logits = autodiff.grad(lambda a: total(a, d), x)
    np.testing.assert_allclose(by_logits, slope * used / scale, rtol=1e-5, atol=1e-9)
    assert not autodiff.grad(lambda a: total(x, a), d).any()
