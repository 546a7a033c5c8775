"""The table of docs/finetuning.md has the figures of docs/results/finetuning.json."""

import json
import re

from folders import ROOT


def test_the_table_is_the_result():
    found = json.loads((ROOT / "docs/results/finetuning.json").read_text())
    text = (ROOT / "docs/finetuning.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| (.*) \|$", text, re.M)
    assert len(rows) == 6
    for step, cells in rows:
        step = step.replace(",", "")
        expected = [
            found[run][ap][step] for ap in ("AP", "AP50") for run in ("scratch", "finetuned")
        ]
        assert cells.split(" | ") == [f"{value:.3f}" for value in expected]
    (low, tuned_low), (high, tuned_high) = (
        [found[run]["steps to AP"][ap] for run in ("scratch", "finetuned")] for ap in ("0.4", "0.5")
    )
    assert f"AP .40 takes {low} steps from random weights and {tuned_low} from" in text
    assert f"AP .50 takes {high} and {tuned_high}." in text
