"""Runs as users start them: `fit` and `focal train`, from random weights and from trained ones."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from backends import RETINANETS
from detectors import CONFIG
from folders import ROOT

pytest.importorskip("torch")
pytest.importorskip("pycocotools")
import torch
from PIL import Image

from focal.cli import main
from focal.core.prior import prior_bias
from focal.retinanet import RetinaNetConfig, build, fit, save
from focal.retinanet.data import DataError, Example, ShapesDataset
from focal.retinanet.presets import CONVENTIONS
from focal.retinanet.torch.network import build_network
from focal.retinanet.training.run_folder import new_folder
from focal.retinanet.weights import load_weights

LOGITS = "head.classification_head.cls_logits"
QUICK = {"image_size": (64, 64), "batch_size": 2, "workers": 0, "precision": "float32"}
QUICK |= {"candidates": 50, "crop": (64, 64), "warmup": 0}
FLAGS = [part for k, v in QUICK.items() for part in ("--set", f"{k}={json.dumps(v)}")]


pytestmark = pytest.mark.usefixtures("one_thread", "quick_jax")


class Numbers:
    """An own dataset of two images with `count` classes: only what the protocol asks for."""

    def __init__(self, count, boxes=((8, 8, 40, 40),), labels=None):
        self.classes = tuple(f"class {k}" for k in range(count))
        self.boxes, self.labels = boxes, labels or [count - 1]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = np.full((64, 64, 3), 60 * index, np.uint8)
        image[8:40, 8:40] = 200
        return Example(image, self.boxes, self.labels)


def record(out):
    return json.loads((out / "config.json").read_text())


def weights(out):
    return load_weights(out / "weights.safetensors")[0]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A folder in Roboflow's layout with five classes."""
    root = tmp_path_factory.mktemp("roboflow")
    for split in ("train", "valid"):
        (root / split).mkdir()
        data = ShapesDataset(
            split.removesuffix("id").removesuffix("idate"), size=(64, 64), num_images=2
        )
        truth = data.ground_truth()
        truth["categories"] = [{"id": 10 + k, "name": f"thing {k}"} for k in range(5)]
        for annotation in truth["annotations"]:
            annotation["category_id"] = 10 + annotation["id"] % 5
        for index, image in enumerate(truth["images"]):
            Image.fromarray(data[index].image).save(root / split / image["file_name"])
        (root / split / "_annotations.coco.json").write_text(json.dumps(truth))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A weights file of a detector of three classes, all weights of which are random."""
    path = tmp_path_factory.mktemp("trained") / "three.safetensors"
    model = build(CONFIG.replace(candidates=50), seed=7, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for x in model.state_dict().values():
            if x.is_floating_point():
                x.add_(0.05 * torch.rand(x.shape))
    save(model, path)
    return path


@pytest.fixture(scope="module")
def torchvisions(tmp_path_factory):
    """A small detector as a .pth file with the names of torchvision's `retinanet_resnet50_fpn`."""
    path = tmp_path_factory.mktemp("torchvision") / "retinanet.pth"
    config = RetinaNetConfig(
        classes=tuple(map(str, range(91))),
        backbone="resnet18",
        channels=16,
        head_depth=2,
        **CONVENTIONS["torchvision"],
    )
    network = build_network(config, seed=3)
    for x in network.state_dict().values():
        if x.ndim == 1:
            x.add_(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)))
    torch.save(network.state_dict(), path)
    return path


# Fine-tuning


@pytest.mark.parametrize("backend", RETINANETS)
def test_three_classes_become_five(coco, trained, tmp_path, backend, caplog):
    """From the command line, with a rate of 0: what comes from the file, and what is new."""
    command = [
        "train",
        "--data",
        coco,
        "--weights",
        trained,
        "--out",
        tmp_path / "run",
        "--steps",
        1,
    ]
    command += [*FLAGS, "--set", "learning_rate=0", "--freeze", 2, "--backend", backend]
    assert main([str(part) for part in command]) == 0
    assert re.search(
        r"weights: tiny detector from .*three\.safetensors; its 3 classes are others, "
        "so the last layer of the class head is new",
        caplog.text,
    )
    before, config = load_weights(trained)
    after, found = load_weights(tmp_path / "run")
    assert found.classes == tuple(f"thing {k}" for k in range(5))
    assert found.category_ids == (10, 11, 12, 13, 14)
    assert found.channels == config.channels and found.anchors == config.anchors
    assert record(tmp_path / "run")["train"]["freeze"] == 2
    for name, x in before.items():
        if name.startswith(LOGITS):
            assert after[name].shape[0] == x.shape[0] // 3 * 5
        elif "running" not in name or name.startswith("backbone.body.layer1"):
            np.testing.assert_allclose(after[name], x, rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(after[f"{LOGITS}.bias"], prior_bias(0.01), rtol=1e-6)


@pytest.mark.parametrize("backend", RETINANETS)
def test_torchvisions_weights_become_a_detector_of_own_classes(
    coco, torchvisions, tmp_path, backend, caplog
):
    command = ["train", "--data", coco, "--weights", torchvisions, "--out", tmp_path / "run"]
    command += [*FLAGS, "--steps", 2, "--freeze", "backbone", "--backend", backend]
    assert main([str(part) for part in command]) == 0
    assert "weights: resnet18 detector from" in caplog.text
    after, config = load_weights(tmp_path / "run")
    assert config.norm == "frozen_batch" and config.anchors.rounded and config.num_classes == 5
    source = torch.load(torchvisions)
    changed = 0
    for name, x in source.items():
        if name.startswith(LOGITS):
            continue
        # The published v1 weights were trained without an epsilon, which goes into the scale.
        if name.startswith("backbone.body.") and x.ndim > 1:
            np.testing.assert_array_equal(after[name], x.numpy(), err_msg=name)
        elif not name.startswith("backbone.body."):
            changed += bool((after[name] != x.numpy()).any())
    assert changed > 10


def test_a_bare_resnet_is_a_backbone(tmp_path):
    network = build_network(CONFIG.replace(backbone="resnet18"), seed=5)
    body = {f"{k}": v for k, v in network.backbone.body.state_dict().items()}
    torch.save({**body, "fc.weight": torch.ones(10, 512)}, tmp_path / "resnet18.pth")
    data = Numbers(2)
    fit(
        *(data, None, tmp_path / "run"),
        preset="tiny",
        weights=tmp_path / "resnet18.pth",
        steps=1,
        learning_rate=0,
        device="cpu",
        **QUICK,
    )
    after, config = load_weights(tmp_path / "run")
    assert config.backbone == "resnet18" and config.levels == (3, 4, 5)
    np.testing.assert_allclose(
        after["backbone.body.layer3.1.conv2.weight"], body["layer3.1.conv2.weight"], rtol=1e-6
    )


def test_the_same_classes_keep_the_class_head(trained, tmp_path):
    data = ShapesDataset("train", (64, 64), num_images=2)
    out = tmp_path / "run"
    options = QUICK | {"steps": 1, "learning_rate": 0.0, "device": "cpu"}
    fit(data, None, out, weights=trained, **options)
    np.testing.assert_allclose(
        weights(out)[f"{LOGITS}.weight"], load_weights(trained)[0][f"{LOGITS}.weight"], rtol=1e-6
    )


def test_the_convention_comes_from_the_weights(tmp_path):
    """A model in another convention was evaluated as if it were the paper's (R2)."""
    config = CONFIG.replace(gamma=1.0, anchors=CONFIG.anchors, box_loss="giou", candidates=50)
    save(build(config, device="cpu"), tmp_path / "own.safetensors")
    data = ShapesDataset("train", (64, 64), num_images=2)
    fit(data, None, tmp_path / "run", weights=tmp_path / "own.safetensors", steps=1, **QUICK)
    assert load_weights(tmp_path / "run")[1] == config


def test_weights_keep_their_anchors_where_the_canvas_is_fitted(trained, tmp_path):
    data = Numbers(3, boxes=[(2, 2, 62, 8), (2, 30, 60, 36), (50, 2, 56, 60)], labels=[0, 1, 2])
    quick = {name: value for name, value in QUICK.items() if name != "image_size"}
    fit(data, None, tmp_path, weights=trained, fit_to_data=True, steps=1, device="cpu", **quick)
    before, after = load_weights(trained)[1], load_weights(tmp_path)[1]
    assert (after.anchors, after.levels) == (before.anchors, before.levels)
    assert after.image_size != before.image_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 32}, r"three\.safetensors: its weights are of channels 16; got 32"),
        ({"backbone": "resnet18"}, r"its weights are of backbone tiny; got resnet18"),
        ({"anchors.scales": [1.0]}, r"its weights are of 9 anchors in a cell; got 3"),
        (
            {"convention": "torchvision"},
            r"convention: .*three\.safetensors has a detector with its",
        ),
    ],
)
def test_what_does_not_fit_the_weights(trained, tmp_path, changes, message):
    data = ShapesDataset("train", (64, 64), num_images=2)
    with pytest.raises(ValueError, match=message):
        fit(data, None, tmp_path / "run", weights=trained, **QUICK, **changes)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_none(tmp_path):
    torch.save({"conv1.weight": torch.ones(3, 3)}, tmp_path / "other.pth")
    data = ShapesDataset("train", (64, 64), num_images=2)
    with pytest.raises(
        ValueError, match=r"other\.pth: expected weights of a RetinaNet or of one of"
    ):
        fit(data, None, tmp_path / "run", weights=tmp_path / "other.pth", **QUICK)
    with pytest.raises(
        FileNotFoundError, match=r"none\.pth: expected weights to start from; found no"
    ):
        fit(data, None, tmp_path / "run", weights=tmp_path / "none.pth", **QUICK)


def test_the_page_on_fine_tuning(torchvisions, tmp_path, monkeypatch):
    """Its commands, one after the other, with small stand-ins for weights, images and steps."""
    monkeypatch.chdir(tmp_path)
    os.symlink(torchvisions, "retinanet_resnet50_fpn_coco-eeacb38b.pth")
    root = tmp_path / "path/to/mine"
    (root / "photos").mkdir(parents=True)
    for split in ("train", "valid"):
        (root / split).mkdir()
        data = ShapesDataset({"valid": "val"}.get(split, split), size=(64, 64), num_images=2)
        truth = data.ground_truth()
        for index, image in enumerate(truth["images"]):
            for folder in (root / split, root / "photos"):
                Image.fromarray(data[index].image).save(folder / f"{split}{index}.png")
            image["file_name"] = f"{split}{index}.png"
        (root / split / "_annotations.coco.json").write_text(json.dumps(truth))
    page = (ROOT / "docs/finetuning.md").read_text()
    (block,) = re.findall(r"```console\n(.*?)```", page, re.S)
    commands = re.findall(r"^\$ focal (.*)$", block.replace("\\\n", " "), re.M)
    assert [command.split()[0] for command in commands] == [
        *("check", "train", "evaluate", "predict", "export")
    ]
    for command in commands:
        words = shlex.split(command)
        quick = [*FLAGS, "--steps", "1", "--device", "cpu"] if words[0] == "train" else []
        assert main([*words, *quick]) == 0, command
    found = json.loads((tmp_path / "found/train0.json").read_text())
    assert found["image_size"] == {"width": 64, "height": 64}
    assert (tmp_path / "detector.onnx").stat().st_size > 100_000
    assert record(tmp_path / "runs/mine")["train"]["freeze"] == 2


# Data of one's own


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Numbers(2, labels=[2]), r"Numbers: image [01]: .*labels"),
        (Numbers(2, boxes=[(8, 8, float("nan"), 40)]), r"Numbers: image [01]: .*boxes"),
        (Numbers(2, boxes=[(40, 8, 8, 40)]), r"Numbers: image [01]: .*boxes"),
    ],
)
def test_examples_that_cannot_be_learned_from(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        fit(data, None, tmp_path, fit_to_data=False, steps=1, device="cpu", **QUICK)


def test_classes_that_differ(tmp_path):
    with pytest.raises(ValueError, match=r"Numbers has the classes \('class 0',\); expected"):
        fit(Numbers(2), Numbers(1), tmp_path, steps=1, fit_to_data=False, **QUICK)
    with pytest.raises(ValueError, match="classes must be a tuple of names; got 'cell'"):
        fit(Numbers(2), None, tmp_path, steps=1, classes="cell", fit_to_data=False, **QUICK)


@pytest.mark.parametrize("wrong", ["name", "folder"])
def test_data_that_is_no_dataset(tmp_path, wrong):
    data = Numbers(2)
    data.classes = "cell"  # or there would be four classes
    with pytest.raises(TypeError, match="data must be a Dataset, such as CocoDataset"):
        fit({"name": data, "folder": str(tmp_path)}[wrong], None, tmp_path, steps=1, **QUICK)


def test_a_split_without_objects(tmp_path, capsys):
    """It has no AP, and so no best one."""
    for split in ("train", "val"):
        data = ShapesDataset(split, size=(64, 64), num_images=2)
        truth = data.ground_truth()
        truth["annotations"] = truth["annotations"] if split == "train" else []
        (tmp_path / "data" / split).mkdir(parents=True)
        for index, image in enumerate(truth["images"]):
            Image.fromarray(data[index].image).save(tmp_path / "data" / split / image["file_name"])
        (tmp_path / "data" / split / "_annotations.coco.json").write_text(json.dumps(truth))
    command = ["train", "--data", tmp_path / "data", "--out", tmp_path / "run", "--steps", 2]
    assert main([*map(str, command), "--eval-every", "1", *FLAGS]) == 0
    found = capsys.readouterr().out
    assert "nan" in found and "best AP" not in found and "report:" in found


def test_tensorboard_without_its_package(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    command = ["train", "--data", coco, "--out", tmp_path / "run", "--tensorboard"]
    assert main([*map(str, command), *FLAGS]) == 2
    assert 'pip install "focal-losses[tensorboard]"' in capsys.readouterr().err


def test_an_own_dataset_trains_and_is_evaluated(tmp_path):
    model = fit(Numbers(2), Numbers(2), tmp_path, steps=2, fit_to_data=False, device="cpu", **QUICK)
    assert model.config.classes == ("class 0", "class 1")
    (line,) = [x for x in read_lines(tmp_path) if x["kind"] == "eval"]
    assert line["split"] == "Numbers" and 0 <= line["AP"] <= 1


@pytest.mark.parametrize(("changes", "ids"), [({}, ()), ({"category_ids": (7, 3)}, (7, 3))])
def test_ids_of_classes_set_by_hand_stay(tmp_path, changes, ids):
    run = {"steps": 1, "fit_to_data": False, "device": "cpu", **changes, **QUICK}
    assert fit(Numbers(2), None, tmp_path, **run).config.category_ids == ids


def read_lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_fields_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no field 'stepps' in RetinaNetConfig or TrainConfig"):
        fit(Numbers(2), None, tmp_path, stepps=3)


# Folders and going on


def test_the_default_folder_is_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/3").mkdir(parents=True)
    for expected in ("4", "5"):
        fit(Numbers(1), steps=1, fit_to_data=False, device="cpu", **QUICK)
        assert (tmp_path / "runs" / expected / "report.html").is_file()
    for wrong in ({"batch_size": 0}, {"patience": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fit(Numbers(1), steps=1, fit_to_data=False, device="cpu", **{**QUICK, **wrong})
    assert sorted(os.listdir("runs")) == ["3", "4", "5"]


def test_runs_that_begin_together_have_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(new_folder, [tmp_path / "runs"] * 200))
    assert {path.name for path in found} == {str(i) for i in range(1, 201)}
    assert all(path.is_dir() for path in found)


def test_a_run_is_refused_where_there_is_one(coco, tmp_path, capsys):
    command = [*map(str, ("train", "--data", coco, "--out", tmp_path, "--steps", 1)), *FLAGS]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(command) == 2
    assert "holds a run already; continue it with --resume" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_resuming_keeps_the_recorded_settings(coco, tmp_path, capsys):
    """The command is repeated with --resume, the preset included (R6)."""
    command = [*map(str, ("train", "--data", coco, "--out", tmp_path)), "--preset", "tiny"]
    assert main([*command, *FLAGS, "--steps", "2", "--set", "learning_rate=0.003"]) == 0
    started = record(tmp_path)
    assert main([*command, "--resume", "--steps", "3", "--set", "workers=0"]) == 0
    found = record(tmp_path)
    assert found["train"] == started["train"] | {"steps": 3}
    assert found["detector"] == started["detector"] and found["preset"] == "tiny"
    capsys.readouterr()
    assert main([*command[:-1], "r50", "--resume"]) == 2
    assert "the run has preset tiny, and resumes with it; got r50" in capsys.readouterr().err
    assert main([*command, "--convention", "detectron2", "--resume"]) == 2
    assert (
        "the run has convention paper, and resumes with it; got detectron2"
        in capsys.readouterr().err
    )


def test_resuming_before_the_first_checkpoint_starts_from_the_weights_again(
    coco, trained, tmp_path
):
    """Not from random ones, where the run was killed before it could save."""
    command = [*map(str, ("train", "--data", coco, "--out", tmp_path, "--steps", 1)), *FLAGS]
    command += ["--set", "learning_rate=0"]
    assert main([*command, "--weights", str(trained)]) == 0
    expected = weights(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert main([*command, "--resume"]) == 0
    found = weights(tmp_path)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_shapes_have_the_size_of_the_canvas(trained, tmp_path, monkeypatch):
    sizes = []

    def opened(data, split, size, hold_out):
        sizes.append(size)
        return ShapesDataset(split, size=size, num_images=2)

    monkeypatch.setattr("focal.cli.train.open_dataset", opened)
    command = ["train", "--data", "shapes", "--weights", trained, "--out", tmp_path, "--steps", 1]
    assert main([*map(str, command), *FLAGS[2:]]) == 0
    assert sizes == [load_weights(trained)[1].image_size] * 2


def test_frozen_stages_without_weights(tmp_path, caplog):
    fit(Numbers(2), None, tmp_path, fit_to_data=False, freeze=1, steps=1, **QUICK)
    assert "the frozen stages stay random" in caplog.text


def test_resuming_what_is_not_there_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: expected the folder of a run to resume"):
        fit(Numbers(2), None, tmp_path / "none", resume=True, steps=1, **QUICK)
    assert not (tmp_path / "none").exists()


def test_resuming_needs_a_folder(capsys):
    assert main(["train", "--data", "shapes", "--resume"]) == 2
    assert "the run folder, out (--out), must be given" in capsys.readouterr().err


def test_the_data_without_a_val_split(coco, tmp_path):
    """Nothing is held out: the run is not measured, and there is no best checkpoint."""
    single = coco / "train" / "_annotations.coco.json"
    command = [*map(str, ("train", "--data", single, "--out", tmp_path, "--steps", 1)), *FLAGS]
    assert main([*command, "--hold-out", "0"]) == 0
    assert not (tmp_path / "best.safetensors").exists()
    assert [x["kind"] for x in read_lines(tmp_path)] == ["train"]


# Watching


def test_tensorboard_files_and_a_callback(tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    seen = []
    data = Numbers(2)
    fit(
        *(data, data, tmp_path),
        steps=3,
        log_every=1,
        eval_every=2,
        tensorboard=True,
        callback=lambda step, metrics: seen.append((step, metrics["kind"])),
        fit_to_data=False,
        device="cpu",
        **QUICK,
    )
    assert seen == [(1, "train"), (2, "train"), (2, "eval"), (3, "train"), (3, "eval")]
    (file,) = tmp_path.glob("events.out.tfevents.*")
    found = {}
    for event in tensorflow.compat.v1.train.summary_iterator(str(file)):
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    lines = read_lines(tmp_path)
    for line in lines:
        name = "loss" if line["kind"] == "train" else "AP"
        assert found[f"{line['kind']}/{name}", line["step"]] == pytest.approx(line[name], rel=1e-6)


@pytest.mark.parametrize("backend", RETINANETS)
def test_ctrl_c_while_the_framework_starts(coco, tmp_path, backend):
    """It stops the run before or after its first step, and the run resumes (R6)."""
    command = [sys.executable, "-m", "focal", "train", "--data", coco, "--out", tmp_path / "run"]
    command += [*FLAGS, "--steps", 500, "--backend", backend, "--set", "log_every=1"]
    code = (
        "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from focal.retinanet import run; print('ready', flush=True); "
        "sys.argv = sys.argv[1:]; runpy.run_module('focal', run_name='__main__', alter_sys=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, command[2:])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        ready = process.stdout.readline()
        time.sleep(1.0)  # the framework is being imported
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert ready == "ready\n", errors
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "focal: stopped by SIGINT after step" in errors.splitlines()[-1], errors
    assert list((tmp_path / "run").glob("checkpoint-*.safetensors"))
    assert (tmp_path / "run/weights.safetensors").is_file()
