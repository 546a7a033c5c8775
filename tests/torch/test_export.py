"""The exported PyTorch detector: `torch.export` and ONNX against `predict`."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from folders import BCCD

pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import onnx
import onnxruntime
import torch

from focal.cli import main
from focal.retinanet import (
    PRESETS,
    RetinaNetConfig,
    build,
    detector,
    export,
    load,
    predict,
    raw_outputs,
    save,
)
from focal.retinanet.data import CocoDataset
from focal.retinanet.detector import _batch
from focal.retinanet.torch import export as export_torch
from focal.retinanet.torch.any_size import after_graph, before_graph
from focal.retinanet.torch.export import export_onnx, export_program

CONFIG = PRESETS["tiny"].detector.replace(
    classes=("ball", "cube", "ring"),
    image_size=(120, 160),  # the levels have odd sizes
    channels=16,
    head_depth=1,
    candidates=300,  # more than one block of suppression
    score_threshold=0.3,
    max_detections=60,
)


def picture(height, width, seed=0):
    """Soft patches of color, in which different places look different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    rows, columns = np.arange(height) * 7 // height, np.arange(width) * 9 // width
    return coarse[rows][:, columns]


PICTURES = [picture(48, 64), picture(240, 320, 1), picture(300, 90, 2), picture(77, 131, 3)]


pytestmark = pytest.mark.usefixtures("one_thread")


def spread(config: RetinaNetConfig, images: list[np.ndarray]) -> torch.nn.Module:
    """A detector that finds many things in these images, with scores far apart."""
    model = build(config, seed=3, device="cpu")
    logits, deltas = raw_outputs(model, images)
    with torch.no_grad():
        model.head["classification_head"].cls_logits.weight *= 2 / logits.std()
        model.head["regression_head"].bbox_reg.weight *= 0.3 / deltas.std()
    return model


@pytest.fixture(scope="module")
def model():
    """Not to be changed."""
    return spread(CONFIG, PICTURES)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """The ONNX file of the model, for images on the canvas, written by the command."""
    return written_by_the_command(model, tmp_path_factory.mktemp("onnx"), "--canvas")


@pytest.fixture(scope="module")
def any_size(model, tmp_path_factory):
    """The ONNX file for images of any size, written by the command."""
    return written_by_the_command(model, tmp_path_factory.mktemp("any"))


def written_by_the_command(model, folder, *options):
    save(model, folder / "weights.safetensors")
    path = folder / "new" / "detector.onnx"
    assert main(["export", str(folder / "weights.safetensors"), "--out", str(path), *options]) == 0
    return path


@pytest.fixture(scope="module")
def session(file):
    return onnxruntime.InferenceSession(file)


def assert_equal_to_predict(run, model, images, least):
    """Every detection within 1e-4, and the padding as promised; at least so many in all."""
    batch = _batch("test", model.config, images)
    scales = batch.scales
    boxes, scores, labels, count = (np.asarray(x) for x in run(batch.images, batch.sizes))
    shape = (len(images), model.config.max_detections)
    assert (boxes.shape, scores.shape, labels.shape) == ((*shape, 4), shape, shape)
    assert count.shape == shape[:1]
    assert (boxes.dtype, scores.dtype) == (np.float32, np.float32)
    assert (labels.dtype, count.dtype) == (np.int64, np.int64)
    for i, expected in enumerate(predict(model, images)):
        n = count[i]
        height, width = images[i].shape[:2]
        own = np.minimum(boxes[i, :n] / scales[i], [width, height, width, height])
        np.testing.assert_array_equal(labels[i, :n], expected["labels"])
        np.testing.assert_allclose(scores[i, :n], expected["scores"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own, expected["boxes"], rtol=1e-4, atol=1e-4)
        assert not boxes[i, n:].any() and not scores[i, n:].any() and (labels[i, n:] == -1).all()
    assert count.sum() >= least
    return count


# ---------------------------------------------------------------- ONNX


def by_onnx(session):
    return lambda images, sizes: session.run(None, {"images": images, "sizes": sizes})


def test_onnx_finds_what_predict_finds(session, model):
    count = assert_equal_to_predict(by_onnx(session), model, PICTURES, 150)
    assert len(set(count.tolist())) > 1  # so that the padding differs
    for image in PICTURES:  # any batch
        assert_equal_to_predict(by_onnx(session), model, [image], 1)


def test_suppression_and_every_class_took_part(model):
    """What the comparisons compare: crowds of boxes of all classes, many of them suppressed."""
    found = predict(model, PICTURES)
    crowd = CONFIG.replace(nms_threshold=1.0, max_detections=300)
    everything = predict(spread(crowd, PICTURES), PICTURES)
    kept, all_of_them = (sum(len(f["scores"]) for f in some) for some in (found, everything))
    assert kept < all_of_them / 2
    assert set(np.concatenate([f["labels"] for f in found])) == {0, 1, 2}


def test_an_image_without_detections(session):
    """The network of a uniform canvas sees nothing but its prior: all is padding."""
    gray = np.full((1, *CONFIG.image_size, 3), (124, 116, 104), np.uint8)
    boxes, scores, labels, count = by_onnx(session)(gray, np.array([CONFIG.image_size]))
    assert count.tolist() == [0]
    assert not boxes.any() and not scores.any() and (labels == -1).all()


def test_onnx_on_real_images(tmp_path):
    data = CocoDataset(BCCD, "test")
    images = [data[i].image for i in range(len(data))]
    model = spread(
        CONFIG.replace(classes=data.classes, image_size=(240, 320), candidates=1000), images
    )
    export_onnx(model, tmp_path / "detector.onnx", canvas=True)
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx")
    assert_equal_to_predict(by_onnx(session), model, images, 100)


def test_the_file_is_valid_and_says_what_it_is(file, session):
    graph = onnx.load(file)
    onnx.checker.check_model(graph, full_check=True)
    assert {domain.domain for domain in graph.opset_import} == {""}  # standard operators only
    assert not graph.functions
    described = {
        value.name: (value.type, value.shape)
        for value in (*session.get_inputs(), *session.get_outputs())
    }
    assert described == {
        "images": ("tensor(uint8)", ["batch", 120, 160, 3]),
        "sizes": ("tensor(int64)", ["batch", 2]),
        "boxes": ("tensor(float)", ["batch", 60, 4]),
        "scores": ("tensor(float)", ["batch", 60]),
        "labels": ("tensor(int64)", ["batch", 60]),
        "count": ("tensor(int64)", ["batch"]),
    }
    meta = session.get_modelmeta()
    texts = meta.custom_metadata_map
    assert (texts["format"], texts["version"]) == ("focal.retinanet.onnx", "1")
    assert json.loads(texts["category_ids"]) == [1, 2, 3]
    assert json.loads(texts["classes"]) == ["ball", "cube", "ring"]
    assert json.loads(texts["image_size"]) == [120, 160]
    assert json.loads(texts["fill"]) == [124, 116, 104]
    assert RetinaNetConfig.from_json(texts["config"]) == CONFIG
    assert "(x1, y1, x2, y2) in pixels of the canvas" in meta.description


def test_the_file_says_nothing_of_where_it_was_written(file):
    """The exporter notes the source line of every operation, with the path on this machine."""
    data = file.read_bytes()
    assert str(Path.cwd()).encode() not in data
    assert b".py" not in data and str(file.parent).encode() not in data


def test_the_file_needs_neither_focal_nor_torch(file, tmp_path, model):
    program = """
import sys
sys.modules["focal"] = sys.modules["torch"] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images, sizes = np.load(sys.argv[2]).values()
np.savez(sys.argv[3], *session.run(None, {"images": images, "sizes": sizes}))
"""

    def run(canvases, sizes):
        np.savez(tmp_path / "in.npz", canvases, sizes)
        files = [file, tmp_path / "in.npz", tmp_path / "out.npz"]
        subprocess.run([sys.executable, "-c", program, *map(str, files)], check=True)
        return np.load(files[-1]).values()

    assert_equal_to_predict(run, model, PICTURES, 150)


# ---------------------------------------------------------------- ONNX, of any size

SIZES = [
    (1, 1),
    (120, 160),
    (37, 91),
    (480, 640),
    (3, 900),
    (200, 1),
    (300, 300),
    (97, 61),
    (501, 353),
]
"""Larger and smaller than the canvas, odd, slivers; none is reduced to a sixth or less."""


def before(canvas):
    """The graph from an image to its canvas alone."""
    config = CONFIG.replace(image_size=canvas)
    return onnxruntime.InferenceSession(before_graph(config, 10).SerializeToString())


@pytest.mark.parametrize("canvas", [(120, 160), (256, 320), (64, 64)])
def test_the_graph_scales_as_pillow_does(canvas):
    """Sizes and scale are the same numbers, pixels within one level of 255, most the same."""
    session, rng = before(canvas), np.random.default_rng(0)
    for size in SIZES:
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        expected = _batch("test", CONFIG.replace(image_size=canvas), [image])
        canvases, sizes, sides, scale = session.run(None, {"image": image})
        np.testing.assert_array_equal(sizes, expected.sizes)
        np.testing.assert_array_equal([scale, *sides], [*expected.scales, *size])
        covered = np.asarray(sizes[0])
        apart = np.abs(canvases.astype(int) - expected.images)
        assert not apart[0, covered[0] :].any() and not apart[0, :, covered[1] :].any()
        if min(covered / size) > 1 / 6:
            assert apart.max() <= 1 and apart.mean() < 0.01
    whole = rng.integers(0, 256, (*canvas, 3)).astype(np.uint8)
    np.testing.assert_array_equal(session.run(["images"], {"image": whole})[0][0], whole)


def test_strong_reductions_are_approximated_by_pillow():
    """Below a sixth Pillow first takes means of blocks (`reducing_gap`); the graph does not."""
    image = picture(1400, 1900, 5)
    expected = _batch("test", CONFIG, [image]).images
    apart = np.abs(before(CONFIG.image_size).run(["images"], {"image": image})[0] - expected * 1.0)
    assert 1 < apart.max() < 32 and apart.mean() < 0.5


def assert_finds_what_predict_finds(run, model, images, score=1e-4, pixels=1e-3):
    """Every detection, in the same order; the number of them."""
    for image, expected in zip(images, predict(model, images), strict=True):
        boxes, scores, labels = (np.asarray(x) for x in run(image))
        assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)
        assert boxes.shape == (len(scores), 4) and labels.shape == scores.shape
        np.testing.assert_array_equal(labels, expected["labels"])
        np.testing.assert_allclose(scores, expected["scores"], atol=score)
        np.testing.assert_allclose(boxes, expected["boxes"], atol=pixels)
        assert (boxes <= [image.shape[1], image.shape[0]] * 2).all()
    return sum(len(found["scores"]) for found in predict(model, images))


def on_any_size(file):
    session = onnxruntime.InferenceSession(file)
    return lambda image: session.run(None, {"image": image})


def test_images_of_any_size(any_size, model):
    """Where pixels are the same as Pillow's, so are detections."""
    images = [picture(*size, seed) for seed, size in enumerate([(120, 160), (240, 320), (60, 80)])]
    images += [picture(120, 91, 7), picture(2, 160, 8)]
    assert assert_finds_what_predict_finds(on_any_size(any_size), model, images) > 150


def test_boxes_go_back_to_the_image_and_end_with_it(monkeypatch):
    """As in `detect`; of three rows half a pixel of the canvas is left, and a whole one covered."""
    graph = after_graph(CONFIG.replace(max_detections=5), 10)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    boxes = np.float32([[[0, 0, 160, 1], [3, 0, 9, 1], [40, 0.25, 47, 1], [0] * 4, [0] * 4]])
    scores, labels = np.float32([[0.9, 0.8, 0.7, 0, 0]]), np.array([[2, 1, 0, -1, -1]])
    scales, sides = np.array([160 / 900]), np.array([[3, 900]])
    given = (boxes, scores, labels, np.array([3]), sides[0], np.array(scales[0]))
    names = (value.name for value in session.get_inputs())
    found = session.run(None, dict(zip(names, given, strict=True)))
    monkeypatch.setattr("focal.retinanet.torch.trainer.detect", lambda *_: (boxes, scores, labels))
    torch_model = SimpleNamespace(backend="torch")
    batch = SimpleNamespace(images=None, sizes=None, scales=scales, image_sizes=sides)
    (expected,) = detector.detect(torch_model, batch)
    for x, key in zip(found, ("boxes", "scores", "labels"), strict=True):
        np.testing.assert_array_equal(x, expected[key])
    assert found[0].shape == (3, 4) and found[0][:, 3].tolist() == [3, 3, 3]


def test_an_image_of_any_size_without_detections(any_size):
    boxes, scores, labels = on_any_size(any_size)(np.full((77, 200, 3), (124, 116, 104), np.uint8))
    assert (boxes.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,))


def test_the_file_for_any_size_says_what_it_is(any_size, file):
    graph = onnx.load(any_size)
    onnx.checker.check_model(graph, full_check=True)
    assert {domain.domain for domain in graph.opset_import} == {""} and not graph.functions
    assert any_size.stat().st_size < file.stat().st_size + 20_000
    session = onnxruntime.InferenceSession(any_size)
    described = {
        value.name: (value.type, value.shape)
        for value in (*session.get_inputs(), *session.get_outputs())
    }
    assert described == {
        "image": ("tensor(uint8)", ["height", "width", 3]),
        "boxes": ("tensor(float)", ["n", 4]),
        "scores": ("tensor(float)", ["n"]),
        "labels": ("tensor(int64)", ["n"]),
    }
    meta = session.get_modelmeta()
    texts = meta.custom_metadata_map
    assert (texts["format"], texts["version"]) == ("focal.retinanet.onnx", "2")
    assert RetinaNetConfig.from_json(texts["config"]) == CONFIG
    assert "one image of any size" in meta.description
    assert "in pixels of the\nimage" in meta.description


def test_real_images_of_any_size(tmp_path):
    """BCCD is 640 x 480: on a canvas of 240 x 320 the pixels are Pillow's."""
    data = CocoDataset(BCCD, "test")
    images = [data[i].image for i in range(4)]
    config = CONFIG.replace(classes=data.classes, image_size=(240, 320), candidates=1000)
    model = spread(config, images)
    export(model, tmp_path / "detector.onnx")
    run = on_any_size(tmp_path / "detector.onnx")
    assert assert_finds_what_predict_finds(run, model, images) > 100


# ---------------------------------------------------------------- torch.export


def test_a_saved_program_finds_what_predict_finds(tmp_path, model):
    model.train()  # an export is of the network in evaluation mode
    torch.export.save(export_program(model), tmp_path / "detector.pt2")
    assert model.training
    model.eval()
    detector = torch.export.load(tmp_path / "detector.pt2").module()

    def run(canvases, sizes):
        return detector(torch.from_numpy(canvases), torch.from_numpy(sizes))

    assert_equal_to_predict(run, model, PICTURES, 150)
    assert_equal_to_predict(run, model, PICTURES[:1], 1)


# ---------------------------------------------------------------- errors, the command


def test_a_failure_leaves_the_old_file(tmp_path, model, monkeypatch):
    path = tmp_path / "detector.onnx"
    path.write_text("old")

    def fails(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(RuntimeError, match="no"):
        export_onnx(model, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("function", [export_program, lambda m: export_onnx(m, "unused.onnx")])
def test_only_detectors_of_pytorch(function):
    with pytest.raises(TypeError, match=r"^export_\w+: model must be .* 'torch'; got 'Linear'"):
        function(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("path", ["detector.pb", "detector.tflite", "detector.ONNX"])
def test_other_endings(path, model, tmp_path):
    with pytest.raises(ValueError, match=r"^export: path must end in \.onnx, or have no ending"):
        export(model, tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_the_command_gone_wrong(tmp_path, model, capsys):
    save(model, tmp_path / "weights.safetensors")
    weights = str(tmp_path / "weights.safetensors")
    assert main(["export", weights, "--out", str(tmp_path / "detector.pb")]) == 2
    assert main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "d.onnx")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors] == ["focal", "focal"]
    assert "must end in .onnx" in errors[0] and "expected a file" in errors[1]


@pytest.mark.parametrize(
    ("name", "backend", "writer"),
    [("net.onnx", "torch", "export_onnx"), ("net", "tensorflow", "export_saved_model")],
)
def test_the_ending_says_who_writes(tmp_path, monkeypatch, capsys, name, backend, writer):
    written = []
    module = SimpleNamespace(**{writer: lambda *given: written.append(given)})
    monkeypatch.setitem(sys.modules, f"focal.retinanet.{backend}.export", module)
    detector_of = lambda _, backend, device: SimpleNamespace(backend=backend, device=device)  # noqa: E731
    monkeypatch.setattr(detector, "load", detector_of)
    out = tmp_path / "new" / name
    assert main(["export", "weights.safetensors", "--out", str(out)]) == 0
    assert main(["export", "weights.safetensors", "--out", str(out), "--canvas"]) == 0
    given = SimpleNamespace(backend=backend, device="cpu")
    assert written == [(given, out, False), (given, out, True)]
    assert out.parent.is_dir()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (2 * f"written: {out}\n", "")


def test_a_detector_of_another_framework(tmp_path, model, monkeypatch):
    """JAX writes no ONNX; its weights go through PyTorch."""
    pytest.importorskip("flax")
    save(model, tmp_path / "weights.safetensors")
    written = []
    monkeypatch.setattr(export_torch, "export_onnx", lambda *given: written.append(given))
    export(load(tmp_path / "weights.safetensors", "jax"), tmp_path / "detector.onnx")
    ((other, path, canvas),) = written
    assert canvas is False
    assert path == tmp_path / "detector.onnx"
    assert (other.backend, other.config, other.training) == ("torch", CONFIG, False)
    for a, b in zip(raw_outputs(other, PICTURES), raw_outputs(model, PICTURES), strict=True):
        np.testing.assert_array_equal(a, b)
