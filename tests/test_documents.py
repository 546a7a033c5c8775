"""Every Python block of the README and the documentation runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block, capsys):
    exec(compile(block, "<block>", "exec"), {"__name__": "__block__"})
    printed = capsys.readouterr().out.split("\n")
    # A comment behind a print says what it prints.
    for expected, got in zip(re.findall(r"print\(.*\)  # (.*)", block), printed, strict=False):
        wanted, found = (
            re.findall(r"-?[\d.]+(?:e-?\d+)?|nan|True", text) for text in (expected, got)
        )
        assert len(wanted) == len(found) > 0
        for a, b in zip(wanted, found, strict=True):
            assert a == b or float(b) == pytest.approx(float(a), rel=2e-2)


def test_local_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
