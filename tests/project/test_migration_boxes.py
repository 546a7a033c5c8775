"""docs/migration_boxes.md: the rules of each library in plain NumPy, and our calls held to them.

The functions that the page gives are taken from the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from backends import Backend
from folders import ROOT
from numpy.testing import assert_allclose, assert_array_equal
from pages import from_page

from focal import AnchorConfig
from focal.numpy import (
    anchors,
    assign_targets,
    batched_nms,
    box_area,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    match_anchors,
    nms,
)

PAGE = ROOT / "docs" / "migration_boxes.md"
YX = [1, 0, 3, 2]
CLIP = math.log(1000 / 16)
STRIDES, SIZES = (8, 16, 32, 64, 128), (32.0, 64.0, 128.0, 256.0, 512.0)
SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 3.0)


stretched, match_matrix = from_page(PAGE, "stretched"), from_page(PAGE, "match_matrix")
overwriting, forced = from_page(PAGE, "overwriting"), from_page(PAGE, "forced")


def reordered(boxes: np.ndarray, config: AnchorConfig) -> np.ndarray:
    """Scales before ratios, as the page writes it."""
    cells = boxes.reshape(-1, len(config.ratios), len(config.scales), 4)
    return cells.swapaxes(1, 2).reshape(-1, 4)


# ---------------------------------------------------------------- anchors


@dataclass
class Rule:
    """How a library makes the anchors of a pyramid."""

    scales_first: bool = False
    ratio_is_width: bool = False
    offset: float = 0.0
    step: str = "nominal"
    rounded: bool = False
    sides_stretch: bool = False
    yx: bool = False

    def boxes(self, size: tuple[int, int]) -> np.ndarray:
        found = []
        for stride, side in zip(STRIDES, SIZES, strict=True):
            rows, columns = (math.ceil(n / stride) for n in size)
            dy, dx = {
                "nominal": (stride, stride),
                "whole": (size[0] // rows, size[1] // columns),
                "exact": (size[0] / rows, size[1] / columns),
            }[self.step]
            cell = [(k, r) for r in RATIOS for k in SCALES]
            if self.scales_first:
                cell = [(k, r) for k in SCALES for r in RATIOS]
            for row in range(rows):
                for column in range(columns):
                    y, x = (row + self.offset) * dy, (column + self.offset) * dx
                    for k, r in cell:
                        length = int(side * k) if self.rounded else side * k
                        tall = math.sqrt(1 / r if self.ratio_is_width else r)
                        h, w = length * tall / 2, length / tall / 2
                        if self.rounded:
                            h, w = np.round(h), np.round(w)
                        if self.sides_stretch:
                            h, w = h * dy / stride, w * dx / stride
                        box = [x - w, y - h, x + w, y + h]
                        found.append([box[i] for i in YX] if self.yx else box)
        return np.array(found)


INVERSE = tuple(1 / r for r in RATIOS)
CORNER = AnchorConfig(offset=0.0, ratios=RATIOS)
WHOLE = AnchorConfig(offset=0.0, ratios=RATIOS, rounded=True, stretched=True)
CENTER, WIDE = AnchorConfig(ratios=RATIOS), AnchorConfig(ratios=INVERSE)

ANCHORS = {
    "torchvision": (Rule(step="whole", rounded=True), lambda s: anchors(s, WHOLE)),
    "detectron2": (Rule(scales_first=True), lambda s: reordered(anchors(s, CORNER), CORNER)),
    "detectron2's constructor": (
        Rule(scales_first=True, offset=0.5),
        lambda s: reordered(anchors(s, CENTER), CENTER),
    ),
    "mmdetection": (Rule(), lambda s: anchors(s, CORNER)),
    "keras-hub": (Rule(step="whole", rounded=True), lambda s: anchors(s, WHOLE)),
    "keras-cv": (
        Rule(scales_first=True, ratio_is_width=True, offset=0.5, yx=True),
        lambda s: reordered(anchors(s, WIDE), WIDE)[:, YX],
    ),
    "Model Garden": (
        Rule(scales_first=True, ratio_is_width=True, offset=0.5, step="exact", yx=True),
        lambda s: reordered(stretched(s, WIDE), WIDE)[:, YX],
    ),
}


@pytest.mark.parametrize("size", [(128, 256), (100, 136)])
@pytest.mark.parametrize("library", ANCHORS)
def test_anchors(library: str, size: tuple[int, int]) -> None:
    rule, ours = ANCHORS[library]
    assert_allclose(ours(size), rule.boxes(size), rtol=0, atol=1e-4)


def test_automl_anchors() -> None:
    rule = replace(ANCHORS["Model Garden"][0], sides_stretch=True)
    ours = reordered(anchors((128, 256), WIDE), WIDE)[:, YX]
    assert_allclose(ours, rule.boxes((128, 256)), rtol=0, atol=1e-4)
    # Another size: the boxes times step / stride.
    size, levels = np.array((100, 136)), []
    for stride, side in zip(STRIDES, SIZES, strict=True):
        step = size / -(-size // stride)
        level = AnchorConfig((stride,), (side,), ratios=INVERSE)
        boxes = anchors(tuple(size), level) * np.tile(step[::-1] / stride, 2)
        levels.append(reordered(boxes, level)[:, YX])
    assert_allclose(np.concatenate(levels), rule.boxes((100, 136)), rtol=0, atol=1e-4)


def test_where_the_greatest_stride_divides_the_image_nothing_stretches() -> None:
    for size in ((512, 512), (640, 1024)):
        assert_array_equal(anchors(size, WHOLE), anchors(size, replace(WHOLE, stretched=False)))
        assert_allclose(stretched(size, CENTER), anchors(size, CENTER), atol=1e-4)


def test_torchvision_strides_at_800_by_1088() -> None:
    strides = [(800 // -(-800 // s), 1088 // -(-1088 // s)) for s in (64, 128)]
    assert strides == [(61, 64), (114, 120)]
    nominal = AnchorConfig(offset=0.0, rounded=True)
    apart = anchors((800, 1088), replace(nominal, stretched=True)) - anchors((800, 1088), nominal)
    assert np.abs(apart).max() == 84


# ---------------------------------------------------------------- matching

ANCHORS_320 = anchors((320, 320))


def random_boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    corner = rng.uniform(0, 250, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(8, 160, (n, 2))], 1).astype(np.float32)


def cases() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [random_boxes(rng, n) for n in (1, 2, 3, 5, 8, 13, 21)] + [
        np.array([[0, 0, 40, 40], [0, 0, 40, 40], [100, 100, 101, 101]], np.float32)
    ]


def best(iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best overlap of each anchor, and the first box that has it; iou is (anchors, boxes)."""
    most, box = np.zeros(len(iou)), np.zeros(len(iou), int)
    for j, overlap in enumerate(iou.T):
        better = overlap > most
        most[better], box[better] = overlap[better], j
    return most, box


@pytest.mark.parametrize("boxes", cases(), ids=len)
def test_torchvision_and_detectron2_matches(boxes: np.ndarray) -> None:
    iou = box_iou(ANCHORS_320, boxes)
    most, box = best(iou)
    for low_quality in (False, True):
        matched = most >= 0.5
        if low_quality:
            matched = matched | (iou == iou.max(axis=0)).any(axis=1)
        there = np.where(matched, box, np.where(most < 0.4, -1, -2))
        ours = match_anchors(ANCHORS_320, boxes, 0.5, 0.4, low_quality)
        assert_array_equal(ours, there)
        labels = np.where(ours >= 0, 1, np.where(ours == -2, -1, 0))
        assert_array_equal(labels, np.where(matched, 1, np.where(most < 0.4, 0, -1)))


def test_a_box_that_overlaps_nothing() -> None:
    """Elsewhere its greatest IoU, 0, is that of every anchor, and all are matched."""
    boxes = np.array([[10, 10, 60, 60], [900, 900, 950, 950]], np.float32)
    iou = box_iou(ANCHORS_320, boxes)
    assert (iou == iou.max(axis=0)).any(axis=1).all()  # torchvision, detectron2
    assert mmdetection(iou, 0.5, 0.4, 0.0).tolist() == [2] * len(iou)
    assert set(match_anchors(ANCHORS_320, boxes, allow_low_quality=True)) == {-2, -1, 0}
    assert set(overwriting(ANCHORS_320, boxes, 0.5, 0.4, 0.0)) == {-2, -1, 0}


def mmdetection(iou: np.ndarray, foreground: float, background: float, least: float) -> np.ndarray:
    """Indices that count from 1, 0 background, -1 ignored: the four steps in their order."""
    most, box = best(iou)
    found = np.full(len(iou), -1)
    found[most < background] = 0
    found[most >= foreground] = box[most >= foreground] + 1
    for i in range(iou.shape[1]):
        if iou[:, i].max() >= least:
            found[iou[:, i] == iou[:, i].max()] = i + 1
    return found


@pytest.mark.parametrize("boxes", cases(), ids=len)
def test_mmdetection_matches(boxes: np.ndarray) -> None:
    iou = box_iou(ANCHORS_320, boxes)
    for least in (0.0, 0.3):
        there = mmdetection(iou, 0.5, 0.4, least)
        assert_array_equal(overwriting(ANCHORS_320, boxes, 0.5, 0.4, least) + 1, there)
    without = mmdetection(iou, 0.5, 0.4, math.inf)
    assert_array_equal(match_anchors(ANCHORS_320, boxes) + 1, without)
    most, box = best(iou)  # neg_iou_thr = (0.1, 0.4)
    there = np.full(len(iou), -1)
    there[(most >= 0.1) & (most < 0.4)] = 0
    there[most >= 0.5] = box[most >= 0.5] + 1
    box, value = match_matrix(iou, [0.1, 0.4, 0.5], [-2, -1, -2, 1])
    assert_array_equal(np.where(value == 1, box, value) + 1, there)


def test_mmdetection_takes_an_anchor_from_a_better_box() -> None:
    rng = np.random.default_rng(1)
    taken = 0
    for _ in range(20):
        boxes = random_boxes(rng, 12)
        there = mmdetection(box_iou(ANCHORS_320, boxes), 0.5, 0.4, 0.0)
        ours = match_anchors(ANCHORS_320, boxes, allow_low_quality=True) + 1
        differ = there != ours
        assert (ours[differ] > 0).all() and (there[differ] > 0).all()
        taken += differ.sum()
    assert taken > 0


def test_mmdetection_crowds() -> None:
    boxes, crowd = cases()[3], np.array([[50, 50, 200, 150]], np.float32)
    x1, y1, x2, y2 = ANCHORS_320.T
    width = np.minimum(x2, 200) - np.maximum(x1, 50)
    height = np.minimum(y2, 150) - np.maximum(y1, 50)
    covered = np.maximum(width, 0) * np.maximum(height, 0) / ((x2 - x1) * (y2 - y1))
    iou, area = box_iou(ANCHORS_320, crowd), box_area(ANCHORS_320)[:, None]
    iof = iou / (1 + iou) * (area + box_area(crowd)) / area
    assert_allclose(iof[:, 0], covered, atol=1e-6)
    ignored = np.where(iof.max(axis=1) > 0.5, -2, match_anchors(ANCHORS_320, boxes))
    assert (ignored == -2).sum() >= (covered > 0.5).sum() > 0


def tensorflow_family(iou: np.ndarray, foreground: float, background: float) -> np.ndarray:
    """Model Garden, automl and keras-cv: each box's first best anchor, the lower box first."""
    most, box = best(iou)
    found = np.where(most >= foreground, box, np.where(most < background, -1, -2))
    wanted: dict[int, int] = {}
    for i in range(iou.shape[1]):
        wanted.setdefault(int(iou[:, i].argmax()), i)
    for anchor, i in wanted.items():
        found[anchor] = i
    return found


@pytest.mark.parametrize("boxes", cases(), ids=len)
def test_forced_matches(boxes: np.ndarray) -> None:
    far = np.concatenate([boxes, np.array([[900, 900, 950, 950]], np.float32)])
    for some in (boxes, far):
        iou = box_iou(ANCHORS_320, some)
        for thresholds in ((0.5, 0.5), (0.5, 0.4)):
            there = tensorflow_family(iou, *thresholds)
            assert_array_equal(forced(ANCHORS_320, some, *thresholds), there)


@pytest.mark.parametrize("boxes", cases(), ids=len)
def test_matrices_of_ious(boxes: np.ndarray) -> None:
    iou = box_iou(ANCHORS_320, boxes)
    box, value = match_matrix(iou, [0.4, 0.5], [-1, -2, 1])
    ours = match_anchors(ANCHORS_320, boxes)
    assert_array_equal(np.where(value == 1, box, value), ours)
    box, value = match_matrix(iou, [0.4, 0.5], [-1, -2, 1], low_quality=True)
    ours = match_anchors(ANCHORS_320, boxes, allow_low_quality=True)
    assert_array_equal(np.where(value == 1, box, value), ours)


def test_matrices_with_more_thresholds_and_without_boxes() -> None:
    iou = np.array([[0.04, 0, 0, 0], [0, 0, 1.0, 0]])
    box, value = match_matrix(iou, [0.0, 0.2, 0.5], [-3, -2, -1, 1])
    assert (box.tolist(), value.tolist()) == ([0, 2], [-2, 1])
    box, value = match_matrix(np.zeros((2, 0)), [0.4, 0.5], [-1, -2, 1])
    assert (box.tolist(), value.tolist()) == ([0, 0], [-1, -1])
    assert_array_equal(match_anchors(ANCHORS_320, np.zeros((0, 4), np.float32)), -1)


def test_keras_labels_and_deltas() -> None:
    """The encoders of keras-cv and keras-hub; only matched anchors have deltas that count."""
    boxes, classes = cases()[4], np.arange(8) % 3
    iou = box_iou(ANCHORS_320, boxes)
    most, box = best(iou)
    there = np.where(most >= 0.5, classes[box], np.where(most < 0.4, -1, -2))
    variance = np.array([0.1, 0.1, 0.2, 0.2])
    labels, deltas = assign_targets(
        ANCHORS_320, boxes, classes, weights=tuple((1 / variance)[[1, 0, 3, 2]])
    )
    assert_array_equal(labels, there)
    matched = labels >= 0
    wanted = center_code(boxes[box], ANCHORS_320)[:, YX] / variance
    assert_allclose(deltas[:, YX][matched], wanted[matched], rtol=1e-4, atol=1e-5)
    assert matched.any() and not deltas[~matched].any()


# ---------------------------------------------------------------- box coders


def center_code(boxes: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """dx, dy, dw, dh of the R-CNN paper."""
    size, prior = boxes[:, 2:] - boxes[:, :2], priors[:, 2:] - priors[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - priors[:, :2] - priors[:, 2:]) / 2
    return np.concatenate([shift / prior, np.log(size / prior)], axis=1)


def center_decode(deltas: np.ndarray, priors: np.ndarray) -> np.ndarray:
    prior = priors[:, 2:] - priors[:, :2]
    center = (priors[:, :2] + priors[:, 2:]) / 2 + deltas[:, :2] * prior
    half = np.exp(deltas[:, 2:]) * prior / 2
    return np.concatenate([center - half, center + half], axis=1)


RNG = np.random.default_rng(2)
PRIORS, BOXES = (random_boxes(RNG, 20).astype(float) for _ in range(2))
DELTAS = RNG.normal(0, 4, (20, 4))
WEIGHTS = np.array([10.0, 10.0, 5.0, 5.0])


def test_torchvision_and_detectron2_coders() -> None:
    code = center_code(BOXES, PRIORS) * WEIGHTS
    assert_allclose(encode_boxes(BOXES, PRIORS, WEIGHTS), code, rtol=1e-9, atol=1e-12)
    deltas = np.random.default_rng(3).normal(0, 20, (20, 12))  # K = 3
    ours = decode_boxes(deltas.reshape(-1, 3, 4), PRIORS[:, None], WEIGHTS)
    for k in range(3):
        some = deltas[:, 4 * k : 4 * k + 4] / WEIGHTS
        some[:, 2:] = np.minimum(some[:, 2:], CLIP)
        assert_allclose(ours[:, k], center_decode(some, PRIORS), rtol=1e-9, atol=1e-9)
        assert_array_equal(ours.reshape(-1, 12)[:, 4 * k : 4 * k + 4], ours[:, k])


def test_a_box_without_area() -> None:
    boxes, priors = np.array([[3.0, 3, 3, 5]]), np.array([[0.0, 0, 4, 4]])
    with np.errstate(divide="ignore"):
        assert center_code(boxes, priors)[0, 2] == -math.inf
    assert np.isfinite(encode_boxes(boxes, priors)).all()


def test_mmdetection_coder() -> None:
    means, stds = np.array([0.1, 0.0, 0.2, 0.0]), np.array([0.1, 0.1, 0.2, 0.2])
    there = (center_code(BOXES, PRIORS) - means) / stds
    ours = encode_boxes(BOXES, PRIORS, 1 / stds) - means / stds
    assert_allclose(ours, there, rtol=1e-9, atol=1e-9)
    deltas = DELTAS * 8
    denormalized = deltas * stds
    denormalized[:, 2:] = np.clip(denormalized[:, 2:], -CLIP, CLIP)
    assert (deltas * stds)[:, 2:].min() < -CLIP  # so that the lower clamp is met
    there = np.clip(center_decode(denormalized, PRIORS), 0, 320)
    clamped = deltas.copy()
    clamped[:, 2:] = np.maximum(clamped[:, 2:], -CLIP / stds[2:])
    ours = clip_boxes(decode_boxes(clamped, PRIORS, 1 / stds), (320, 320))
    assert_allclose(ours, there, rtol=1e-9, atol=1e-9)
    only_above = clip_boxes(decode_boxes(deltas, PRIORS, 1 / stds), (320, 320))
    assert not np.allclose(only_above, there)


def test_keras_and_tensorflow_coders() -> None:
    """(y, x) everywhere: the variances, too, belong to dy, dx, dh, dw."""
    variance = np.array([0.1, 0.3, 0.2, 0.5])
    there = center_code(BOXES, PRIORS)[:, YX] / variance
    ours = encode_boxes(BOXES, PRIORS, (1 / variance)[YX])[..., YX]
    assert_allclose(ours, there, rtol=1e-9, atol=1e-9)
    there = center_decode((DELTAS * variance)[:, YX], PRIORS)[:, YX]
    ours = decode_boxes(DELTAS[:, YX], PRIORS, (1 / variance)[YX], clip=80.0)[:, YX]
    assert_allclose(ours, there, rtol=1e-9, atol=1e-9)
    plain = encode_boxes(BOXES, PRIORS, 1 / variance)  # keras's "center_xywh"
    assert_allclose(plain, center_code(BOXES, PRIORS) / variance, rtol=1e-9, atol=1e-9)
    huge = np.array([[0.0, 0, 30, 30]])
    assert_allclose(
        decode_boxes(huge, PRIORS[:1], clip=80.0), center_decode(huge, PRIORS[:1]), rtol=1e-9
    )
    clamped = np.minimum(DELTAS[:, YX] / WEIGHTS, [math.inf, math.inf, CLIP, CLIP])
    garden = center_decode(clamped, PRIORS)[:, YX]
    ours = decode_boxes(DELTAS[:, YX], PRIORS, WEIGHTS)[:, YX]
    assert_allclose(ours, garden, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- NMS


def greedy(
    boxes: np.ndarray, scores: np.ndarray, threshold: float, at_equal: bool = False
) -> list[int]:
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        iou = box_iou(boxes[i : i + 1], boxes[kept])[0]
        drops = iou >= threshold if at_equal else iou > threshold
        if not drops.any():
            kept.append(int(i))
    return kept


HALF = np.array([[0.0, 0, 10, 10], [0, 0, 10, 5], [40, 40, 50, 50]])  # the first two: IoU 0.5
SCORES = np.array([0.9, 0.8, 0.7])


def test_nms_at_the_threshold() -> None:
    assert nms(HALF, SCORES, 0.5).tolist() == greedy(HALF, SCORES, 0.5) == [0, 1, 2]
    below = float(np.nextafter(0.5, 0))
    assert nms(HALF, SCORES, below).tolist() == greedy(HALF, SCORES, 0.5, at_equal=True) == [0, 2]
    rng = np.random.default_rng(4)
    for threshold in (0.3, 0.5, 0.7):
        boxes, scores = random_boxes(rng, 60), rng.random(60)
        assert nms(boxes, scores, threshold).tolist() == greedy(boxes, scores, threshold)


def test_nms_by_class() -> None:
    rng = np.random.default_rng(5)
    boxes, scores, classes = random_boxes(rng, 60), rng.random(60), rng.integers(0, 3, 60)
    shifted = boxes + (classes * (boxes.max() + 1))[:, None]
    kept = batched_nms(boxes, scores, classes, 0.5)
    assert kept.tolist() == greedy(shifted, scores, 0.5)
    # A shift by the greatest coordinate does not part classes that reach below 0.
    boxes, classes = np.array([[0.0, 0, 10, 10], [-11, -11, -1, -1]]), np.array([0, 1])
    shifted = boxes + (classes * (boxes.max() + 1))[:, None]
    assert greedy(shifted, SCORES[:2], 0.5) == [0]
    assert batched_nms(boxes, SCORES[:2], classes, 0.5).tolist() == [0, 1]


def model_garden_nms(boxes: np.ndarray, threshold: float) -> list[int]:
    """Rounds in which whoever is not overlapped by more than .5 drops others: .5 is fixed."""
    n = len(boxes)
    iou = np.triu(box_iou(boxes, boxes), 1)
    iou = np.where(iou >= threshold, iou, 0)
    before = None
    while before is None or (before - iou).sum() > 0.5:
        before = iou
        may_drop = (iou.max(axis=0) <= 0.5)[:, None]
        iou = iou * ((may_drop * iou).max(axis=0) <= 0.5)[:, None]
    return [i for i in range(n) if not iou[:, i].any()]


def test_model_garden_nms_below_a_half() -> None:
    """A chain: each box overlaps the next by 0.43. The second falls, and so the third stands."""
    chain = np.array([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    assert nms(chain, SCORES, 0.3).tolist() == greedy(chain, SCORES, 0.3) == [0, 2]
    assert model_garden_nms(chain, 0.3) == [0]
    tight = chain * [0.5, 1, 1, 1]
    for boxes in (chain, tight, HALF):
        below = float(np.nextafter(0.5, 0))
        assert model_garden_nms(boxes, 0.5) == nms(boxes, SCORES, below).tolist()


# ---------------------------------------------------------------- formats


def test_formats() -> None:
    x1, y1, x2, y2 = BOXES.T
    xywh = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
    centers = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
    b = xywh
    assert_allclose(np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1), BOXES)
    b = centers
    ours = np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], axis=1)
    assert_allclose(ours, BOXES)
    assert_array_equal(np.stack([y1, x1, y2, x2], axis=1)[..., YX], BOXES)
    relative = np.stack([x1 / 640, y1 / 480, x2 / 640, y2 / 480], axis=1)
    assert_allclose(relative * [640, 480, 640, 480], BOXES)


def test_whole_numbers_and_empty_lists() -> None:
    whole = np.array([[10, 20, 40, 60]])
    assert box_iou(whole, whole).dtype == np.float32
    assert_array_equal(box_iou(whole, whole), [[1]])
    boxes = whole.astype(np.float32)
    none = np.array([], np.float32).reshape(-1, 4)
    assert box_iou(boxes, none).shape == (1, 0)
    assert encode_boxes(none, none).shape == decode_boxes(none, none).shape == (0, 4)
    assert nms(none, np.zeros(0, np.float32), 0.5).shape == (0,)
    assert_array_equal(box_iou(np.zeros((1, 4)), np.zeros((1, 4))), [[0]])


def test_image_sizes_as_floats(backend: Backend) -> None:
    boxes = np.array([[-5.0, 10.0, 50.0, 99.0]], np.float32)
    for size in ((32.0, 40.0), (np.float32(32), np.float64(40))):
        assert_array_equal(backend("clip_boxes", boxes, size), [[0, 10, 40, 32]])
        assert_array_equal(backend("anchors", size), backend("anchors", (32, 40)))
    with pytest.raises((TypeError, ValueError), match="image_size"):
        backend("clip_boxes", boxes, (32.5, 40.0))
