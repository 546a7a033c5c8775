"""The generated sets of very different object sizes, the script that trains on them, the page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("sklearn")

from benchmarks import fit, fit_sets, pages
from focal.retinanet.data import CocoDataset

SIDES = {"plates": (27, 55), "nuclei": (6, 22), "objects": (100, 433), "digits": (5, 201)}
COUNTS = {"plates": (1, 5), "nuclei": (30, 100), "objects": (1, 2), "digits": (2, 9)}


@pytest.mark.parametrize("name", fit_sets.SETS)
def test_a_set_is_as_described_and_the_same_every_time(tmp_path, monkeypatch, name):
    own = fit_sets.SETS[name]
    monkeypatch.setitem(fit_sets.SETS, name, own._replace(images={"train": 2, "val": 1}))
    for root in ("one", "two"):
        fit_sets.write(name, tmp_path / root)
    train, val = (CocoDataset(tmp_path / "one", split) for split in ("train", "val"))
    again = CocoDataset(tmp_path / "two", "train")
    assert (len(train), len(val), train.classes) == (2, 1, own.classes)
    for n in range(2):
        assert (train[n].image == again[n].image).all() and (train[n].boxes == again[n].boxes).all()
        assert COUNTS[name][0] <= len(train[n].boxes) <= COUNTS[name][1]
        sides = train[n].boxes[:, 2:] - train[n].boxes[:, :2]
        assert sides.min() >= SIDES[name][0] and sides.max() <= SIDES[name][1]
    assert (train[0].image != train[1].image).any() and (train[0].image != val[0].image).any()


def test_the_digits_of_a_split_are_in_no_other():
    splits = [fit_sets.handwriting(split)[0] for split in ("train", "val", "test")]
    assert sum(map(len, splits)) == 1797
    seen = [{image.tobytes() for image in images} for images in splits]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_a_finished_set_is_not_run_again(tmp_path, monkeypatch):
    """With a stand-in for the commands: they run in `tests/retinanet/test_cli.py`."""
    ran = []

    def command(*arguments):
        words = [str(word) for word in arguments]
        ran.append(words)
        out = tmp_path / "runs/nuclei"
        out.mkdir(parents=True, exist_ok=True)
        anchors = {"sizes": [16, 32, 64], "ratios": [0.5, 1, 2]}
        detector = {"image_size": [512, 512], "levels": [3, 4, 5], "anchors": anchors}
        record = {"fit": "fit: nuclei", "seconds": 80.0, "detector": detector}
        record["train"] = {"crop": [240, 240], "steps": 4000}
        (out / "config.json").write_text(json.dumps(record))
        metrics = {"AP": 0.5, "AP50": 0.75, "AP75": 0.6}
        line = {"kind": "eval", "split": "nuclei/val", "step": 4000, **metrics}
        (out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (out / "test.json").write_text(json.dumps(metrics))
        return 90.0, 0.01

    monkeypatch.setattr(fit, "focal", command)
    small = fit_sets.SETS["nuclei"]._replace(images=dict.fromkeys(("train", "val", "test"), 1))
    monkeypatch.setitem(fit_sets.SETS, "nuclei", small)
    options = [
        "--only",
        "nuclei",
        "--data",
        str(tmp_path / "sets"),
        "--out",
        str(tmp_path / "runs"),
    ]
    fit.main(options)
    fit.main(options)
    assert [words[0] for words in ran] == ["train", "evaluate"]
    assert ran[0][1:] == ["--data", f"{tmp_path}/sets/nuclei", "--out", f"{tmp_path}/runs/nuclei"]
    fit.main([*options, "--again"])
    assert [words[0] for words in ran[2:]] == ["train", "evaluate"] and "--resume" not in ran[2]
    found = json.loads((tmp_path / "runs/results.json").read_text())
    line = found["sets"]["nuclei"]
    assert (line["sentence"], line["quiet"], line["test"]["AP50"]) == ("fit: nuclei", True, 0.75)
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    row = fit.table(found).splitlines()[-1]
    assert row == (
        "| `nuclei` | 512 x 512 | 16 to 102 | 240 x 240 | 4,000 | 1.5 | 0.750 | 0.750 | 0.500 |"
    )


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the counters are those of Linux")
def test_the_work_of_a_program_is_counted():
    code = "import time\nwhile time.process_time() < 0.5: pass"
    before, own = fit.busy(), fit.children()
    subprocess.run([sys.executable, "-c", code], check=True)
    work = fit.children() - own
    # User and system time are counted in whole ticks, each rounded down.
    assert work >= 0.5 - 2 / os.sysconf("SC_CLK_TCK")
    # What all programs did has this one in it.
    assert fit.busy() - before >= work - 0.1


def test_the_page_shows_the_committed_results():
    results = json.loads((fit.PAGE.parent / "results/fit.json").read_text())
    page = fit.PAGE.read_text()
    assert pages.fill(page, {"fit": fit.table(results)}) == page
