"""`fit_config`: canvas, anchors, crop and steps from boxes."""

import dataclasses

import numpy as np
import pytest
from folders import BCCD
from hypothesis import given, settings
from hypothesis import strategies as st

from focal.retinanet import PRESETS
from focal.retinanet.data import CocoDataset, Example
from focal.retinanet.data.coverage import best_iou, scales
from focal.retinanet.data.fitting import MAX_CANVAS, fit_config

DETECTOR, TRAIN = PRESETS["tiny"]


class Boxes:
    """As much of a dataset as is read: sizes of images and boxes in the `image` of that index."""

    def __init__(self, sizes, image, boxes, labels=None):
        self.sizes, self.image, self.boxes = sizes, image, boxes
        self.labels = np.zeros(len(boxes), int) if labels is None else labels

    def ground_truth(self):
        corners = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)
        rows = zip(self.image.tolist(), corners.tolist(), self.labels.tolist(), strict=True)
        return {
            "images": [{"id": n, "height": h, "width": w} for n, (h, w) in enumerate(self.sizes)],
            "annotations": [
                {"image_id": n, "bbox": box, "category_id": label + 7, "iscrowd": 0}
                for n, box, label in rows
            ],
        }


def fit(case, detector=DETECTOR, train=TRAIN, fixed=frozenset()):
    return fit_config(Boxes(*case), detector, train, fixed)


def boxes_of(sizes, relative):
    """Boxes of sides (width, height) relative to the image, all in its middle; two each image."""
    image = np.arange(len(relative)) % len(sizes)
    sides = np.maximum(relative * sizes[image][:, ::-1], 0.5)
    middle = sizes[image][:, ::-1] / 2
    return image, np.concatenate([middle - sides / 2, middle + sides / 2], axis=1)


def uniform(size, low, high, count=400, seed=0):
    """Squares of `low` to `high` pixels anywhere in images of one size."""
    rng = np.random.default_rng(seed)
    side = rng.uniform(low, high, (count, 1))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - side)
    boxes = np.concatenate([corner, corner + side], axis=1)
    return np.array([size] * 50, float), np.arange(count) % 50, boxes


def share(case, config):
    """The share of the boxes with an anchor."""
    sizes, image, boxes = case
    scale = scales(sizes, config.image_size)[image]
    return np.mean(best_iou(boxes * scale[:, None], config) >= config.foreground)


SIDE = st.integers(8, 4000)
CASES = st.tuples(
    st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=5),
    st.lists(st.tuples(*[st.floats(1e-3, 1)] * 2), min_size=1, max_size=12),
)
FIELDS = ["image_size", "levels", "anchors", "anchors.sizes", "anchors.ratios", "anchors.strides"]
FIELDS += ["crop", "steps"]


@given(CASES, st.sets(st.sampled_from(FIELDS)))
@settings(max_examples=40, deadline=None)
def test_any_boxes_give_configs_and_fixed_fields_stay(case, fixed):
    sizes = np.array(case[0], float)
    found = fit((sizes, *boxes_of(sizes, np.array(case[1]))), fixed=fixed)
    assert type(found.detector).from_json(found.detector.to_json()) == found.detector
    assert type(found.train).from_json(found.train.to_json()) == found.train
    canvas, crop = found.detector.image_size, found.train.crop
    if "image_size" not in fixed:
        assert all(side % 32 == 0 and 32 <= side <= MAX_CANVAS for side in canvas)
    if "crop" not in fixed:
        assert crop[0] <= canvas[0] and crop[1] <= canvas[1]
    # About the same pixels in all, at most twice the steps.
    if "steps" not in fixed:
        pixels = found.train.steps * crop[0] * crop[1] / (4000 * 240 * 240)
        assert pixels == pytest.approx(1, rel=0.05) or found.train.steps == 8000 or "crop" in fixed
        assert found.train.steps <= 8000 and pixels < 1.05
    # Only these change, and none that is fixed.
    before, after = (
        vars(d) | vars(t) | {f"anchors.{k}": v for k, v in vars(d.anchors).items()}
        for d, t in ((DETECTOR, TRAIN), (found.detector, found.train))
    )
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= set(FIELDS) and not changed & fixed
    assert found.sentence.startswith("fit: ") and "\n" not in found.sentence


@given(CASES, st.sampled_from([2, 3]))
@settings(max_examples=40, deadline=None)
def test_the_same_pictures_in_more_pixels_fit_the_same_way(case, k):
    """Where the images are large enough that neither their size nor the cap decides."""
    sizes = np.array(case[0], float)
    sizes *= 3000 / sizes.max(axis=1, keepdims=True)
    relative = np.clip(np.array(case[1]), 0.03, 1)
    image, boxes = boxes_of(sizes, relative)
    one = fit((sizes, image, boxes))
    other = fit((k * sizes, image, k * boxes))
    assert (one.detector, one.train) == (other.detector, other.train)


def test_small_defects_keep_the_pixels_of_their_images():
    case = uniform((640, 640), 28, 54)
    found = fit(case)
    assert found.detector.image_size == (640, 640)
    assert found.train.crop == (240, 240) and found.train.steps == 4000
    assert share(case, DETECTOR) < 0.75 and share(case, found.detector) > 0.98
    assert found.sentence.startswith(
        "fit: images of 640x640 stay at 640x640, since boxes are 30 to 53 pixels (5 % to 95 %); "
    )


def test_small_nuclei_are_enlarged():
    case = uniform((256, 256), 8, 20)
    found = fit(case)
    # The median of 14.6 pixels becomes 28.
    assert found.detector.image_size == (480, 480)
    assert share(case, DETECTOR) < 0.5 and share(case, found.detector) > 0.97


def test_large_objects_are_not_cut():
    case = uniform((360, 480), 200, 350)
    found = fit(case)
    assert found.detector.image_size == (192, 224)
    assert found.train.crop == found.detector.image_size and found.train.steps == 5357
    assert share(case, found.detector) > 0.98


def test_blood_cells():
    """As in BCCD: 85 of 100 are red cells, and platelets are a third of the classes."""
    red, white, platelets = (
        uniform((480, 640), low, high, count, seed=count)
        for low, high, count in ((85, 120, 850), (130, 235, 75), (31, 50, 76))
    )
    cells = (
        red[0],
        *(np.concatenate(x) for x in zip(red[1:], white[1:], platelets[1:], strict=True)),
    )
    found = fit((*cells, np.repeat([0, 1, 2], [850, 75, 76])))
    assert found.detector.image_size == DETECTOR.image_size == (256, 320)
    assert (found.train.crop, found.train.steps) == ((240, 240), 4000)
    assert found.detector.levels == (3, 4, 5)
    assert found.sentence == (
        "fit: images of 480x640 are scaled to 256x320, since boxes are 44 to 173 pixels (5 % to "
        "95 %); anchors 20 to 127; crop 240x240, 4000 steps; 100% of the boxes have an anchor"
    )


def test_real_blood_cells():
    found = fit_config(CocoDataset(BCCD, "train"), DETECTOR, TRAIN)
    assert found.detector.image_size == (256, 320) and found.train == TRAIN


def test_large_boxes_get_a_larger_crop():
    rare = uniform((640, 640), 30, 40)
    rare[2][:60, 2:] = rare[2][:60, :2] + 200
    large, given = DETECTOR.replace(image_size=(640, 640)), {"image_size"}
    found = fit(rare, large, fixed=given)
    assert found.train.crop == (288, 288) and found.train.steps == 2778
    assert fit(rare, large, fixed=given | {"steps"}).train.steps == 4000
    kept = fit(rare, large, fixed=given | {"crop"}).train
    assert (kept.crop, kept.steps) == ((240, 240), 4000)


def test_thin_boxes_count_as_small():
    sizes = np.full((10, 2), 1000.0)
    wide = fit((sizes, *boxes_of(sizes, np.full((40, 2), [0.4, 0.02])))).detector
    square = fit((sizes, *boxes_of(sizes, np.full((40, 2), (0.4 * 0.02) ** 0.5)))).detector
    assert max(wide.image_size) > max(square.image_size)


def test_a_rare_class_counts_as_much_as_a_common_one():
    sizes, image, boxes = uniform((640, 640), 30, 40)
    boxes[:20, 2:] = boxes[:20, :2] + 200
    labels = np.zeros(400, int)
    assert fit((sizes, image, boxes, labels)).detector.image_size == (640, 640)
    labels[:20] = 1
    assert fit((sizes, image, boxes, labels)).detector.image_size == (320, 320)


def test_images_both_tall_and_wide_get_a_square():
    sizes = np.array([(300, 400), (400, 300)] * 20, float)
    case = sizes, *boxes_of(sizes, np.full((40, 2), 0.1))
    height, width = fit(case).detector.image_size
    assert height == width
    sizes = sizes[::2]
    case = sizes, *boxes_of(sizes, np.full((40, 2), 0.1))
    height, width = fit(case).detector.image_size
    assert height < width


def test_long_boxes_get_other_ratios():
    sizes = np.full((10, 2), 640.0)
    long = boxes_of(sizes, np.tile([[0.4, 0.05], [0.05, 0.4]], (10, 1)))
    found = fit((sizes, *long)).detector
    assert found.anchors.ratios != DETECTOR.anchors.ratios
    assert share((sizes, *long), found) > 0.98
    square = boxes_of(sizes, np.tile([[0.1, 0.1], [0.05, 0.05]], (10, 1)))
    assert fit((sizes, *square)).detector.anchors.ratios == (0.5, 1.0, 2.0)


def test_what_the_convention_says_of_anchors_stays():
    anchors = dataclasses.replace(DETECTOR.anchors, offset=0.0, rounded=True)
    found = fit(uniform((256, 256), 8, 20), DETECTOR.replace(anchors=anchors))
    assert (found.detector.anchors.offset, found.detector.anchors.rounded) == (0.0, True)


def test_levels_are_only_added():
    r50 = PRESETS["r50"]
    found = fit(uniform((640, 640), 28, 54), *r50)
    assert found.detector.levels == (3, 4, 5, 6, 7)
    assert found.train == r50.train


def test_without_boxes_nothing_changes():
    found = fit((np.array([[9.0, 9.0]]), np.zeros(0, int), np.zeros((0, 4))))
    assert found[:2] == (DETECTOR, TRAIN) and "no boxes" in found.sentence


class Bare:
    """A dataset without ground truth, of 600 images."""

    classes = ("thing",)
    read = 0

    def __len__(self):
        return 600

    def __getitem__(self, index):
        self.read += 1
        boxes = np.array([[4, 4, 40, 44]] * (index % 3), np.float32).reshape(-1, 4)
        return Example(np.zeros((64, 96, 3), np.uint8), boxes, np.zeros(len(boxes), int), index)


class Known(Bare):
    """The same with ground truth, where crowds do not count."""

    def ground_truth(self):
        images = [{"id": 7 * n, "height": 64, "width": 96} for n in range(600)]
        box = {"category_id": 1, "bbox": [4, 4, 36, 40]}
        boxes = [{"image_id": 7 * n, **box} for n in range(600) for _ in range(n % 3)]
        crowd = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 3, 3], "iscrowd": 1}
        return {"images": images, "annotations": [*boxes, *[crowd] * 900]}


def test_a_dataset_without_ground_truth_is_read():
    bare, known = Bare(), Known()
    found = fit_config(bare, DETECTOR, TRAIN)
    assert found == fit_config(known, DETECTOR, TRAIN)
    assert (bare.read, known.read) == (500, 0)
