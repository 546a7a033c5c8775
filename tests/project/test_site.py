"""The documentation builds strictly without a network, and shows all that is public."""

from __future__ import annotations

import importlib
import re
import socket

import pytest
from folders import ROOT

pytest.importorskip("mkdocs")

from mkdocs.commands.build import build
from mkdocs.config import load_config

import focal.keras

MODULES = (
    "numpy",
    "torch",
    "jax",
    "tensorflow",
    "keras",
    "testing",
    "retinanet",
    "retinanet.torch.export",
    "retinanet.tensorflow.export",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, str]:
    """The pages of the site by name."""
    out = tmp_path_factory.mktemp("site")

    def no_network(*_):
        raise AssertionError("the build asked for a network")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("getaddrinfo", "create_connection"):
            patch.setattr(socket, name, no_network)
        patch.setattr(socket.socket, "connect", no_network)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=True))
    return {str(page.parent.relative_to(out)): page.read_text() for page in out.rglob("index.html")}


def test_every_page_is_there(site):
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert set(site) == (pages - {"index"}) | {"."}


def test_pages_load_nothing_from_elsewhere(site):
    loads = r'<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"'
    assert {name: found for name, page in site.items() if (found := re.findall(loads, page))} == {}


def test_formulas_are_mathml_and_no_markup_is_left(site):
    formulas = 0
    for name, page in site.items():
        marked = len(re.findall(r'<(?:span|div) class="arithmatex">', page))
        assert len(re.findall(r'class="arithmatex"><math\b', page)) == marked, name
        formulas += marked
        for left in (".. math::", ":math:", ":func:", ":class:", "&amp;#58;", r"\mathrm"):
            assert left not in page, f"{name}: {left}"
    assert formulas > 50


def test_the_api_pages_have_every_public_name(site):
    api = "".join(page for name, page in site.items() if name.startswith("api"))
    listed = set(re.findall(r'<h3 id="(focal\.[\w.]+)"', api))
    core = {path.split(".")[-1] for path in listed if path.startswith("focal.core.")}
    public = {
        f"focal.{module}.{name}"
        for module in MODULES
        for name in importlib.import_module(f"focal.{module}").__all__
        if module != "tensorflow" or name not in focal.keras.__all__  # the same classes
    }
    missing = {path for path in public - listed if path.split(".")[-1] not in core}
    assert missing == set()
    names = {path.split(".")[-1] for path in public}
    assert {path for path in listed if path.split(".")[-1] not in names} == set()
    assert not re.search(r"\bxp\b", api)


def test_the_home_page_has_the_numbers_of_the_pages_that_it_names():
    text = (ROOT / "docs" / "index.md").read_text()
    (table,) = re.findall(r"^\| \| textbook \| focal \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    for row in table.splitlines():
        what, *cells = row.strip("| ").split(" | ")
        (page,) = re.findall(r"\]\((\w+\.md)#", what)
        there = (ROOT / "docs" / page).read_text()
        for number in re.findall(r"[\d,.]*\d", " ".join(cells)):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d,]|\.\d)", there), row
