"""docs/trainers.md: its files run as they stand, and a step in parts is that of the whole batch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import ROOT, TESTS

PAGE = (ROOT / "docs" / "trainers.md").read_text()
FILES = {
    re.match(r"# (\w+\.py)\n", block)[1]: block
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S)
}
STEP = TESTS / "helpers" / "trainers_step.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files."""
    for package in ("torch", "lightning", "transformers", "accelerate"):
        # Not `importorskip`: they warn when they are imported, which is an error here.
        # In `make test` this skip is a failure.
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("trainers")
    for name, block in FILES.items():
        (folder / name).write_text(block)
    return folder


def run(folder: Path, *arguments: object) -> list[str]:
    """The lines that a Python program prints, in a process of its own: the libraries warn."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["first_loss.py", "with_lightning.py", "with_transformers.py"])
def test_the_file_runs(folder, name):
    wanted = re.findall(r"print\(.*\)  # (.*)", FILES[name])
    assert len(wanted) == FILES[name].count("print(") > 0
    assert run(folder, name)[-len(wanted) :] == wanted


def step(folder: Path, parts: int, processes: int) -> dict[str, np.ndarray]:
    """The change of the weights in each trainer."""
    file = folder / f"step-{parts}-{processes}.npz"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    run(folder, *(launcher if processes > 1 else []), STEP, parts, processes, file)
    with np.load(file) as changes:
        return dict(changes)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, np.ndarray]:
    """The change of the weights by a step with all images at once, in one process."""
    return step(folder, 1, 1)


def largest_difference(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    """Relative to the greatest change of the same tensor."""
    assert some.keys() == others.keys()
    return max(abs(some[k] - others[k]).max() / abs(others[k]).max() for k in others)


def test_both_trainers_take_the_same_step(whole):
    lightning, transformers = (
        {k.partition("/")[2]: v for k, v in whole.items() if k.startswith(trainer)}
        for trainer in ("lightning", "transformers")
    )
    assert all(abs(change).max() > 0 for change in lightning.values())
    assert largest_difference(transformers, lightning) < 1e-4


@pytest.mark.parametrize(("parts", "processes"), [(4, 1), (2, 2)])
def test_a_step_in_parts_is_that_of_the_whole_batch(folder, whole, parts, processes):
    assert largest_difference(step(folder, parts, processes), whole) < 1e-4
