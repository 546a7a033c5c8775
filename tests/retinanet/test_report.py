"""Pictures of detections, curves, and the HTML page of a run."""

import base64
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from focal.retinanet.data import Example, ShapesDataset
from focal.retinanet.report.curves import loss_plot
from focal.retinanet.report.draw import PALETTE, class_color, draw_boxes, save_image, side_by_side
from focal.retinanet.report.report import detections_picture, write_report
from focal.retinanet.training.metrics import read_metrics

HOSTILE = (
    "<script>alert(1)</script>",
    "赤血球 é ℵ \U0001f9ab \u202e",
    "a\nb\tc\0d\ud800",
    "long " * 2000,
    "\"&' onload=x $\\frac{",
    "",
)


def rgb(label):
    return tuple(bytes.fromhex(class_color(label)[1:]))


def gray(height=100, width=120, value=90):
    return np.full((height, width, 3), value, np.uint8)


def train_line(step, **changes):
    line = {"kind": "train", "step": step, "loss": 1 / step, "classification": 0.6 / step}
    line |= {"box": 0.4 / step, "learning_rate": 1e-3, "positives": 9, "images_per_second": 50.0}
    return json.dumps(line | changes) + "\n"


def eval_line(step, split="val", **metrics):
    base = {"AP": 0.5, "AP50": 0.8, "AP75": 0.5, "APs": float("nan"), "AR100": 0.6}
    return json.dumps({"kind": "eval", "split": split, "step": step, **base, **metrics}) + "\n"


CONFIG = {
    "detector": {"classes": HOSTILE[:2], "anchors": {"offset": 0.5}},
    "train": {"steps": 90, "ema": None},
    "command": "focal train --data 'a<b>' && echo",
    "started": "2026-01-02 03:04",
    "data": "<b>cells</b>",
    "backend": "torch",
    "versions": {"focal": "0.1.0", "<i>": "<u>"},
    "device": "cpu & more",
    "parameters": 930123,
    "seconds": 75.0,
}


def size_of(path):
    with Image.open(path) as image:
        image.load()
        return image.size


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize("value", [0, 90, 255])
@pytest.mark.parametrize("label", range(len(PALETTE) + 2))
def test_the_edge_has_the_class_color_and_a_halo_of_another(label, value):
    box = np.array([[30, 40, 90, 80]], np.float32)
    out = draw_boxes(gray(value=value), box, np.array([label]), ("x",) * 20)
    for y, x in [(60, 30), (60, 89), (79, 60)]:
        assert tuple(out[y, x]) == rgb(label)
    assert tuple(out[60, 29]) == tuple(out[60, 90]) in {(0, 0, 0), (255, 255, 255)}
    assert (out[60, 40] == value).all() and (out[60, 27] == value).all()


def test_the_image_given_is_not_drawn_on_and_may_be_read_only_or_a_view():
    image = gray()
    image.flags.writeable = False
    out = draw_boxes(image[:, ::-1], [[10, 10, 50, 50]], [0], ("x",))
    assert (image == 90).all() and (out != 90).any()


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 2.6])
def test_scale_scales_picture_and_boxes(scale):
    out = draw_boxes(gray(), np.array([[40, 40, 80, 80]]), np.array([1]), ("a", "b"), scale=scale)
    assert out.shape == (round(100 * scale), round(120 * scale), 3) and out.dtype == np.uint8
    assert tuple(out[round(60 * scale), round(40 * scale)]) == rgb(1)
    assert tuple(out[round(60 * scale), round(80 * scale) - 1]) == rgb(1)


def test_without_boxes_the_picture_is_the_image():
    for boxes in (np.zeros((0, 4)), np.zeros(0), []):
        out = draw_boxes(gray(), boxes, np.zeros(0, int), ("x",), np.zeros(0))
        assert np.array_equal(out, gray())


def test_a_box_on_the_border_is_drawn_inside_the_picture():
    out = draw_boxes(gray(), np.array([[0, 0, 120, 100]]), np.array([0]), ("x",))
    assert (out[50:, [0, -1]] == rgb(0)).all() and (out[-1] == rgb(0)).all()
    for corner in ([-50, -50, 20, 20], [100, 80, 500, 1e30]):
        out = draw_boxes(gray(), np.array([corner]), np.array([0]), ("x",), np.array([0.5]))
        assert out.shape == (100, 120, 3) and (out == rgb(0)).all(axis=2).any()


def test_a_one_pixel_box_is_one_pixel_with_a_halo():
    out = draw_boxes(gray(), np.array([[60, 50, 61, 51]]), np.array([0]), ("",))
    assert tuple(out[50, 60]) == rgb(0)
    colored = np.argwhere((out != 90).any(axis=2))
    assert colored.min(axis=0).tolist() == [49, 59] and colored.max(axis=0).tolist() == [51, 61]


@pytest.mark.parametrize(
    "box",
    [[130, 5, 140, 9], [-9, 5, -1, 9], [5, 100, 9, 130], [np.nan, 1, 2, 3], [1, 2, np.inf, 4]],
)
def test_boxes_outside_and_not_finite_are_left_out(box):
    out = draw_boxes(gray(), np.array([box]), np.array([0]), ("x",), np.array([0.5]))
    assert np.array_equal(out, gray())


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (12, 12), (30, 30), (400, 300)])
@pytest.mark.parametrize("label", range(len(HOSTILE)))
def test_any_name_fits_any_picture(shape, label):
    boxes = np.array([[0, 0, 1, 1], [0, 0, *shape[::-1]]], float)
    out = draw_boxes(gray(*shape), boxes, [label] * 2, HOSTILE, [0.5, np.nan])
    assert out.shape == (*shape, 3)


def test_a_tag_stays_inside_the_picture_and_off_the_others():
    boxes = np.array([[100, 90, 119, 99], [1, 1, 8, 8], [40, 40, 70, 60], [40, 40, 71, 61]])
    out = draw_boxes(gray(), boxes, [0, 1, 2, 3], ("name",) * 4, [1, 1, 1, 1])
    for label in range(4):  # a tag is mostly its color: far more of it than in the outline
        assert (out == rgb(label)).all(axis=2).sum() > 250


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        draw_boxes(gray(), np.zeros((2, 4)), [0], ("x",))
    with pytest.raises(ValueError):
        draw_boxes(gray(), np.zeros((2, 4)), [0, 0], ("x",), [0.5])


# ---------------------------------------------------------------- sheets and files


def test_a_sheet_holds_its_pictures_unchanged():
    left, right = gray(100, 300, 10), gray(80, 250, 20)
    sheet = side_by_side([(left, right), (right, left)], legend=list(enumerate(HOSTILE)))
    assert sheet.shape[1] > 600 and sheet.dtype == np.uint8
    assert (sheet == 10).all(axis=2).sum() == 2 * 100 * 300
    assert (sheet == 20).all(axis=2).sum() == 2 * 80 * 250
    for label in range(len(HOSTILE)):
        assert (sheet == rgb(label)).all(axis=2).any()


def test_a_long_legend_wraps_and_an_empty_sheet_has_only_titles():
    legend = [(k, f"class number {k}") for k in range(80)]
    assert side_by_side([], legend=legend).shape[0] > 10 * side_by_side([]).shape[0]


def test_images_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    image = ShapesDataset("val")[0].image
    assert save_image(tmp_path / "a.PNG", image) == tmp_path / "a.PNG"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.PNG")), image)
    assert size_of(save_image(tmp_path / "a.jpg", image)) == (128, 128)
    quick = save_image(tmp_path / "quick.png", image, optimize=False)
    np.testing.assert_array_equal(np.array(Image.open(quick)), image)  # PNG loses nothing
    assert quick.stat().st_size > (tmp_path / "a.PNG").stat().st_size
    with pytest.raises(ValueError, match="must end in"):
        save_image(tmp_path / "a.gif", image)

    def fail(*_):
        raise OSError("no rename")

    before = (tmp_path / "a.PNG").read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        save_image(tmp_path / "a.PNG", 255 - image)
    with pytest.raises(OSError, match="no rename"):
        write_report(tmp_path)
    assert (tmp_path / "a.PNG").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.PNG", "a.jpg", "quick.png"]


def test_detections_below_the_threshold_are_not_shown(tmp_path):
    example = Example(gray(256, 256), np.zeros((0, 4), np.float32), np.zeros(0, int), 1)
    found = {"boxes": np.array([[20, 60, 90, 120], [120, 60, 200, 120]], np.float32)}
    found |= {"scores": np.array([0.9, 0.2]), "labels": np.array([0, 2])}
    out = detections_picture([example], [found], HOSTILE, tmp_path / "d.png")
    picture = np.asarray(Image.open(out))
    assert (picture == rgb(0)).all(axis=2).any() and not (picture == rgb(2)).all(axis=2).any()
    detections_picture([example], [found], HOSTILE, out, threshold=0.1)
    assert (np.asarray(Image.open(out)) == rgb(2)).all(axis=2).any()


def test_a_picture_of_generators_with_empty_predictions(tmp_path):
    data = ShapesDataset("val", num_images=6)
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, int)}
    examples = (data[i] for i in range(6))
    out = detections_picture(
        examples, (nothing for _ in range(6)), data.classes, tmp_path / "d.png", limit=3
    )
    width, height = size_of(out)
    assert 2 * 512 <= width < 2 * 512 + 50 and 3 * 512 <= height < 3 * 512 + 120
    assert size_of(detections_picture([], [], data.classes, out))


# ---------------------------------------------------------------- metrics and curves


def test_cut_and_repeated_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = train_line(20) + train_line(40) + train_line(60)[:30] + "\n" + train_line(40, loss=7.0)
    text += "[]\n3\n" + json.dumps({"kind": "train"}) + "\n\n" + eval_line(40, "train")
    path.write_text(text + train_line(80)[:-9])
    train, evals = read_metrics(path)
    assert [(line["step"], line["loss"]) for line in train] == [(20, 0.05), (40, 7.0)]
    assert list(evals) == ["train"]
    assert read_metrics(tmp_path / "missing.jsonl") == ([], {})


LINES = {
    "none": "",
    "one": train_line(1),
    "many": "".join(train_line(s) for s in range(20, 4000, 20)) + eval_line(1000) + eval_line(2000),
    "eval": eval_line(10, "$x^ 細胞 _"),
    "odd": train_line(1, loss=float("nan"), box=0, classification=None, learning_rate="x")
    + train_line(2, loss=float("inf"), box=0, classification=-1, learning_rate=0),
    "cut": train_line(1) + train_line(2)[:-5],
}


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES)
def test_curves_are_drawn_from_any_lines(tmp_path, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines)
    width, height = size_of(loss_plot(path, tmp_path / "loss.png"))
    assert width == 800 and 350 < height < 800


# ---------------------------------------------------------------- the page


def page_of(run):
    assert write_report(run) == run / "report.html"
    return (run / "report.html").read_text("utf-8")


def test_a_full_report_is_escaped_and_self_contained(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    per_class = {f"AP/{name}": 0.25 for name in HOSTILE}
    lines = train_line(20) + eval_line(20, **per_class) + eval_line(30, "<test>", AP=0.625)
    (tmp_path / "metrics.jsonl").write_text(lines)
    loss_plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    save_image(tmp_path / "detections.png", gray())
    page = page_of(tmp_path)

    images = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert [Image.open(io.BytesIO(base64.b64decode(i))).size[0] for i in images] == [800, 120]
    page = re.sub(r"base64,[^\"]*", "", page)
    for word in "http // url( @import <script <link <b> <i> <u> <test>".split():
        assert word not in page, word
    assert not re.search(r"<[^>]*\bonload", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "赤血球 é ℵ" in page
    assert "930,123" in page and "1 min 15 s" in page and "0.625" in page and "0.250" in page
    assert '<td class="number">–</td>' in page  # noqa: RUF001
    assert ">nan<" not in page.lower() and "prefers-color-scheme" in page


def test_an_empty_folder_gives_sentences(tmp_path):
    page = page_of(tmp_path)
    for name in ("loss.png", "detections.png", "config.json"):
        assert f"{name} is missing" in page
    assert "not been evaluated" in page


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"detector": 3, "seconds": "x"}'])
def test_a_damaged_config_is_no_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "RetinaNet on unknown data" in page_of(tmp_path)
