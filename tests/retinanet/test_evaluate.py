"""COCO metrics."""

import copy
import math

import numpy as np
import pytest

from focal.retinanet.data import ShapesDataset
from focal.retinanet.training.evaluate import evaluate

TRUTH = {
    "images": [{"id": 1}, {"id": 2}, {"id": 3}],
    "annotations": [
        # Id 0 on purpose: pycocotools takes it for "no match" unless it is renumbered.
        {"id": 0, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20], "area": 400},
        {"id": 1, "image_id": 1, "category_id": 9, "bbox": [50, 50, 40, 50], "area": 2000},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [0, 0, 100, 100], "area": 10000},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 11, "name": "elk"}],
}
for annotation in TRUTH["annotations"]:
    annotation["iscrowd"] = 0
IDS = (7, 9, 11)


def detection(image_id, boxes, labels, scores=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    scores = np.full(len(boxes), 0.9, np.float32) if scores is None else np.array(scores)
    return {"image_id": image_id, "boxes": boxes, "scores": scores, "labels": np.array(labels, int)}


PERFECT = [
    detection(1, [[10, 10, 30, 30], [50, 50, 90, 100]], [0, 1]),
    detection(2, [[0, 0, 100, 100]], [0]),
    detection(3, [], []),
]


def test_perfect_detections():
    metrics = evaluate(TRUTH, PERFECT, IDS)
    assert math.isnan(metrics.pop("AP/elk"))
    keys = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "AP/cat", "AP/dog"]
    assert list(metrics) == keys
    assert all(type(value) is float for value in metrics.values())
    assert metrics == pytest.approx(dict.fromkeys(keys, 1.0))


def test_silent_and_without_side_effects(capsys):
    truth, found = copy.deepcopy(TRUTH), copy.deepcopy(PERFECT)
    evaluate(truth, found, IDS)
    assert capsys.readouterr() == ("", "")
    assert truth == TRUTH
    np.testing.assert_equal(found, PERFECT)


@pytest.mark.parametrize("found", [[], [detection(1, [], []), detection(2, [], [])]])
def test_no_detections_give_zeros(found):
    metrics = evaluate(TRUTH, found, IDS)
    assert math.isnan(metrics.pop("AP/elk"))
    assert metrics == dict.fromkeys(metrics, 0.0)


def test_no_objects_give_nan():
    metrics = evaluate({**TRUTH, "annotations": []}, PERFECT, IDS)
    assert len(metrics) == 10 and all(math.isnan(value) for value in metrics.values())


def test_sizes_without_objects_are_nan():
    truth = {**TRUTH, "annotations": TRUTH["annotations"][:1]}
    metrics = evaluate(truth, PERFECT[:1], IDS)
    assert metrics["APs"] == pytest.approx(1.0)
    assert math.isnan(metrics["APm"]) and math.isnan(metrics["APl"])


def test_wrong_class_and_poor_boxes():
    wrong = [detection(1, [[10, 10, 30, 30]], [2]), *PERFECT[1:]]
    metrics = evaluate(TRUTH, wrong, IDS)
    assert metrics["AP/dog"] == 0
    assert metrics["AP/cat"] == pytest.approx(51 / 101)  # half the recall: points 0.00 to 0.50
    # IoU 0.8: the seven thresholds 0.50, 0.55, ... 0.80 are reached, the other three are not
    loose = [detection(2, [[0, 0, 100, 80.01]], [0])]
    metrics = evaluate({**TRUTH, "annotations": TRUTH["annotations"][2:]}, loose, IDS)
    assert [metrics["AP50"], metrics["AP75"]] == pytest.approx([1.0, 1.0])
    assert metrics["AP"] == pytest.approx(0.7) and metrics["AR100"] == pytest.approx(0.7)


def test_false_positives_count_by_score():
    found = [detection(2, [[0, 0, 100, 100], [200, 200, 230, 230]], [0, 0], [0.9, 0.1])]
    truth = {**TRUTH, "annotations": TRUTH["annotations"][2:]}
    assert evaluate(truth, found, IDS)["AP"] == pytest.approx(1.0)
    found[0]["scores"] = np.array([0.1, 0.9])
    assert evaluate(truth, found, IDS)["AP"] == pytest.approx(0.5)


def test_crowds_excuse_detections():
    crowd = {"id": 5, "image_id": 3, "category_id": 7, "bbox": [0, 0, 50, 50], "area": 2500}
    inside = detection(3, [[5, 5, 20, 20]], [0], [0.99])
    for iscrowd, expected in ((1, 1.0), (0, None)):
        annotations = [*TRUTH["annotations"], {**crowd, "iscrowd": iscrowd}]
        truth = {**TRUTH, "annotations": annotations}
        metrics = evaluate(truth, [*PERFECT[:2], inside], IDS)
        if expected is None:
            assert metrics["AP/cat"] < 0.7
        else:
            assert metrics["AP/cat"] == pytest.approx(expected)


def test_labels_are_mapped_to_category_ids_in_the_order_given():
    swapped = [{**d, "labels": 1 - d["labels"]} for d in PERFECT]
    assert evaluate(TRUTH, swapped, (9, 7))["AP"] == pytest.approx(1.0)


def test_shapes_against_themselves():
    data = ShapesDataset("val", num_images=5)
    found = [detection(e.image_id, e.boxes, e.labels) for e in data]
    metrics = evaluate(data.ground_truth(), found, data.category_ids)
    assert metrics["AP"] == pytest.approx(1.0)
    assert {f"AP/{name}" for name in data.classes} <= set(metrics)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([detection(4, [], [])], "image_id 4 is unknown or comes twice"),
        ([detection(-1, [], [])], "image_id -1 is unknown or comes twice"),
        ([PERFECT[0], PERFECT[0]], "image_id 1 is unknown or comes twice"),
        ([detection(1, [[0, 0, 1, 1]], [3])], r"image_id 1: labels must be in \[0, 3\)"),
        ([detection(1, [[0, 0, 1, 1]], [-1])], r"image_id 1: labels must be in \[0, 3\)"),
        ([detection(1, [[0, 0, 1, np.nan]], [0])], "image_id 1: boxes and scores must be finite"),
        ([detection(1, [[0, 0, 1, 1]], [0], [np.inf])], "boxes and scores must be finite"),
        (
            [detection(1, [[0, 0, 1, 1]], [0, 1])],
            r"expected boxes \(n, 4\), scores \(n,\), labels \(n,\); got \(1, 4\), \(1,\), \(2,\)",
        ),
    ],
)
def test_errors(found, message):
    with pytest.raises(ValueError, match=f"^evaluate: .*{message}$|^evaluate: {message}$"):
        evaluate(TRUTH, found, IDS)
