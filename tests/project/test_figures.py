"""The figures of docs/figures.md: the numbers behind the curves, and the command."""

import numpy as np
import pytest
from folders import BCCD, ROOT

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")
from PIL import Image

import focal
import focal.numpy as F
from benchmarks.figures import (
    FIGURES,
    anchor_logits,
    cumulative_share,
    main,
    textbook,
    ulp_errors,
    write_figures,
)
from focal.core.anchors import AnchorConfig
from focal.retinanet import PRESETS, build, save
from focal.retinanet.data import ShapesDataset

PAGE = ROOT / "docs" / "figures.md"
CONFIG = PRESETS["tiny"].detector.replace(
    classes=("circle", "square", "triangle"),
    image_size=(64, 64),
    channels=16,
    head_depth=1,
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(12.0, 24.0, 48.0)),
)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_the_textbook_is_right_where_it_has_digits(gamma, y):
    x = np.linspace(-8, 8, 101)
    loss, slope = textbook(x, y, gamma)
    t = np.full_like(x, y)
    np.testing.assert_allclose(loss, F.sigmoid_focal_loss(x, t, None, gamma), rtol=1e-9)
    np.testing.assert_allclose(slope, F.sigmoid_focal_loss_grad(x, t, None, gamma), rtol=1e-9)


def test_the_textbook_fails_at_saturated_logits():
    x = np.array([16.0, 20.0], np.float32)
    assert np.isfinite(textbook(x, 1.0, 0.5)[1]).tolist() == [True, False]
    assert textbook(x, 1.0, 2.0)[1][1] == 0


def test_an_ulp_is_the_distance_of_neighbors():
    x = np.array([1.0, 1.5, 3e-20], np.float32)
    above = np.nextafter(x, np.float32(np.inf))
    np.testing.assert_array_equal(ulp_errors(above, x.astype(np.float64)), [1, 1, 1])


def test_the_cumulative_share():
    np.testing.assert_allclose(cumulative_share(np.full(8, 3.0))[1], np.linspace(0, 1, 1001))
    share, held = cumulative_share(np.array([6.0, 0.0, 2.0, 0.0]), 5)
    np.testing.assert_allclose(share, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(held, [0, 0, 0, 0.25, 1])


def test_every_logit_of_an_anchor_in_use_is_counted_once():
    data = ShapesDataset("test", size=(64, 64), num_images=3)  # of a batch of 8
    positives, negatives = anchor_logits(build(CONFIG, device="cpu"), data)
    anchors = F.anchors(CONFIG.image_size, CONFIG.anchors).astype(np.float32)
    labels = [
        F.assign_targets(anchors, e.boxes, e.labels, 0.5, 0.4, CONFIG.allow_low_quality)[0]
        for e in map(data.__getitem__, range(3))
    ]
    assert len(positives) == sum((own >= 0).sum() for own in labels) > 0
    assert len(positives) + len(negatives) == 3 * sum((own > -2).sum() for own in labels)
    untrained = focal.prior_bias(0.01)
    assert positives.mean() == pytest.approx(untrained, abs=0.5)


@pytest.mark.parametrize("data", ["shapes", str(BCCD)], ids=["shapes", "files"])
def test_the_command_draws_them_all(tmp_path, capsys, data):
    save(build(CONFIG, device="cpu"), tmp_path / "w.safetensors")
    out = tmp_path / "new" / "figures"
    weights = ["--weights", str(tmp_path / "w.safetensors"), "--data", data]
    main(["--out", str(out), *weights, "--device", "cpu"])
    names = [f"{name}.png" for name in (*FIGURES, "cumulative_loss")]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "figures.md"])
    page = (out / "figures.md").read_text()
    for name in names:
        assert f"]({name})" in page
        assert (out / name).stat().st_size < 100_000
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # something is drawn
    assert capsys.readouterr().out.count(str(out)) == len(names) + 1


def test_figure_4_needs_a_detector_and_images(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path), "--data", "shapes"])
    assert stop.value.code == 2
    assert "--weights and --data" in capsys.readouterr().err
    assert set(write_figures(tmp_path)) == {f"{name}.png" for name in FIGURES}


def test_the_page_says_what_the_command_says():
    text = " ".join(PAGE.read_text().split())
    for name, figure in FIGURES.items():
        assert f"(pictures/figures/{name}.png)" in text
        assert figure.caption in text
