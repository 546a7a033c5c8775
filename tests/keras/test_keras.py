"""`focal.keras` on every backend of Keras, each in a process of its own (keras_worker.py)."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras_worker as worker
import numpy as np
import pytest

import focal
import focal.numpy as F

TRAINING = ("tensorflow", "jax", "torch")
BACKENDS = (*TRAINING, "numpy")
KINDS = tuple(worker.TARGETS)

Found = Callable[[str, str], dict[str, Any]]


def installed(*names: str) -> None:
    """Skip where a package is missing; nothing is imported into this process."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def run(*command: object, backend: str) -> None:
    """A program that must succeed, with Keras on this backend."""
    path = [str(Path(focal.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the worker finds on a backend. It runs once, also where processes share the tests."""
    shared = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp().parent / f"keras-{shared}"
    folder = folder if shared else tmp_path_factory.mktemp("keras")
    folder.mkdir(exist_ok=True)

    def look(what: str, backend: str) -> dict[str, Any]:
        installed("keras", backend)
        file = folder / f"{backend}-{what}.json"
        with (folder / f"{backend}-{what}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                run(worker.__file__, what, folder, backend=backend)
        return json.loads(file.read_text())

    def with_models(what: str, backend: str) -> dict[str, Any]:
        """Evaluation loads what every backend has trained."""
        if what == "evaluate":
            for other in TRAINING:
                look("train", other)
        return look(what, backend)

    return with_models


def close(got: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=rtol, atol=atol)


# What is expected, by NumPy in float64


def each(kind: str, logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The loss of each sample."""
    _, function, parameters, _ = worker.LOSSES[kind]
    values = getattr(F, function)(logits.astype(np.float64), target, **parameters)
    return values if kind == "softmax" else values.mean(-1)


def counted(kind: str, target: np.ndarray) -> np.ndarray:
    """Which samples are not ignored."""
    if kind not in ("sparse", "softmax"):
        return np.ones(len(target), bool)
    return target >= (-1 if kind == "sparse" else 0)


def reduced(
    losses: np.ndarray, valid: np.ndarray, reduction: str | None, weight: np.ndarray | None
) -> Any:
    """Keras's reductions over the samples that count."""
    weight = np.ones(losses.shape) if weight is None else weight.astype(np.float64)
    losses = losses * weight * valid
    if reduction is None:
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean_with_sample_weight":
        return losses.sum() / (weight * valid).sum()
    return losses.sum() / valid.sum()


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_the_same_on_every_backend(found: Found, kind: str) -> None:
    """From the same weights, each with its own `fit`."""
    histories = {b: found("train", b)["history"][kind] for b in TRAINING}
    first, *others = histories.values()
    assert len(first) == worker.EPOCHS and first[-1] < 0.8 * first[0]
    for other in others:
        close(other, first, 1e-5)


@pytest.mark.parametrize("backend", TRAINING)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_has_the_loss_of_the_formula(found: Found, kind: str, backend: str) -> None:
    w1, b1, w2, b2 = (w.astype(np.float64) for w in worker.WEIGHTS)
    logits = np.tanh(worker.INPUTS @ w1 + b1) @ w2 + b2
    target = worker.TARGETS[kind]
    expected = reduced(each(kind, logits, target), counted(kind, target), "mean", None)
    results = found("train", backend)
    close(results["history"][kind][0], expected, 1e-5)


def test_fit_with_xla_in_tensorflow(found: Found) -> None:
    results = found("train", "tensorflow")
    close(results["xla"], results["history"]["sparse"][:3], 1e-5)


def test_torch_compile_of_a_loss(found: Found) -> None:
    results = found("evaluate", "torch")
    close(results["compiled"], results["values"]["sparse"]["mean"], 1e-6)


@pytest.mark.parametrize("half", worker.HALF_TYPES)
@pytest.mark.parametrize("backend", TRAINING)
def test_mixed_precision(found: Found, backend: str, half: str) -> None:
    results = found("train", backend)["half"][half]
    assert results["logits"] == half
    assert set(results["losses"].values()) == {"float32"}
    assert results["scaled"] == (half == "float16")
    history = found("train", backend)["history"]["sparse"]
    close(results["history"], history, 0.02)
    assert results["history"] != history


@pytest.mark.parametrize("backend", TRAINING)
def test_flat_labels_with_class_weights_and_a_metric(found: Found, backend: str) -> None:
    results, first = (found("train", b)["binary"] for b in (backend, TRAINING[0]))
    assert results["loss"][-1] < results["loss"][0]
    assert set(results) == {"loss", "auc"} and results["auc"][-1] > 0.9
    close(results["loss"], first["loss"], 1e-5)


@pytest.mark.parametrize("backend", TRAINING)
def test_fit_with_masks_and_sample_weights(found: Found, backend: str) -> None:
    results, first = (found("train", b)["masked"] for b in (backend, TRAINING[0]))
    expected = of_sequences("sum_over_batch_size", worker.SEQUENCE_WEIGHT)
    close(results[0], expected, 1e-5)
    close(results, first, 1e-5)
    assert results[-1] < results[0]


# Evaluation


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", worker.LOSSES)
def test_values_weights_and_reductions(found: Found, kind: str, backend: str) -> None:
    values = found("evaluate", backend)["values"][kind]
    target = worker.LOSSES[kind][3]
    losses, valid = each(kind, worker.LOGITS, target), counted(kind, target)
    reductions = worker.REDUCTIONS if kind in KINDS else worker.REDUCTIONS[:1]
    assert len(values) == 2 * len(reductions)
    for reduction in reductions:
        for key, weight in (
            (f"{reduction}", None),
            (f"{reduction}, weighted", worker.SAMPLE_WEIGHT),
        ):
            close(values[key], reduced(losses, valid, reduction, weight), 2e-6)


def of_sequences(reduction: str | None, weight: np.ndarray | None) -> Any:
    losses = each("sparse", worker.EMBEDDING[worker.SEQUENCES], worker.SEQUENCE_LABELS)
    valid = (worker.SEQUENCE_LABELS >= -1) & (worker.SEQUENCES != 0)
    return reduced(losses, valid, reduction, weight)


@pytest.mark.parametrize("backend", TRAINING)
def test_masks_of_keras_and_ignored_labels_together(found: Found, backend: str) -> None:
    values = found("evaluate", backend)["mask"]
    for reduction in worker.REDUCTIONS:
        close(values[f"{reduction}"], of_sequences(reduction, None), 2e-6)
        expected = of_sequences(reduction, worker.SEQUENCE_WEIGHT)
        close(values[f"{reduction}, weighted"], expected, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_types_of_labels(found: Found, backend: str) -> None:
    shapes = found("evaluate", backend)["shapes"]
    assert len(set(shapes["flat"])) == 1
    for kind in ("sparse", "softmax"):
        assert len(shapes[kind]) == 4
        close(shapes[kind], shapes[kind][0], 1e-6)
    half = shapes["labels of a half type"]
    assert len(half) == 6 and len(set(half[:3])) == len(set(half[3:])) == 1
    assert shapes["nothing counted"] == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["sparse", "softmax"])
def test_a_label_outside_is_an_error_or_ignored(found: Found, kind: str, backend: str) -> None:
    """In eager code, and in compiled code."""
    outside = found("evaluate", backend)["outside"][kind]
    function = worker.LOSSES[kind][1]
    assert outside["eager"].startswith(f"ValueError: {function}: labels must ")
    assert outside["eager"].endswith("; got 3")
    if backend in ("tensorflow", "jax"):
        wrong, right = outside["compiled"]
        assert wrong == right > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", worker.LOSSES)
def test_a_loss_is_written_down_and_read_again(found: Found, kind: str, backend: str) -> None:
    copies = found("evaluate", backend)["copies"][kind]
    name, _, parameters, _ = worker.LOSSES[kind]
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in parameters.items()}
    config = copies["config"]
    assert {k: config[k] for k in plain} == plain
    assert config["reduction"] == "sum"
    # Keras turns labels into the type to compute in, and float16 does not hold them all.
    assert config["dtype"] == ("float32" if kind in ("sparse", "softmax") else "float16")
    assert copies["registered"] == f"focal>{name}"
    assert len(copies["same"]) == 4 and all(copies["same"].values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_saved_under_a_former_name_is_read(found: Found, backend: str) -> None:
    earlier = found("evaluate", backend)["earlier"]
    assert earlier["read"] == earlier["written"]
    assert earlier["classes"] == ["SparseSigmoidFocalLoss", "AsymmetricLoss"]
    assert earlier["same"]
    (message,) = earlier["warnings"]
    assert message.startswith("focal.keras.AsymmetricFocalLoss is deprecated")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_saved_model_loads_on_every_backend(found: Found, backend: str) -> None:
    loaded = found("evaluate", backend)["loaded"]
    expected = {
        f"{origin}-{kind}": value
        for origin in TRAINING
        for kind, value in found("train", origin)["evaluated"].items()
    }
    assert loaded.keys() == expected.keys()
    for name, value in loaded.items():
        close(value, expected[name], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prior_bias(found: Found, backend: str) -> None:
    bias = found("evaluate", backend)["bias"]
    close(bias["layer"], focal.prior_bias([0.01, 0.1, 0.5]), 1e-6)
    close(bias["again"], np.tile(focal.prior_bias([0.02, 0.5]), 2), 1e-6)
    assert bias["config"] == {"pi": [0.02, 0.5]}
    half, values = bias["half"]
    assert half == "bfloat16"
    close(values, [focal.prior_bias(0.02)] * 2, 2**-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_get_a_clear_error(found: Found, backend: str) -> None:
    assert found("evaluate", backend)["errors"] == list(worker.WRONG)


@pytest.mark.parametrize("backend", BACKENDS)
def test_type_hints_of_every_class(found: Found, backend: str) -> None:
    hints = found("evaluate", backend)["hints"]
    assert len(hints) == 10 and all(hints.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_examples_run_on_every_backend(found: Found, backend: str) -> None:
    attempted, failed = found("evaluate", backend)["examples"]
    assert attempted > 30 and failed == 0


# Beside focal.tensorflow

WITH_TENSORFLOW = """
import numpy as np, tensorflow as tf
import focal.tensorflow as F
import focal.keras

assert F.SigmoidFocalLoss is focal.keras.SigmoidFocalLoss
x, y = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
with tf.GradientTape() as tape:
    logits = tf.Variable(x)
    loss = F.sigmoid_focal_loss(logits, y, reduction="mean")
assert np.abs(tape.gradient(loss, logits)).min() > 0
import keras
assert keras.backend.backend() == "jax"
np.testing.assert_allclose(F.SigmoidFocalLoss()(y, x), loss, rtol=1e-6)
assert np.isclose(keras.ops.convert_to_numpy(F.PriorBias(0.5)((1,))), 0)
"""


def test_focal_tensorflow_where_keras_runs_on_another_backend() -> None:
    """Its functions are TensorFlow's, and its Keras classes those of the backend."""
    installed("keras", "tensorflow", "jax")
    run("-c", WITH_TENSORFLOW, backend="jax")
