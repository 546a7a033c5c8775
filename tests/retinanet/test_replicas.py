"""Several replicas, each with a share of the batch, have the gradient of one with the whole."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from backends import RETINANETS
from folders import TESTS
from sharing import (
    CASES,
    CLASSES,
    INPUTS,
    KERNEL,
    LABELS,
    REPLICAS,
    after_a_step,
    batch,
    trainer_cases,
)

import focal
import focal.numpy as F
from focal.cli import main
from focal.retinanet.config import TrainConfig
from focal.retinanet.data import ShapesDataset, train_batches
from focal.retinanet.detector import backend_module, build
from focal.retinanet.training.loop import learning_rate

pytestmark = pytest.mark.usefixtures("quick_jax")

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
def outcome(framework):
    """What the replicas of a framework found, by name; or how they failed."""
    launcher = TORCHRUN if framework == "torch" else [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.npz"
        try:
            run(*launcher, TESTS / "helpers/sharing.py", framework, file)
        except AssertionError as error:
            return error
        with np.load(file) as found:
            return dict(found)


def found_by(framework):
    pytest.importorskip(framework)
    found = outcome(framework)
    if isinstance(found, AssertionError):
        raise found
    return found


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


@pytest.mark.parametrize("framework", RETINANETS)
@pytest.mark.parametrize("case", LABELS)
def test_the_gradient_of_the_loss_is_that_of_the_whole_batch(framework, case):
    labels = LABELS[case]
    expected = slope_of_the_whole_batch(labels, max(1, (labels >= 0).sum()))
    found = {k: v for k, v in found_by(framework).items() if k.startswith(f"loss/{case}")}
    assert len(found) == (2 if framework == "jax" else 1)
    for slope in found.values():
        close(slope, expected)


def test_a_local_normalizer_gives_another_gradient():
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


# A step of the detector


@functools.cache
def of_one_process(framework, name):
    return after_a_step(backend_module(framework), name)


def same_step(found, expected, start, tolerance=1e-5):
    """Equal changes of every weight, relative to the largest change of its tensor."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        before = start.get(name.removeprefix("model/").removeprefix("kept/"), 0.0)
        change = np.abs(x - before).max()
        rounding = 2e-7 * np.abs(x).max()  # of the weight that the change is added to
        assert np.isfinite(found[name]).all()
        assert np.abs(found[name] - x).max() <= tolerance * change + rounding, name


@pytest.mark.parametrize(
    ("framework", "name"),
    [(framework, name) for framework, names in CASES.items() for name in names],
)
def test_a_step_of_replicas_is_one_of_the_whole_batch(framework, name):
    prefix = f"trainer/{name}/"
    found = {k: v for k, v in found_by(framework).items() if k.startswith(prefix)}
    found = {k.removeprefix(prefix): v for k, v in found.items()}
    expected = of_one_process(framework, name.partition(", acc")[0])
    assert expected["part/positives"] > 4
    start = backend_module(framework).state(build(trainer_cases()[name][0], framework, 0, "cpu"))
    key = "model/head.classification_head.cls_logits.weight"
    change = np.abs(expected[key] - start[key.removeprefix("model/")]).max()
    assert change > 0.1
    same_step(found, expected, start)


# The command line

TRAIN = ["train", "--data", "shapes", "--image-size", "64x64", "--steps", "4"]
for _setting in (
    "batch_size=4",
    "norm=group",
    "channels=16",
    "head_depth=1",
    "precision=float32",
    "log_every=2",
    "learning_rate=0.001",
):
    TRAIN += ["--set", _setting]


def two_processes(framework, *arguments):
    """The output of a focal command in two processes, started as the framework has it."""
    if framework == "torch":
        return run(*TORCHRUN, "-m", "focal", *arguments)
    ports = [free_port(), free_port()]
    settings = [
        {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{ports[0]}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(rank),
            "JAX_PLATFORMS": "cpu",
        }
        if framework == "jax"
        else {
            "TF_CONFIG": json.dumps(
                {
                    "cluster": {"worker": [f"localhost:{port}" for port in ports]},
                    "task": {"type": "worker", "index": rank},
                }
            )
        }
        for rank in range(2)
    ]
    command = [sys.executable, "-m", "focal", *map(str, arguments), "--backend", framework]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(command, env={**environment(), **own}, **pipes) for own in settings
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return "".join(said)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("framework", RETINANETS)
def test_two_processes_train_like_one(framework, tmp_path, capsys):
    pytest.importorskip("pycocotools")
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*TRAIN, "--device", "cpu", "--out"]
    assert main([*arguments, str(one), "--backend", framework]) == 0
    alone = "".join(capsys.readouterr())
    said = two_processes(framework, *arguments, two)
    assert sorted(os.listdir(two)) == sorted(os.listdir(one))
    # One of them speaks.
    assert said.count("report: ") == alone.count("report: ") == 1
    assert json.loads((two / "config.json").read_text())["replicas"] == REPLICAS

    found, expected = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (two, one)
    )
    assert [(x["kind"], x["step"]) for x in found] == [("train", 2), ("train", 4), ("eval", 4)]
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours["positives"] == theirs["positives"]
        for part in ("loss", "classification", "box", "gradient_norm"):
            assert ours[part] == pytest.approx(theirs[part], rel=1e-4)


def test_two_processes_stop_after_the_same_step(tmp_path):
    pytest.importorskip("torch")
    command = [*TORCHRUN, "-m", "focal", *TRAIN, "--steps", "4000", "--device", "cpu"]
    with subprocess.Popen(
        [str(x) for x in (*command, "--out", tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        metrics = tmp_path / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # which the launcher sends on, at its own pace
        said, _ = process.communicate()
    (checkpoint,) = tmp_path.glob("checkpoint-*.safetensors")
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert checkpoint.name == f"checkpoint-{step:06d}.safetensors"
    sentence = f"focal: stopped by SIGTERM after step {step} of 4000; {checkpoint} is saved"
    assert said.count(sentence) == REPLICAS


def test_shares_that_are_not_equal(tmp_path):
    from focal.retinanet.replicas import Replicas

    train = TrainConfig(batch_size=12, accumulate=2)
    Replicas(processes=2, local=3).check(train)
    with pytest.raises(
        ValueError,
        match=r"batch_size must be a multiple of 8 \(replicas: 4, accumulate: 2\).*; got 12",
    ):
        Replicas(processes=4).check(train)


def test_shares_of_a_batch_make_the_batch():
    data = ShapesDataset("train", size=(32, 32), num_images=5)
    config, train = trainer_cases()["batch"]
    whole = train_batches(data, config, train.replace(workers=0), start=3)
    shares = [
        train_batches(data, config, train.replace(workers=0), start=3, share=(i, 4))
        for i in range(4)
    ]
    for joint, *parts in zip(*([next(x), next(x)] for x in (whole, *shares)), strict=True):
        for name in joint._fields:
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(joint, name))


def test_the_learning_rate_of_a_batch_of_another_size():
    train = TrainConfig(learning_rate=0.01, batch_size=64, warmup=0)
    assert learning_rate(train, 0) == 0.01
    assert learning_rate(train.replace(reference_batch=16), 0) == pytest.approx(0.04)
    with pytest.raises(ValueError, match="reference_batch must be >= 1; got 0"):
        train.replace(reference_batch=0)
    with pytest.raises(TypeError, match="compile must be True or False; got 1"):
        train.replace(compile=1)


# Memory and compilers, in one process


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_what_is_computed_again_does_not_count_twice_in_the_statistics(framework):
    pytest.importorskip(framework)
    backend = backend_module(framework)
    config, train = trainer_cases()["batch"]
    states = []
    for recompute in (False, True):
        model = backend.build(config.replace(norm="batch"), 0, "cpu")
        trainer = backend.Trainer(model, train.replace(recompute=recompute))
        trainer.step(0, batch(0, 8), 0.1)
        states.append(trainer.state())
    plain, again = states
    for name, x in plain.items():
        np.testing.assert_allclose(again[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.abs(plain["model/backbone.body.bn1.running_mean"]).max() > 0.01


def test_what_torch_cannot_compile():
    backend = pytest.importorskip("focal.retinanet.torch.trainer")
    config, train = trainer_cases()["batch"]
    model = backend.build(config.replace(norm="batch"), 0, "cpu")
    with pytest.raises(ValueError, match="compile with recompute needs norm 'group'"):
        backend.Trainer(model, train.replace(compile=True, recompute=True))
