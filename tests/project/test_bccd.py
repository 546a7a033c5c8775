"""The recipes for BCCD: their commands, runs that happen once, and the tables of the page."""

import contextlib
import json

import pytest
from folders import BCCD, ROOT

pytest.importorskip("torch")
pytest.importorskip("pycocotools")

import torch

import focal.torch as F
from benchmarks import bccd, pages, varifocal
from focal.cli import _parser
from focal.cli.options import assignments
from focal.retinanet import RetinaNetConfig, TrainConfig
from focal.retinanet.data import ShapesDataset, train_batches
from focal.retinanet.objective import Targets, losses
from focal.retinanet.settings import apply, preset_settings
from focal.retinanet.torch import trainer

RESULTS = ROOT / "docs/results/bccd.json"
PAGE = ROOT / "docs/retinanet.md"


@pytest.mark.parametrize("recipe", bccd.RECIPES)
def test_a_recipe_is_what_its_command_says(recipe):
    run = bccd.Run(recipe, "jax", 3)
    options = _parser().parse_args([*run.command()[1:], "--data", "x"])
    assert options.preset == "tiny" and options.backend == "jax" and options.fit is False
    found = apply(preset_settings("tiny"), assignments(options))
    assert found == apply(preset_settings("tiny"), {**bccd.RECIPES[recipe], "seed": 3})


def test_a_run_that_is_done_is_not_run_again(tmp_path, monkeypatch):
    path, recipe = tmp_path / "results.json", "GIoU"
    small = {**bccd.RECIPES[recipe], "steps": 2, "image_size": [64, 64], "crop": [64, 64]}
    monkeypatch.setitem(bccd.RECIPES, recipe, small)
    ran, own = [], bccd.run_module
    monkeypatch.setattr(bccd, "run_module", lambda a, *more: ran.append(a[1]) or own(a, *more))
    arguments = ["--data", str(BCCD), "--out", str(tmp_path), "--results", str(path)]
    arguments += ["--recipes", recipe, "--jobs", "1"]
    bccd.main([*arguments, "--seeds", "1"])
    (first,) = json.loads(path.read_text())
    assert ran == ["train", "evaluate"]
    assert (first["recipe"], first["seed"], first["steps"]) == (recipe, 1, 2)
    assert first["settings"] == small and {"AP", "AP50", "AP/RBC"} <= first["test"].keys()
    bccd.main([*arguments, "--seeds", "1"])
    assert ran == ["train", "evaluate"] and json.loads(path.read_text()) == [first]
    monkeypatch.setitem(bccd.RECIPES, recipe, {**small, "gamma": 1.0})
    with pytest.raises(ValueError, match=r"expected Run.*'gamma': 1.0.*; got .*; remove its line"):
        bccd.main([*arguments, "--seeds", "1"])
    path.unlink()
    with pytest.raises(ValueError, match=r"GIoU torch 1: expected a run with .*'gamma': 1.0"):
        bccd.main([*arguments, "--seeds", "1"])


def test_an_error_starts_no_other_run(tmp_path, monkeypatch):
    begun = []

    def fail(run, *_):
        begun.append(run)
        raise OSError("no space left")

    monkeypatch.setattr(bccd, "measure", fail)
    arguments = ["--data", "x", "--out", str(tmp_path), "--jobs", "1"]
    with pytest.raises(OSError, match="no space left"):
        bccd.main([*arguments, "--seeds", *map(str, range(50))])
    assert len(begun) == 1


def test_a_loss_for_pytorch_is_not_run_in_other_frameworks(capsys):
    with pytest.raises(SystemExit):
        bccd.main(["--backends", "torch", "jax"])
    assert "got GIoU, varifocal loss" in capsys.readouterr().err


def test_the_trainer_takes_the_other_loss(monkeypatch):
    data = ShapesDataset("train", (64, 64), 2)
    config = RetinaNetConfig(
        classes=data.classes, image_size=(64, 64), backbone="tiny", norm="batch", channels=16
    )
    run = TrainConfig(batch_size=2, precision="float32", workers=0)
    found = {}
    for loss in (losses, varifocal.varifocal_losses):
        monkeypatch.setattr(trainer, "losses", loss)
        with contextlib.closing(train_batches(data, config, run)) as batches:
            model = trainer.build(config, 0, "cpu")
            step = trainer.Trainer(model, run).step(0, next(batches), 0.0)
        found[loss] = float(step["classification"])
    assert found[losses] != found[varifocal.varifocal_losses]


def test_the_score_of_a_positive_learns_the_iou_of_its_box():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [5, 5, 15, 15]])
    target = Targets(torch.tensor([[1, -1, -2]]), torch.zeros(1, 3, 4))
    logits = torch.tensor([[[0.3, -1.0], [2.0, -3.0], [9.0, 9.0]]], requires_grad=True)
    deltas = torch.zeros(1, 3, 4)
    deltas[0, 0, 0] = 0.5  # half a width to the right: IoU 1 / 3
    quality = varifocal.qualities(logits, deltas, anchors, target)
    expected = torch.zeros(1, 3, 2)
    expected[0, 0, 1] = 1 / 3
    torch.testing.assert_close(quality, expected)

    config = RetinaNetConfig(classes=("a", "b"), box_loss="giou")
    found = varifocal.varifocal_losses(F, logits, deltas, anchors, target, config, 2.0)
    usual = losses(F, logits, deltas, anchors, target, config, 2.0)
    assert float(found.box) == float(usual.box)
    p = torch.sigmoid(logits.detach()[0, :2].double())
    negatives = 0.75 * p**2 * -torch.log1p(-p)
    positive = (-torch.log(p[0, 1]) - 2 * torch.log1p(-p[0, 1])) / 9
    negatives[0, 1] = positive
    torch.testing.assert_close(found.classification.double(), negatives.sum() / 2)


def test_the_page_shows_the_committed_results(tmp_path):
    lines, page = json.loads(RESULTS.read_text()), tmp_path / "page.md"
    page.write_text(pages.fill(PAGE.read_text(), dict.fromkeys(bccd.tables(lines), "old")))
    assert page.read_text() != PAGE.read_text()
    bccd.main(["--results", str(RESULTS), "--page", str(page)])
    assert page.read_text() == PAGE.read_text()
    for line in lines:
        assert line["settings"] == bccd.RECIPES[line["recipe"]]


def test_the_tables():
    line = {"recipe": "GIoU", "backend": "torch", "seed": 0, "seconds": 90.0}
    line |= {split: dict.fromkeys(bccd.METRICS, 0.25) for split in ("val", "test")}
    other = {**line, "seed": 1, "seconds": 200.0, "test": dict.fromkeys(bccd.METRICS, 0.75)}
    found = bccd.tables([line, other])
    assert found["bccd settings"].splitlines()[2:] == ["| GIoU | 2 |" + " 0.250 |" * 6]
    row = "| `torch` | GIoU | 2 | 0.250 (0.250 to 0.250) | 0.500 (0.250 to 0.750)"
    assert found["bccd backends"].splitlines()[2].startswith(row)
