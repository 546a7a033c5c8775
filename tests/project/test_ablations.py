"""The paper in miniature: cells that run once, and the page that shows what they found."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("pycocotools")
import torch

from benchmarks import ablations, ablations_page, pages

TWO = ["CE .5", "OHEM 1:3 128 .5"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few images, and as many threads as before."""
    monkeypatch.setattr(ablations, "IMAGES", {"train": 16, "test": 2})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(out, *arguments, only=TWO):
    ablations.main(["--out", str(out), "--only", *only, "--seeds", "1", "--steps", "2", *arguments])
    cells = (out / "cells.jsonl").read_text().splitlines()
    return [json.loads(line) for line in cells], json.loads((out / "results.json").read_text())


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch):
    lines, results = run(tmp_path)
    assert [line["name"] for line in lines] == TWO
    assert lines[1]["detector"]["ohem_ratio"] == 3.0
    assert results["shapes"]["train"]["steps"] == 2
    cell = results["shapes"]["cells"]["CE .5"]
    assert cell["changes"] == {"gamma": 0.0, "alpha": 0.5}
    assert cell["seed"] == [0] and cell["diverged"] == [None] and 0 <= cell["AP"][0] <= 1

    # Stopped in the middle of writing the second: it alone runs again, to the same numbers.
    path = tmp_path / "cells.jsonl"
    path.write_text(path.read_text()[:-40])
    ran = []
    own = ablations.run_cell
    monkeypatch.setattr(ablations, "run_cell", lambda s, *d: ran.append(s) or own(s, *d))
    again, _ = run(tmp_path)
    assert [s.detector.loss for s in ran] == ["ohem"]
    assert [{**line, "cpu_seconds": 0} for line in again] == [
        {**line, "cpu_seconds": 0} for line in lines
    ]

    # Another setting is another cell.
    run(tmp_path, "--steps", "1", only=TWO[:1])
    assert len(ran) == 2 and ran[1].train.steps == 1


def test_a_loss_that_is_not_finite_ends_the_cell():
    setting = ablations.SHAPES
    hot = setting.train.replace(learning_rate=1e12, warmup=0, steps=9, batch_size=4)
    data = ablations.datasets(ablations.argparse.Namespace(bccd=None))["shapes"]
    found = ablations.run_cell(setting._replace(train=hot), *data)
    assert 0 < found["diverged"] < 8 and found["AP"] == 0


def test_every_cell_is_a_setting_and_in_a_table():
    options = ablations.argparse.Namespace(seeds=2, only=None, steps=None, bccd="somewhere")
    planned = list(ablations.plan(options))
    assert len(planned) == 2 * (len(ablations.SHAPES_CELLS) + len(ablations.BCCD_CELLS))
    assert len({(data, name, s.train.seed) for data, name, s in planned}) == len(planned)
    shown = set(_texts(vars(ablations_page)))
    shown |= {f"{name}, longer" for _, name in ablations_page.LONGER}
    assert set(ablations.SHAPES_CELLS) <= shown


def _texts(value):
    """All the strings of the page's tables, which are nested tuples."""
    if isinstance(value, dict):
        value = [v for k, v in value.items() if k.isupper()]
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def test_the_page_shows_the_committed_results(tmp_path):
    results = json.loads(ablations_page.RESULTS.read_text())
    page = ablations_page.PAGE.read_text()
    assert pages.fill(page, ablations_page.tables(results)) == page
    ablations_page.picture(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 100_000


def test_means_and_spread():
    cells = {
        "a": {"AP": [0.1, 0.2], "diverged": [None, None]},
        "b": {"AP": [0.0, 0.0], "diverged": [7, 9]},
        "c": {"AP": [0.0, 0.2], "diverged": [7, None]},
    }
    assert ablations_page.shown(cells, "a") == "15.0 (10.0 to 20.0)"
    assert ablations_page.shown(cells, "b") == "diverged at steps 7 to 9"
    assert ablations_page.shown(cells, "c") == "1 of 2 diverged at step 7; at most 20.0"
    assert ablations_page.shown(cells, "d") == ""
