"""The SavedModel of a detector: run without focal, it finds what focal finds."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from folders import BCCD

tf = pytest.importorskip("tensorflow")
pytest.importorskip("keras")
pytest.importorskip("safetensors")

from focal.retinanet import PRESETS, build, predict  # noqa: E402
from focal.retinanet.data import CocoDataset, ShapesDataset  # noqa: E402
from focal.retinanet.data.transforms import fit, place  # noqa: E402
from focal.retinanet.tensorflow.export import _on_canvas, export_saved_model  # noqa: E402

CONFIG = PRESETS["tiny"].detector.replace(
    classes=("RBC", "WBC", "Platelets"),
    image_size=(128, 160),
    channels=16,
    head_depth=1,
    candidates=300,
    max_detections=40,
)
# What a user's own program does; neither library can be imported in it.
PROGRAM = """
import sys
sys.modules["focal"] = sys.modules["keras"] = None
import numpy as np
import tensorflow as tf

folder, given, found = sys.argv[1:]
detect = tf.saved_model.load(folder).signatures["serving_default"]
images, sizes = np.load(given).values()
parts = [slice(0, 1), slice(1, 4), slice(4, None)]  # batches of any size
results = [detect(images=tf.constant(images[p]), sizes=tf.constant(sizes[p])) for p in parts]
np.savez(found, **{k: np.concatenate([r[k] for r in results]) for k in results[0]})
"""


def detector(config=CONFIG, seed=3):
    """Untrained, with scores far apart, and boxes that are not the anchors."""
    model = build(config, "tensorflow", seed, "cpu")
    logits = model.head["classification_head"].cls_logits.kernel
    deltas = model.head["regression_head"].bbox_reg.kernel
    logits.assign(180 * logits)
    deltas.assign(60 * deltas)
    return model


@pytest.fixture(scope="module")
def model():
    return detector()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "detector"
    export_saved_model(model, path, canvas=True)
    return path


@pytest.fixture(scope="module")
def any_size(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "detector"
    export_saved_model(model, path)
    return path


def on_canvas(images, description):
    """Images on the canvas that the description asks for, and what each covers of it."""
    canvas, fill = tuple(description["image_size"]), np.uint8(description["fill"])
    fitted = [fit(image, np.zeros((0, 4)), canvas) for image in images]
    canvases = np.stack([place(image, canvas, fill) for image, _, _ in fitted])
    sizes = np.array([image.shape[:2] for image, _, _ in fitted], np.int64)
    return canvases, sizes, [scale for _, _, scale in fitted]


def same_detections(model, images, scales, found):
    """Compare with `predict`; the number of detections."""
    total = 0
    for i, (expected, image, scale) in enumerate(
        zip(predict(model, images), images, scales, strict=True)
    ):
        count = found["count"][i]
        assert count == len(expected["scores"])
        np.testing.assert_array_equal(found["labels"][i, :count], expected["labels"])
        np.testing.assert_allclose(found["scores"][i, :count], expected["scores"], atol=1e-4)
        limit = np.array([image.shape[1], image.shape[0]] * 2)
        boxes = np.minimum(found["boxes"][i, :count] / scale, limit)
        np.testing.assert_allclose(boxes, expected["boxes"], rtol=1e-4, atol=1e-4)
        assert (found["labels"][i, count:] == -1).all()
        assert not found["scores"][i, count:].any() and not found["boxes"][i, count:].any()
        total += count
    return total


@pytest.mark.parametrize("data", ["shapes", "bccd"])
def test_another_program_finds_the_same(model, folder, data, tmp_path):
    dataset = CocoDataset(BCCD, "test") if data == "bccd" else ShapesDataset("test", num_images=8)
    images = [dataset[i].image for i in range(8)]
    images[1] = images[1][:, :70]  # another aspect
    description = json.loads((folder / "assets" / "detector.json").read_text())
    canvases, sizes, scales = on_canvas(images, description)
    np.savez(tmp_path / "given.npz", canvases, sizes)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, tmp_path / "given.npz", tmp_path / "found.npz"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # where the expected ones come from
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "found.npz"))
    assert {k: (v.shape, v.dtype.name) for k, v in found.items()} == {
        "boxes": ((8, 40, 4), "float32"),
        "scores": ((8, 40), "float32"),
        "labels": ((8, 40), "int64"),
        "count": ((8,), "int64"),
    }
    assert same_detections(model, images, scales, found) > 100
    scores = found["scores"][found["scores"] > 0]
    assert np.ptp(scores) > 0.3 and len(np.unique(scores)) > 100


def test_fewer_detections_are_padded(tmp_path):
    model = detector(CONFIG.replace(score_threshold=0.5))
    images = [np.zeros((64, 80, 3), np.uint8), *[ShapesDataset("test", num_images=1)[0].image] * 2]
    export_saved_model(model, tmp_path / "out", canvas=True)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    canvases, sizes, scales = on_canvas(images, {"image_size": (128, 160), "fill": (124, 116, 104)})
    found = {k: v.numpy() for k, v in loaded.detect(canvases, sizes).items()}
    assert 0 < same_detections(model, images, scales, found) < 120


def test_the_description(folder):
    description = json.loads((folder / "assets" / "detector.json").read_text())
    assert description["classes"] == ["RBC", "WBC", "Platelets"]
    assert description["category_ids"] == [1, 2, 3] and description["version"] == "1"
    assert description["image_size"] == [128, 160]
    assert description["fill"] == [124, 116, 104]  # 255 times the mean
    assert type(CONFIG).from_json(json.dumps(description["config"])) == CONFIG
    asset = tf.saved_model.load(str(folder)).description.asset_path.numpy().decode()
    assert Path(asset) == folder / "assets" / "detector.json"


# Images of any size


SIZES = [
    (1, 1),
    (128, 160),
    (37, 91),
    (480, 640),
    (3, 900),
    (200, 1),
    (300, 300),
    (97, 61),
    (501, 353),
]
"""Larger and smaller than the canvas, odd, slivers; none is reduced to a sixth or less."""


@pytest.mark.parametrize("canvas", [(128, 160), (256, 320), (64, 64)])
def test_the_graph_scales_as_pillow_does(canvas):
    """Sizes and scale are the same numbers, pixels within one level of 255, most the same."""
    config, rng = CONFIG.replace(image_size=canvas), np.random.default_rng(0)
    for size in SIZES:
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        found, covered, scale = (x.numpy() for x in _on_canvas(tf.constant(image), config))
        (expected,), (wanted,), (by,) = on_canvas([image], vars(config) | {"fill": config.fill})
        np.testing.assert_array_equal(covered, wanted)
        assert (found.shape, found.dtype, scale) == ((*canvas, 3), np.uint8, by)
        apart = np.abs(found.astype(int) - expected)
        assert not apart[covered[0] :].any() and not apart[:, covered[1] :].any()
        if min(covered / size) > 1 / 6:
            assert apart.max() <= 1 and apart.mean() < 0.01
    whole = rng.integers(0, 256, (*canvas, 3)).astype(np.uint8)
    np.testing.assert_array_equal(_on_canvas(tf.constant(whole), config)[0], whole)


def test_images_of_any_size(model, any_size, tmp_path):
    """In another program; where pixels are the same as Pillow's, so are detections."""
    data, bccd = ShapesDataset("test", num_images=2), CocoDataset(BCCD, "test")
    images = [data[0].image, data[1].image[:, :70], bccd[0].image, bccd[1].image[:384]]
    images += [np.zeros((40, 300, 3), np.uint8), bccd[2].image[:2, :160]]
    program = """
import sys
sys.modules["focal"] = sys.modules["keras"] = None
import numpy as np, tensorflow as tf
detect = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
found = [detect(image=tf.constant(image)) for image in np.load(sys.argv[2]).values()]
np.savez(sys.argv[3], **{f"{k}{i}": v for i, f in enumerate(found) for k, v in f.items()})
"""
    np.savez(tmp_path / "given.npz", *images)
    done = subprocess.run(
        [sys.executable, "-c", program, any_size, tmp_path / "given.npz", tmp_path / "found.npz"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found, total = np.load(tmp_path / "found.npz"), 0
    for i, image in enumerate(images):
        (expected,) = predict(model, [image])
        boxes, scores, labels = (found[f"{key}{i}"] for key in ("boxes", "scores", "labels"))
        assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)
        assert boxes.shape == (len(expected["scores"]), 4)
        np.testing.assert_allclose(scores, expected["scores"], atol=1e-4)
        # Two scores may be as good as equal: whichever comes first, each box is found again.
        apart = np.abs(boxes[:, None] - expected["boxes"]).max(-1)
        apart[labels[:, None] != expected["labels"]] = np.inf
        assert not len(scores) or max(apart.min(0).max(), apart.min(1).max()) < 1e-2
        assert (boxes <= [image.shape[1], image.shape[0]] * 2).all()
        total += len(scores)
    assert total > 100


def test_an_image_of_any_size_without_detections(tmp_path):
    export_saved_model(detector(CONFIG.replace(score_threshold=1.0)), tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    found = loaded.detect(np.zeros((33, 500, 3), np.uint8))
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    assert shapes == {"boxes": (0, 4), "scores": (0,), "labels": (0,)}


def test_the_description_of_any_size(any_size):
    description = json.loads((any_size / "assets" / "detector.json").read_text())
    assert description["version"] == "2" and description["format"] == "focal.retinanet.saved_model"
    signature = tf.saved_model.load(str(any_size)).signatures["serving_default"]
    _, inputs = signature.structured_input_signature
    assert {k: (v.shape.as_list(), v.dtype.name) for k, v in inputs.items()} == {
        "image": ([None, None, 3], "uint8")
    }
    outputs = {
        k: (v.shape.as_list(), v.dtype.name) for k, v in signature.structured_outputs.items()
    }
    assert outputs == {
        "boxes": ([None, 4], "float32"),
        "scores": ([None], "float32"),
        "labels": ([None], "int64"),
    }


@pytest.mark.parametrize("form", ["folder", "any_size"])
def test_the_graph_is_bound_to_no_device(form, request):
    folder = request.getfixturevalue(form)
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    functions = SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    (graph,) = functions.meta_graphs
    placed = {
        function.signature.name
        for function in graph.graph_def.library.function
        for node in function.node_def
        if node.device and "traced_" not in function.signature.name  # reading and writing files
    }
    assert placed == set() and len(graph.graph_def.library.function) > 2


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    model, other = detector(), detector(CONFIG.replace(classes=("cell",)))
    path = tmp_path / "out"
    path.mkdir()  # empty
    for exported in (model, other):
        export_saved_model(exported, str(path))
        description = json.loads((path / "assets" / "detector.json").read_text())
        assert tuple(description["classes"]) == exported.config.classes
        assert os.listdir(tmp_path) == ["out"]

    someones = tmp_path / "someones"
    (someones / "assets").mkdir(parents=True)
    (someones / "assets" / "detector.json").write_text('{"format": "another"}')
    (tmp_path / "text").write_text("hello")
    for wrong in (someones, tmp_path / "text"):
        with pytest.raises(FileExistsError, match=rf"export_saved_model: path must .* got {wrong}"):
            export_saved_model(model, wrong)
    assert os.listdir(someones) == ["assets"] and (tmp_path / "text").read_text() == "hello"
    with pytest.raises(FileNotFoundError):
        export_saved_model(model, tmp_path / "none" / "out")


def test_a_failure_leaves_the_old_export(model, folder, monkeypatch):
    before = (folder / "saved_model.pb").read_bytes()

    def full(*_):
        raise OSError("no space left")

    for target in ("tensorflow.saved_model.save", "focal.retinanet.tensorflow.export.Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(OSError, match="no space left"):
                export_saved_model(model, folder)
        assert (folder / "saved_model.pb").read_bytes() == before
        assert os.listdir(folder.parent) == ["detector"]

    rename = Path.rename

    def second(self, target):
        return full() if self.name == "new" else rename(self, target)

    monkeypatch.setattr(Path, "rename", second)
    with pytest.raises(OSError, match="no space left"):
        export_saved_model(model, folder)
    assert (folder / "saved_model.pb").read_bytes() == before


def test_a_detector_of_another_framework(tmp_path):
    class OfPyTorch:
        backend = "torch"

    for wrong, name in ((OfPyTorch(), "torch"), (3, "int")):
        with pytest.raises(TypeError, match=f"of the backend 'tensorflow'; got '{name}'"):
            export_saved_model(wrong, tmp_path / "out")
    assert os.listdir(tmp_path) == []


# TensorFlow logs its own warning on newer Pythons; as an error it would keep the frames it is from.
@pytest.mark.filterwarnings("default")
def test_an_exported_model_is_the_same_and_can_go(tmp_path):
    gc.freeze()  # older garbage would take long
    try:
        model = detector()
        images = [ShapesDataset("test", num_images=1)[0].image]
        (before,) = predict(model, images)
        export_saved_model(model, tmp_path / "out")
        (after,) = predict(model, images)
        np.testing.assert_array_equal(before["boxes"], after["boxes"])
        gone = weakref.ref(model)
        del model
        gc.collect()
    finally:
        gc.unfreeze()
    assert gone() is None
