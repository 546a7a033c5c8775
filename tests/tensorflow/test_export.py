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
from focal.retinanet.tensorflow.export import export_saved_model  # noqa: E402

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
    export_saved_model(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    canvases, sizes, scales = on_canvas(images, {"image_size": (128, 160), "fill": (124, 116, 104)})
    found = {k: v.numpy() for k, v in loaded.detect(canvases, sizes).items()}
    assert 0 < same_detections(model, images, scales, found) < 120


def test_the_description(folder):
    description = json.loads((folder / "assets" / "detector.json").read_text())
    assert description["classes"] == ["RBC", "WBC", "Platelets"]
    assert description["image_size"] == [128, 160]
    assert description["fill"] == [124, 116, 104]  # 255 times the mean
    assert type(CONFIG).from_json(json.dumps(description["config"])) == CONFIG
    asset = tf.saved_model.load(str(folder)).description.asset_path.numpy().decode()
    assert Path(asset) == folder / "assets" / "detector.json"


def test_the_graph_is_bound_to_no_device(folder):
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
