"""COCO metrics."""

import copy
import math
import sys

import numpy as np
import pytest

from focal.retinanet import PRESETS, build, evaluate, predict
from focal.retinanet.data import Example, ShapesDataset, eval_batches, train_batches
from focal.retinanet.training.evaluate import coco_metrics, evaluate_model

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
    metrics = coco_metrics(TRUTH, PERFECT, IDS)
    assert math.isnan(metrics.pop("AP/elk"))
    keys = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "AP/cat", "AP/dog"]
    assert list(metrics) == keys
    assert all(type(value) is float for value in metrics.values())
    assert metrics == pytest.approx(dict.fromkeys(keys, 1.0))


def test_silent_and_without_side_effects(capsys):
    truth, found = copy.deepcopy(TRUTH), copy.deepcopy(PERFECT)
    coco_metrics(truth, found, IDS)
    assert capsys.readouterr() == ("", "")
    assert truth == TRUTH
    np.testing.assert_equal(found, PERFECT)


@pytest.mark.parametrize("found", [[], [detection(1, [], []), detection(2, [], [])]])
def test_no_detections_give_zeros(found):
    metrics = coco_metrics(TRUTH, found, IDS)
    assert math.isnan(metrics.pop("AP/elk"))
    assert metrics == dict.fromkeys(metrics, 0.0)


def test_no_objects_give_nan():
    metrics = coco_metrics({**TRUTH, "annotations": []}, PERFECT, IDS)
    assert len(metrics) == 10 and all(math.isnan(value) for value in metrics.values())


def test_sizes_without_objects_are_nan():
    truth = {**TRUTH, "annotations": TRUTH["annotations"][:1]}
    metrics = coco_metrics(truth, PERFECT[:1], IDS)
    assert metrics["APs"] == pytest.approx(1.0)
    assert math.isnan(metrics["APm"]) and math.isnan(metrics["APl"])


def test_wrong_class_and_poor_boxes():
    wrong = [detection(1, [[10, 10, 30, 30]], [2]), *PERFECT[1:]]
    metrics = coco_metrics(TRUTH, wrong, IDS)
    assert metrics["AP/dog"] == 0
    assert metrics["AP/cat"] == pytest.approx(51 / 101)  # half the recall: points 0.00 to 0.50
    # IoU 0.8: the seven thresholds 0.50, 0.55, ... 0.80 are reached, the other three are not
    loose = [detection(2, [[0, 0, 100, 80.01]], [0])]
    metrics = coco_metrics({**TRUTH, "annotations": TRUTH["annotations"][2:]}, loose, IDS)
    assert [metrics["AP50"], metrics["AP75"]] == pytest.approx([1.0, 1.0])
    assert metrics["AP"] == pytest.approx(0.7) and metrics["AR100"] == pytest.approx(0.7)


def test_false_positives_count_by_score():
    found = [detection(2, [[0, 0, 100, 100], [200, 200, 230, 230]], [0, 0], [0.9, 0.1])]
    truth = {**TRUTH, "annotations": TRUTH["annotations"][2:]}
    assert coco_metrics(truth, found, IDS)["AP"] == pytest.approx(1.0)
    found[0]["scores"] = np.array([0.1, 0.9])
    assert coco_metrics(truth, found, IDS)["AP"] == pytest.approx(0.5)


def test_crowds_excuse_detections():
    crowd = {"id": 5, "image_id": 3, "category_id": 7, "bbox": [0, 0, 50, 50], "area": 2500}
    inside = detection(3, [[5, 5, 20, 20]], [0], [0.99])
    for iscrowd, expected in ((1, 1.0), (0, None)):
        annotations = [*TRUTH["annotations"], {**crowd, "iscrowd": iscrowd}]
        truth = {**TRUTH, "annotations": annotations}
        metrics = coco_metrics(truth, [*PERFECT[:2], inside], IDS)
        if expected is None:
            assert metrics["AP/cat"] < 0.7
        else:
            assert metrics["AP/cat"] == pytest.approx(expected)


def test_labels_are_mapped_to_category_ids_in_the_order_given():
    swapped = [{**d, "labels": 1 - d["labels"]} for d in PERFECT]
    assert coco_metrics(TRUTH, swapped, (9, 7))["AP"] == pytest.approx(1.0)


def test_shapes_against_themselves():
    data = ShapesDataset("val", num_images=5)
    found = [detection(e.image_id, e.boxes, e.labels) for e in data]
    metrics = coco_metrics(data.ground_truth(), found, data.category_ids)
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
    with pytest.raises(ValueError, match=f"^coco_metrics: .*{message}$|^coco_metrics: {message}$"):
        coco_metrics(TRUTH, found, IDS)


# A model on a dataset


SIZE = (64, 80)
SHAPES = ShapesDataset("val", size=SIZE, num_images=5)


@pytest.fixture(scope="module")
def model():
    """A detector with many detections, of all classes, with scores far apart."""
    torch = pytest.importorskip("torch")
    config = PRESETS["tiny"].detector.replace(
        classes=SHAPES.classes, image_size=(72, 90), channels=16, head_depth=1, score_threshold=0.0
    )
    model = build(config, seed=3, device="cpu")
    with torch.no_grad():
        model.head["classification_head"].cls_logits.weight *= 100
    return model


class Plain:
    """What a dataset must have, and `max_boxes`."""

    max_boxes = SHAPES.max_boxes
    classes = SHAPES.classes

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def perfect(monkeypatch, examples):
    """Let the detector find exactly what is there."""
    boxes = {e.image_id: e for e in examples}
    order = iter([e.image_id for e in examples])

    def found(model, batch):
        some = [boxes[next(order)] for _ in range(len(batch.sizes))]
        ones = [np.ones(len(e.boxes), np.float32) for e in some]
        return [
            {"boxes": e.boxes, "labels": e.labels, "scores": s}
            for e, s in zip(some, ones, strict=True)
        ]

    monkeypatch.setattr("focal.retinanet.training.evaluate.detect", found)


def test_a_model_on_a_dataset(model):
    metrics = evaluate(model, SHAPES, batch_size=2)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
    assert list(metrics) == names + [f"AP/{name}" for name in SHAPES.classes]
    found = [
        {"image_id": e.image_id, **f}
        for e, f in zip(SHAPES, predict(model, [e.image for e in SHAPES]), strict=True)
    ]
    expected = coco_metrics(SHAPES.ground_truth(), found, SHAPES.category_ids)
    assert 0 < metrics["AR100"] < 1
    np.testing.assert_equal(metrics, expected)
    np.testing.assert_equal(evaluate(model, SHAPES, batch_size=5), metrics)


def test_the_progress_bar_is_asked_for_on_a_terminal(model, capsys, monkeypatch):
    evaluate(model, SHAPES, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate(model, SHAPES)
    assert capsys.readouterr() == ("", "")
    evaluate(model, SHAPES, progress=True)
    assert "shapes/val: 100%" in capsys.readouterr().err


def test_a_dataset_without_ground_truth(model, monkeypatch):
    """Its examples are the truth; every box is found, so AP is 1, with the ids 1 to K."""
    examples = [e._replace(image_id=10 * e.image_id) for e in SHAPES]
    perfect(monkeypatch, examples)
    metrics = evaluate(model, Plain(examples), batch_size=5)
    assert {k for k, v in metrics.items() if v != pytest.approx(1)} <= {"APm", "APl"}
    assert len(metrics) == 10 and metrics["AP"] == pytest.approx(1)


def test_the_truth_of_examples_is_that_of_ground_truth(model):
    """The boxes go to the canvas and back; ids and classes stay."""
    expected = evaluate(model, SHAPES)
    assert evaluate(model, Plain(list(SHAPES))) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_images_without_boxes_count(model, monkeypatch):
    empty = Example(np.zeros((30, 40, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, int), 0)
    wrong = Example(empty.image, np.float32([[1, 1, 9, 9]]), np.array([0]), 0)
    perfect(monkeypatch, [wrong, *SHAPES])
    metrics = evaluate(model, Plain([empty, *SHAPES]), batch_size=6)
    assert metrics["AP/square"] == pytest.approx(1) and metrics["AP/circle"] < 1


def test_image_ids_may_be_negative(model):
    own = [example._replace(image_id=n - 3) for n, example in enumerate(SHAPES)]
    metrics, found = evaluate_model(model, Plain(own), 4)
    assert [entry["image_id"] for entry in found] == [example.image_id for example in own]
    assert metrics == pytest.approx(evaluate(model, Plain(list(SHAPES))), nan_ok=True)


@pytest.mark.parametrize("progress", [True, False])
def test_off_a_terminal_there_is_no_progress_bar(model, capsys, progress):
    evaluate(model, SHAPES, progress=progress)
    assert capsys.readouterr().err == ""


def test_classes_must_be_the_models(model):
    other = Plain(list(SHAPES))
    other.classes = ("circle", "cube", "triangle")
    message = (
        r"^evaluate: the detector's classes are \('circle', 's.*those of Plain are \('circle', 'c"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(model, other)


@pytest.mark.parametrize("size", [(2, 300), (300, 2), (100, 130), (64, 80)])
def test_boxes_end_where_the_image_does(model, size):
    """A sliver of 0.6 pixels of the canvas has a whole one there; detections are cut to it."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    example = Example(image, np.float32([[0, 0, 2, 2]]), np.array([0]), 1)
    (batch,) = eval_batches(Plain([example]), model.config, 1)
    assert batch.image_sizes.tolist() == [list(size)]
    _, (found,) = evaluate_model(model, Plain([example]), 1)
    (expected,) = predict(model, [image])
    np.testing.assert_array_equal(found["boxes"], expected["boxes"])
    assert (found["boxes"] <= [size[1], size[0]] * 2).all() and len(found["boxes"])


def test_sizes_of_the_images_of_a_training_batch(model):
    run = PRESETS["tiny"].train.replace(batch_size=4, crop=(32, 40), zoom=(0.5, 2.0), workers=0)
    batch = next(train_batches(SHAPES, model.config, run))
    assert batch.image_sizes.shape == (4, 2) and batch.image_sizes.dtype == np.int64
    np.testing.assert_allclose(batch.image_sizes, batch.sizes / batch.scales[:, None], atol=0.5)
