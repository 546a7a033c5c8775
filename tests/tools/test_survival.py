"""Training runs that are killed with `kill -9`, and training for long: see survival.py, soak.py."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from backends import RETINANETS
from folders import ROOT


def command(module, *arguments):
    """Run a module of the tests in a process of its own; the record that it writes."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.tools.{module}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(Path(arguments[arguments.index("--out") + 1]).read_text())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize(("backend", "kills"), [("torch", 3), ("jax", 1), ("tensorflow", 1)])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, quick_jax, backend, kills):
    assert backend in RETINANETS
    found = command(
        *("survival", "--backend", backend, "--kills", kills, "--out", tmp_path / "found.json"),
        *("--each", kills, "--steps", 8 + 2 * kills, "--variants", "adamw", "--aims", "step"),
    )
    assert found["kills"] == kills and found["resumed"] >= 1
    assert found["runs_bit_identical"] == found["runs"] >= 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_memory_stays_flat_and_nothing_is_left(tmp_path, backend):
    found = command("soak", "--backend", backend, "--steps", 160, "--out", tmp_path / "found.json")
    assert len(found["memory_mb"]) == 20
    # A set of gradients kept in each step would be 100 MB; in TensorFlow a graph kept of each
    # evaluation was 70.
    assert found["growth_mb"] < 8
    assert found["threads_left"] == found["processes_left"] == []
