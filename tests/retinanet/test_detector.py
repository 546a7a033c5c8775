"""The facade: build, save, load, raw_outputs and predict, whatever the framework behind them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")
import torch
from PIL import ExifTags, Image

import focal
import focal.numpy as F
from focal.retinanet import (
    CONVENTIONS,
    PRESETS,
    RetinaNetConfig,
    TrainConfig,
    build,
    load,
    predict,
    raw_outputs,
    save,
)
from focal.retinanet.data import ShapesDataset, read_image, train_batches
from focal.retinanet.detector import backend_module
from focal.retinanet.objective import losses, targets
from focal.retinanet.weights import save_weights, write_tensors

CONFIG = PRESETS["tiny"].detector.replace(
    classes=("ball", "cube"), image_size=(48, 64), channels=16, head_depth=1, max_detections=20
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    """A detector that finds something everywhere, with scores far apart. Not to be changed."""
    model = build(CONFIG.replace(score_threshold=0.0), seed=3, device="cpu")
    with torch.no_grad():
        model.head["classification_head"].cls_logits.weight *= 100
    return model


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


# Building, saving, loading


def test_the_seed_decides():
    images = [picture(48, 64)]
    first, same, other = (
        raw_outputs(build(CONFIG, seed=seed, device="cpu"), images)[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_a_model_is_its_frameworks_own(model):
    assert isinstance(model, torch.nn.Module) and not model.training
    assert model.backend == "torch"
    assert model.config == CONFIG.replace(score_threshold=0.0)


def test_the_file_holds_all_that_a_prediction_needs(tmp_path, model):
    save(model, tmp_path / "net.safetensors")
    loaded = load(str(tmp_path / "net.safetensors"), device="cpu")
    assert loaded.config == model.config
    images = [picture(30, 70), picture(48, 64, seed=1)]
    for ours, theirs in zip(raw_outputs(model, images), raw_outputs(loaded, images), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(predict(model, images), predict(loaded, images), strict=True):
        assert len(ours["scores"]) == 20
        for key in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_loading_needs_a_file_of_this_library(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        load(tmp_path / "text")


def test_settings_of_inference_may_be_changed(tmp_path, model):
    path = tmp_path / "net.safetensors"
    save(model, path)
    changes = {"score_threshold": 0.015, "nms_threshold": 0.9, "candidates": 7, "max_detections": 3}
    changed = load(path, device="cpu", **changes)
    assert changed.config == model.config.replace(**changes)
    (found,) = predict(changed, [picture(48, 64)])
    assert len(found["scores"]) == 3 and (found["scores"] > 0.015).all()
    with pytest.raises(
        TypeError, match=r"^load: changes must be among score_threshold, .*; got gamma, loss$"
    ):
        load(path, gamma=1.0, loss="ohem")
    with pytest.raises(ValueError, match="score_threshold must be"):
        load(path, score_threshold=2)


def checkpoint(path, config, value, average=None):
    """A checkpoint in which every weight has one value, and its moving average another."""
    tensors = backend_module("torch").state(build(CONFIG, device="cpu"))
    values = {"model/": value} | ({} if average is None else {"average/": average})
    state = {
        f"{k}{name}": np.full_like(x, v) for k, v in values.items() for name, x in tensors.items()
    }
    state["optimizer/0/exp_avg"] = np.ones(3, np.float32)
    metadata = {} if config is None else {"config": config.to_json()}
    write_tensors(path, state, "focal.checkpoint", {"step": "3", **metadata})
    return path


def loaded_value(source):
    """The one value of all its weights."""
    loaded = load(source, device="cpu")
    assert loaded.config == CONFIG
    (value,) = {float(v) for x in loaded.parameters() for v in x.detach().unique()}
    return value


def test_a_checkpoint_is_a_detector(tmp_path):
    path = checkpoint(tmp_path / "checkpoint-000003.safetensors", CONFIG, 0.5)
    assert loaded_value(path) == 0.5
    checkpoint(path, CONFIG, 0.5, average=0.25)
    assert loaded_value(path) == 0.25  # what the run evaluates
    checkpoint(path, None, 0.5)
    with pytest.raises(ValueError, match=r"000003.safetensors: a checkpoint of an older version"):
        load(path)


def test_a_run_folder_is_a_detector(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"expected a run folder, with best.safetensors, "):
        load(tmp_path)
    for step in (9, 10, 100):
        checkpoint(tmp_path / f"checkpoint-{step:06d}.safetensors", CONFIG, step)
    assert loaded_value(tmp_path) == 100
    (tmp_path / "checkpoint-000100.safetensors").write_bytes(b"cut")
    assert loaded_value(str(tmp_path)) == 10
    assert "checkpoint-000100.safetensors: expected a whole" in caplog.text
    tensors = backend_module("torch").state(build(CONFIG, device="cpu"))
    for value, name in enumerate(("weights", "best")):
        weights = {k: np.full_like(x, value) for k, x in tensors.items()}
        save_weights(tmp_path / f"{name}.safetensors", weights, CONFIG)
        assert loaded_value(tmp_path) == value


def test_saving_needs_a_folder(tmp_path, model):
    with pytest.raises(OSError, match="none"):
        save(model, tmp_path / "none" / "net.safetensors")


def test_an_unknown_backend(tmp_path, model):
    message = "backend must be one of torch.*; got 'caffe'"
    with pytest.raises(ValueError, match=message):
        build(CONFIG, backend="caffe")
    save(model, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "net.safetensors", backend="caffe")


def test_a_detector_has_classes():
    with pytest.raises(ValueError, match="classes must name at least one"):
        build(CONFIG.replace(classes=()))


# Raw outputs and predictions

SIZES = [(1, 1), (48, 64), (37, 91), (200, 1), (1, 200), (3, 900), (700, 500), (96, 128)]


@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_size(model, size):
    image = picture(*size)
    (found,) = predict(model, [image])
    boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
    assert len(scores) > 0
    assert (boxes.shape, scores.shape, labels.shape) == ((len(scores), 4), *[(len(scores),)] * 2)
    assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)
    x1, y1, x2, y2 = boxes.T
    assert ((0 <= x1) & (x1 <= x2) & (x2 <= size[1])).all()
    assert ((0 <= y1) & (y1 <= y2) & (y2 <= size[0])).all()
    assert ((scores > 0) & (scores <= 1)).all() and (np.diff(scores) <= 0).all()
    assert set(labels) <= {0, 1}
    np.testing.assert_array_equal(image, picture(*size))  # as it was


def test_boxes_are_in_pixels_of_the_image(model, monkeypatch):
    def halves(_, canvases, sizes):
        """One detection in each image: the left half of what it covers."""
        boxes = [[[0, 0, width / 2, height]] for height, width in sizes]
        return np.float32(boxes), np.full((len(sizes), 1), 0.5), np.ones((len(sizes), 1), int)

    monkeypatch.setattr("focal.retinanet.torch.trainer.detect", halves)
    images = [picture(24, 32), picture(96, 64), picture(48, 48)]
    found = predict(model, images)
    assert [f["boxes"].tolist() for f in found] == [
        [[0, 0, 16, 24]],
        [[0, 0, 32, 96]],
        [[0, 0, 24, 48]],
    ]


def test_raw_outputs_have_an_entry_for_each_anchor(model):
    logits, deltas = raw_outputs(model, [picture(48, 64), picture(5, 300), picture(1, 1)])
    anchors = len(F.anchors(CONFIG.image_size, CONFIG.anchors))
    assert logits.shape == (3, anchors, 2) and deltas.shape == (3, anchors, 4)
    assert logits.dtype == deltas.dtype == np.float32
    assert np.isfinite(logits).all() and np.isfinite(deltas).all()


def test_paths_and_images_of_pillow(tmp_path, model):
    """Rotation, modes and transparency as `read_image` has them; the image stays as it was."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(picture(30, 64)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(picture(48, 64)[..., 0]).save(tmp_path / "gray.png")
    clear = np.dstack([picture(48, 50), np.full((48, 50), 99, np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(clear[..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    for name in ("turned", "gray", "clear", "deep"):
        path = tmp_path / f"{name}.png"
        array = read_image(path)
        with Image.open(path) as opened:
            before = opened.size, opened.mode
            same = predict(model, [array, path, str(path), opened])
            logits = [raw_outputs(model, [image])[0] for image in (array, path, opened)]
            assert (opened.size, opened.mode) == before and len(same[0]["scores"]) > 0
        for found in same[1:]:
            for key in ("boxes", "scores", "labels"):
                np.testing.assert_array_equal(found[key], same[0][key])
        np.testing.assert_array_equal(logits[0], logits[1])
        np.testing.assert_array_equal(logits[0], logits[2])
    assert read_image(tmp_path / "turned.png").shape == (64, 30, 3)
    with pytest.raises(ValueError, match=r"none.png: not a readable image \(no such file\)"):
        predict(model, [tmp_path / "none.png"])


def test_no_images(model):
    anchors = len(F.anchors(CONFIG.image_size, CONFIG.anchors))
    assert predict(model, []) == []
    assert [x.shape for x in raw_outputs(model, [])] == [(0, anchors, 2), (0, anchors, 4)]


def test_many_images_are_found_as_each_alone(model):
    images = [picture(20 + 5 * i, 90 - 4 * i, seed=i) for i in range(19)]
    together = predict(model, images)
    assert len(together) == 19
    for image, found in zip(images, together, strict=True):
        (alone,) = predict(model, [image])
        np.testing.assert_array_equal(found["labels"], alone["labels"])
        np.testing.assert_allclose(found["scores"], alone["scores"], rtol=1e-4)
        np.testing.assert_allclose(found["boxes"], alone["boxes"], rtol=1e-4, atol=1e-3)


def test_nothing_found_is_an_empty_array():
    model = build(CONFIG.replace(score_threshold=0.9), device="cpu")
    (found,) = predict(model, [picture(48, 64)])
    assert {k: (v.shape, v.dtype.name) for k, v in found.items()} == {
        "boxes": ((0, 4), "float32"),
        "scores": ((0,), "float32"),
        "labels": ((0,), "int64"),
    }


@pytest.mark.parametrize("function", [predict, raw_outputs])
@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((9, 9), np.uint8), ValueError, r"\(height, width, 3\); got \(9, 9\)"),
        (np.zeros((9, 9, 1), np.uint8), ValueError, r"got \(9, 9, 1\)"),
        (np.zeros((9, 9, 4), np.uint8), ValueError, r"got \(9, 9, 4\)"),
        (np.zeros((3, 9, 9), np.uint8), ValueError, r"got \(3, 9, 9\)"),
        (np.zeros((0, 9, 3), np.uint8), ValueError, r"got \(0, 9, 3\)"),
        (np.zeros((9, 9, 3), np.float32), TypeError, "uint8 array.* Pillow; got float32"),
        ([[[0, 0, 0]]], TypeError, "uint8 array, a path or an image of Pillow; got list"),
        (None, TypeError, "uint8 array, a path .*; got NoneType"),
    ],
)
def test_what_is_no_image(model, function, image, error, message):
    with pytest.raises(error, match=rf"{function.__name__}: images\[1\] must .*{message}"):
        function(model, [picture(4, 4), image])


@pytest.mark.parametrize("image", ["photo.png", Path("photo.png"), Image.new("RGB", (9, 9))])
def test_one_image_instead_of_a_list(model, image):
    for function in (predict, raw_outputs):
        with pytest.raises(TypeError, match=rf"^{function.__name__}: images must be a list of"):
            function(model, image)


# The first loss


def first_loss(prior):
    """Classification loss of a new detector on a batch of shapes, and what it should be."""
    data = ShapesDataset("train", num_images=4, num_objects=4)  # few, so that the prior matters
    config = CONFIG.replace(classes=data.classes, image_size=(128, 128), prior=prior)
    run = TrainConfig(batch_size=4, workers=0, flips="none")
    batch = next(train_batches(data, config, run))
    logits, deltas = raw_outputs(build(config, device="cpu"), batch.images)
    assert np.abs(deltas).max() < 0.5
    anchors = F.anchors(config.image_size, config.anchors)
    target = targets(F, anchors, batch.boxes, batch.labels, config)
    found = losses(F, logits, deltas, anchors, target, config, F.num_positives(target.labels))
    used, positives = (target.labels != -2).sum(), (target.labels >= 0).sum()
    expected = focal.expected_initial_loss(int(used), int(positives), 3, pi=prior)
    return found.classification, expected


def test_the_first_loss_is_the_expected_one():
    with_prior, expected = first_loss(0.01)
    assert with_prior == pytest.approx(expected, rel=0.05)
    without, expected = first_loss(0.5)
    assert without == pytest.approx(expected, rel=0.05)
    assert without > 10 * with_prior


# Presets and configs


def test_conventions_differ_where_they_should():
    """Section 3 of the survey, where a row is a field of the config."""
    fields = ("p6_from", "allow_low_quality", "box_beta", "normalizer", "max_detections")
    table = {
        name: [getattr(RetinaNetConfig(**changes), field) for field in fields]
        for name, changes in CONVENTIONS.items()
    }
    assert table == {
        "paper": ["c5", False, 1.0, "batch", 100],
        "torchvision": ["p5", True, 0.0, "image", 300],
        "torchvision_v2": ["c5", True, 0.0, "image", 300],
        "detectron2": ["c5", True, 0.0, "ema", 100],
    }
    heads = [
        (c.head_norm, c.box_loss) for c in (RetinaNetConfig(**c) for c in CONVENTIONS.values())
    ]
    assert heads == [("none", "smooth_l1")] * 2 + [("group", "giou"), ("none", "smooth_l1")]
    for changes in CONVENTIONS.values():
        config = RetinaNetConfig(**changes)
        assert (config.foreground, config.background, config.prior) == (0.5, 0.4, 0.01)
        assert (config.candidates, config.score_threshold, config.nms_threshold) == (
            1000,
            0.05,
            0.5,
        )


@pytest.mark.parametrize(
    ("name", "first"),
    [
        # The first anchor: 32 pixels, ratio 1/2, so 45.25 wide and 22.63 high.
        ("paper", [4 - 22.627417, 4 - 11.313708, 4 + 22.627417, 4 + 11.313708]),
        ("torchvision", [-23, -11, 23, 11]),
        ("detectron2", [-22.627417, -11.313708, 22.627417, 11.313708]),
    ],
)
def test_conventions_place_their_anchors(name, first):
    anchors = F.anchors((64, 64), RetinaNetConfig(**CONVENTIONS[name]).anchors)
    np.testing.assert_allclose(anchors[0], first, rtol=1e-6)


def test_tiny_is_for_small_objects_and_r50_is_the_papers():
    tiny, r50 = PRESETS["tiny"], PRESETS["r50"]
    assert r50.detector == RetinaNetConfig() and r50.train == TrainConfig()
    assert tiny.detector.anchors.sizes == tuple(2.5 * s for s in tiny.detector.anchors.strides)
    assert (r50.train.steps, r50.train.batch_size, r50.train.learning_rate) == (90_000, 16, 0.01)


def test_the_stretch_of_anchors_is_torchvisions_and_in_no_older_file():
    stretched = {name for name, c in CONVENTIONS.items() if RetinaNetConfig(**c).anchors.stretched}
    assert stretched == {"torchvision", "torchvision_v2"}
    config = RetinaNetConfig(**CONVENTIONS["torchvision"])
    older = json.loads(config.to_json())
    del older["anchors"]["stretched"]
    read = RetinaNetConfig.from_json(json.dumps(older))
    assert read.anchors == dataclasses.replace(config.anchors, stretched=False)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_configs_survive_json(preset):
    for config in (
        *preset,
        preset.detector.replace(classes=("é", "b"), alpha=None, allow_low_quality=True),
        preset.train.replace(ema=None, crop=(3, 4), milestones=()),
    ):
        assert type(config).from_json(config.to_json()) == config


def test_old_names_of_fields_still_work():
    new = RetinaNetConfig(image_size=(64, 96), normalizer="image")
    with pytest.warns(DeprecationWarning, match="RetinaNetConfig.canvas .* use image_size"):
        assert RetinaNetConfig(canvas=(64, 96), normalizer="image") == new
    with pytest.warns(DeprecationWarning, match="RetinaNetConfig.normaliser .* use normalizer"):
        assert new.replace(normalizer="batch").replace(normaliser="image") == new
    with pytest.warns(DeprecationWarning, match="use image_size"):
        assert new.canvas == (64, 96)
    old = new.to_json().replace("image_size", "canvas").replace("normalizer", "normaliser")
    assert RetinaNetConfig.from_json(old) == new
    with pytest.raises(TypeError, match="canvas is the old name of image_size; got both"):
        RetinaNetConfig(canvas=(64, 96), image_size=(64, 96))
    values = dict(vars(new))
    values["canvas"] = values.pop("image_size")  # what was pickled before
    pickled = object.__new__(RetinaNetConfig)
    pickled.__setstate__(values)
    assert pickled == new and RetinaNetConfig(classes=["a", "b"]).classes == ("a", "b")
    with pytest.raises(AttributeError, match="RetinaNetConfig has no field 'canvass'"):
        new.canvass  # noqa: B018


def test_configs_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.gamma = 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "vgg"}, "backbone must be one of 'tiny', .*; got 'vgg'"),
        ({"image_size": (0, 5)}, "image_size must be >= 1; got 0"),
        ({"image_size": 64}, "image_size must be .*height, width.*; got 64"),
        ({"alpha": 2}, "alpha must lie in"),
        ({"gamma": -1}, "gamma must be"),
        ({"foreground": 1.5}, "foreground must be"),
        ({"max_detections": 0}, "max_detections must be >= 1; got 0"),
        ({"levels": (3, 4)}, r"anchors.strides must be those of levels \(3, 4\)"),
        ({"box_loss": "l3"}, "box_loss must be one of 'smooth_l1', 'giou'; got 'l3'"),
    ],
)
def test_detectors_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=f"RetinaNetConfig: {message}"):
        CONFIG.replace(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be >= 1; got 0"),
        ({"optimizer": "adam"}, "optimizer must be one of 'sgd', 'adamw'; got 'adam'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"ema": 1.5}, "ema must be a finite number"),
        ({"crop": (5,)}, "crop must be .*height, width"),
        ({"seed": -1}, "seed must be >= 0; got -1"),
    ],
)
def test_runs_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        TrainConfig().replace(**change)
