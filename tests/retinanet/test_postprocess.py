"""Detections of a batch, against the same thing done with plain loops, and on cases by hand."""

import importlib
import math

import numpy as np
import pytest

import focal.numpy as F
from focal.core.anchors import AnchorConfig, level_shapes
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.postprocess import FEW, Detections, _top, detections

CONFIG = RetinaNetConfig(
    classes=("a", "b", "c"),
    image_size=(64, 48),
    levels=(3, 4, 5),
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(12.0, 24.0, 48.0), scales=(1.0,)),
    score_threshold=0.2,
    candidates=60,
    max_detections=20,
)
ANCHORS = F.anchors(CONFIG.image_size, CONFIG.anchors)
SIZES = np.array([[64, 48], [40, 48], [64, 1]])
NAMESPACES = ("numpy", "torch")


@pytest.fixture(params=NAMESPACES)
def name(request):
    return request.param


def run(name, logits, deltas, sizes, config=CONFIG, anchors=ANCHORS):
    pytest.importorskip(name)
    library = importlib.import_module(f"focal.{name}")
    arrays = (library.xp.constant(np.asarray(x), None) for x in (logits, deltas, anchors, sizes))
    return Detections(*map(np.asarray, detections(library, *arrays, config)))


def outputs(seed, classes=3, spread=2.0, batch=3):
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, spread, (batch, len(ANCHORS), classes)).astype(np.float32)
    deltas = rng.normal(0, 0.3, (batch, len(ANCHORS), 4)).astype(np.float32)
    return logits, deltas


def naive(logits, deltas, size, config):
    """Boxes, scores and labels of one image, best first."""
    candidates, start = [], 0
    for rows, columns in level_shapes(config.image_size, config.anchors):
        stop = start + rows * columns * config.anchors.per_cell
        level = [
            (float(logits[anchor, label]), anchor, label)
            for anchor in range(start, stop)
            for label in range(logits.shape[1])
        ]
        candidates += sorted(level, reverse=True)[: config.candidates]
        start = stop
    height, width = size
    kept = []
    for logit, anchor, label in sorted(candidates, reverse=True):
        score = 1 / (1 + math.exp(-logit))
        if score <= config.score_threshold:
            break
        x1, y1, x2, y2 = F.decode_boxes(deltas[anchor], ANCHORS[anchor])
        box = np.array([x1, y1, x2, y2]).clip(0, [width, height, width, height])
        rivals = [best for best, _, other in kept if other == label]
        if not rivals or F.box_iou(box[None], np.array(rivals)).max() <= config.nms_threshold:
            kept.append((box, score, label))
    return kept[: config.max_detections]


def check(found, logits, deltas, sizes, config):
    """Every image has the naive detections, then nothing but scores of 0."""
    for image, size in enumerate(sizes):
        expected = naive(logits[image], deltas[image], size, config)
        boxes, scores, labels = (np.array(x) for x in zip(*expected, strict=True))
        n = len(expected)
        np.testing.assert_array_equal(found.labels[image][:n], labels)
        np.testing.assert_allclose(found.scores[image][:n], scores, rtol=1e-5)
        np.testing.assert_allclose(found.boxes[image][:n], boxes, rtol=1e-5, atol=1e-4)
        assert not found.scores[image][n:].any()


CONFIGS = {
    "default": CONFIG,
    "a candidate or two": CONFIG.replace(candidates=2),
    "all candidates": CONFIG.replace(candidates=10_000),
    "one detection": CONFIG.replace(max_detections=1),
    "loose overlap": CONFIG.replace(nms_threshold=0.9),
    "no overlap": CONFIG.replace(nms_threshold=0.0),
    "high threshold": CONFIG.replace(score_threshold=0.9),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_is_what_plain_loops_give(name, config):
    logits, deltas = outputs(0)
    found = run(name, logits, deltas, SIZES, config)
    check(found, logits, deltas, SIZES, config)


def test_many_classes(name):
    logits, deltas = outputs(1, classes=80)
    config = CONFIG.replace(classes=tuple(map(str, range(80))), candidates=300, max_detections=100)
    found = run(name, logits, deltas, SIZES, config)
    assert len(np.unique(found.labels)) > 40
    check(found, logits, deltas, SIZES, config)


@pytest.mark.parametrize("classes", [FEW - 1, FEW, 80])
@pytest.mark.parametrize("k", [1, 30, 99, 100, 200])
def test_candidates_are_the_best_logits_also_where_many_are_equal(name, classes, k):
    library = pytest.importorskip(f"focal.{name}")
    logits = np.random.default_rng(k).integers(-3, 3, (2, 100, classes)).astype(np.float32)
    flat = logits.reshape(2, -1)
    expected = np.argsort(-flat, axis=-1, stable=True)[:, :k]
    top, at = map(
        np.asarray, _top(library.xp, library.xp.constant(logits, None), logits.shape[1], k)
    )
    np.testing.assert_array_equal(top, np.take_along_axis(flat, expected, -1))
    np.testing.assert_array_equal(top, np.take_along_axis(flat, at, -1))
    assert all(len(np.unique(row)) == k for row in at)
    if name == "numpy":  # PyTorch does not say which of equal ones it takes
        np.testing.assert_array_equal(at, expected)


def test_one_class_and_one_image(name):
    logits, deltas = outputs(2, classes=1, batch=1)
    found = run(name, logits, deltas, SIZES[:1], CONFIG.replace(classes=("a",)))
    check(found, logits, deltas, SIZES[:1], CONFIG)


@pytest.mark.parametrize("seed", range(5))
def test_numpy_and_torch_agree(seed):
    logits, deltas = outputs(seed)
    ours, theirs = (run(name, logits, deltas, SIZES) for name in NAMESPACES)
    real = ours.scores > 0
    assert real.sum() > 20
    np.testing.assert_allclose(theirs.scores, ours.scores, rtol=1e-6)
    np.testing.assert_array_equal(theirs.labels[real], ours.labels[real])
    np.testing.assert_allclose(theirs.boxes[real], ours.boxes[real], rtol=1e-6, atol=1e-5)


# Cases by hand: four anchors, two of them the same place, in one level


FOUR = RetinaNetConfig(
    classes=("a", "b"),
    image_size=(8, 32),
    levels=(3,),
    anchors=AnchorConfig(strides=(8,), sizes=(8.0,), scales=(1.0,), ratios=(1.0,)),
    score_threshold=0.5,
)
CELLS = F.anchors(FOUR.image_size, FOUR.anchors)  # [0, 8], [8, 16], [16, 24], [24, 32] in x


def found_by_hand(name, logits, deltas=None, size=(8, 32), config=FOUR):
    deltas = np.zeros((1, 4, 4), np.float32) if deltas is None else np.float32([deltas])
    found = run(name, np.float32([logits]), deltas, np.array([size]), config, CELLS)
    real = found.scores[0] > 0
    assert found.scores.shape == (1, min(config.max_detections, 8))
    assert real[: real.sum()].all()  # what is empty comes last
    return list(zip(found.labels[0][real], found.boxes[0][real].tolist(), strict=True))


def test_best_first_with_their_classes(name):
    logits = [[-9, 2], [-9, -9], [3, -9], [1, -9]]
    assert found_by_hand(name, logits) == [
        (0, [16, 0, 24, 8]),
        (1, [0, 0, 8, 8]),
        (0, [24, 0, 32, 8]),
    ]


def test_an_anchor_may_be_two_classes(name):
    logits = [[2, 3], [-9, -9], [-9, -9], [-9, -9]]
    assert found_by_hand(name, logits) == [(1, [0, 0, 8, 8]), (0, [0, 0, 8, 8])]


def test_the_weaker_of_two_that_overlap_goes_unless_of_another_class(name):
    to_the_left = [[0, 0, 0, 0], [-1, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0]]
    same = [[2, -9], [3, -9], [1, -9], [-9, -9]]
    other = [[2, -9], [-9, 3], [1, -9], [-9, -9]]
    assert found_by_hand(name, same, to_the_left) == [(0, [0, 0, 8, 8]), (0, [8, 0, 16, 8])]
    assert found_by_hand(name, other, to_the_left) == [
        (1, [0, 0, 8, 8]),
        (0, [0, 0, 8, 8]),
        (0, [8, 0, 16, 8]),
    ]


def test_what_only_a_rejected_box_overlaps_stays(name):
    chain = [[0, 0, 0, 0], [-0.75, 0, 0, 0], [-1.5, 0, 0, 0], [0, 0, 0, 0]]  # 0 to 8, 2 to 10, ...
    logits = [[3, -9], [2, -9], [1, -9], [-9, -9]]
    assert found_by_hand(name, logits, chain) == [(0, [0, 0, 8, 8]), (0, [4, 0, 12, 8])]


def test_boxes_end_where_the_image_does(name):
    larger = [[0, 0, np.log(2), np.log(2)]] * 4
    logits = [[3, -9], [-9, -9], [-9, 2], [-9, -9]]
    assert found_by_hand(name, logits, larger, size=(5, 20)) == [
        (0, [0, 0, 12, 5]),
        (1, [12, 0, 20, 5]),
    ]


def test_nothing_above_the_threshold(name):
    assert found_by_hand(name, np.full((4, 2), -1.0)) == []
    assert found_by_hand(name, np.zeros((4, 2))) == []  # 0.5 is not above 0.5


def test_no_more_than_the_limit(name):
    logits = [[4, -9], [3, -9], [-9, 2], [-9, 1]]
    config = FOUR.replace(max_detections=3)
    assert [label for label, _ in found_by_hand(name, logits, config=config)] == [0, 0, 1]


def test_extreme_outputs(name):
    logits = [[1e4, -1e4], [-1e4, 1e4], [-1e4, -1e4], [-1e4, -1e4]]
    wild = [[1e4, -1e4, 50, 50], [-1e4, 1e4, -50, -50], [0, 0, 0, 0], [0, 0, 0, 0]]
    found = found_by_hand(name, logits, wild)
    assert sorted(label for label, _ in found) == [0, 1]
    for _, (x1, y1, x2, y2) in found:
        assert 0 <= x1 <= x2 <= 32 and 0 <= y1 <= y2 <= 8


def test_an_empty_batch(name):
    logits, deltas = np.zeros((0, 4, 2), np.float32), np.zeros((0, 4, 4), np.float32)
    found = run(name, logits, deltas, np.zeros((0, 2), np.int64), FOUR, CELLS)
    assert [x.shape for x in found] == [(0, 8, 4), (0, 8), (0, 8)]
