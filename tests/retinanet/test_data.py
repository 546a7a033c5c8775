"""Datasets, augmentation and batches."""

import copy
import gc
import json
import logging
import os
import re
import threading
import time

import numpy as np
import pytest
from folders import BCCD
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from focal.numpy import box_area, box_iou
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data import (
    CocoDataset,
    DataError,
    Dataset,
    Example,
    ShapesDataset,
    Transformed,
    eval_batches,
    loader,
    read_image,
    resize,
    train_batches,
)
from focal.retinanet.data import transforms as T
from focal.retinanet.data.coco import find_splits
from focal.retinanet.data.dataset import category_ids, dataset_name, read_example
from focal.retinanet.data.images import exif_turns, printable
from focal.retinanet.data.shapes import _mask

# ---------------------------------------------------------------- images


def save(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def gradient(height=20, width=30):
    """Every pixel has another color."""
    y, x = np.mgrid[:height, :width]
    return np.stack([8 * x, 12 * y, 4 * (x + y)], axis=2).astype(np.uint8)


def gray_of(path):
    image = read_image(path)
    assert image.dtype == np.uint8 and image.ndim == 3
    assert (image == image[..., :1]).all()
    return image[..., 0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_opaque_colors_are_read_unchanged(tmp_path, mode):
    image = read_image(save(tmp_path, Image.fromarray(gradient()).convert(mode)))
    np.testing.assert_array_equal(image, gradient())
    assert image.flags.writeable and image.flags.c_contiguous


def test_greyscale_and_one_bit(tmp_path):
    gray = gradient()[..., 0]
    np.testing.assert_array_equal(gray_of(save(tmp_path, Image.fromarray(gray))), gray)
    bits = gray > 100
    np.testing.assert_array_equal(gray_of(save(tmp_path, Image.fromarray(bits))), bits * 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    image = Image.new(mode, (3, 1), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
    np.testing.assert_allclose(gray_of(save(tmp_path, image)), [[0, 255, 127]], atol=1)


@pytest.mark.parametrize("transparent", [None, 1, bytes([255, 0])])
def test_palette(tmp_path, transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    options = {} if transparent is None else {"transparency": transparent}
    expected = [10, 20, 30], [40, 50, 60] if transparent is None else [255, 255, 255]
    np.testing.assert_array_equal(read_image(save(tmp_path, image, **options))[0], expected)


def test_cmyk_jpeg(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    pixel = read_image(save(tmp_path, image, "image.jpg"))[8, 8].astype(int)
    assert pixel[0] > 200 and pixel[1] < 60 and pixel[2] < 60


INT16, INT32, FLOAT = np.uint16, np.int32, np.float32


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (INT16, [0, 257, 128 * 257, 65535], [0, 1, 128, 255]),
        (INT32, [0, 7, 255], [0, 7, 255]),
        (INT32, [0, 257, 65535], [0, 1, 255]),
        (INT32, [-100, 0, 100], [0, 128, 255]),
        (FLOAT, [0, 0.5, 1], [0, 128, 255]),
        (FLOAT, [0, 7, 255], [0, 7, 255]),
        (FLOAT, [-1, 0, 1], [0, 128, 255]),
        (FLOAT, [np.nan, 0.5, np.inf], [0, 128, 0]),
        (FLOAT, [-3, -3, -3], [0, 0, 0]),
    ],
)
def test_values_of_more_than_8_bits_are_scaled(tmp_path, dtype, values, expected):
    for name in ("image.tif", "image.png")[: 2 if dtype is INT16 else 1]:
        path = save(tmp_path, Image.fromarray(np.array([values], dtype)), name)
        np.testing.assert_array_equal(gray_of(path)[0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    image = gradient()
    # The stored pixels, of which EXIF says how to turn them back
    stored = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image, 1),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), name, exif=exif)
    np.testing.assert_array_equal(read_image(path), image)
    assert exif_turns(path) == (orientation >= 5)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_damaged_exif_does_not_spoil_the_pixels(tmp_path, exif):
    path = save(tmp_path, Image.fromarray(gradient()), exif=exif)
    np.testing.assert_array_equal(read_image(path), gradient())


def test_max_size_may_shrink_a_jpeg_but_not_below(tmp_path):
    path = save(tmp_path, Image.new("RGB", (640, 480), "red"), "image.jpg")
    assert read_image(path).shape == (480, 640, 3)
    assert read_image(path, (120, 160)).shape == (120, 160, 3)
    assert read_image(path, (121, 100)).shape == (240, 320, 3)
    assert read_image(path, (5000, 5000)).shape == (480, 640, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, Image.new("RGB", (640, 320), "red"), "turned.jpg", exif=exif)
    assert read_image(path, (320, 160)).shape == (320, 160, 3)
    path = save(tmp_path, Image.fromarray(gradient()))
    np.testing.assert_array_equal(read_image(path, (2, 2)), gradient())


def test_unreadable_files_say_which_and_why(tmp_path):
    def message(path):
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "a.jpg"
    assert message(path) == f"{path}: not a readable image (no such file)"
    path.write_bytes(b"")
    assert message(path) == f"{path}: not a readable image (the file is empty)"
    path.write_bytes(b"some text")
    assert message(path) == f"{path}: not a readable image (unknown or damaged format)"
    for name in ("a.jpg", "a.png", "a.tif", "a.gif", "a.bmp"):
        noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
        path = save(tmp_path, Image.fromarray(noise), name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert message(path).startswith(f"{path}: not a readable image (")


@given(at=st.integers(0, 2000), bit=st.integers(0, 7), fmt=st.sampled_from(["png", "jpg", "gif"]))
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_give_an_image_or_a_data_error(tmp_path_factory, at, bit, fmt):
    path = save(tmp_path_factory.getbasetemp(), Image.fromarray(gradient()), f"damaged.{fmt}")
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        image = read_image(path)
    except DataError:
        return
    assert image.ndim == 3 and image.dtype == np.uint8


def test_resize_averages_where_it_shrinks():
    checks = np.zeros((40, 40, 3), np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    small = resize(checks, (10, 20))
    assert small.shape == (10, 20, 3)
    np.testing.assert_allclose(small.astype(int), 127, atol=25)
    np.testing.assert_array_equal(
        resize(gradient(), (5, 5), (10, 5, 15, 10)), gradient()[5:10, 10:15]
    )


# ---------------------------------------------------------------- COCO


GOOD = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 30, "height": 20},
        {"id": 3, "file_name": "sub/b.png", "width": 30, "height": 20},
    ],
    "annotations": [
        {"id": 5, "image_id": 3, "category_id": 90, "bbox": [1, 2, 10, 5], "area": 33},
        {"id": 0, "image_id": 3, "category_id": 4, "bbox": [25.5, -2, 10, 5], "iscrowd": 0},
    ],
    "categories": [{"id": 90, "name": "cat"}, {"id": 4, "name": "dog"}],
}


def write_coco(root, data, split="train"):
    (root / "images/sub").mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient()).save(root / "images/a.png")
    Image.fromarray(gradient()[::-1]).save(root / "images/sub/b.png")
    text = data if isinstance(data, str | bytes) else json.dumps(data)
    path = root / f"instances_{split}.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def assert_annotated(example, data):
    """The boxes and labels of an example are its annotations in the ground truth."""
    own = [a for a in data.ground_truth()["annotations"] if a["image_id"] == example.image_id]
    x, y, w, h = np.array([a["bbox"] for a in own]).T
    np.testing.assert_array_equal(example.boxes, np.stack([x, y, x + w, y + h], axis=1))
    assert [data.category_ids[k] for k in example.labels] == [a["category_id"] for a in own]


def test_coco_examples(tmp_path, caplog):
    data: Dataset = CocoDataset(write_coco(tmp_path / "set", GOOD), "train", hold_out=0)
    assert data.name == "set/train" and len(data) == 2
    assert data.classes == ("dog", "cat") and data.category_ids == (4, 90)
    assert data.max_boxes == 2
    empty, full = data
    assert empty.image_id == 7 and empty.boxes.shape == (0, 4) and empty.labels.shape == (0,)
    np.testing.assert_array_equal(empty.image, gradient())
    assert full.image_id == 3
    np.testing.assert_array_equal(full.image, gradient()[::-1])
    np.testing.assert_array_equal(full.boxes, [[1, 2, 11, 7], [25.5, 0, 30, 3]])
    assert full.boxes.dtype == np.float32
    np.testing.assert_array_equal(full.labels, [1, 0])
    assert full.labels.dtype == np.int64
    assert data[-1].image_id == 3
    with pytest.raises(IndexError):
        data[2]
    assert not caplog.records


def test_coco_ground_truth_has_the_original_ids(tmp_path):
    truth = CocoDataset(write_coco(tmp_path, GOOD), "train", hold_out=0).ground_truth()
    assert [i["id"] for i in truth["images"]] == [7, 3]
    assert truth["categories"] == [{"id": 4, "name": "dog"}, {"id": 90, "name": "cat"}]
    first = {"id": 5, "image_id": 3, "category_id": 90, "iscrowd": 0, "area": 33.0}
    second = {"id": 0, "image_id": 3, "category_id": 4, "iscrowd": 0, "area": 13.5}
    assert truth["annotations"] == [
        {**first, "bbox": [1.0, 2.0, 10.0, 5.0]},
        {**second, "bbox": [25.5, 0.0, 4.5, 3.0]},
    ]
    json.dumps(truth)


def test_coco_2017_layout(tmp_path):
    flat = write_coco(tmp_path / "flat", GOOD)
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (flat / "instances_train.json").rename(root / "annotations/instances_val2017.json")
    with pytest.raises(DataError, match=r"^instances_val2017.json: its image folder .* not exist$"):
        CocoDataset(root, "val")
    (flat / "images").rename(root / "val2017")
    assert CocoDataset(root, "val")[1].image_id == 3
    with pytest.raises(DataError, match=r"no split 'train'; found val$"):
        CocoDataset(root, "train")


def test_missing_folder_and_split(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder or file$"):
        CocoDataset(tmp_path / "nowhere", "train")
    with pytest.raises(DataError) as caught:
        CocoDataset(tmp_path, "train")
    nothing = (
        f"{tmp_path}: no split 'train'; found no instances_*.json, no folder with "
        "_annotations.coco.json and no single JSON file"
    )
    assert str(caught.value) == nothing
    for name in ("b.json", "a.json", ".hidden.json"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        CocoDataset(tmp_path, "train")
    assert str(caught.value) == f"{nothing}, but a.json, b.json: name one of them"
    write_coco(write_coco(tmp_path, GOOD, "val"), GOOD, "train")
    with pytest.raises(DataError, match=r"no split '../train'; found train, val$"):
        CocoDataset(tmp_path, "../train")


def test_dropped_boxes_are_counted_in_one_line(tmp_path, caplog):
    data = copy.deepcopy(GOOD)
    more = [[5, 5, 0, 3], [5, 5, 3, 0], [30, 2, 4, 4], [2, 2, 3, 3], [0, 0, 1e-30, 3]]
    for number, bbox in enumerate(more, 10):
        annotation = {"id": number, "image_id": 7, "category_id": 4, "bbox": bbox}
        data["annotations"].append({**annotation, "iscrowd": int(number == 13)})
    with caplog.at_level(logging.INFO, "focal"):
        coco = CocoDataset(write_coco(tmp_path, data), "train", hold_out=0)
    assert [r.getMessage() for r in caplog.records] == [
        "instances_train.json: dropped 4 of 7 boxes (3 zero-area, 1 outside the image), 1 crowd"
    ]
    assert len(coco[0].boxes) == 0 and coco.max_boxes == 2
    crowds = [a for a in coco.ground_truth()["annotations"] if a["iscrowd"]]
    assert [a["id"] for a in crowds] == [13]
    assert len(coco.ground_truth()["annotations"]) == 3


def test_crowds_alone_are_no_warning(tmp_path, caplog):
    data = copy.deepcopy(GOOD)
    data["annotations"][0]["iscrowd"] = 1
    with caplog.at_level(logging.INFO, "focal"):
        CocoDataset(write_coco(tmp_path, data), "train", hold_out=0)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == "instances_train.json: dropped 0 of 2 boxes, 1 crowd"


def test_no_annotations_at_all(tmp_path):
    coco = CocoDataset(write_coco(tmp_path, {**GOOD, "annotations": []}), "train", hold_out=0)
    assert coco.max_boxes == 0 and coco[1].boxes.shape == (0, 4)
    assert coco.ground_truth()["annotations"] == []


NO_ID = "not an object with an integer id"
LEADS_OUT = "file_name leads out of images/"
NOT_FOUND = "file not found in images/"
NO_BBOX = "annotation 5: bbox must be four finite numbers, got"
BROKEN = [
    *(
        ("images.0.file_name", name, f"image id 7 ({name}): {LEADS_OUT}")
        for name in ("../a.png", "sub/../../a", "/etc/hosts", "..\\a", "C:\\a")
    ),
    ("images.0.file_name", "foo.jpg", f"image id 7 (foo.jpg): {NOT_FOUND}"),
    ("images.0.file_name", "sub", f"image id 7 (sub): {NOT_FOUND}"),
    ("images.0.file_name", "a\0", f"image id 7 (a\\x00): {NOT_FOUND}"),
    ("images.0.file_name", 5, "image id 7: file_name must be text, got 5"),
    ("images.0.file_name", None, "image id 7: missing key 'file_name'"),
    ("images.0.width", 0, "image id 7 (a.png): width must be a positive integer, got 0"),
    ("images.0.height", "20", "image id 7 (a.png): height must be a positive integer, got '20'"),
    ("images.0.height", None, "image id 7 (a.png): missing key 'height'"),
    ("images.0.id", None, f"images[0]: {NO_ID}"),
    ("images.0.id", True, f"images[0]: {NO_ID}"),
    ("images.1.id", 7, "duplicate image id 7"),
    ("images.1", 7, f"images[1]: {NO_ID}"),
    ("images", {}, "'images' must be a list, got dict"),
    ("images", [], "no images"),
    ("images", None, "missing key 'images'"),
    ("annotations", None, "missing key 'annotations'"),
    ("annotations.1.id", 5, "duplicate annotation 5"),
    ("annotations.1.id", 2**63, f"annotations[1]: {NO_ID}"),
    ("annotations.0.image_id", 17, "annotation 5: unknown image_id 17"),
    ("annotations.0.image_id", [], "annotation 5: unknown image_id []"),
    ("annotations.0.image_id", None, "annotation 5: missing key 'image_id'"),
    ("annotations.0.category_id", 5, "annotation 5: unknown category_id 5"),
    ("annotations.0.category_id", None, "annotation 5: missing key 'category_id'"),
    ("annotations.0.iscrowd", 2, "annotation 5: iscrowd must be 0 or 1, got 2"),
    ("annotations.0.area", "a", "annotation 5: area must be a finite number of 0 or more, got 'a'"),
    ("annotations.0.bbox", None, "annotation 5: missing key 'bbox'"),
    ("annotations.0.bbox", [1, 2, 3], f"{NO_BBOX} [1, 2, 3]"),
    ("annotations.0.bbox", [1, 2, 3, float("nan")], f"{NO_BBOX} [1, 2, 3, nan]"),
    ("annotations.0.bbox", [1, 2, float("inf"), 3], f"{NO_BBOX} [1, 2, inf, 3]"),
    ("annotations.0.bbox", "1234", f"{NO_BBOX} '1234'"),
    (
        "annotations.0.bbox",
        [1, 2, -3, 4],
        "annotation 5: bbox must have a width and height of 0 or more, got [1, 2, -3, 4]",
    ),
    ("categories", None, "missing key 'categories'"),
    ("categories", [], "no categories"),
    ("categories.1.id", 90, "duplicate category 90"),
    ("categories.1.name", "cat", "category 4: duplicate name 'cat'"),
    ("categories.1.name", None, "category 4: missing key 'name'"),
    ("categories.1.name", "", "category 4: name must be text without control characters, got ''"),
]


@pytest.mark.parametrize(("where", "value", "message"), BROKEN)
def test_each_fault_has_its_sentence(tmp_path, where, value, message):
    data = copy.deepcopy(GOOD)
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    node = data
    for key in path:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    with pytest.raises(DataError) as caught:
        CocoDataset(write_coco(tmp_path, data), "train", hold_out=0)
    assert str(caught.value) == f"instances_train.json: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"images":\n  , }', "not valid JSON (line 3 column 3)"),
        ("", "not valid JSON (line 1 column 1)"),
        (b'{"a": "\xff"}', "not valid JSON (not UTF-8 text)"),
        ("[" * 100_000, "not valid JSON (nested too deeply)"),
        ("[]", "expected an object at the top, got list"),
    ],
)
def test_broken_json(tmp_path, text, message):
    with pytest.raises(DataError, match=f"^{re.escape(f'instances_train.json: {message}')}$"):
        CocoDataset(write_coco(tmp_path, text), "train", hold_out=0)


def test_json_with_a_number_too_long_to_read(tmp_path):
    with pytest.raises(DataError, match=r"^instances_train.json: not valid JSON \("):
        CocoDataset(write_coco(tmp_path, "1" * 5000), "train", hold_out=0)


def test_size_that_differs_from_the_file(tmp_path):
    data = copy.deepcopy(GOOD)
    data["images"][0].update(width=20, height=30)
    root = write_coco(tmp_path, data)
    message = (
        "instances_train.json: image id 7 (a.png): width x height is 20x30 in the JSON but 30x20 "
        "in the file"
    )
    with pytest.raises(DataError) as caught:
        CocoDataset(root, "train", hold_out=0)[0]
    assert str(caught.value) == message
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(30, 20)).save(root / "images/a.png", exif=exif)
    with pytest.raises(DataError) as caught:
        CocoDataset(root, "train", hold_out=0)[0]
    assert str(caught.value) == f"{message}, swapped by the EXIF orientation, which is applied"


# How many images and boxes it has is tested with `focal check`.
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_bccd_boxes_of_an_image_are_its_annotations(split, caplog):
    data = CocoDataset(BCCD, split)
    assert data.name == f"bccd/{split}" and not caplog.records
    assert data.classes == ("RBC", "WBC", "Platelets") and data.category_ids == (1, 2, 3)
    assert len(data) == (8 if split == "test" else 4)
    for index in range(len(data)):
        example = data[index]
        assert example.image.shape == (480, 640, 3)
        assert 0 < len(example.boxes) <= data.max_boxes
        assert_annotated(example, data)


# ---------------------------------------------------------------- layouts


def picture(number):
    """A picture of 30 x 20 pixels that differs from that of any other number."""
    return Image.fromarray(np.roll(gradient(), number, axis=1))


def coco_json(numbers, prefix="", categories=({"id": 4, "name": "dog"}, {"id": 90, "name": "cat"})):
    """Images with these numbers as ids, each with one box, a pixel to the right of the last."""
    return {
        "images": [
            {"id": n, "file_name": f"{prefix}{n}.png", "width": 30, "height": 20} for n in numbers
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": categories[-1]["id"], "bbox": [n, 3, 2, 4]}
            for n in numbers
        ],
        "categories": list(categories),
    }


def write_layout(root, files):
    """Write JSON files by name, and pictures: `images/3.png` is the picture 3."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            picture(int(path.stem)).save(path)
        else:
            path.write_text(json.dumps(content))
    return root


def png_files(folder, numbers):
    return {f"{folder}{n}.png": None for n in numbers}


def ids(data):
    """The ids of the images, each of which must have its own pixels and its own box."""
    for example in data:
        np.testing.assert_array_equal(example.image, np.asarray(picture(example.image_id)))
        x = example.image_id
        np.testing.assert_array_equal(example.boxes, [[x, 3, x + 2, 7]])
    truth = data.ground_truth()
    found = [image["id"] for image in truth["images"]]
    assert found == [example.image_id for example in data]
    assert sorted(found) == sorted(a["image_id"] for a in truth["annotations"])
    return found


ROBOFLOW = (
    {"id": 0, "name": "animals", "supercategory": "none"},
    {"id": 1, "name": "cat", "supercategory": "animals"},
    {"id": 2, "name": "dog", "supercategory": "animals"},
)


@pytest.mark.parametrize("folder", ["{}/", "images/{}/", "images/"])
@pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
def test_annotations_folder(tmp_path, folder, validation, caplog):
    files = {}
    for name, numbers in (("train", [0, 1]), (validation, [2])):
        files[f"annotations/instances_{name}.json"] = coco_json(numbers)
        files |= png_files(folder.format(name), numbers)
    with caplog.at_level(logging.INFO, "focal"):
        root = write_layout(tmp_path / "set", files)
        train, val = CocoDataset(root, "train"), CocoDataset(root, "val")
    assert (ids(train), ids(val)) == ([0, 1], [2])
    assert (train.name, val.name) == ("set/train", "set/val") and not caplog.records
    assert train.classes == ("dog", "cat")
    with pytest.raises(DataError, match=r"set: no split 'test'; found train, val$"):
        CocoDataset(root, "test")


def test_of_the_folders_that_exist_the_one_with_the_first_image_is_taken(tmp_path):
    files = {"annotations/instances_train2017.json": coco_json([0, 1], "train2017/")}
    files |= {"annotations/instances_val.json": coco_json([2]), **png_files("images/val/", [2])}
    root = write_layout(tmp_path, files | png_files("images/train2017/", [0, 1]))
    (root / "train2017").mkdir()
    assert ids(CocoDataset(root, "train")) == [0, 1]
    (root / "images/val/2.png").unlink()
    missing = r"^instances_val.json: image id 2 \(2.png\): file not found in val/$"
    with pytest.raises(DataError, match=missing):
        CocoDataset(root, "val")


@pytest.mark.parametrize("validation", ["valid", "validation", "val"])
def test_roboflow(tmp_path, validation, caplog):
    files = {"README.roboflow.txt": "no image"}
    splits = {"train": [0, 1], validation: [2], "test": [3, 4]}
    for name, numbers in splits.items():
        files[f"{name}/_annotations.coco.json"] = coco_json(numbers, categories=ROBOFLOW)
        files |= png_files(f"{name}/", numbers)
    root = write_layout(tmp_path / "set", files)
    with caplog.at_level(logging.INFO, "focal"):
        train = CocoDataset(root, "train")
    assert [r.getMessage() for r in caplog.records] == [
        "train/_annotations.coco.json: not among the classes, having no boxes and only grouping "
        "others: animals"
    ]
    val, test = CocoDataset(root, "val"), CocoDataset(root, "test")
    assert (ids(train), ids(val), ids(test)) == ([0, 1], [2], [3, 4])
    for data in (train, val, test):
        assert data.classes == ("cat", "dog") and data.category_ids == (1, 2)
        assert [c["id"] for c in data.ground_truth()["categories"]] == [1, 2]
        assert data[0].labels.tolist() == [1]
    broken = coco_json([2, 2])
    (root / validation / "_annotations.coco.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=f"^{validation}/_annotations.coco.json: duplicate image"):
        CocoDataset(root, "val")
    (root / validation / "_annotations.coco.json").write_text("{")  # no other split minds
    assert CocoDataset(root, "train").classes == ("cat", "dog")
    with pytest.raises(DataError, match=f"^{validation}/_annotations.coco.json: not valid JSON"):
        CocoDataset(root, "val")


def test_roboflow_without_val(tmp_path, caplog):
    files = {}
    for name, numbers in {"train": range(10), "test": [10]}.items():
        files[f"{name}/_annotations.coco.json"] = coco_json(numbers, categories=ROBOFLOW)
        files |= png_files(f"{name}/", numbers)
    root = write_layout(tmp_path, files)
    train, val, test = (CocoDataset(root, split) for split in ("train", "val", "test"))
    assert len(ids(val)) == 1 and sorted(ids(train) + ids(val)) == [*range(10)]
    assert ids(test) == [10]
    with pytest.raises(DataError, match=r"'dev'; found test, train, with val held out of train$"):
        CocoDataset(root, "dev")


def group_classes(tmp_path, categories, used, elsewhere):
    """The classes of two splits, of which each has boxes of these categories."""
    files = png_files("train/", [0]) | png_files("valid/", [1])
    for n, (name, own) in enumerate({"train": used, "valid": elsewhere}.items()):
        content = coco_json([n], categories=categories)
        content["annotations"] = [
            {"id": k, "image_id": n, "category_id": c, "bbox": [1, 2, 3, 4]}
            for k, c in enumerate(own)
        ]
        files[f"{name}/_annotations.coco.json"] = content
    root = write_layout(tmp_path, files)
    train, val = CocoDataset(root, "train"), CocoDataset(root, "val")
    assert train.classes == val.classes and train.category_ids == val.category_ids
    return train.classes


PERSON = ({"id": 1, "name": "person", "supercategory": "person"},)
RIDER = {"id": 2, "name": "rider", "supercategory": "person"}
SAME = ({"id": 0, "name": "cat", "supercategory": "none"},)


@pytest.mark.parametrize(
    ("categories", "used", "elsewhere", "classes"),
    [
        (ROBOFLOW, [1], [2], ("cat", "dog")),
        (ROBOFLOW, [1], [0], ("animals", "cat", "dog")),  # used in one split: kept in both
        (ROBOFLOW, [0], [1], ("animals", "cat", "dog")),
        (ROBOFLOW, [], [], ("cat", "dog")),
        (PERSON, [], [], ("person",)),
        ((*PERSON, RIDER), [2], [1], ("person", "rider")),
        ((*PERSON, RIDER), [2], [2], ("rider",)),
        ((*SAME, {"id": 1, "name": "cat", "supercategory": "cat"}), [1], [1], ("cat",)),
        (({"id": 3, "name": "None"}, {"id": 1, "name": "cat"}), [1], [1], ("cat", "None")),
    ],
)
def test_a_category_that_only_groups_others_is_no_class(
    tmp_path, categories, used, elsewhere, classes
):
    assert group_classes(tmp_path, categories, used, elsewhere) == classes


@pytest.mark.parametrize("name", ["supercategory", "name", "id"])
@pytest.mark.parametrize("value", [[], {}, None, True, 5])
def test_odd_categories_end_in_a_sentence(tmp_path, name, value):
    content = coco_json([0, 1], categories=copy.deepcopy(ROBOFLOW))
    content["categories"][0][name] = content["categories"][2][name] = value
    content["categories"].append(7)
    root = write_layout(tmp_path, {"a.json": content, **png_files("", [0, 1])})
    with pytest.raises(DataError, match=r"^a.json: "):
        CocoDataset(root, "train")


SINGLE = ["_annotations.coco.json", "annotations.json", "result.json", "instances_default.json"]


@pytest.mark.parametrize("folder", ["images/", "images/default/", ""])
@pytest.mark.parametrize("name", [*SINGLE, "annotations/instances_default.json", "my own.json"])
def test_a_single_file(tmp_path, name, folder):
    files = {name: coco_json(range(20), "sub/"), **png_files(f"{folder}sub/", range(20))}
    root = write_layout(tmp_path / "set", files)
    for place in (root, root / name):
        train, val = CocoDataset(place, "train"), CocoDataset(place, "val")
        assert (train.name, val.name) == ("set/train", "set/val")
        assert len(ids(val)) == 2 and sorted(ids(train) + ids(val)) == [*range(20)]
        with pytest.raises(DataError) as caught:
            CocoDataset(place, "test")
        message = f"{place}: no split 'test'; found train, with val held out of train"
        assert str(caught.value) == message


def test_one_of_several_files(tmp_path, monkeypatch):
    files = {"a.json": coco_json(range(3)), "b.json": coco_json(range(3, 6))}
    root = write_layout(tmp_path, files | png_files("images/", range(6)))
    assert sorted(ids(CocoDataset(root / "b.json", "train", hold_out=0))) == [3, 4, 5]
    monkeypatch.chdir(root)
    assert len(CocoDataset("a.json", "train")) == 2
    with pytest.raises(DataError, match=r"^\.: no split 'train'; found no .*: name one of them$"):
        CocoDataset(".", "train")
    (root / "b.json").unlink()
    assert len(CocoDataset(".", "train")) == 2


def test_the_images_of_a_single_file_are_nowhere(tmp_path, monkeypatch):
    root = write_layout(tmp_path / "set", {"a.json": coco_json([0, 1])})
    message = r"^a.json: image id 0 \(0.png\): file not found in {}/$"
    with pytest.raises(DataError, match=message.format("set")):
        CocoDataset(root, "train")
    monkeypatch.chdir(root)
    with pytest.raises(DataError, match=message.format(r"\.")):
        CocoDataset("a.json", "train")
    (root / "images").mkdir()
    with pytest.raises(DataError, match=message.format("images")):
        CocoDataset(root, "train")


def single(tmp_path, numbers):
    files = {"a.json": coco_json(numbers), **png_files("images/", numbers)}
    return write_layout(tmp_path, files)


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(2, 0.01, 1), (2, 0.99, 1), (10, 0.25, 2), (14, 0.5, 7), (10, 0.1, 1)],
)
def test_how_many_are_held_out(tmp_path, caplog, count, share, held):
    root = single(tmp_path, range(count))
    with caplog.at_level(logging.INFO, "focal"):
        train, val = (CocoDataset(root, split, hold_out=share) for split in ("train", "val"))
    assert (len(train), len(val)) == (count - held, held)
    assert sorted(ids(train) + ids(val)) == [*range(count)]
    assert [r.getMessage() for r in caplog.records] == [
        f"a.json: no split 'val'; held out {held} of {count} images for it "
        f"(hold_out={share}, seed=0)"
    ]


def test_which_are_held_out_depends_on_the_seed_and_the_ids_alone(tmp_path):
    root = single(tmp_path, range(14))
    chosen = [ids(CocoDataset(root, "val", 0.5, seed)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    for seed, own in ((0, chosen[0]), (1, chosen[2])):  # of a set opened in another version, too
        assert set(own) == set(np.random.default_rng(seed).permutation(14)[:7])
    content = coco_json(range(13, -1, -1))  # another order in the file
    content["annotations"] = content["annotations"][:3]
    (root / "a.json").write_text(json.dumps(content))
    other = CocoDataset(root, "val", 0.5)
    assert [example.image_id for example in other] == chosen[0][::-1]
    everything = CocoDataset(root, "train", hold_out=0)
    assert len(everything) == 14
    with pytest.raises(DataError) as caught:
        CocoDataset(root, "val", hold_out=0)
    message = f"{root}: no split 'val'; found train; hold_out=0 holds nothing out"
    assert str(caught.value) == message


def test_nothing_is_held_out_where_there_is_val(tmp_path, caplog):
    write_coco(write_coco(tmp_path, GOOD, "val"), GOOD, "train")
    with caplog.at_level(logging.INFO, "focal"):
        assert len(CocoDataset(tmp_path, "train", 0.5)) == len(CocoDataset(tmp_path, "val")) == 2
    assert not caplog.records
    (tmp_path / "instances_val.json").unlink()  # today's layouts follow the rule, too
    assert len(CocoDataset(tmp_path, "train")) == len(CocoDataset(tmp_path, "val")) == 1


def test_one_image_cannot_be_shared(tmp_path):
    root = single(tmp_path, [3])
    for split in ("train", "val"):
        with pytest.raises(DataError) as caught:
            CocoDataset(root, split)
        assert str(caught.value) == (
            "a.json: 1 image, of which none can be held out as val; expected 2, or hold_out=0"
        )
    assert ids(CocoDataset(root, "train", hold_out=0)) == [3]


@pytest.mark.parametrize(
    ("share", "seed"), [(1, 0), (-0.1, 0), (float("nan"), 0), (0.1, -1), (0.1, 0.5)]
)
def test_hold_out_and_seed_must_be_in_range(tmp_path, share, seed):
    with pytest.raises(ValueError) as caught:
        CocoDataset(tmp_path, "train", share, seed)
    assert str(caught.value) == (
        f"CocoDataset: expected hold_out in [0, 1) and seed an integer >= 0; got {share} and {seed}"
    )


def layout_files(layout, file_name):
    """A set of this layout, of which one image of train has this name."""
    name, folder = {
        "flat": ("instances_train.json", "images/"),
        "2017": ("annotations/instances_train2017.json", "train2017/"),
        "annotations": ("annotations/instances_train.json", "images/train/"),
        "roboflow": ("train/_annotations.coco.json", "train/"),
        "single": ("a.json", "images/default/"),
        "beside": ("a.json", ""),
    }[layout]
    content = coco_json([0, 1])
    content["images"][1]["file_name"] = file_name
    return {name: content, **png_files(folder, [0])}, name, folder


LAYOUTS = ["flat", "2017", "annotations", "roboflow", "single", "beside"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_reads_outside_of_the_folder(tmp_path, layout):
    secret = write_layout(tmp_path / "outside", png_files("", [1]))

    def fault(file_name, root):
        with pytest.raises(DataError) as caught:
            CocoDataset(root, "train", hold_out=0)
        assert f"image id 1 ({printable(file_name)}): " in str(caught.value)
        return str(caught.value).partition("): ")[2]

    for name in ("../" * 4 + "outside/1.png", str(secret / "1.png"), "..\\1.png"):
        files, _, folder = layout_files(layout, name)
        root = write_layout(tmp_path / "set", files)
        assert fault(name, root).startswith("file_name leads out of ")
    files, _, folder = layout_files(layout, "1.png")
    root = write_layout(tmp_path / "set", files)
    (root / folder / "1.png").symlink_to(secret / "1.png")
    assert fault("1.png", root).startswith("a link that leads out of the data folder")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_image_folder_may_be_a_link(tmp_path, layout):
    files, _, folder = layout_files(layout, "1.png")
    root = write_layout(tmp_path / "set", files | png_files(folder, [1]))
    if folder:
        (root / folder).rename(tmp_path / "elsewhere")
        (root / folder.rstrip("/")).symlink_to(tmp_path / "elsewhere")
    else:
        root = tmp_path / "link"
        root.symlink_to(tmp_path / "set")
    assert ids(CocoDataset(root, "train", hold_out=0)) == [0, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_annotation_file_may_not_be_a_link_that_leads_out(tmp_path, layout):
    files, name, _ = layout_files(layout, "1.png")
    root = write_layout(tmp_path / "set", files)
    (root / name).rename(tmp_path / "outside.json")
    (root / name).symlink_to(tmp_path / "outside.json")
    with pytest.raises(DataError, match=r"json: a link that leads out of the data folder"):
        CocoDataset(root, "train")


def test_no_other_split_is_read_through_a_link_that_leads_out(tmp_path):
    files = {"train/_annotations.coco.json": coco_json([0], categories=ROBOFLOW)}
    root = write_layout(tmp_path / "set", {**files, **png_files("train/", [0])})
    other = coco_json([1], categories=ROBOFLOW)
    other["annotations"][0]["category_id"] = 0
    (root / "valid").mkdir()
    (tmp_path / "outside.json").write_text(json.dumps(other))
    (root / "valid/_annotations.coco.json").symlink_to(tmp_path / "outside.json")
    assert CocoDataset(root, "train").classes == ("cat", "dog")  # else it would have animals, too


@pytest.mark.parametrize("name", ["..", ".", "...", ""])
def test_the_name_of_an_annotation_file_leads_nowhere(tmp_path, name):
    """`instances_...json` would be of the split "..", with its images in the folder above."""
    files = {f"set/annotations/instances_{name}.json": coco_json([0, 1]), **png_files("", [0, 1])}
    root = write_layout(tmp_path, files) / "set"
    assert find_splits(root) == {}
    with pytest.raises(DataError, match=f"no split '{re.escape(name)}'"):
        CocoDataset(root, name)


# ---------------------------------------------------------------- shapes


def test_shapes_are_a_function_of_seed_split_and_index():
    first, again = ShapesDataset("train"), ShapesDataset("train")
    again[5]
    for a, b in zip(first[3], again[3], strict=True):
        np.testing.assert_array_equal(a, b)
    images = [
        first[3].image,
        first[4].image,
        ShapesDataset("val")[3].image,
        ShapesDataset("train", seed=1)[3].image,
    ]
    assert len({image.tobytes() for image in images}) == 4


def test_shapes_interface():
    data: Dataset = ShapesDataset("train")
    assert len(data) == 2000 and data.name == "shapes/train"
    assert len(ShapesDataset("val")) == len(ShapesDataset("test")) == 200
    assert len(data.classes) == len(data.category_ids) == 3
    example = data[1999]
    assert isinstance(example, Example) and example.image_id == 2000
    assert example.image.shape == (128, 128, 3) and example.image.dtype == np.uint8
    assert example.boxes.dtype == np.float32 and example.labels.dtype == np.int64
    with pytest.raises(IndexError):
        data[2000]
    with pytest.raises(DataError, match=r"^shapes: no split 'dev'; found train, val, test$"):
        ShapesDataset("dev")


def test_shapes_boxes_lie_inside_and_hide_little_of_each_other():
    data = ShapesDataset("val", size=(96, 160), num_images=30)
    counts, sides = [], []
    for example in data:
        boxes = example.boxes
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [160, 96]).all()
        iou, area = box_iou(boxes, boxes), box_area(boxes)
        shared = iou / (1 + iou) * (area[:, None] + area)
        np.fill_diagonal(shared, 0)
        assert (shared <= 0.301 * np.minimum(area[:, None], area)).all()
        assert len(boxes) <= data.max_boxes
        counts.append(len(boxes))
        sides.extend((boxes[:, 2:] - boxes[:, :2]).max(axis=1))
    assert 9 < np.mean(counts) < 13  # 12 * (96 * 160) / 128^2 = 11.25
    assert 16 <= min(sides) < 21 and 41 < max(sides) <= 48


def test_shapes_boxes_are_tight_and_filled_as_their_class_says():
    data = ShapesDataset("val", num_images=20)
    filled = {0: [], 1: [], 2: []}
    for index in range(20):
        for shape in data._layout(index)[1]:
            mask = np.asarray(_mask(shape))
            x1, y1, x2, y2 = shape.box
            assert mask.shape == (y2 - y1, x2 - x1)
            assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()
            filled[shape.label].append(mask.mean() / 255)
    np.testing.assert_allclose(filled[0], np.pi / 4, atol=0.03)
    assert np.min(filled[1]) > 0.55  # a square turned by 20 degrees: 0.61
    low, high = np.min(filled[2]), np.max(filled[2])
    assert 0.4 < low < high < 0.6  # an equilateral triangle: 0.46 to 0.54


def test_shapes_can_be_seen():
    """The colors inside and just outside of a single shape's box differ."""
    data = ShapesDataset("test", num_images=20, num_objects=1, object_size=(30, 40))
    for example in data:
        for x1, y1, x2, y2 in example.boxes.astype(int):
            inside = example.image[(y1 + y2) // 2 - 4 :, (x1 + x2) // 2 - 4 :][:8, :8]
            around = np.pad(example.image.astype(float), ((4, 4), (4, 4), (0, 0)), "reflect")
            ring = np.concatenate([around[y1 : y1 + 4, x1:x2], around[y2 + 4 : y2 + 8, x1:x2]])
            difference = inside.mean(axis=(0, 1)) - ring.mean(axis=(0, 1))
            assert np.abs(difference).max() > 20


def test_sparse_and_crowded_shapes():
    sparse = ShapesDataset("train", num_images=40, num_objects=1)
    assert sparse.max_boxes == 2
    assert {len(example.boxes) for example in sparse} == {0, 1, 2}
    none = ShapesDataset("train", num_images=1, num_objects=0)
    assert none.max_boxes == 0 and none[0].boxes.shape == (0, 4)
    full = ShapesDataset("train", size=(48, 48), num_images=2, num_objects=200)
    assert len(full[0].boxes) < full.max_boxes == 250  # no room for more
    tiny = ShapesDataset("train", size=(16, 24), num_images=3, num_objects=3)
    assert all(len(example.boxes) for example in tiny)


def test_shapes_ground_truth_agrees_with_examples():
    data = ShapesDataset("val", num_images=6)
    truth = data.ground_truth()
    assert data.category_ids == (1, 2, 3)
    assert [i["id"] for i in truth["images"]] == [1, 2, 3, 4, 5, 6]
    assert [a["id"] for a in truth["annotations"]] == list(range(1, 1 + len(truth["annotations"])))
    for example in data:
        assert_annotated(example, data)


# ---------------------------------------------------------------- transforms


def white_box(height, width, box):
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image, np.array([box], np.float32)


def find_box(image):
    """The white rectangle to a fraction of a pixel, from the mass and center of its profiles."""
    weight = image[..., 0] / 255
    found = []
    for profile in (weight.max(axis=0), weight.max(axis=1)):
        length = profile.sum()
        center = (profile * (np.arange(len(profile)) + 0.5)).sum() / length
        found.append((center - length / 2, center + length / 2))
    (x1, x2), (y1, y2) = found
    return np.array([x1, y1, x2, y2])


@st.composite
def pictures(draw):
    height, width = draw(st.integers(40, 90)), draw(st.integers(40, 90))
    x1, y1 = draw(st.integers(0, width - 16)), draw(st.integers(0, height - 16))
    x2, y2 = draw(st.integers(x1 + 12, width)), draw(st.integers(y1 + 12, height))
    return white_box(height, width, (x1, y1, x2, y2))


@given(picture=pictures(), canvas=st.tuples(st.integers(30, 160), st.integers(30, 160)))
@settings(max_examples=100, deadline=None)
def test_fit_keeps_box_on_its_pixels(picture, canvas):
    image, boxes = picture
    out, moved, scale = T.fit(image, boxes, canvas)
    assert scale == min(canvas[0] / image.shape[0], canvas[1] / image.shape[1])
    assert out.shape[0] <= canvas[0] and out.shape[1] <= canvas[1]
    assert out.shape[0] == canvas[0] or out.shape[1] == canvas[1]
    np.testing.assert_allclose(moved, boxes * scale, rtol=1e-6)
    seen = np.clip(moved[0], 0, np.array(out.shape)[[1, 0, 1, 0]])
    np.testing.assert_allclose(find_box(out), seen, atol=0.3)


def test_fit_of_a_sliver_and_of_nothing():
    image, boxes = np.zeros((2000, 3, 3), np.uint8), np.array([[2, 0, 3, 2000]], np.float32)
    out, moved, _ = T.fit(image, boxes, (100, 100))
    assert out.shape == (100, 1, 3)
    assert (moved[:, 2:] > moved[:, :2]).all()
    out, moved, scale = T.fit(gradient(), np.zeros((0, 4), np.float32), (20, 64))
    assert moved.shape == (0, 4) and scale == 1
    np.testing.assert_array_equal(out, gradient())


def test_place_fills_the_rest():
    out = T.place(gradient(), (25, 40), np.array([1, 2, 3], np.uint8))
    np.testing.assert_array_equal(out[:20, :30], gradient())
    assert (out[20:] == [1, 2, 3]).all() and (out[:, 30:] == [1, 2, 3]).all()


@given(
    picture=pictures(),
    crop=st.tuples(st.integers(30, 100), st.integers(30, 100)),
    zoom=st.sampled_from([(1.0, 1.0), (0.5, 0.9), (0.5, 2.0), (1.5, 1.5)]),
    flips=st.sampled_from(["none", "horizontal", "d4"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_augment_keeps_boxes_on_their_pixels(picture, crop, zoom, flips, seed):
    image, boxes = picture
    example = Example(image, boxes, np.array([2]), 9)
    before = copy.deepcopy(example)
    rng = np.random.default_rng(seed)
    out, scale = T.augment(example, crop, zoom, flips, 0.0, rng)
    for a, b in zip(before, example, strict=True):
        np.testing.assert_array_equal(a, b)
    assert out.image.shape[0] <= crop[0] and out.image.shape[1] <= crop[1]
    assert zoom[0] <= scale * (1 + 1e-9) and scale <= zoom[1] * (1 + 1e-9)
    assert out.image_id == 9 and out.boxes.shape == (len(out.labels), 4)
    assert out.boxes.dtype == np.float32
    if len(out.boxes):
        assert out.labels.tolist() == [2]
        np.testing.assert_allclose(find_box(out.image), out.boxes[0], atol=0.3)
        assert (out.boxes[0, 2:] - out.boxes[0, :2] >= 2).all()
    else:  # then most of it must be outside
        seen = (out.image[..., 0] / 255).sum()
        whole = np.prod(boxes[0, 2:] - boxes[0, :2]) * scale**2
        assert seen < 0.4 * whole + 2 * (sum(out.image.shape) + 1)


def test_crop_keeps_only_what_stays_visible():
    image = np.zeros((100, 100, 3), np.uint8)
    boxes = np.array(
        [[0, 0, 100, 100], [40, 40, 60, 60], [0, 0, 5, 5], [49, 49, 50, 51]], np.float32
    )
    labels = np.arange(4)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        out, kept, names, scale = T.random_crop_zoom(image, boxes, labels, (50, 50), (1, 1), rng)
        assert out.shape == (50, 50, 3) and scale == 1
        assert 0 not in names  # a quarter of it is visible
        assert 3 not in names  # one pixel wide
        visible = T.random_crop_zoom(
            image, boxes, labels, (50, 50), (1, 1), np.random.default_rng(seed), min_visible=0
        )
        assert 0 in visible[2]
        assert (kept >= 0).all() and (kept <= 50).all()


def test_crop_of_the_whole_image_is_the_image():
    boxes, rng = np.array([[0, 0, 30, 20]], np.float32), np.random.default_rng(0)
    out = T.random_crop_zoom(gradient(), boxes, np.array([1]), (99, 99), (1.0, 1.0), rng)
    for got, expected in zip(out, (gradient(), boxes, [1], 1), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_crops_and_zooms_cover_their_ranges():
    image, boxes = white_box(60, 80, (0, 0, 80, 60))
    corners, scales = set(), []
    for seed in range(400):
        marked = np.zeros((8, 9, 3), np.uint8)
        marked[..., 0] = np.arange(72).reshape(8, 9)
        rng = np.random.default_rng(seed)
        out = T.random_crop_zoom(marked, boxes[:0], np.zeros(0), (5, 7), (1, 1), rng)[0]
        corners.add(int(out[0, 0, 0]))
        scales.append(T.random_crop_zoom(image, boxes, np.zeros(1), (9, 9), (0.5, 2), rng)[3])
    assert corners == {9 * y + x for y in range(4) for x in range(3)}
    assert 0.5 <= min(scales) < 0.52 and 1.95 < max(scales) <= 2
    assert 0.4 < np.mean(np.array(scales) < 1) < 0.6


def test_eight_symmetries_differ_and_match_their_boxes():
    image, boxes = white_box(20, 30, (3, 4, 11, 9))
    image[:] = gradient()
    seen = set()
    for symmetry in range(8):
        out, moved = T.d4(image, boxes, symmetry)
        assert out.shape == ((30, 20, 3) if symmetry & 4 else (20, 30, 3))
        seen.add(out.tobytes() + bytes(out.shape))
        x1, y1, x2, y2 = moved[0].astype(int)
        part = out[y1:y2, x1:x2]
        assert sorted(map(tuple, part.reshape(-1, 3))) == sorted(
            map(tuple, image[4:9, 3:11].reshape(-1, 3))
        )
    assert len(seen) == 8


def test_flips_setting_says_which_symmetries_occur():
    square = gradient(24, 24)
    example = Example(square, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 0)
    for flips, count in (("none", 1), ("horizontal", 2), ("d4", 8)):
        outs = [
            T.augment(example, (24, 24), (1.0, 1.0), flips, 0.0, np.random.default_rng(seed))[0]
            for seed in range(80)
        ]
        assert len({out.image.tobytes() for out in outs}) == count


def test_color_jitter():
    image = gradient()
    rng = np.random.default_rng(0)
    assert T.color_jitter(image, 0.0, rng) is image
    out = np.array([T.color_jitter(image, 0.3, rng) for _ in range(200)]).astype(float)
    assert out.shape == (200, *image.shape)
    means = out.mean(axis=(1, 2, 3)) / image.mean()
    assert 0.65 < means.min() < 0.8 and 1.2 < means.max() < 1.35
    gray = np.full((8, 8, 3), 100, np.uint8)  # only the brightness can change plain gray
    changed = T.color_jitter(gray, 0.5, np.random.default_rng(3))
    factor = np.random.default_rng(3).uniform(0.5, 1.5, 3)[0]
    np.testing.assert_allclose(changed, 100 * factor, atol=1)


def test_color_jitter_is_the_three_steps_in_one():
    image = gradient()
    brightness, contrast, saturation = np.random.default_rng(5).uniform(0.8, 1.2, 3)
    gray = image @ np.array([0.299, 0.587, 0.114])
    expected = gray[..., None] + saturation * (image - gray[..., None])
    mean = gray[::4, ::4].mean()
    expected = brightness * (mean + contrast * (expected - mean))
    out = T.color_jitter(image, 0.2, np.random.default_rng(5))
    np.testing.assert_allclose(out, np.clip(expected, 0, 255), atol=0.51)


# ---------------------------------------------------------------- loader


SHAPES = ShapesDataset("train", size=(64, 96), num_images=13)
CONFIG = RetinaNetConfig(classes=SHAPES.classes, image_size=(64, 64))
TRAIN = TrainConfig(batch_size=4, zoom=(0.7, 1.4), flips="d4", jitter=0.2, workers=1)


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def data_threads():
    return [t for t in threading.enumerate() if t.name.startswith("focal-data")]


def wait_for_no_threads():
    for _ in range(200):
        if not data_threads():
            return
        time.sleep(0.02)
    raise AssertionError(f"threads left over: {data_threads()}")


@pytest.mark.parametrize("crop", [None, (48, 32), (100, 40)])
def test_train_batches_have_static_shapes(crop):
    canvas = {None: (64, 64), (48, 32): (48, 32), (100, 40): (64, 40)}[crop]
    rows = -(-SHAPES.max_boxes // 8) * 8
    for batch in take(train_batches(SHAPES, CONFIG, TRAIN.replace(crop=crop)), 5):
        assert batch.images.shape == (4, *canvas, 3) and batch.images.dtype == np.uint8
        assert batch.boxes.shape == (4, rows, 4) and batch.boxes.dtype == np.float32
        assert batch.labels.shape == (4, rows) and batch.labels.dtype == np.int64
        assert batch.sizes.shape == (4, 2) and batch.sizes.dtype == np.int64
        assert batch.scales.shape == (4,) and batch.scales.dtype == np.float64
        assert batch.image_ids.shape == (4,) and batch.image_ids.dtype == np.int64
        assert (batch.sizes <= canvas).all()
        assert batch.images.flags.writeable
        padding = batch.labels < 0
        assert (batch.boxes[padding] == 0).all()
        real = batch.boxes[~padding]
        assert len(real) and (real[:, 2:] - real[:, :2] >= 2).all()
        limits = np.repeat(batch.sizes[:, None, ::-1], rows, axis=1)[~padding]
        assert (real[:, 2:] <= limits).all()


def test_batches_depend_on_seed_and_number_alone():
    expected = take(train_batches(SHAPES, CONFIG, TRAIN), 9)
    for workers in (0, 1, 3, None):
        train = TRAIN.replace(workers=workers)
        assert_same(take(train_batches(SHAPES, CONFIG, train), 9), expected)
        assert_same(take(train_batches(SHAPES, CONFIG, train, start=4), 5), expected[4:])
    uncached = train_batches(SHAPES, CONFIG, TRAIN, cache_bytes=0)
    assert_same(take(uncached, 9), expected)
    other = take(train_batches(SHAPES, CONFIG, TRAIN.replace(seed=1)), 1)[0]
    assert (other.images != expected[0].images).any()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 3), (16, 8)])
def test_by_default_there_is_a_thread_for_each_core_but_one(monkeypatch, cores, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert TrainConfig().workers is None
    assert loader._default_workers() == threads
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert loader._default_workers() == threads


def test_every_epoch_shows_every_image_once_in_another_order():
    ids = np.concatenate([b.image_ids for b in take(train_batches(SHAPES, CONFIG, TRAIN), 13)])
    epochs = ids.reshape(4, 13)
    assert (np.sort(epochs, axis=1) == np.arange(1, 14)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_scales_relate_canvas_to_image():
    train = TRAIN.replace(zoom=(1.0, 1.0), flips="none", jitter=0.0)
    batch = take(train_batches(SHAPES, CONFIG, train), 1)[0]
    for row in range(4):
        example = SHAPES[int(batch.image_ids[row]) - 1]
        assert batch.scales[row] == 64 / 96
        assert batch.sizes[row].tolist() == [42, 64]  # 64 * 64 / 96 = 42.7
        count = (batch.labels[row] >= 0).sum()
        if count == len(example.boxes):
            limit = np.array([64, 42, 64, 42])
            expected = np.minimum(example.boxes * (64 / 96), limit)
            np.testing.assert_allclose(batch.boxes[row, :count], expected, rtol=1e-6)
    zoomed = take(train_batches(SHAPES, CONFIG, train.replace(zoom=(0.5, 0.5))), 1)[0]
    np.testing.assert_allclose(zoomed.scales, 64 / 96 / 2)


class Counting:
    """A dataset that counts how often it is read, and fails where it is told to."""

    name, classes, category_ids, max_boxes, constant = "counting", ("a",), (1,), 0, True

    def __init__(self, length, fails_at=None):
        self.length, self.fails_at, self.reads = length, fails_at, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads += 1
        if index == self.fails_at:
            raise DataError("instances_train.json: image id 1: broken")
        image = np.full((16, 16, 3), index % 256, np.uint8)
        return Example(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), index)

    def ground_truth(self):
        raise NotImplementedError


@pytest.mark.parametrize(("cache_bytes", "reads"), [(2**20, 6), (64 * 64 * 3 * 2, 22), (0, 30)])
def test_cache_keeps_what_fits(cache_bytes, reads):
    data = Counting(6)
    train = TRAIN.replace(batch_size=6, workers=0)
    take(train_batches(data, CONFIG, train, cache_bytes=cache_bytes), 5)
    assert data.reads == reads


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_errors_reach_the_consumer(workers):
    batches = train_batches(Counting(8, fails_at=5), CONFIG, TRAIN.replace(workers=workers))
    with pytest.raises(DataError, match="image id 1: broken"):
        for _ in range(10):
            next(batches)
    wait_for_no_threads()
    batches = eval_batches(Counting(8, fails_at=5), CONFIG, 2, workers)
    seen = []
    with pytest.raises(DataError, match="image id 1: broken"):
        for batch in batches:
            seen.extend(batch.image_ids)
    assert seen == [0, 1, 2, 3]  # earlier batches are not lost
    wait_for_no_threads()


class Faulty(Counting):
    """Fails with another error than DataError, as a user's dataset may."""

    def __init__(self, error, files=True):
        super().__init__(8)
        self.error, self.files = error, files

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return super().__getitem__(index)

    def ground_truth(self):
        assert self.files
        return {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(8)]}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), SystemExit(3)], ids=repr)
def test_any_error_names_the_image(error, workers):
    reason = {KeyError: "KeyError: 'x'", MemoryError: "MemoryError", SystemExit: "SystemExit: 3"}
    expected = f"counting: 5.png: cannot be used ({reason[type(error)]})"
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        take(train_batches(Faulty(error), CONFIG, TRAIN.replace(workers=workers)), 10)
    with pytest.raises(DataError, match=r"^counting: image 5: cannot be used"):
        list(eval_batches(Faulty(error, files=False), CONFIG, 2, workers))
    wait_for_no_threads()


def test_threads_work_ahead_and_no_further_than_the_bound():
    data = Counting(1000)
    batches = train_batches(data, CONFIG, TRAIN.replace(workers=2, batch_size=1))
    next(batches)
    for _ in range(200):
        if data.reads == 5:
            break
        time.sleep(0.02)
    time.sleep(0.05)
    assert data.reads == 5  # one taken, two waiting for each worker
    batches.close()


def test_threads_end_with_the_iterator():
    wait_for_no_threads()
    batches = train_batches(SHAPES, CONFIG, TRAIN.replace(workers=2))
    assert not data_threads()  # none before the first batch is asked for
    next(batches)
    assert data_threads()
    batches.close()
    assert not data_threads()
    batches = train_batches(SHAPES, CONFIG, TRAIN.replace(workers=2))
    next(batches)
    del batches
    gc.collect()
    wait_for_no_threads()
    assert len(list(eval_batches(SHAPES, CONFIG, 4))) == 4
    wait_for_no_threads()


def test_train_batches_of_nothing():
    with pytest.raises(ValueError, match=r"^train_batches: counting has no images$"):
        train_batches(Counting(0), CONFIG, TRAIN)
    assert list(eval_batches(Counting(0), CONFIG, 2)) == []


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_eval_batches_show_every_image_once_in_order(workers):
    batches = list(eval_batches(SHAPES, CONFIG, 4, workers))
    ids = np.concatenate([b.image_ids for b in batches])
    assert ids.tolist() == [*range(1, 14), -1, -1, -1]
    assert all(b.images.shape == (4, 64, 64, 3) for b in batches)
    assert all((b.images[:, 42:] == [124, 116, 104]).all() for b in batches)  # the mean color
    np.testing.assert_array_equal(batches[-1].images[3], batches[-1].images[0])
    example = SHAPES[5]
    image, boxes, scale = T.fit(example.image, example.boxes, (64, 64))
    batch = batches[1]
    np.testing.assert_array_equal(batch.images[1, :42, :64], image)
    np.testing.assert_array_equal(batch.boxes[1, : len(boxes)], boxes)
    np.testing.assert_array_equal(batch.labels[1, : len(boxes)], example.labels)
    assert (batch.labels[1, len(boxes) :] == -1).all()
    assert batch.scales[1] == scale and batch.sizes[1].tolist() == [42, 64]


# ---------------------------------------------------------------- datasets of one's own


class Own:
    """As little as a dataset needs; each reading gives another example."""

    classes = "circle", "square"

    def __init__(self, example, length=4):
        self.example, self.length, self.reads = example, length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads += 1
        return self.example(index, self.reads) if callable(self.example) else self.example


IMAGE = np.zeros((20, 30, 3), np.uint8)
PLAIN = TRAIN.replace(zoom=(1.0, 1.0), flips="none", jitter=0.0, batch_size=2, workers=0)
SAME_SIZE = CONFIG.replace(image_size=(20, 30), classes=("circle", "square"))


def test_a_class_with_nothing_but_what_it_must_have():
    data: Dataset = Own(lambda index, _: (IMAGE, [[1, 2, 11, 8]] * index, [1] * index), 4)
    assert dataset_name(data) == "Own" and category_ids(data) == (1, 2)
    assert dataset_name(SHAPES) == "shapes/train"
    assert category_ids(CocoDataset(BCCD, "val")) == (1, 2, 3)
    first, second = eval_batches(data, SAME_SIZE, 2)
    assert first.image_ids.tolist() == [0, 1] and second.image_ids.tolist() == [2, 3]
    assert first.boxes.shape == (2, 8, 4) and (first.labels[0] == -1).all()
    assert second.labels[1].tolist() == [1, 1, 1, -1, -1, -1, -1, -1]
    np.testing.assert_array_equal(second.boxes[1, :4], [[1, 2, 11, 8]] * 3 + [[0] * 4])
    batch = take(train_batches(data, SAME_SIZE, PLAIN.replace(batch_size=4)), 1)[0]
    assert sorted(batch.image_ids) == [0, 1, 2, 3] and (batch.labels >= 0).sum() == 6


@pytest.mark.parametrize(
    ("boxes", "declared", "rows"),
    [(0, None, 8), (8, None, 8), (9, None, 16), (17, None, 32), (64, None, 64), (9, 17, 24)],
)
def test_batches_are_padded_to_few_sizes(boxes, declared, rows):
    data = Own((IMAGE, [[1, 2, 11, 8]] * boxes, [0] * boxes))
    if declared is not None:
        data.max_boxes = declared
    for batch in (
        *eval_batches(data, SAME_SIZE, 4),
        *take(train_batches(data, SAME_SIZE, PLAIN), 1),
    ):
        assert batch.boxes.shape[1:] == (rows, 4) and batch.labels.shape[1] == rows
        assert ((batch.labels >= 0).sum(axis=1) == boxes).all()


def test_more_boxes_than_were_declared_are_kept():
    data = Own((IMAGE, [[1, 2, 11, 8]] * 9, [0] * 9))
    data.max_boxes = 3
    (batch,) = eval_batches(data, SAME_SIZE, 4)
    assert batch.labels.shape == (4, 16) and (batch.labels >= 0).sum() == 36


def test_a_dataset_is_read_anew_in_every_epoch():
    def example(_, reads):
        return np.full((20, 30, 3), reads, np.uint8), np.zeros((0, 4)), []

    seen = [
        batch.images[:, 0, 0, 0] for batch in take(train_batches(Own(example), SAME_SIZE, PLAIN), 6)
    ]
    assert np.concatenate(seen).tolist() == [*range(1, 13)]
    constant = Own(example)
    constant.constant = True
    seen = [b.images[:, 0, 0, 0] for b in take(train_batches(constant, SAME_SIZE, PLAIN), 6)]
    assert set(np.concatenate(seen)) == {1, 2, 3, 4} and constant.reads == 4
    assert CocoDataset.constant and ShapesDataset.constant


def test_boxes_are_clipped_to_the_image():
    boxes = [[-5, -5, 3, 4], [20, 10, 99, 99], [0, 0, 30, 20]]
    data = Own((IMAGE, boxes, [0, 1, 1]))
    example = read_example(data, 2)
    assert example.boxes.tolist() == [[0, 0, 3, 4], [20, 10, 30, 20], [0, 0, 30, 20]]
    assert example.boxes.dtype == np.float32 and example.labels.dtype == np.int64
    assert example.image_id == 2
    (batch,) = eval_batches(data, SAME_SIZE, 4)
    np.testing.assert_array_equal(batch.boxes[0, :3], example.boxes)


def test_an_example_may_have_an_id_and_any_integer_type():
    for labels in ([1], np.array([1], np.uint8), np.array([1], np.int16)):
        example = read_example(Own(Example(IMAGE, [(1, 2, 3, 4)], labels, np.int32(77))), 3)
        assert example.image_id == 77 and example.labels.tolist() == [1]


NAN, INF = float("nan"), float("inf")
FINITE = "boxes must be finite (x1, y1, x2, y2) with x1 < x2 and y1 < y2; got "
OVERLAP = "boxes must overlap the image, which is 30x20 pixels; got "


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((IMAGE, [[1, 2, NAN, 4]], [0]), f"{FINITE}[[1.0, 2.0, nan, 4.0]]"),
        ((IMAGE, [[1, 2, 3, 4], [1, 2, INF, 4]], [0, 0]), f"{FINITE}[[1.0, 2.0, inf, 4.0]]"),
        ((IMAGE, [[1, 2, 1e300, 4]], [0]), f"{FINITE}[[1.0, 2.0, inf, 4.0]]"),
        ((IMAGE, [[3, 2, 1, 4]], [0]), f"{FINITE}[[3.0, 2.0, 1.0, 4.0]]"),
        ((IMAGE, [[1, 4, 3, 4]], [0]), f"{FINITE}[[1.0, 4.0, 3.0, 4.0]]"),
        ((IMAGE, [[31, 2, 40, 4]], [0]), f"{OVERLAP}[[31.0, 2.0, 40.0, 4.0]]"),
        ((IMAGE, [[1, -4, 3, 0]], [0]), f"{OVERLAP}[[1.0, -4.0, 3.0, 0.0]]"),
        ((IMAGE, [1, 2, 3, 4], [0]), "boxes must be (M, 4) numbers; got ((4,), 'int64')"),
        ((IMAGE, [[1, 2, 3]], [0]), "boxes must be (M, 4) numbers; got ((1, 3), 'int64')"),
        ((IMAGE, [["1", "2", "3", "4"]], [0]), "boxes must be (M, 4) numbers; got ((1, 4), '<U1')"),
        ((IMAGE, [[1, 2, 3, 4]], [2]), "labels must be in [0, 2); got [2]"),
        ((IMAGE, [[1, 2, 3, 4]] * 2, [0, -1]), "labels must be in [0, 2); got [-1]"),
        (
            (IMAGE, [[1, 2, 3, 4]], [0.0]),
            "labels must be 1 integers, one for each box; got ((1,), 'float64')",
        ),
        (
            (IMAGE, [[1, 2, 3, 4]], []),
            "labels must be 1 integers, one for each box; got ((0,), 'int64')",
        ),
        (
            (IMAGE, [], [1, 1]),
            "labels must be 0 integers, one for each box; got ((2,), 'int64')",
        ),
        ((IMAGE / 255, [], []), "image must be (H, W, 3) uint8; got ((20, 30, 3), 'float64')"),
        ((IMAGE[..., 0], [], []), "image must be (H, W, 3) uint8; got ((20, 30), 'uint8')"),
        ((IMAGE[:0], [], []), "image must be (H, W, 3) uint8; got ((0, 30, 3), 'uint8')"),
        (
            {"image": IMAGE},
            "expected an Example or (image, boxes, labels); got <class 'dict'>",
        ),
        ((IMAGE, []), "expected an Example or (image, boxes, labels); got <class 'tuple'>"),
        (
            (IMAGE, [], [], "a"),
            "cannot be used (TypeError: 'str' object cannot be interpreted as an integer)",
        ),
    ],
)
def test_an_example_that_is_none_is_named(example, message):
    data = Own(lambda index, _: example if index == 2 else (IMAGE, [], []))
    data.name = "mine"
    for batches in (eval_batches(data, SAME_SIZE, 4), train_batches(data, SAME_SIZE, PLAIN)):
        with pytest.raises(DataError) as caught:
            for _ in range(2):
                next(batches)
        assert str(caught.value) == f"mine: image 2: {message}"
    data.ground_truth = lambda: {"images": [{"file_name": f"{i}.png"} for i in range(4)]}
    with pytest.raises(DataError, match=r"^mine: 2\.png: "):
        list(eval_batches(data, SAME_SIZE, 4))


def flip(image, bboxes, labels):
    """Mirrors, in the calling convention of albumentations."""
    width = image.shape[1]
    boxes = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in bboxes]
    return {"image": image[:, ::-1], "bboxes": boxes, "labels": list(labels)}


def test_own_augmentation_sees_the_whole_image():
    data = Transformed(SHAPES, flip)
    assert len(data) == 13 and data.classes == SHAPES.classes
    assert (data.name, data.category_ids, data.max_boxes) == (
        SHAPES.name,
        SHAPES.category_ids,
        SHAPES.max_boxes,
    )
    plain, mirrored = SHAPES[5], data[5]
    np.testing.assert_array_equal(mirrored.image, plain.image[:, ::-1])
    _, boxes = T.d4(plain.image, plain.boxes, 1)
    np.testing.assert_array_equal(mirrored.boxes, boxes)
    np.testing.assert_array_equal(mirrored.labels, plain.labels)
    assert mirrored.image_id == plain.image_id
    assert not hasattr(data, "constant") and not hasattr(data, "ground_truth")
    twice = Transformed(data, flip)[5]
    for a, b in zip(twice, plain, strict=True):
        np.testing.assert_array_equal(a, b)


def test_own_augmentation_is_random_in_every_epoch():
    values = iter(range(1, 100))

    def paint(image, bboxes, labels):
        image[:] = next(values)  # in place, which must not change the dataset's image
        return {"image": image, "bboxes": bboxes, "labels": labels, "more": None}

    image = IMAGE.copy()
    data = Transformed(Own((image, [[1, 2, 3, 4]], [0])), paint)
    batches = take(train_batches(data, SAME_SIZE, PLAIN), 4)
    seen = np.concatenate([batch.images[:, 0, 0, 0] for batch in batches])
    assert seen.tolist() == [*range(1, 9)] and not image.any()
    assert data.max_boxes == 0 and data.name == "Own"


def test_one_thread_at_a_time_transforms():
    inside, most = [], []

    def slow(image, bboxes, labels):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return {"image": image, "bboxes": bboxes, "labels": labels}

    data = Transformed(SHAPES, slow)
    take(train_batches(data, CONFIG, TRAIN.replace(workers=4)), 5)
    assert len(most) >= 20 and max(most) == 1


def test_boxes_that_a_transform_made_empty_are_dropped():
    moved = [[5, 5, 5, 9], [-9, 1, 0, 5], [40, 1, 50, 5], [-3, 1, 4, 5], [7, 9, 9, 3]]

    def move(image, bboxes, labels):
        return {"image": image[:10], "bboxes": moved, "labels": [0, 1, 0, 1, 0]}

    data = Transformed(Own((IMAGE, [[1, 2, 3, 4]] * 5, [0] * 5)), move)
    example = read_example(data, 0)
    assert example.boxes.tolist() == [[0, 1, 4, 5]] and example.labels.tolist() == [1]
    assert example.image.shape == (10, 30, 3)


def test_a_transform_that_fails_or_gives_nonsense_is_named():
    def transformed(**changes):
        def transform(image, bboxes, labels):
            out = {"image": image, "bboxes": bboxes, "labels": labels} | changes
            return {key: value for key, value in out.items() if value is not None}

        data = Own((IMAGE, [[1, 2, 3, 4]], [0]))
        data.name = "mine"
        return Transformed(data, transform)

    for changes, message in (
        ({"bboxes": [[1, 2, NAN, 4]]}, f"{FINITE}[[1.0, 2.0, nan, 4.0]]"),
        ({"bboxes": [[1, 2, 3, 4, 5]]}, "boxes must be (M, 4) numbers; got ((1, 5), 'int64')"),
        ({"bboxes": []}, "labels must be 0 integers, one for each box; got ((1,), 'int64')"),
        ({"labels": [2]}, "labels must be in [0, 2); got [2]"),
        ({"labels": None}, "cannot be used (KeyError: 'labels')"),
        (
            {"image": IMAGE.astype(float)},
            "image must be (H, W, 3) uint8; got ((20, 30, 3), 'float64')",
        ),
    ):
        with pytest.raises(DataError) as caught:
            list(eval_batches(transformed(**changes), SAME_SIZE, 4))
        assert str(caught.value) == f"mine: image 0: {message}"
