"""What is released: the wheel and the sdist, and what is said of their version."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import hatchling.build
import pytest
import yaml
from folders import ROOT

import focal

MISSING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from focal.cli import main
sys.exit(main({arguments!r}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist of this tree."""
    out = str(tmp_path_factory.mktemp("dist"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        names = hatchling.build.build_wheel(out), hatchling.build.build_sdist(out)
    return Path(out, names[0]), Path(out, names[1])


def test_the_wheel_is_the_package_and_nothing_else(built):
    wheel, _ = built
    assert wheel.name == f"focal_losses-{focal.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"focal_losses-{focal.__version__}.dist-info/METADATA")
        entries = archive.read(f"focal_losses-{focal.__version__}.dist-info/entry_points.txt")
    info = {name for name in names if ".dist-info/" in name}
    assert {Path(name).name for name in info} == {
        "METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt"
    }  # fmt: skip
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "focal").rglob("*.py")}
    assert names - info == {*files, "focal/py.typed"}

    fields = email.message_from_bytes(metadata)
    assert (fields["Name"], fields["Version"]) == ("focal-losses", focal.__version__)
    assert fields["Requires-Python"] == ">=3.11"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()
    needs = fields.get_all("Requires-Dist")
    assert [need for need in needs if "extra ==" not in need] == ["numpy>=2.0"]
    extras = {"torch", "jax", "tensorflow", "onnx", "retinanet", "docs", "dev"}
    assert extras <= set(fields.get_all("Provides-Extra"))
    assert entries.decode() == "[console_scripts]\nfocal = focal.cli:main\n"


def test_the_sdist_builds_the_same_wheel(built, tmp_path, monkeypatch):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    top = {p.name for p in tree.iterdir()}
    assert {"focal", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"} <= top
    assert not top & {"tests", "docs", "benchmarks", "runs"}
    monkeypatch.chdir(tree)
    again = tmp_path / hatchling.build.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert one.namelist() == other.namelist()
        assert all(one.read(name) == other.read(name) for name in one.namelist())


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first is not None and first[1] in (focal.__version__, "Unreleased")


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert str(citation["version"]) == focal.__version__
    assert citation["authors"] == [{"name": "The focal authors"}]
    (paper,) = citation["references"]
    assert paper["title"] == "Focal Loss for Dense Object Detection" and paper["year"] == 2017
    assert [author["family-names"] for author in paper["authors"]] == [
        "Lin", "Goyal", "Girshick", "He", "Dollár"
    ]  # fmt: skip
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:1708.02002"}]


# ---------------------------------------------------------------- without the extras


def run_without(names: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The `focal` command where these packages are not installed."""
    code = MISSING.format(names=names, arguments=list(arguments))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


EXTRAS = {"PIL", "matplotlib", "pycocotools", "safetensors", "tqdm"}
FRAMEWORKS = {"torch", "jax", "flax", "optax", "tensorflow", "keras"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "usage: focal"),
        (["--version"], f"focal {focal.__version__}"),
        (["prior-bias"], "-4.59511985013459"),
    ],
)
def test_the_command_needs_numpy_alone(arguments, said):
    done = run_without(EXTRAS | FRAMEWORKS, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(said)


@pytest.mark.parametrize(
    ("missing", "extra", "backend"),
    [
        (EXTRAS | FRAMEWORKS, "retinanet", "torch"),
        (FRAMEWORKS, "torch", "torch"),
        (FRAMEWORKS, "jax", "jax"),
        (FRAMEWORKS, "tensorflow", "tensorflow"),
    ],
)
def test_a_missing_extra_is_one_sentence(missing, extra, backend, tmp_path):
    out = str(tmp_path / "run")
    done = run_without(missing, "train", "--data", "shapes", "--backend", backend, "--out", out)
    assert (done.returncode, done.stdout) == (2, "")
    sentence = (
        rf'focal: \w+ is not installed; install it with: pip install "focal-losses\[{extra}\]"\n'
    )
    assert re.fullmatch(sentence, done.stderr)
