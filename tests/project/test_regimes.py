"""Focal loss against cross entropy: the images, what is looked at, and cells that run once."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pycocotools")
import torch

from benchmarks import pages, regimes, regimes_page
from benchmarks.scenes import NAMES, Scene, Scenes, labeled, names
from focal.retinanet.data import ShapesDataset
from focal.retinanet.objective import Losses, Targets

CELL = regimes.Cell("base", "CE", 0.5, 3e-3, 0, "val")


@pytest.fixture
def small(monkeypatch):
    """Few images, and as many threads as before."""
    monkeypatch.setattr(regimes, "IMAGES", {"train": 16, "val": 16, "test": 16})
    regimes.scenes.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    regimes.scenes.cache_clear()


# The images


def test_a_scene_labels_the_shapes_in_its_own_way():
    plain = ShapesDataset("val", (96, 96), 6, num_objects=6, object_size=(20, 44))
    scenes = {kind: Scenes("val", 6, Scene(objects=6, classes=kind)) for kind in NAMES}
    for index, example in enumerate(plain):
        found = {kind: scene[index] for kind, scene in scenes.items()}
        for own in found.values():
            np.testing.assert_array_equal(own.image, example.image)
        np.testing.assert_array_equal(found["shapes"].labels, example.labels)
        np.testing.assert_array_equal(found["one"].labels, 0 * example.labels)
        np.testing.assert_array_equal(found["one"].boxes, example.boxes)
        circles = example.labels == 0
        np.testing.assert_array_equal(found["circles"].boxes, example.boxes[circles])
        assert not found["circles"].labels.any()
        np.testing.assert_array_equal(found["colors"].labels // 8, example.labels)
    truth = scenes["colors"].ground_truth()
    assert len(truth["images"]) == 6 and len(truth["categories"]) == 24
    assert len(truth["annotations"]) == sum(len(e.labels) for e in plain)
    colors = {a["category_id"] for a in truth["annotations"]}
    assert len(colors) > 10  # 32 shapes of 24 classes


def test_the_color_of_a_shape_is_that_of_its_center():
    image = np.full((96, 96, 3), 20, np.uint8)
    image[40:60, 40:60] = 200, 20, 200
    example = ShapesDataset("val", (96, 96), 1)[0]._replace(
        image=image, boxes=np.array([[40.0, 40.0, 60.0, 60.0]], np.float32), labels=np.array([2])
    )
    assert labeled(example, Scene(classes="colors")).labels.tolist() == [2 * 8 + 5]


def test_unused_classes_have_no_objects():
    scene = Scenes("val", 3, Scene(unused=5))
    assert len(scene.classes) == len(scene.category_ids) == 8
    assert max(a["category_id"] for a in scene.ground_truth()["annotations"]) <= 3


def test_errors_are_in_the_training_labels_alone():
    clean = Scenes("train", 60, Scene(objects=6))
    missing = Scenes("train", 60, Scene(objects=6, missing=0.3))
    wrong = Scenes("train", 60, Scene(objects=6, wrong=0.3))
    boxes = sum(len(e.boxes) for e in clean)
    assert 0.6 < sum(len(e.boxes) for e in missing) / boxes < 0.8
    same = sum(int((a.labels == b.labels).sum()) for a, b in zip(clean, wrong, strict=True))
    assert 0.6 < same / boxes < 0.8
    assert {int(label) for e in wrong for label in e.labels} == {0, 1, 2}
    ends = (Scenes("test", 9, Scene(wrong=share)) for share in (1.0, 0.0))
    for own, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(own.labels, other.labels)


# What is looked at


def test_a_frame_tells_where_the_gradient_comes_from():
    detector = regimes.DETECTOR.replace(classes=("a", "b"), gamma=0.0, alpha=None)
    # A positive of class 1, background, and an ignored anchor.
    target = Targets(torch.tensor([[1, -1, -2]]), torch.zeros(1, 3, 4))
    logits = torch.tensor([[[-4.0, 2.0], [0.0, -5.0], [9.0, 9.0]]])
    p = 1 / (1 + np.exp(-np.array([-4.0, 2.0, 0.0, -5.0])))
    slopes = np.array([p[0], 1 - p[1], p[2], p[3]])
    frame = regimes.frame(logits, target, detector)
    expected = [slopes[1], slopes[2], slopes[0] + slopes[3]] / slopes.sum()
    np.testing.assert_allclose(list(frame["gradient"].values()), expected, rtol=1e-3)
    assert list(frame["gradient"]) == ["positives", "hard negatives", "easy negatives"]
    losses = -np.log1p(-p[[2, 0, 3]])
    np.testing.assert_allclose(frame["hardest"], [losses[0] / losses.sum()] * 3, rtol=1e-3)
    assert frame["positive logits"] == [2.0] * 5
    assert frame["negative logits"][0] == -4.0 and frame["negative logits"][-1] == 0.0


def test_frames_are_close_together_at_first():
    steps = sorted(regimes.frames(600))
    assert steps[0] == 0 and steps[-1] == 599
    gaps = np.diff(steps)
    assert (np.diff(gaps) >= 0).all() and gaps[-1] > 50 * gaps[0]


def test_the_bins_of_a_calibration_hold_every_logit_that_counts(small):
    detector, run = regimes.settings(CELL, 1)
    train = regimes.scenes(Scene(), "train")
    model, found = regimes.fit(detector, run, train, scaled=False)
    bins = regimes.calibration(model, regimes.scenes(Scene(), "val"), 16)
    ignored = 0
    for example in regimes.scenes(Scene(), "val"):
        target = regimes.matched(example, model.anchors((96, 96)), detector)
        ignored += int((target == -2).sum())
    assert sum(bins["count"]) == 3 * (16 * found["anchors"] - ignored)
    assert bins["score"][0] == pytest.approx(0.01, abs=0.005)  # the prior bias
    share = regimes.share_of_positives(regimes.scenes(Scene(), "val"), detector, 16)
    hits = np.dot(bins["count"], bins["positive"])
    assert hits == pytest.approx(share * 16 * 3 * found["anchors"], rel=0.1)


def test_a_guided_loss_is_as_large_as_that_of_the_boxes():
    classification = torch.tensor(0.25, requires_grad=True)
    box = torch.tensor(4.0, requires_grad=True)
    total = regimes.guided(Losses(classification, box))
    total.backward()
    assert float(total.detach()) == 8.0
    assert float(classification.grad) == 16.0 and float(box.grad) == 1.0


# Cells


def run(out, *arguments):
    common = ["--out", str(out), "--only", "base", "--losses", "CE guided", "--steps", "2"]
    regimes.main([*common, "--jobs", "0", *arguments])
    return regimes.read(out / "results.json")["base"]["CE guided"]


def test_a_finished_cell_is_not_run_again(small, tmp_path, monkeypatch):
    scaled = []
    own_guided = regimes.guided
    monkeypatch.setattr(regimes, "guided", lambda parts: scaled.append(1) or own_guided(parts))
    kept = [{"regime": "base", "loss": "FL 2"}, {"regime": "sparse", "loss": "CE"}]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    first = run(tmp_path)
    assert len(scaled) == 10 * 2
    results = regimes.read(tmp_path / "results.json")
    assert [results["base"]["FL 2"], results["sparse"]["CE"]] == kept
    detector, _ = regimes.settings(CELL)
    share = regimes.share_of_positives(regimes.scenes(Scene(), "train"), detector)
    assert first["prior"] == [share] * 5 and 1e-4 < share < 0.01
    alphas = [line[0] for line in first["search"]]
    assert alphas[:3] == list(regimes.ALPHAS) and alphas[3] == alphas[4] == first["alpha"][0]
    assert [line[1] for line in first["search"]] == [6e-3, 6e-3, 6e-3, 3e-3, 12e-3]
    assert first["seed"] == list(regimes.TEST_SEEDS) and first["diverged"] == [None] * 5
    assert len(list(tmp_path.rglob("* *.json"))) == 10

    ran = []
    own = regimes.run_cell
    monkeypatch.setattr(regimes, "run_cell", lambda c, s: ran.append(c) or own(c, s))
    lost = next(tmp_path.rglob("*test 3.json"))
    lost.unlink()
    again = run(tmp_path)
    assert [c.seed for c in ran] == [3]
    varying = {"date": None, "machine": None, "cpu_seconds": None}
    assert {**again, **varying} == {**first, **varying}

    # Another setting is another cell: of the detector, or of the images.
    monkeypatch.setattr(regimes, "TEST_SEEDS", ())
    monkeypatch.setattr(regimes, "FACTORS", ())
    monkeypatch.setattr(regimes, "ALPHAS", (0.5,))
    with monkeypatch.context() as changed:
        changed.setattr(regimes, "DETECTOR", regimes.DETECTOR.replace(box_beta=0.5))
        regimes.chain("base", "CE guided", tmp_path, 2)
    assert len(ran) == 2
    other = {**regimes.REGIMES, "base": regimes.Regime(Scene(sides=(30, 40)))}
    monkeypatch.setattr(regimes, "REGIMES", other)
    regimes.chain("base", "CE guided", tmp_path, 2)
    regimes.chain("base", "CE guided", tmp_path, 2)
    assert len(ran) == 3


def test_a_regime_like_another_has_its_search(small, tmp_path, monkeypatch):
    monkeypatch.setattr(regimes, "TEST_SEEDS", (0, 1))
    monkeypatch.setattr(regimes, "run_cell", lambda cell, _: {"AP": cell.alpha - cell.rate})
    found = regimes.chain("unused classes, long", "CE", tmp_path)
    assert {line["regime"] for line in found["search"]} == {"unused classes"}
    assert {line["train"]["steps"] for line in found["search"]} == {600}
    assert [[line[k] for k in ("regime", "alpha", "rate", "seed")] for line in found["test"]] == [
        ["unused classes, long", 0.75, 3e-3, seed] for seed in (0, 1)
    ]
    assert {line["train"]["steps"] for line in found["test"]} == {1800}


def test_regimes_like_others_differ_in_training_alone():
    for regime in filter(lambda regime: regime.like, regimes.REGIMES.values()):
        assert regimes.REGIMES[regime.like]._replace(train=regime.train, like=regime.like) == regime


def test_a_loss_that_is_not_finite_ends_the_cell(small, monkeypatch):
    hot = regimes.Regime(Scene(), train={"warmup": 0, "optimizer": "sgd"})
    monkeypatch.setattr(regimes, "REGIMES", {**regimes.REGIMES, "hot": hot})
    line = regimes.run_cell(CELL._replace(regime="hot", rate=1e12), 9)
    assert 0 < line["diverged"] < 9
    assert line["AP"] == line["AP50"] == 0 and "calibration" not in line


def test_every_regime_can_be_set_up_and_those_of_the_page_are_known():
    shown = {name for names, _ in regimes_page.GROUPS.values() for name in names}
    assert shown <= set(regimes_page.LABELS) <= set(regimes.REGIMES)
    assert set(regimes_page.COLORS) == set(regimes.LOSSES)
    for name in regimes.REGIMES:
        detector, _ = regimes.settings(CELL._replace(regime=name))
        assert detector.num_classes == len(names(regimes.REGIMES[name].scene))


# The page


def test_the_page_shows_the_committed_results(tmp_path):
    results = regimes.read(regimes_page.RESULTS)
    page = regimes_page.PAGE.read_text()
    assert pages.fill(page, regimes_page.tables(results)) == page
    for name, draw in regimes_page.PLOTS.items():
        draw(results, tmp_path / name)
        assert (regimes_page.PICTURES / name).is_file()
        assert (tmp_path / name).stat().st_size < 100_000


def test_a_gain_is_seed_by_seed_and_bold_beyond_the_spread():
    losses = {"CE": {"AP": [0.1, 0.2]}, "FL .5": {"AP": [0.15, 0.3]}}
    assert regimes_page._gain("FL .5", "CE", losses) == "+7.5 (+5.0 to +10.0)"
    assert regimes_page._gain("FL .5", "CE prior", losses) == ""
    losses["FL 2"] = {"AP": [0.25, 0.4]}
    assert regimes_page._gain("FL 2", "CE", losses) == "**+17.5 (+15.0 to +20.0)**"
    assert regimes_page._gain("CE", "FL 2", losses) == "**-17.5 (-20.0 to -15.0)**"
