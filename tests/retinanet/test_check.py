"""`focal check`: what it finds, what it says of sizes and anchors, and how it ends."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
from folders import BCCD, WHOLE_BCCD
from PIL import Image

from focal.cli import main
from focal.numpy import anchors, box_iou
from focal.retinanet import PRESETS
from focal.retinanet.data import CocoDataset
from focal.retinanet.data.coverage import anchor_shapes, best_iou
from focal.retinanet.report.check import check_data, read_boxes
from focal.retinanet.report.check_picture import check_picture
from focal.retinanet.report.check_report import check_record, check_text

TINY = PRESETS["tiny"].detector


def picture(seed, size=(60, 40)):
    """A picture that differs from that of any other seed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(256, size=(4, 6, 3), dtype=np.uint8)).resize(size)


def split(first, count=2, boxes=((5, 5, 20, 10), (30, 20, 12, 16))):
    """A valid split: images first, first + 1, ..., each with one box of each class."""
    images = [
        {"id": k, "file_name": f"{k}.png", "width": 60, "height": 40}
        for k in range(first, first + count)
    ]
    pairs = [(image, label, box) for image in images for label, box in enumerate(boxes)]
    return {
        "images": images,
        "annotations": [
            {"id": k, "image_id": image["id"], "category_id": label, "bbox": list(box)}
            for k, (image, label, box) in enumerate(pairs)
        ],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(len(boxes))],
    }


@pytest.fixture
def data(tmp_path):
    """A valid set of two splits, as Python objects; `write` writes it to disk."""
    (tmp_path / "images").mkdir()
    for k in range(4):
        picture(k).save(tmp_path / "images" / f"{k}.png")
    return {"train": split(0), "val": split(2)}


def write(root, data):
    for name, content in data.items():
        (root / f"instances_{name}.json").write_text(json.dumps(content))
    return root


def found(root, level="warning"):
    """The findings of a level as pairs of kind and sentence."""
    return [(f.kind, f.sentence) for f in check_data(root)[0] if f.level == level]


def test_a_sound_set_has_no_findings(tmp_path, data, capsys):
    findings, splits = check_data(write(tmp_path, data))
    assert findings == [] and [s.name for s in splits] == ["train", "val"]
    assert main(["check", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "errors: none" in text and "warnings: none" in text
    assert [row.split() for row in text.splitlines()[:5]] == [
        ["train", "val", "all"],
        ["images", "2", "2", "4"],
        ["boxes", "4", "4", "8"],
        ["class", "0", "2", "2", "4"],
        ["class", "1", "2", "2", "4"],
    ]


def test_all_errors_at_once(tmp_path, data, capsys):
    train, val = data["train"], data["val"]
    train["images"] += [
        {"id": 10, "file_name": "gone.png", "width": 60, "height": 40},
        {"id": 11, "file_name": "../secret.png", "width": 60, "height": 40},
        {"id": 12, "file_name": "broken.png", "width": 60, "height": 40},
        {"id": 13, "file_name": "turned.png", "width": 60, "height": 40},
        {"id": 0, "file_name": "1.png", "width": 60, "height": 40},
        {"id": 14, "file_name": 7, "width": "60", "height": 40},
    ]
    (tmp_path / "images/broken.png").write_bytes((tmp_path / "images/0.png").read_bytes()[:90])
    picture(7, (40, 60)).save(tmp_path / "images/turned.png")
    boxes = [[1, 2, 3, float("nan")], [1, 2, -3, 4], "text", [0, 0, 5, 5], [0, 0, 5, 5], None]
    train["annotations"] += [
        {"id": 20 + k, "image_id": 0, "category_id": 0, "bbox": box} for k, box in enumerate(boxes)
    ]
    train["annotations"][-3]["image_id"] = 99
    train["annotations"][-2]["category_id"] = 99
    del train["annotations"][-1]["bbox"]
    train["annotations"].append({"id": 30, "image_id": 14, "category_id": 0, "bbox": [1, 1, 5, 5]})
    val["categories"][1]["name"] = "another"
    errors = [sentence for _, sentence in found(write(tmp_path, data), "error")]
    for part in [
        "image id 10 (gone.png): file not found in images/",
        "image id 11 (../secret.png): file_name leads out of images/",
        "image id 12: ",
        "image id 13 (turned.png): width x height is 60x40 in the JSON but 40x60 in the file",
        "duplicate image id 0",
        "image id 14: file_name must be text, got 7",
        "image id 14: width must be a positive integer, got '60'",
        "annotation 20: bbox must be four finite numbers, got [1, 2, 3, nan]",
        "annotation 21: bbox must have a width and height of 0 or more, got [1, 2, -3, 4]",
        "annotation 22: bbox must be four finite numbers, got 'text'",
        "annotation 23: unknown image_id 99",
        "annotation 24: unknown category_id 99",
        "annotation 25: missing key 'bbox'",
    ]:
        assert sum(f"instances_train.json: {part}" in sentence for sentence in errors) == 1, part
    assert (
        "instances_val.json: its classes are not those of instances_train.json (only in "
        "instances_val.json: another; only in instances_train.json: class 1)"
    ) in errors
    assert len(errors) == 14  # and none of them twice, nor of annotation 30
    assert main(["check", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    record = json.loads((tmp_path / "out/check.json").read_text())
    assert sorted(s for group in record["errors"] for s in group["findings"]) == sorted(errors)
    assert sum(group["count"] for group in record["errors"]) == 14
    capsys.readouterr()
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.removeprefix("focal: ").strip() in errors


def test_missing_splits_and_files(tmp_path, data, capsys):
    del data["val"]
    write(tmp_path, data)
    assert found(tmp_path, "error") == []
    (tmp_path / "instances_test.json").write_text("{")
    broken = ("annotation file", "instances_test.json: not valid JSON (line 1 column 2)")
    assert found(tmp_path, "error") == [broken]
    (tmp_path / "instances_train.json").unlink()
    missing = ("missing split", f"{tmp_path}: no split 'train'; found test")
    assert found(tmp_path, "error") == [missing, broken]
    (tmp_path / "instances_test.json").unlink()
    assert main(["check", str(tmp_path)]) == 2
    assert "no split 'train'; found no instances_*.json" in capsys.readouterr().err


def test_the_images_that_training_would_hold_out_are_compared(tmp_path, data, capsys):
    """A set without val is two splits of one file: nothing is said twice, all is compared."""
    everything = split(0, 10)
    for k in range(1, 10):  # the same picture is in both splits, whichever is held out
        shutil.copy(tmp_path / "images/0.png", tmp_path / "images" / f"{k}.png")
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/instances_default.json"
    file.write_text(json.dumps(everything))
    findings, splits = check_data(tmp_path)
    assert [(s.name, len(s.images), s.total, len(s.raw)) for s in splits] == [
        ("train", 9, 18, 20),
        ("val", 1, 2, 20),
    ]
    for own in splits:
        data = CocoDataset(tmp_path, own.name)
        assert [i.id for i in own.images] == [e.image_id for e in data]
    kinds = [f.kind for f in findings]
    assert (
        kinds.count("image in two splits") == 1 and kinds.count("duplicate image in a split") == 8
    )
    assert {f.level for f in findings} == {"warning"}
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out.split()[:3] == ["train", "val", "all"]
    everything["annotations"][0]["bbox"] = "text"
    everything["annotations"][7]["image_id"] = []
    everything["images"][3]["width"] = 0
    file.write_text(json.dumps(everything))
    assert sorted(s for _, s in found(tmp_path, "error")) == [
        "instances_default.json: annotation 0: bbox must be four finite numbers, got 'text'",
        "instances_default.json: annotation 7: unknown image_id []",
        "instances_default.json: image id 3 (3.png): width must be a positive integer, got 0",
    ]
    file.write_text(json.dumps(split(0, 1)))
    assert [s for _, s in found(tmp_path, "error")] == [
        "instances_default.json: 1 image, of which none can be held out as val; expected 2, "
        "or hold_out=0"
    ]


def roboflow(root, data):
    """The set as Roboflow writes it; the names of all annotation files are the same."""
    group = {"id": 9, "name": "group", "supercategory": "none"}
    for name, content in data.items():
        for category in content["categories"]:
            category["supercategory"] = "group"
        content["categories"].append(group)
        folder = root / {"val": "valid"}.get(name, name)
        folder.mkdir()
        for image in content["images"]:
            shutil.move(root / "images" / image["file_name"], folder)
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    (root / "README.dataset.txt").touch()
    return root


def test_roboflow(tmp_path, data):
    findings, splits = check_data(roboflow(tmp_path, data))
    assert findings == [] and [s.name for s in splits] == ["train", "val"]
    assert [s.classes for s in splits] == [("class 0", "class 1")] * 2
    for folder, name in (("train", "class 0"), ("valid", "class 2")):
        file = tmp_path / folder / "_annotations.coco.json"
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = name
        content["annotations"][0]["bbox"] = None
        file.write_text(json.dumps(content))
    assert [s for _, s in found(tmp_path, "error")] == [
        "train/_annotations.coco.json: annotation 0: bbox must be four finite numbers, got None",
        "valid/_annotations.coco.json: annotation 0: bbox must be four finite numbers, got None",
        "valid/_annotations.coco.json: its classes are not those of train/_annotations.coco.json "
        "(only in valid/_annotations.coco.json: class 2; only in train/_annotations.coco.json: "
        "class 0)",
    ]


def test_files_beside_the_images_and_folders_in_folders(tmp_path, data):
    """Annotation files lie among images; the images of val lie in a folder of those of train."""
    root = tmp_path / "images"
    (root / "a.json").write_text(json.dumps(split(0, 4)))
    (root / "notes.txt").touch()
    unlisted = "file not listed in any split"
    assert found(root) == [(unlisted, "images/notes.txt")]
    (root / "a.json").rename(tmp_path / "a.json")
    (tmp_path / "annotations").mkdir()
    for name, content in data.items():
        path = tmp_path / f"annotations/instances_{name}.json"
        path.write_text(json.dumps(content))
    (root / "val").mkdir()
    for name in ("2.png", "3.png"):
        (root / name).rename(root / "val" / name)
    (root / "val/more.txt").touch()
    assert found(tmp_path) == [(unlisted, "images/notes.txt"), (unlisted, "images/val/more.txt")]


def test_classes_are_told_apart_by_name_where_their_order_differs(tmp_path, data):
    for entry, name in zip(data["val"]["categories"], ("class 1", "class 0"), strict=True):
        entry["name"] = name
    data["test"] = copy.deepcopy(data["val"])
    findings, splits = check_data(write(tmp_path, data))
    sentences = [f.sentence for f in findings if f.level == "error"]
    assert sentences == [
        f"instances_{split}.json: its classes are not those of instances_train.json "
        "(their order by id differs)"
        for split in ("val", "test")
    ]
    record = check_record(findings, splits, read_boxes(splits, TINY), TINY, {})
    assert record["classes"] == ["class 0", "class 1"]
    widths = record["boxes by class"]["class 0"]["height/width"]  # 10 / 20, then 16 / 12
    assert widths["5%"] == 0.5 and widths["median"] == widths["95%"] == 1.33


def change(name, value):
    """An edit of the first annotation of train."""
    return lambda data: data["train"]["annotations"][0].update({name: value})


def one_more(box, label=0):
    entry = {"id": 50, "image_id": 0, "category_id": label, "bbox": box}
    return lambda data: data["train"]["annotations"].append(entry)


def without(rows):
    return lambda data: data["train"]["annotations"].__delitem__(rows)


def same_file_again(data):
    data["train"]["images"].append({**data["train"]["images"][0], "id": 9})


def names_alike(data):
    for content in data.values():
        content["categories"][1]["name"] = " CLASS0"


IMAGE = "image id 0 (0.png)"
FIRST, OTHER = f"annotation 0 of {IMAGE}", f"annotation 50 of {IMAGE}"
AREA = "area larger than the box"
CLIPPED = "box that extends beyond its image, clipped"
TWO_BOXES = "two boxes for one object (IoU 0.9 or more)"
TWO_CLASSES = "one object with two classes (IoU 0.9 or more)"
NAMES_ALIKE = "class names that differ only in case or spaces"


@pytest.mark.parametrize(
    ("edit", "kind", "sentence"),
    [
        (one_more([9, 9, 0, 5]), "box dropped: zero-area", "annotation 50 of image id 0: [9, 9, 0"),
        (one_more([90, 9, 5, 5]), "box dropped: outside the image", "annotation 50 of image id 0"),
        (one_more([50, 35, 20, 7]), CLIPPED, f"{OTHER}: by 10 pixels"),
        (one_more([5, 5, 20, 10]), "duplicate box", f"{FIRST}, and 50: IoU 1.000"),
        (one_more([5, 5, 20, 10], 1), TWO_CLASSES, f"{FIRST}, and 50: IoU 1.000"),
        (one_more([5, 5, 19, 10]), TWO_BOXES, f"{FIRST}, and 50: IoU 0.950"),
        (change("area", 300), AREA, f"{FIRST}: area 300, box 20 x 10 = 200"),
        (change("area", 203.1), AREA, f"{FIRST}: area 203.1, box 20 x 10 = 200"),
        (change("iscrowd", 1), "crowd box, used only to ignore detections", FIRST),
        (without(slice(0, 2)), "image without boxes", IMAGE),
        (without(slice(1, 4, 2)), "class without boxes", "'class 1'"),
        (same_file_again, "file listed more than once", "0.png, 2 times"),
        (names_alike, NAMES_ALIKE, "'class 0', ' CLASS0'"),
    ],
)
def test_each_warning(tmp_path, data, edit, kind, sentence):
    edit(data)
    warnings = found(write(tmp_path, data))
    assert (kind, f"instances_train.json: {sentence}") in [
        (k, s[: len(f"instances_train.json: {sentence}")]) for k, s in warnings
    ]
    beside = {"image without boxes", NAMES_ALIKE}
    assert {k for k, _ in warnings} <= {kind} | beside
    assert found(tmp_path, "error") == []


@pytest.mark.parametrize("area", [0, 1, 100, 199.5, 202.9, None])
def test_an_area_of_a_mask_may_be_smaller(tmp_path, data, area):
    """Many exports leave out the mask, but not its area."""
    change("area", area)(data)
    assert found(write(tmp_path, data)) == []


def test_the_same_image_again(tmp_path, data):
    images = tmp_path / "images"
    shutil.copy(images / "0.png", images / "1.png")
    shutil.copy(images / "0.png", images / "2.png")
    nearly = np.asarray(picture(0)).astype(int) + 3
    Image.fromarray(np.minimum(nearly, 255).astype(np.uint8)).save(images / "3.png")
    (images / "notes.txt").touch()
    first = f"instances_train.json: {IMAGE}"
    (images / "more").mkdir()
    (images / "more/5.png").touch()
    assert found(write(tmp_path, data)) == [
        (
            "duplicate image in a split",
            f"instances_train.json: image id 1 (1.png) and {first}",
        ),
        ("image in two splits", f"instances_val.json: image id 2 (2.png) and {first}"),
        (
            "near-duplicate of an image in another split",
            f"instances_val.json: image id 3 (3.png) and {first}: correlation 1.000",
        ),
        ("file not listed in any split", "images/notes.txt"),
        ("file not listed in any split", "images/more/5.png"),
    ]


def test_unusual_boxes_and_missing_classes(tmp_path):
    (tmp_path / "images").mkdir()
    data = {"train": split(0, 24), "val": split(24, 6)}
    for k in range(30):
        picture(k).save(tmp_path / "images" / f"{k}.png")
    rng = np.random.default_rng(0)
    for content in data.values():
        for entry in content["annotations"]:
            entry["bbox"][2] += float(rng.uniform(-1, 1))
    boxes = data["train"]["annotations"]
    boxes[9]["bbox"][2:] = [2, 2]  # image 4, class 1
    del boxes[20]  # image 10, class 0
    assert found(write(tmp_path, data)) == [
        (
            "image without 'class 0', which 96.7% of the images have",
            "instances_train.json: image id 10 (10.png)",
        ),
        (
            "box of a size unusual for its class",
            "instances_train.json: annotation 9 of image id 4 (4.png): 'class 1' of 2 pixels, "
            "the median is 14",
        ),
    ]


@pytest.mark.parametrize(
    "placement",
    [
        {},
        {"offset": 0.0, "rounded": True},
        {"offset": 0.3},
        {"offset": 0.3, "stretched": True},
    ],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_best_anchor_is_the_best_of_all(preset, placement):
    config = PRESETS[preset].detector.replace(image_size=(200, 260))
    config = config.replace(anchors=dataclasses.replace(config.anchors, **placement))
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 1, (100, 2)) * [250, 190]
    high = np.minimum(low + np.exp(rng.uniform(0, 5.5, (100, 2))), [260, 200])
    boxes = np.concatenate([low, high], axis=1)
    every = anchors(config.image_size, config.anchors).astype(np.float64)
    np.testing.assert_allclose(
        best_iou(boxes, config), box_iou(every, boxes).max(axis=0), atol=1e-5
    )
    assert [len(cell) for cell in anchor_shapes(config)] == [9] * len(config.levels)


def test_statistics_by_class_and_size(tmp_path, data):
    # On the canvas one pixel is four: 200 x 100, 48 x 64 and 8 x 160; anchors are 20 to 127.
    data["train"]["annotations"][1]["bbox"] = [50, 0, 2, 40]
    data["train"]["annotations"][0]["bbox"] = [0, 0, 50, 25]
    config = TINY.replace(image_size=(160, 240))
    _, splits = check_data(write(tmp_path, data))
    boxes = read_boxes(splits, config)
    record = check_record([], splits, boxes, config, {"data": "x"})
    assert boxes.scale.tolist() == [4] * 8
    reached = record["boxes by class"]["class 1"]["reached"]
    assert reached["all"] == {"count": 4, "share": 0.75}
    assert reached["small"] == {"count": 4, "share": 0.75}
    assert reached["large"] == {"count": 0, "share": None}
    first = record["boxes by class"]["class 0"]
    assert first["reached"]["medium"]["count"] == 1 and first["count"] == 4
    assert first["side"]["median"] == pytest.approx(np.sqrt(200), abs=0.01)
    assert first["side on the canvas"]["median"] == pytest.approx(4 * np.sqrt(200), abs=0.01)
    assert record["boxes"]["reached"]["all"]["count"] == 8
    row = next(r for r in check_text(record).splitlines() if r.startswith("class 1  "))
    last = [r for r in check_text(record).splitlines() if r.startswith("class 1")][-1]
    assert row != last and last.split()[-4:] == ["75.0%", "75.0%", "-", "-"]


def test_it_ends_with_the_command_to_run(tmp_path, data, capsys):
    # No anchor of the preset is as long as these boxes.
    for content in data.values():
        for annotation in content["annotations"]:
            annotation["bbox"] = [5, 5, 40, 8]
    root = tmp_path / "my set"
    root.mkdir()
    (tmp_path / "images").rename(root / "images")
    write(root, data)
    small = ["--image-size", "32x64"]
    assert main(["check", str(root), "--out", str(tmp_path / "out")]) == 0
    suggested = json.loads((tmp_path / "out/check.json").read_text())["suggested"]
    assert f"\n\nsuggested: {suggested}\n" in capsys.readouterr().out
    command, fit = suggested.splitlines()
    assert command == f"focal train --data '{root}'"
    assert fit.startswith("fit: images of 40x60 ") and fit.endswith(
        "100% of the boxes have an anchor"
    )
    assert read_boxes(check_data(root)[1], TINY).iou.max() < 0.5

    # What is given stays.
    assert main(["check", str(root), *small, "--out", str(tmp_path / "out")]) == 0
    assert f"suggested: focal train --data '{root}' --image-size 32x64\n" in capsys.readouterr().out
    assert " 32x64, as set" in json.loads((tmp_path / "out/check.json").read_text())["suggested"]


def test_where_nothing_is_fitted_the_command_is_shown(tmp_path, data, capsys):
    assert main(["check", str(write(tmp_path, data)), "--preset", "r50"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"suggested: focal train --data {tmp_path} --preset r50"
    data["train"]["annotations"] = []
    assert main(["check", str(write(tmp_path, data))]) == 0
    assert "no boxes, so the settings stay" in capsys.readouterr().out
    (tmp_path / "instances_train.json").write_text("{")
    assert main(["check", str(tmp_path)]) == 1
    assert "suggested" not in capsys.readouterr().out


NAMES = ["$x^ 細胞 _", "_hidden", "<script>", "a" * 300, "all", *(f"class {k}" for k in range(9))]


@pytest.mark.parametrize("count", [0, 3, 14])
def test_any_set_can_be_drawn(tmp_path, data, count):
    data = copy.deepcopy(data)
    for content in data.values():
        content["categories"] = [{"id": k, "name": n} for k, n in enumerate(NAMES[: count or 1])]
        content["annotations"] = content["annotations"] if count else []
    findings, splits = check_data(write(tmp_path, data))
    boxes = read_boxes(splits, TINY)
    record = check_record(findings, splits, boxes, TINY, {"data": str(tmp_path)})
    assert check_text(record).encode()
    out = check_picture(boxes, record, TINY, tmp_path / "check.png")
    with Image.open(out) as image:
        assert image.size == (1100, 860)
    assert sorted(p.name for p in tmp_path.glob("check*")) == ["check.png"]


TWICE = "two boxes for one object (IoU 0.9 or more)"
REAL = [
    (
        BCCD,
        {"train": (4, 67, 55, 5, 7), "val": (4, 82, 75, 4, 3), "test": (8, 148, 130, 9, 9)},
        {TWICE: {"train": 1, "val": 1}},
    ),
    (
        WHOLE_BCCD,
        {
            "train": (205, 2804, 2381, 214, 209),
            "val": (87, 1137, 967, 87, 83),
            "test": (72, 945, 805, 71, 69),
        },
        {
            TWICE: {"train": 4, "val": 2, "test": 1},
            "image without 'RBC', which 95.9% of the images have": {
                "train": 8,
                "val": 4,
                "test": 3,
            },
            "box of a size unusual for its class": {"train": 2, "test": 1},
        },
    ),
]


@pytest.mark.parametrize(
    ("folder", "counts", "warned"), [x for x in REAL if x[0] != WHOLE_BCCD or x[0].is_dir()]
)
def test_bccd_is_what_its_readme_says(tmp_path, folder, counts, warned):
    assert main(["check", str(folder), "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "check.json").read_text())
    assert counts == {
        name: (s["images"], s["boxes"], *s["classes"].values())
        for name, s in record["splits"].items()
    }
    assert record["boxes"]["count"] == sum(boxes for _, boxes, *_ in counts.values())
    assert record["errors"] == []
    warnings = {group["kind"]: group for group in record["warnings"]}
    assert {kind: warnings[kind]["splits"] for kind in warned} == warned
    (alike,) = warnings["near-duplicate of an image in another split"]["findings"]
    assert "00037" in alike and "00038" in alike
