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
from focal.retinanet.detector import _canvases
from focal.retinanet.torch import export as export_torch
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
    """The ONNX file of the model, written by the command."""
    folder = tmp_path_factory.mktemp("onnx")
    save(model, folder / "weights.safetensors")
    path = folder / "new" / "detector.onnx"
    assert main(["export", str(folder / "weights.safetensors"), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def session(file):
    return onnxruntime.InferenceSession(file)


def assert_equal_to_predict(run, model, images, least):
    """Every detection within 1e-4, and the padding as promised; at least so many in all."""
    canvases, sizes, scales = _canvases("test", model.config, images)
    boxes, scores, labels, count = (np.asarray(x) for x in run(canvases, sizes))
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
    export_onnx(model, tmp_path / "detector.onnx")
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
    assert texts["format"] == "focal.retinanet.onnx"
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
    assert written == [(SimpleNamespace(backend=backend, device="cpu"), out)]
    assert out.parent.is_dir()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"written: {out}\n", "")


def test_a_detector_of_another_framework(tmp_path, model, monkeypatch):
    """JAX writes no ONNX; its weights go through PyTorch."""
    pytest.importorskip("flax")
    save(model, tmp_path / "weights.safetensors")
    written = []
    monkeypatch.setattr(export_torch, "export_onnx", lambda *given: written.append(given))
    export(load(tmp_path / "weights.safetensors", "jax"), tmp_path / "detector.onnx")
    ((other, path),) = written
    assert path == tmp_path / "detector.onnx"
    assert (other.backend, other.config, other.training) == ("torch", CONFIG, False)
    for a, b in zip(raw_outputs(other, PICTURES), raw_outputs(model, PICTURES), strict=True):
        np.testing.assert_array_equal(a, b)
