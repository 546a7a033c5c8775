"""Several replicas, each with a share of the batch, have the gradient of one with the whole."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from backends import RETINANETS
from sharing import CLASSES, INPUTS, KERNEL, LABELS, REPLICAS

import focal
import focal.numpy as F

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += [f"--nproc-per-node={REPLICAS}"]


def environment():
    """A process of its own: this package, one thread, no device settings of ours."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "TF_CONFIG")}
    path = [str(Path(focal.__file__).parents[1]), kept.get("PYTHONPATH", "")]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def run(*command):
    """The output of a program that must succeed."""
    done = subprocess.run(
        [str(x) for x in command], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@functools.cache
def found_by(framework):
    """What the replicas of a framework found, by name."""
    pytest.importorskip(framework)
    launcher = TORCHRUN if framework == "torch" else [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.npz"
        run(*launcher, TESTS / "sharing.py", framework, file)
        with np.load(file) as found:
            return dict(found)


@pytest.fixture(params=RETINANETS, scope="module")
def framework(request):
    return request.param


def close(found, expected, tolerance=1e-5):
    """Within the tolerance of the largest value."""
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# The loss


def slope_of_the_whole_batch(labels, divisor):
    """The gradient in the kernel, by the closed form in float64."""
    inputs = INPUTS.astype(np.float64)
    onehot = (labels[:, None] == np.arange(CLASSES)).astype(np.float64)
    slope = F.sigmoid_focal_loss_grad(inputs @ KERNEL, onehot)
    return inputs.T @ (slope * (labels >= -1)[:, None]) / divisor


@pytest.mark.parametrize("case", LABELS)
def test_the_gradient_of_the_loss_is_that_of_the_whole_batch(framework, case):
    labels = LABELS[case]
    expected = slope_of_the_whole_batch(labels, max(1, (labels >= 0).sum()))
    found = {k: v for k, v in found_by(framework).items() if k.startswith(f"loss/{case}")}
    assert len(found) == (2 if framework == "jax" else 1)
    for slope in found.values():
        close(slope, expected)


def test_a_local_normaliser_gives_another_gradient():
    """The test above could fail."""
    labels = LABELS["unequal"]
    halves = np.split(labels, REPLICAS)
    first = np.where(np.arange(len(labels)) < len(halves[0]), labels, -2)
    second = np.where(np.arange(len(labels)) < len(halves[0]), -2, labels)
    mean = sum(
        slope_of_the_whole_batch(half, max(1, (half >= 0).sum())) / REPLICAS
        for half in (first, second)
    )
    whole = slope_of_the_whole_batch(labels, (labels >= 0).sum())
    assert np.abs(mean - whole).max() > 0.1 * np.abs(whole).max()
