"""A few hundred damaged COCO folders; fuzz_data.py makes thousands, and says what it does."""

import json

import fuzz_data
import pytest
from folders import ROOT

pytest.importorskip("pycocotools")


@pytest.mark.parametrize(
    "kind", [name for name in fuzz_data.KINDS if name not in fuzz_data.SKIPPED]
)
def test_damage_ends_in_a_clear_sentence_or_does_no_harm(kind):
    for number in range(6):
        outcome = fuzz_data.run_case(kind, f"suite/{number}")
        assert outcome.word in fuzz_data.KINDS[kind][1], (number, outcome)


def test_a_read_outside_would_be_seen(monkeypatch):
    """Without the rule for paths the fuzz finds the secret opened."""
    monkeypatch.setattr(
        "focal.retinanet.data.paths.PathRule.fault",
        lambda rule, name: None if (rule._folder / name).is_file() else ("missing", "not found"),
    )
    words = [fuzz_data.run_case("path that climbs out", f"suite/{n}") for n in range(8)]
    assert any(word == "other" and "opened" in text for word, text in words)


def test_the_record_in_the_documentation_is_of_these_kinds():
    record = json.loads((ROOT / "docs/results/fuzz.json").read_text())
    assert {*record["kinds"], *record["not made here"]} == set(fuzz_data.KINDS)
    assert record["unexplained"] == [] and record["cases"] >= 6000
    assert record["cases"] == sum(kind["cases"] for kind in record["kinds"].values())
    table = (ROOT / "docs/survival.md").read_text()
    for name, kind in record["kinds"].items():
        cells = (kind[key] for key in ("cases", "clear error", "counted skip", "fine"))
        assert f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |" in table
