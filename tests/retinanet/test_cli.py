"""The command line: what the commands do, and what they say to wrong input."""

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from backends import RETINANETS
from PIL import Image

import focal
from focal.cli import main
from focal.cli.options import assignments

pytest.importorskip("torch")
pytest.importorskip("pycocotools")

from focal.retinanet import load
from focal.retinanet.data import ShapesDataset
from focal.retinanet.settings import apply, preset_settings
from focal.retinanet.weights import (
    load_weights,
    read_checkpoint,
    read_tensors,
    save_weights,
    write_tensors,
)

QUICK = [
    *(
        "--image-size",
        "64x64",
        "--set",
        "batch_size=2",
        "--set",
        "channels=16",
        "--set",
        "workers=0",
    ),
    *("--set", "precision=float32", "--set", "candidates=50", "--device", "cpu"),
    "--no-fit",
]
CHECKPOINT = "checkpoint-000003.safetensors"
RUN_FILES = [
    "best.safetensors",
    "config.json",
    "detections.png",
    "loss.png",
    "metrics.jsonl",
    "report.html",
    "weights.safetensors",
]


pytestmark = pytest.mark.usefixtures("one_thread", "quick_jax")


def shell(*arguments, **options):
    """`python -m focal` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "focal", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A COCO folder of shapes: two images to train on, one each for val and test."""
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        data = ShapesDataset(split, size=(64, 64), num_images=count)
        truth = data.ground_truth()
        for record, i in zip(truth["images"], range(count), strict=True):
            record["file_name"] = f"{split}{i}.png"
            Image.fromarray(data[i].image).save(root / "images" / record["file_name"])
        (root / f"instances_{split}.json").write_text(json.dumps(truth))
    return root


@pytest.fixture(scope="module")
def run(coco, tmp_path_factory):
    """A run folder that `focal train` left. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "new" / "run"
    assert main(["train", "--data", str(coco), "--steps", "3", "--out", str(out), *QUICK]) == 0
    return out


def files(out):
    """What a run left, apart from its checkpoints, of which there are one or two."""
    found = os.listdir(out)
    assert 1 <= sum(name.startswith("checkpoint-") for name in found) <= 2
    return [name for name in found if not name.startswith("checkpoint-")]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# From a shell


def test_prior_bias():
    process = shell("prior-bias", "0.01")
    assert process.communicate() == ("-4.59511985013459\n", "")
    assert process.returncode == 0


def test_shapes_need_nothing_but_a_folder_to_write(tmp_path):
    out = tmp_path / "runs" / "shapes"
    process = shell("train", "--data", "shapes", "--steps", "4", "--out", out, *QUICK)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert sorted(files(out)) == RUN_FILES

    for name in ("AP ", "AP50 ", "AP/circle ", "AP/square ", "AP/triangle "):
        assert f"\n  {name}" in stdout
    assert f"report: {out / 'report.html'}\n" in stdout
    assert f"weights: {out / 'weights.safetensors'}\n" in stdout

    record = json.loads((out / "config.json").read_text())
    assert record["command"].startswith(f"focal train --data shapes --steps 4 --out {out}")
    assert record["data"] == "shapes" and record["focal"] == focal.__version__
    assert record["detector"]["image_size"] == [64, 64] and record["detector"]["channels"] == 16
    assert record["train"]["steps"] == 4 and record["train"]["batch_size"] == 2

    assert [(x["kind"], x["step"]) for x in metrics(out)] == [("train", 4), ("eval", 4)]
    assert load(out / "weights.safetensors").config.classes == ("circle", "square", "triangle")
    for name in ("loss.png", "detections.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 64
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2  # the page is self-contained
    assert "<html" in page and "triangle" in page


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_run_survives_kill_9(coco, tmp_path):
    out = tmp_path / "run"
    command = ["train", "--data", str(coco), "--steps", "30", "--out", str(out), *QUICK]
    command += ["--set", "save_every=2", "--set", "log_every=1"]
    with shell(*command) as process:
        while process.poll() is None and not list(out.glob("checkpoint-*")):
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "weights.safetensors").exists()

    assert main([*command, "--resume"]) == 0
    assert [x["step"] for x in metrics(out) if x["kind"] == "train"] == list(range(1, 31))
    assert sorted(files(out)) == RUN_FILES


# What the commands do


@pytest.mark.parametrize(
    "command", [(), ("train",), ("evaluate",), ("predict",), ("export",), ("prior-bias",)]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(" ".join(["usage: focal", *command]))
    assert max(map(len, output.splitlines())) <= 100


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"focal {focal.__version__}\n"


def test_a_coco_folder_trains(run):
    assert sorted(files(run)) == RUN_FILES
    assert metrics(run)[-1]["split"] == "coco0/val"


def test_options_reach_the_run(coco, tmp_path):
    arguments = ["train", "--data", str(coco), "--out", str(tmp_path), *QUICK]
    arguments += ["--steps", "1", "--seed", "7", "--convention", "torchvision"]
    arguments += ["--set", "ema=None", "--set", "crop=[48,40]", "--set", "clip_norm=5"]
    arguments += ["--set", "alpha=null", "--set", "optimizer=sgd", "--set", "max_detections=9"]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "config.json").read_text())
    detector, train = record["detector"], record["train"]
    assert (train["steps"], train["seed"], train["ema"]) == (1, 7, None)
    assert (train["crop"], train["clip_norm"], train["optimizer"]) == ([48, 40], 5, "sgd")
    assert (detector["p6_from"], detector["normalizer"]) == ("p5", "image")
    assert (detector["alpha"], detector["max_detections"]) == (None, 9)
    # The convention places the anchors; their sizes are the preset's.
    assert detector["anchors"]["rounded"] and detector["anchors"]["offset"] == 0
    assert detector["anchors"]["stretched"]
    assert detector["anchors"]["sizes"] == [20, 40, 80]
    assert load(tmp_path / "weights.safetensors").config.image_size == (64, 64)


def test_fields_that_only_fit_together(tmp_path):
    options = argparse.Namespace(preset=None, convention=None, resume=False, steps=None, seed=None)
    options.image_size = "96x128"
    anchors = '{"strides": [16, 32], "sizes": [30, 60]}'
    options.set = ["levels=[4,5]", f"anchors={anchors}", "crop=48x64", "flips=eightfold"]
    detector, train = apply(preset_settings("tiny"), assignments(options))
    assert detector.image_size == (96, 128) and train.crop == (48, 64)
    assert detector.levels == (4, 5)
    assert detector.anchors == focal.AnchorConfig(strides=(16, 32), sizes=(30, 60))
    assert train.flips == "d4"  # "eightfold" is its old name
    assert type(train).from_json('{"flips": "eightfold"}').flips == "d4"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["anchors.sizes=[16,32,64]"], {"sizes": (16, 32, 64)}),
        (["anchors.ratios=[1]", "anchors.offset=0"], {"ratios": (1,), "offset": 0}),
        (["anchors.rounded=true", "anchors.scales=[1,1.5]"], {"rounded": True, "scales": (1, 1.5)}),
        (["levels=[3,4,5,6]"], {"strides": (8, 16, 32, 64), "sizes": (20, 40, 80, 160)}),
        (["levels=[2,3]"], {"strides": (4, 8), "sizes": (10, 20)}),
        (
            ["anchors.sizes=[16,32,64,99]", "levels=[3,4,5,6]"],
            {"strides": (8, 16, 32, 64), "sizes": (16, 32, 64, 99)},
        ),
        (
            ['anchors={"strides": [8, 16, 32], "sizes": [9, 9, 9]}', "anchors.sizes=[5,6,7]"],
            {"sizes": (5, 6, 7)},
        ),
    ],
)
def test_anchors_by_parts(settings, expected):
    options = argparse.Namespace(preset=None, convention=None, resume=False, steps=None, seed=None)
    options.image_size, options.set = None, settings
    tiny = focal.retinanet.PRESETS["tiny"].detector
    found, _ = apply(preset_settings("tiny"), assignments(options))
    assert found.anchors == dataclasses.replace(tiny.anchors, **expected)
    assert found == tiny.replace(anchors=found.anchors, levels=found.levels)
    assert set(assignments(options)) == {setting.partition("=")[0] for setting in settings}


def test_what_was_set_by_hand():
    options = argparse.Namespace(preset=None, convention=None, resume=False, steps=9, seed=None)
    options.image_size, options.set = "64x96", ["canvas=32x32", "crop=None", "gamma=1"]
    values = {"steps": 9, "image_size": [32, 32], "crop": None, "gamma": 1}
    assert assignments(options) == values


def test_training_goes_on_from_a_checkpoint(coco, run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in (CHECKPOINT, "metrics.jsonl"):
        (out / name).write_bytes((run / name).read_bytes())
    arguments = ["train", "--data", str(coco), "--steps", "5", "--out", str(out), *QUICK]
    assert main([*arguments, "--resume"]) == 0
    _, _, metadata = read_checkpoint(out)
    assert metadata["step"] == "5"
    assert [x["step"] for x in metrics(out)] == [3, 3, 5, 5]


def test_training_starts_from_weights(coco, run, tmp_path):
    arguments = ["train", "--data", str(coco), "--steps", "1", "--out", str(tmp_path), *QUICK]
    arguments += ["--weights", str(run / "weights.safetensors"), "--set", "learning_rate=0"]
    assert main(arguments) == 0
    name = "head.classification_head.cls_logits.weight"
    before, after = (load_weights(x / "weights.safetensors")[0][name] for x in (run, tmp_path))
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-8)


def test_evaluate_prints_and_writes(coco, run, tmp_path, capsys):
    out = tmp_path / "deep" / "metrics.json"
    weights = str(run / "weights.safetensors")
    assert main(["evaluate", weights, "--data", str(coco), "--out", str(out)]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == "coco0/test"
    names = "AP AP50 AP75 APs APm APl AR100 AP/circle AP/square AP/triangle".split()
    assert [row.split()[0] for row in rows] == names
    record = json.loads(out.read_text())
    assert record["data"] == "coco0/test" and record["command"].startswith("focal evaluate")
    for row in rows:
        name, value = row.split()
        assert value == ("nan" if record[name] is None else f"{record[name]:.3f}")

    assert main(["evaluate", weights, "--data", str(coco), "--split", "val"]) == 0
    assert capsys.readouterr().out.startswith("coco0/val\n  AP ")


def test_predict_writes_a_picture_and_json(coco, run, tmp_path, capsys):
    images = [coco / "images" / "test0.png", coco / "images" / "val0.png"]
    weights = run / "weights.safetensors"
    eager = tmp_path / "eager.safetensors"
    tensors, config = load_weights(weights)
    save_weights(eager, tensors, config.replace(score_threshold=0.0, max_detections=4))
    out = tmp_path / "deep" / "found"
    assert main(["predict", str(eager), *map(str, images), "--out", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["test0.json", "test0.png", "val0.json", "val0.png"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    with Image.open(out / "test0.png") as drawn:
        assert drawn.size == (64, 64)
        # Scores after so little training are about 0.01: none is drawn, all are written.
        np.testing.assert_array_equal(np.array(drawn), np.array(Image.open(images[0])))
    record = json.loads((out / "test0.json").read_text())
    assert record["image"] == str(images[0]) and len(record["found"]) == 4
    for entry in record["found"]:
        x1, y1, x2, y2 = entry["box"]
        assert 0 <= x1 <= x2 <= 64 and 0 <= y1 <= y2 <= 64
        assert entry["class"] in config.classes and 0 < entry["score"] < 0.3

    command = ["predict", str(eager), str(images[0]), "--out", str(out), "--score", "0"]
    assert main(command) == 0
    assert (np.array(Image.open(out / "test0.png")) != np.array(Image.open(images[0]))).any()


@pytest.mark.parametrize("backend", RETINANETS)
def test_every_command_takes_every_backend(coco, run, tmp_path, backend):
    weights = tmp_path / "eager.safetensors"
    tensors, config = load_weights(run / "weights.safetensors")
    save_weights(weights, tensors, config.replace(score_threshold=0.0, max_detections=4))
    there = ["--backend", backend, "--device", "cpu"]

    image = coco / "images" / "test0.png"
    found = []
    for name, options in (("torch", []), (backend, there)):
        out = tmp_path / "found" / name
        assert main(["predict", str(weights), str(image), "--out", str(out), *options]) == 0
        found.append(json.loads((out / "test0.json").read_text())["found"])
    assert len(found[0]) == 4
    for expected, got in zip(*found, strict=True):
        assert got["class"] == expected["class"]
        assert got["score"] == pytest.approx(expected["score"], abs=2e-5)
        assert got["box"] == pytest.approx(expected["box"], abs=0.02)

    metrics = tmp_path / "metrics.json"
    data = ["--data", str(coco)]
    assert main(["evaluate", str(weights), *data, "--out", str(metrics), *there]) == 0
    assert 0 <= json.loads(metrics.read_text())["AP"] <= 1

    out = tmp_path / "run"
    auto = ["--set", "precision=auto"]
    assert main(["train", *data, "--steps", "2", "--out", str(out), *QUICK, *there, *auto]) == 0
    assert sorted(files(out)) == RUN_FILES
    record = json.loads((out / "config.json").read_text())
    assert record["backend"] == backend
    assert record["train"]["precision"] == "auto"
    assert record["precision"] in ("float32", "bfloat16")
    train = ["train", *data, "--steps", "3", "--out", str(out), *QUICK, *there, "--resume"]
    assert main(train) == 0


# What goes wrong


def fails(capsys, *arguments):
    """The one line on standard error of a command that fails."""
    assert main([str(a) for a in arguments]) == 2
    output, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert line.startswith("focal: ") and output == ""
    return line.removeprefix("focal: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "preset must be one of tiny, r50; got 'huge'"),
        (
            ("--convention", "mine"),
            "convention must be one of paper, torchvision, torchvision_v2, detectron2",
        ),
        (
            ("--image-size", "64"),
            "--image-size must be HEIGHTxWIDTH in pixels, such as 256x320; got '64'",
        ),
        (("--image-size", "0x64"), "--image-size must be HEIGHTxWIDTH"),
        (("--image-size", "wide"), "--image-size must be HEIGHTxWIDTH"),
        (("--steps", "0"), "steps must be >= 1; got 0"),
        (("--seed", "-1"), "seed must be >= 0; got -1"),
        (("--backend", "caffe"), "backend must be one of torch"),
        (("--set", "color=red"), "no field 'color'"),
        (("--set", "gamma"), "--set must be FIELD=VALUE; got 'gamma'"),
        (("--set", "gamma=-1"), "gamma must be a finite number >= 0; got -1"),
        (("--set", "gamma=much"), "gamma must be a number"),
        (("--set", "gamma="), "gamma must be a number"),
        (("--set", "norm=layer"), "norm must be one of 'batch', 'frozen_batch', 'group'"),
        (("--set", "batch_size=2.5"), "batch_size must be an integer"),
        (("--set", "crop=5"), "crop must be (height, width); got 5"),
        (("--set", "foreground=0.3"), "background must be a finite number in [0, 0.3]; got 0.4"),
        (("--set", "allow_low_quality=yes"), "allow_low_quality must be a number"),
        (("--set", "anchors=3"), "anchors must be an AnchorConfig; got 3"),
        (("--set", "levels=5"), "levels must be a tuple of numbers; got 5"),
        (("--set", "mean=[0.5,0.5]"), "mean must be 3 numbers; got (0.5, 0.5)"),
        (("--set", "std=[1,1,0]"), "std must be a finite number >="),
        (("--set", "zoom=2"), "zoom must be 2 numbers; got 2"),
        (("--set", "zoom=[2,1]"), "zoom must be (least, most); got (2, 1)"),
        (("--set", "milestones=3"), "milestones must be a tuple of numbers; got 3"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--set", "prior=2"), "pi must lie inside (0, 1); got 2"),
        (("--set", "levels=[3,4]"), "config.levels must be 3 to 5, 6 or 7; got (3, 4)"),
        (("--freeze", "neck"), "--freeze must be a number of stages or backbone; got 'neck'"),
        (("--freeze", "6"), "freeze must be in [0, 5]; got 6"),
        (("--weights", "none.safetensors"), "none.safetensors: expected weights to start from"),
        (("--set", "levels=[3,-4]"), "levels must be >= 0; got -4"),
        (("--set", "levels=[]"), "anchors.strides must be those of levels (), ()"),
        (("--set", "anchors.sizes=[16,32]"), "sizes must have one number per stride (3); got 2"),
        (
            ("--set", "levels=[3,4,5,6]", "--set", "anchors.sizes=[16,32,64]"),
            "sizes must have one number per stride (4); got 3",
        ),
        (("--set", "anchors.sizes=20"), "sizes must be a tuple of numbers; got 20"),
        (("--set", "anchors.ratios=[0]"), "ratios must be > 0; got 0"),
        (("--set", "anchors.size=[20]"), "no field 'anchors.size' in"),
        (("--set", "gamma.x=2"), "no field 'gamma.x' in RetinaNetConfig, TrainConfig or"),
        (("--set", "anchors.strides=[8,16,30]"), "anchors.strides must be those of levels"),
        (
            ("--set", "anchors=3", "--set", "anchors.sizes=[16,32,64]"),
            "anchors must be an AnchorConfig; got 3",
        ),
    ],
)
def test_settings_that_make_no_sense(capsys, coco, tmp_path, arguments, message):
    start = ["train", "--data", coco, "--out", tmp_path, "--steps", "1", *QUICK]
    error = fails(capsys, *start, *arguments)
    assert message in error


def test_no_data(capsys, coco, run, tmp_path):
    out = tmp_path / "run"
    assert "none: no such folder" in fails(
        capsys, "train", "--data", tmp_path / "none", "--out", out, *QUICK
    )
    assert "no split 'train'; found no instances_*.json" in fails(
        capsys, "train", "--data", tmp_path, "--out", out, *QUICK
    )
    weights = run / "weights.safetensors"
    assert "no split 'test2'; found test, train, val" in fails(
        capsys, "evaluate", weights, "--data", coco, "--split", "test2"
    )
    assert "no split 'test2'; found train, val, test" in fails(
        capsys, "evaluate", weights, "--data", "shapes", "--split", "test2"
    )
    assert not out.exists()


def copy_of(coco, root):
    shutil.copytree(coco, root)
    return root


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_image_that_cannot_be_read(capsys, coco, run, tmp_path, content):
    root = copy_of(coco, tmp_path / "set")
    path, weights = root / "images" / "val0.png", run / "weights.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    arguments = "evaluate", weights, "--data", root, "--split", "val"
    # One line below the progress bar.
    error = one_sentence(capsys, 2, *arguments)
    assert "val0.png" in error
    missing = "instances_val.json: image id 1 (val0.png): file not found in images/"
    assert (error == missing) == (content is None)
    error = fails(capsys, "predict", weights, path, "--out", tmp_path / "out")
    reason = "no such file)" if content is None else ""
    assert error.startswith(f"{path}: not a readable image ({reason}")


def test_no_image_is_overwritten(capsys, coco, run, tmp_path):
    root = copy_of(coco, tmp_path / "set")
    path, weights = root / "images" / "val0.png", run / "weights.safetensors"
    before = path.read_bytes()
    error = fails(capsys, "predict", weights, path, "--out", path.parent)
    assert "val0.png would overwrite another image" in error
    assert path.read_bytes() == before
    other = tmp_path / "val0.png"
    other.write_bytes(before)
    error = fails(capsys, "predict", weights, path, other, "--out", tmp_path / "out")
    assert "val0.png would overwrite another image" in error


def test_weights_that_are_none(capsys, coco, run, tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("these are no weights")
    tensors, metadata = read_tensors(run / CHECKPOINT, "focal.checkpoint")
    metadata.pop("config", None)
    old = tmp_path / "old.safetensors"
    kinds = [metadata.pop(key) for key in ("format", "version")]
    write_tensors(old, tensors, kinds[0], metadata)
    for path, message in (
        (tmp_path / "none", "none: expected a file of format 'focal.retinanet' or 'focal.ch"),
        (tmp_path, "expected a run folder, with best.safetensors, weights.safetensors or a check"),
        (text, "text.safetensors: expected a whole safetensors file"),
        (old, "old.safetensors: a checkpoint of an older version, without the detector's config"),
    ):
        assert message in fails(capsys, "evaluate", path, "--data", coco)
        assert message in fails(capsys, "predict", path, coco / "images" / "val0.png")
        arguments = "--data", coco, "--out", tmp_path / "run", "--weights", path, *QUICK
        if not path.exists():
            message = "none: expected weights to start from; found no such file"
        assert message in fails(capsys, "train", *arguments)


def test_weights_of_another_network(capsys, coco, run, tmp_path):
    error = fails(
        capsys,
        *("train", "--data", coco, "--out", tmp_path / "run", "--steps", "1", *QUICK),
        *("--set", "channels=8", "--weights", run / "weights.safetensors"),
    )
    assert "weights.safetensors: its weights are of channels 16; got 8" in error


def test_classes_that_do_not_fit(capsys, coco, run, tmp_path):
    root = copy_of(coco, tmp_path / "set")
    truth = json.loads((root / "instances_val.json").read_text())
    truth["categories"][0]["name"] = "disc"
    (root / "instances_val.json").write_text(json.dumps(truth))
    weights = run / "weights.safetensors"
    error = fails(capsys, "evaluate", weights, "--data", root, "--split", "val")
    assert "classes are ('circle', 'square', 'triangle')" in error
    assert "those of set/val are ('disc', 'square', 'triangle')" in error
    error = fails(capsys, "train", "--data", root, "--out", tmp_path / "run", *QUICK)
    assert error.startswith("train: set/val has the classes ('disc', 'square', 'triangle'); exp")


def test_nowhere_to_write(capsys, coco, run, tmp_path):
    file = tmp_path / "file"
    file.touch()
    weights, image = run / "weights.safetensors", coco / "images" / "val0.png"
    for out in (file, file / "below"):
        assert str(file) in fails(capsys, "train", "--data", coco, "--out", out, *QUICK)
        assert str(file) in fails(capsys, "predict", weights, image, "--out", out)


def test_nothing_to_go_on_from(capsys, coco, tmp_path):
    error = fails(capsys, "train", "--data", coco, "--out", tmp_path, "--resume", *QUICK)
    assert error == f"{tmp_path}: expected a checkpoint-*.safetensors; found none"
    (tmp_path / CHECKPOINT).write_bytes(b"\x10\0\0")
    error = fails(capsys, "train", "--data", coco, "--out", tmp_path, "--resume", *QUICK)
    assert f"{CHECKPOINT}: expected a whole safetensors file" in error
    (tmp_path / "config.json").write_text("{}")
    error = fails(capsys, "train", "--data", coco, "--out", tmp_path, "--resume", *QUICK)
    assert (
        error == f"{tmp_path / 'config.json'}: expected the record of a run; KeyError('detector')"
    )


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_sentence(capsys, status, *arguments):
    """The last line on standard error; above it only progress, and no traceback."""
    assert main([str(a) for a in arguments]) == status
    *above, line = capsys.readouterr().err.splitlines()
    assert line.startswith("focal: ") and "Traceback" not in "".join(above)
    return line.removeprefix("focal: ")


def test_a_disk_that_is_full(capsys, coco, run, tmp_path):
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = snapshot(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = "train", "--data", coco, "--steps", "4", "--out", out, *QUICK, "--resume"
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        error = one_sentence(capsys, 2, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path = out / "checkpoint-000004.safetensors"
    assert error == f"{path}: File too large; what was there before is untouched"
    after = snapshot(out)
    assert after.keys() == before.keys()
    assert {k for k in after if after[k] != before[k]} <= {"config.json", "metrics.jsonl"}


@contextlib.contextmanager
def nobody():
    """Without root's permission to write everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_that_must_not_be_written(capsys, run, resume):
    with tempfile.TemporaryDirectory() as folder:  # which, other than tmp_path, others may enter
        pathlib.Path(folder).chmod(0o755)
        out = pathlib.Path(folder) / "run"
        shutil.copytree(run, out) if resume else out.mkdir()
        before = snapshot(out)
        out.chmod(0o555)
        with nobody():
            arguments = "train", "--data", "shapes", "--out", out, *QUICK, *resume
            error = one_sentence(capsys, 2, *arguments)
        out.chmod(0o755)
        assert "Permission denied" in error and str(out) in error
        assert snapshot(out) == before


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_disk_that_cannot_be_written(capsys, coco, run, tmp_path, monkeypatch, resume):
    out = tmp_path / "run"
    shutil.copytree(run, out) if resume else out.mkdir()
    before = snapshot(out)

    def refused(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refused)
        patch.setattr(pathlib.Path, "unlink", refused)
        error = one_sentence(capsys, 2, "train", "--data", "shapes", "--out", out, *QUICK, *resume)
    assert "Read-only file system" in error and str(out) in error
    assert snapshot(out) == before


def test_numbers_that_are_not_finite(capsys, coco, tmp_path):
    arguments = "train", "--data", coco, "--steps", "9", "--out", tmp_path, *QUICK
    bad = "--set", "learning_rate=1e30", "--set", "warmup=0"
    error = one_sentence(capsys, 2, *arguments, *bad)
    assert error.startswith("step 2: ") and "the images with the ids" in error
    assert error.endswith(f"{tmp_path / 'checkpoint-000001.safetensors'} is the state before it")


def test_a_run_goes_on_with_its_own_settings(coco, run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    first = json.loads((out / "config.json").read_text())
    arguments = ["train", "--data", str(coco), "--out", str(out), "--device", "cpu", "--resume"]
    assert main([*arguments, "--steps", "4", "--set", "learning_rate=1e-5"]) == 0
    second = json.loads((out / "config.json").read_text())
    assert second["detector"] == first["detector"]
    assert second["train"] == {**first["train"], "steps": 4, "learning_rate": 1e-5}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_is_told_to_stop(coco, tmp_path, name):
    out, number = tmp_path / "run", getattr(signal, name)
    command = ["train", "--data", coco, "--steps", "4000", "--out", out, *QUICK]
    command += ["--set", "save_every=0", "--set", "log_every=1", "--set", "workers=1"]
    # A shell may ignore SIGINT in background processes, and their children inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = shell(*command)
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        while process.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.005)
        while process.poll() is None and not metrics(out):
            time.sleep(0.005)
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == 128 + number
    step = metrics(out)[-1]["step"]
    path = out / f"checkpoint-{step:06d}.safetensors"
    assert error.splitlines()[-1] == (
        f"focal: stopped by {name} after step {step} of 4000; {path} is saved"
        "; --resume continues from the last checkpoint"
    )
    assert "Traceback" not in error
    assert read_checkpoint(out)[2]["step"] == str(step)


@pytest.mark.parametrize("pi", ["0", "1", "2", "nan"])
def test_a_prior_is_a_probability(capsys, pi):
    assert "pi must lie inside (0, 1)" in fails(capsys, "prior-bias", pi)


@pytest.mark.parametrize(
    "arguments",
    [(), ("fly",), ("train",), ("train", "--data", "shapes", "--steps", "many"), ("predict", "w")],
)
def test_words_that_are_no_command(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    usage, *_, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: focal") and error.startswith("focal") and "error: " in error
