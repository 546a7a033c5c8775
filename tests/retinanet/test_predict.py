"""`focal predict` and `focal evaluate` on files: what they read, and what they write."""

import gc
import json
import os
import shutil
import weakref

import numpy as np
import pytest
from folders import BCCD
from PIL import Image

from focal.cli import main

pytest.importorskip("torch")
pytest.importorskip("pycocotools")
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focal.cli import predict as command
from focal.retinanet import PRESETS, build, evaluate, load, predict, save
from focal.retinanet.data import CocoDataset, read_image
from focal.retinanet.detector import backend_module
from focal.retinanet.weights import save_weights, write_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = CocoDataset(BCCD, "test")
CONFIG = PRESETS["tiny"].detector.replace(
    classes=DATA.classes,
    image_size=(96, 128),
    channels=16,
    head_depth=1,
    score_threshold=0.0,
    max_detections=30,
)


@pytest.fixture(scope="module")
def model():
    """Untrained, with scores far apart. Not to be changed."""
    model = build(CONFIG, seed=3, device="cpu")
    with torch.no_grad():
        model.head["classification_head"].cls_logits.weight *= 200
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save(model, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten small images of several formats and sizes, and files that are none."""
    path = tmp_path / "in"
    path.mkdir()
    for i in range(10):
        size = (40 + i, 60 - i, 3)
        pixels = np.random.default_rng(i).integers(0, 256, size).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.{('png', 'JPG', 'bmp')[i % 3]}")
    (path / "notes.txt").write_text("no image")
    (path / "below").mkdir()
    shutil.copy(path / "0.png", path / "below" / "deep.png")
    return path


def run(*arguments):
    return main(["predict", *map(str, arguments), "--device", "cpu"])


def test_folders_patterns_and_files(weights, folder, tmp_path, capsys):
    out = tmp_path / "out"
    given = [folder / "4.JPG", folder / "*.png", folder, folder / "below" / "deep.png"]
    assert run(weights, *given, "--out", out) == 0
    names = ["4", "0", "3", "6", "9", "1", "2", "5", "7", "8", "deep"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        str(folder / ("below/deep.png" if n == "deep" else next(folder.glob(f"{n}.*")).name))
        for n in names
    ]
    assert sorted(os.listdir(out)) == sorted(f"{n}.{end}" for n in names for end in ("json", "png"))


def test_a_name_with_the_signs_of_a_pattern_is_a_name(weights, folder, tmp_path):
    shutil.copy(folder / "0.png", folder / "a[1].png")
    assert run(weights, folder / "a[1].png", "--out", tmp_path / "out", "--json-only") == 0
    assert os.listdir(tmp_path / "out") == ["a[1].json"]


@pytest.mark.parametrize("ids", [(), (7, 3, 90)])
def test_what_the_json_says(model, folder, tmp_path, ids):
    shutil.rmtree(folder / "below")
    state = backend_module("torch").state(model)
    save_weights(tmp_path / "w.safetensors", state, CONFIG.replace(category_ids=ids))
    arguments = [tmp_path / "w.safetensors", folder, "--out", tmp_path / "out", "--json-only"]
    assert run(*arguments) == 0
    assert sorted(os.listdir(tmp_path / "out")) == [f"{i}.json" for i in range(10)]  # no pictures
    labels = set()
    for i in range(10):
        (path,) = folder.glob(f"{i}.*")
        record = json.loads((tmp_path / "out" / f"{i}.json").read_text())
        (found,) = predict(model, [path])
        assert record["image"] == str(path)
        assert record["image_size"] == {"width": 60 - i, "height": 40 + i}
        assert len(record["found"]) == len(found["scores"]) == 30
        labels |= set(found["labels"].tolist())
        for entry, label in zip(record["found"], found["labels"], strict=True):
            assert list(entry) == ["class", "label", "category_id", "score", "box"]
            assert entry["class"] == CONFIG.classes[label] and entry["label"] == label
            assert entry["category_id"] == (ids or (1, 2, 3))[label]
        boxes = [entry["box"] for entry in record["found"]]
        np.testing.assert_allclose(boxes, found["boxes"], atol=0.02)
    assert len(labels) > 1


def test_a_file_that_cannot_be_read(weights, folder, tmp_path, capsys):
    (folder / "1b.png").write_bytes(b"no image")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    out = tmp_path / "out"
    arguments = [folder, folder / "none.png", "--out", out, "--results", out / "all.json"]
    assert run(weights, *arguments) == 1
    output, errors = capsys.readouterr()
    assert [line.split(": ")[:2] for line in errors.splitlines()] == [
        ["focal", str(folder / name)] for name in ("1b.png", "3.png", "none.png")
    ]
    good = [i for i in range(10) if i != 3]
    assert len(output.splitlines()) == 9
    assert sorted(os.listdir(out)) == [
        *sorted(f"{i}.{e}" for i in good for e in ("json", "png")),
        "all.json",
    ]
    # Every file has its number, also those that cannot be read.
    results = json.loads((out / "all.json").read_text())
    found = {entry["file_name"]: entry["image_id"] for entry in results}
    assert (found["0.png"], found["1.JPG"], found["2.bmp"], found["9.png"]) == (1, 2, 4, 11)


def test_nothing_that_can_be_read(weights, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert run(weights, tmp_path / "a.png", tmp_path / "b.png", "--out", out) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2 and os.listdir(out) == []
    (tmp_path / "empty").mkdir()
    assert run(weights, tmp_path / "empty", "--out", out) == 2
    assert capsys.readouterr().err == f"focal: {tmp_path / 'empty'}: a folder without image files\n"


def test_results_are_those_of_coco(weights, model, folder, tmp_path):
    out = tmp_path / "deep" / "results.json"
    assert run(weights, folder, "--out", tmp_path / "out", "--results", out, "--json-only") == 0
    results = json.loads(out.read_text())
    files = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".JPG", ".bmp"))
    start = 0
    for number, (path, found) in enumerate(zip(files, predict(model, files), strict=True), 1):
        own = results[start : start + len(found["scores"])]
        start += len(own)
        assert {(e["image_id"], e["file_name"]) for e in own} == {(number, path.name)}
        assert [e["category_id"] for e in own] == (found["labels"] + 1).tolist()
        np.testing.assert_array_equal(np.float32([e["score"] for e in own]), found["scores"])
        boxes = np.array([e["bbox"] for e in own])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, found["boxes"], rtol=1e-6)
    assert start == len(results) > 100 and os.listdir(out.parent) == [out.name]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i + 1} for i in range(len(files))],
        "categories": [{"id": i + 1, "name": c} for i, c in enumerate(CONFIG.classes)],
        "annotations": [],
    }
    truth.createIndex()
    assert len(truth.loadRes(str(out)).anns) == len(results)


def test_no_detections_give_an_empty_list(weights, folder, tmp_path):
    out = tmp_path / "all.json"
    arguments = ["--out", tmp_path, "--results", out, "--score-threshold", "1", "--json-only"]
    assert run(weights, folder, *arguments) == 0
    assert json.loads(out.read_text()) == []


def test_half_a_results_file_is_none(weights, folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "results" / "all.json"
    monkeypatch.setattr(command, "_write", stop)
    assert run(weights, folder, "--out", tmp_path / "out", "--results", out) == 130
    assert os.listdir(out.parent) == []


def test_settings_of_inference(weights, folder, tmp_path):
    out = tmp_path / "out"
    inference = ["--score-threshold", "0.32", "--nms-threshold", "0.9", "--max-detections", "4"]
    assert run(weights, folder / "0.png", "--out", out, "--json-only", *inference) == 0
    changes = {"score_threshold": 0.32, "nms_threshold": 0.9, "max_detections": 4}
    (expected,) = predict(load(weights, device="cpu", **changes), [folder / "0.png"])
    (other,) = predict(load(weights, device="cpu", max_detections=4), [folder / "0.png"])
    found = json.loads((out / "0.json").read_text())["found"]
    assert [entry["score"] for entry in found] == pytest.approx(expected["scores"], abs=1e-5)
    assert 1 < len(expected["scores"]) < len(other["scores"]) == 4
    with pytest.raises(ValueError, match="RetinaNetConfig: nms_threshold must be"):
        load(weights, nms_threshold=2)


def test_memory_does_not_grow_with_the_images(weights, folder, tmp_path, monkeypatch):
    """At most the batch that is predicted and the one after it are in memory."""
    alive, most = set(), []

    def read(path):
        image = read_image(path).view(np.ndarray)
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most.append(len(alive))
        return image

    paths = []
    for i in range(60):
        paths.append(folder / f"copy{i}.png")
        shutil.copy(folder / "0.png", paths[-1])
    monkeypatch.setattr("focal.retinanet.data.read_image", read)
    gc.disable()
    try:
        assert run(weights, *paths, "--out", tmp_path / "out", "--json-only") == 0
    finally:
        gc.enable()
    assert len(most) == 60 and max(most) <= 3 * command.BATCH


def test_off_a_terminal_there_is_no_progress_bar(weights, folder, tmp_path, capsys):
    assert run(weights, folder, "--out", tmp_path / "out", "--json-only") == 0
    assert capsys.readouterr().err == ""


# evaluate


def coco_ap(truth, results):
    coco = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    coco.evaluate()
    coco.accumulate()
    coco.summarize()
    return coco.stats


def test_results_of_evaluate_are_scored_by_pycocotools_alike(weights, model, tmp_path):
    out, scores = tmp_path / "deep" / "results.json", tmp_path / "scores.json"
    arguments = ["evaluate", str(weights), "--data", str(BCCD), "--device", "cpu"]
    assert main([*arguments, "--results", str(out), "--out", str(scores)]) == 0
    metrics = json.loads(scores.read_text())
    stats = coco_ap(COCO(BCCD / "instances_test.json"), out)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", None, None, "AR100"]
    for name, value in zip(names, stats[:9], strict=True):
        if name is not None:
            assert value == (
                -1 if metrics[name] is None else pytest.approx(metrics[name], abs=1e-12)
            )
    assert metrics["AP"] > 0
    np.testing.assert_equal(evaluate(model, DATA)["AP"], metrics["AP"])
    categories = {entry["category_id"] for entry in json.loads(out.read_text())}
    assert categories <= set(DATA.category_ids) and len(categories) > 1


def test_settings_of_inference_of_evaluate(weights, tmp_path, capsys):
    arguments = ["evaluate", str(weights), "--data", str(BCCD), "--device", "cpu"]
    for most in (1, 5):
        out = tmp_path / f"{most}.json"
        assert main([*arguments, "--max-detections", str(most), "--results", str(out)]) == 0
        assert len(json.loads(out.read_text())) == most * len(DATA)


def test_commands_take_checkpoints_and_run_folders(weights, model, folder, tmp_path, capsys):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    state = {f"model/{k}": 0 * v for k, v in backend_module("torch").state(model).items()}
    state |= {f"average/{k}": v for k, v in backend_module("torch").state(model).items()}
    checkpoint = run_folder / "checkpoint-000012.safetensors"
    write_tensors(checkpoint, state, "focal.checkpoint", {"config": CONFIG.to_json()})
    printed = []
    for source in (weights, checkpoint, run_folder):
        assert main(["evaluate", str(source), "--data", str(BCCD), "--device", "cpu"]) == 0
        printed.append(capsys.readouterr().out)
        out = tmp_path / "out" / source.name
        assert run(source, folder / "0.png", "--out", out, "--json-only") == 0
        capsys.readouterr()
    assert len(set(printed)) == 1
    assert len({(p / "0.json").read_text() for p in (tmp_path / "out").iterdir()}) == 1


def test_an_image_that_is_none_is_named_by_its_number_in_the_list(model):
    images = [np.zeros((8, 8, 3), np.uint8)] * 10
    with pytest.raises(TypeError, match=r"images\[9\] must be a uint8 array"):
        predict(model, [*images[:9], images[9].astype(np.float32)])
    assert len(predict(model, images)) == 10


def test_boxes_under_autocast_are_as_fine_as_without(model):
    """bfloat16 has 8 bits: it could not tell pixels beyond 256 apart."""
    image = np.random.default_rng(0).integers(0, 256, (960, 1280, 3)).astype(np.uint8)
    (plain,) = predict(model, [image])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = predict(model, [image])
    assert found["boxes"].dtype == np.float32
    assert (found["boxes"] != torch.tensor(found["boxes"]).bfloat16().float().numpy()).mean() > 0.5
    for box in plain["boxes"][:3]:
        assert np.abs(found["boxes"] - box).max(axis=1).min() < 0.02 * 1280
