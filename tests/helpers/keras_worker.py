"""What test_keras.py runs on each backend of Keras, KERAS_BACKEND being set.

`python keras_worker.py train FOLDER` trains small models from the same weights and saves
them. `evaluate` calls the losses and loads what all backends have saved. What they find goes to
FOLDER as JSON, for the tests to compare.
"""

from __future__ import annotations

import copy
import doctest
import inspect
import json
import pickle
import sys
import typing
import unittest.mock
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

EPOCHS = 20
ROWS, FEATURES, HIDDEN, CLASSES = 48, 6, 16, 3
LENGTH, WORDS = 5, 9  # of the sequences with a mask
REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", None)
HALF_TYPES = ("float16", "bfloat16")
ALPHAS = (0.1, 0.5, 0.9)

_RNG = np.random.default_rng(11)
INPUTS = _RNG.normal(size=(ROWS, FEATURES)).astype(np.float32)
SHAPES = [(FEATURES, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
WEIGHTS = [_RNG.normal(0, 0.5, shape).astype(np.float32) for shape in SHAPES]
LOGITS = _RNG.normal(0, 3, (ROWS, CLASSES)).astype(np.float32)
SAMPLE_WEIGHT = _RNG.uniform(0, 2, ROWS).astype(np.float32)
SOFT = _RNG.uniform(size=(ROWS, CLASSES)).astype(np.float32)
LABELS = _RNG.integers(-2, CLASSES, ROWS)  # -1 background, -2 ignored
FLAT = (INPUTS[:, 0] > 0).astype(np.int64)
CHOICES = np.where(LABELS < 0, -100, LABELS)  # -100 ignored
SEQUENCES = _RNG.integers(0, WORDS, (ROWS, LENGTH))  # 0 is padding
SEQUENCE_LABELS = _RNG.integers(-2, CLASSES, (ROWS, LENGTH))
SEQUENCE_WEIGHT = _RNG.uniform(0, 2, (ROWS, LENGTH)).astype(np.float32)
EMBEDDING = _RNG.normal(0, 2, (WORDS, CLASSES)).astype(np.float32)
TARGETS = {"dense": SOFT, "sparse": LABELS, "softmax": CHOICES}

LOSSES: dict[str, tuple[str, str, dict[str, Any], np.ndarray]] = {
    "dense": (
        "SigmoidFocalLoss",
        "sigmoid_focal_loss",
        {"alpha": ALPHAS, "gamma": 1.5, "label_smoothing": 0.1},
        SOFT,
    ),
    "sparse": (
        "SparseSigmoidFocalLoss",
        "sparse_sigmoid_focal_loss",
        {"alpha": 0.3, "gamma": 2.0, "label_smoothing": 0.1},
        LABELS,
    ),
    "softmax": (
        "SoftmaxFocalLoss",
        "softmax_focal_loss",
        {"alpha": (1.0, 2.0, 3.0), "gamma": 2.0, "label_smoothing": 0.1},
        CHOICES,
    ),
    "star": (
        "SigmoidFocalLossStar",
        "sigmoid_focal_loss_star",
        {"alpha": 0.3, "gamma": 1.5, "beta": 0.5},
        SOFT,
    ),
    "balanced": ("BalancedCrossEntropyLoss", "balanced_cross_entropy", {"alpha": 0.6}, SOFT),
    "quality": ("QualityFocalLoss", "quality_focal_loss", {"beta": 1.5}, SOFT),
    "varifocal": ("VarifocalLoss", "varifocal_loss", {"alpha": 0.5, "gamma": 1.5}, SOFT),
    "heatmap": (
        "HeatmapFocalLoss",
        "heatmap_focal_loss",
        {"gamma": 1.5, "beta": 3.0},
        np.where(SOFT > 0.8, 1, SOFT),
    ),
    "asymmetric": (
        "AsymmetricLoss",
        "asymmetric_loss",
        {"gamma_positive": 0.5, "gamma_negative": 3.0, "margin": 0.1},
        SOFT,
    ),
}
"""Class, function, parameters and targets of every loss."""


def loss(kind: str, **options: Any) -> Any:
    import focal.keras

    name, _, parameters, _ = LOSSES[kind]
    return getattr(focal.keras, name)(**parameters, **options)


def plain(value: Any) -> Any:
    """A tensor as numbers and lists."""
    import keras

    return np.asarray(keras.ops.convert_to_numpy(value)).astype(np.float64).tolist()


# Training


def network(kind: str | None = None, weights: bool = True, **options: Any) -> Any:
    """Two layers, ready to train with one of the losses."""
    import keras

    from focal.keras import PriorBias

    model = keras.Sequential(
        [
            keras.layers.Input((FEATURES,)),
            keras.layers.Dense(HIDDEN, activation="tanh"),
            keras.layers.Dense(CLASSES, bias_initializer=PriorBias([0.01, 0.1, 0.5])),
        ]
    )
    if weights:
        model.set_weights(WEIGHTS)
    if kind is not None:
        model.compile(keras.optimizers.Adam(0.02), loss=loss(kind), **options)
    return model


def fit(model: Any, target: np.ndarray, inputs: np.ndarray = INPUTS, **options: Any) -> list[float]:
    """The loss before each of the steps, on all rows."""
    options = {"epochs": EPOCHS, "batch_size": ROWS, "shuffle": False, "verbose": 0} | options
    return model.fit(inputs, target, **options).history["loss"]


def masked() -> Any:
    """An embedding is the logits; 0 is padding, which Keras masks."""
    import keras

    ids = keras.layers.Input((LENGTH,), dtype="int32")
    model = keras.Model(ids, keras.layers.Embedding(WORDS, CLASSES, mask_zero=True)(ids))
    model.set_weights([EMBEDDING])
    return model


def trained_in_half(half: str) -> dict[str, Any]:
    import keras

    keras.config.set_dtype_policy(f"mixed_{half}")
    try:
        model = network("sparse")
        logits = model(INPUTS)
        return {
            "logits": keras.backend.standardize_dtype(logits.dtype),
            "losses": {
                kind: keras.backend.standardize_dtype(loss(kind)(target, logits).dtype)
                for kind, target in TARGETS.items()
            },
            "scaled": isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer),
            "history": fit(model, LABELS),
        }
    finally:
        keras.config.set_dtype_policy("float32")


def train(folder: Path) -> dict[str, Any]:
    """The losses of every training; models are left in the folder."""
    import keras

    backend = keras.backend.backend()
    found: dict[str, Any] = {"history": {}, "evaluated": {}}
    for kind, target in TARGETS.items():
        model = network(kind)
        found["history"][kind] = fit(model, target)
        found["evaluated"][kind] = model.evaluate(INPUTS, target, batch_size=ROWS, verbose=0)
        model.save(folder / f"{backend}-{kind}.keras")
    if backend == "tensorflow":  # JAX compiles by default
        found["xla"] = fit(network("sparse", jit_compile=True), LABELS, epochs=3)
    found["half"] = {half: trained_in_half(half) for half in HALF_TYPES}

    binary = keras.Sequential([keras.layers.Input((FEATURES,)), keras.layers.Dense(1)])
    binary.set_weights([WEIGHTS[0][:, :1], np.zeros(1)])
    metrics = [keras.metrics.AUC(from_logits=True, name="auc")]
    binary.compile(keras.optimizers.SGD(1.0), loss=loss("star"), metrics=metrics)
    options = {"epochs": 3, "batch_size": ROWS // 3, "class_weight": {0: 1.0, 1: 2.0}}
    fit(binary, FLAT, **options)
    found["binary"] = {name: values for name, values in binary.history.history.items()}

    model = masked()
    model.compile(keras.optimizers.SGD(1.0), loss=loss("sparse"))
    options = {"inputs": SEQUENCES, "sample_weight": SEQUENCE_WEIGHT, "epochs": 3}
    found["masked"] = fit(model, SEQUENCE_LABELS, **options)
    return found


# Evaluation


def values(kind: str) -> dict[str, Any]:
    """What a loss gives; those that may ignore samples in every reduction."""
    target = LOSSES[kind][3]
    found: dict[str, Any] = {}
    for reduction in REDUCTIONS if kind in TARGETS else REDUCTIONS[:1]:
        function = loss(kind, reduction=reduction)
        found[f"{reduction}"] = plain(function(target, LOGITS))
        found[f"{reduction}, weighted"] = plain(function(target, LOGITS, SAMPLE_WEIGHT))
    return found


def copies(kind: str) -> dict[str, Any]:
    """The configuration of a loss, and whether others made from it are the same."""
    import keras

    first = loss(kind, reduction="sum", dtype="float16")
    config = json.loads(json.dumps(first.get_config()))
    written = json.loads(json.dumps(keras.losses.serialize(first)))
    again = {
        "config": type(first).from_config(config),
        "keras": keras.losses.deserialize(written),
        "pickle": pickle.loads(pickle.dumps(first)),
        "copy": copy.deepcopy(first),
    }
    return {
        "config": config,
        "registered": written["registered_name"],
        "same": {
            name: type(other) is type(first) and other.get_config() == config
            for name, other in again.items()
        },
    }


def earlier() -> dict[str, Any]:
    """Losses as older files have them, of another module or name, and the former name itself."""
    import keras

    import focal.keras

    own = {"name": "own", "reduction": "sum"}
    files = [
        (
            "focal.tensorflow.losses_keras",
            "SparseSigmoidFocalLoss",
            own | {"alpha": [0.1, 0.9], "gamma": 1.5},
        ),
        ("focal.keras", "AsymmetricFocalLoss", own | {"gamma_positive": 0.5, "margin": 0.1}),
    ]
    found: dict[str, Any] = {"written": [], "read": [], "classes": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["same"] = focal.keras.AsymmetricFocalLoss is focal.keras.AsymmetricLoss
    found["warnings"] = [str(warning.message) for warning in caught]
    for module, name, config in files:
        saved = {"module": module, "class_name": name, "config": config}
        loss = keras.losses.deserialize(saved | {"registered_name": f"focal>{name}"})
        read = loss.get_config()
        found["written"].append(config)
        found["read"].append({key: read[key] for key in config})
        found["classes"].append(type(loss).__name__)
    return found


def shapes() -> dict[str, Any]:
    """Labels with an axis too many, classes on another axis, half types."""
    from focal.keras import SigmoidFocalLoss, SoftmaxFocalLoss, SparseSigmoidFocalLoss

    images = LOGITS.reshape(4, 3, 4, CLASSES)
    labels, choices = LABELS.reshape(4, 3, 4), CHOICES.reshape(4, 3, 4)
    first = np.moveaxis(images, -1, 1)
    column = LOGITS[:, :1]
    many = np.zeros((2, 300), np.float32)
    many[:, 257] = 5
    return {
        "softmax": [
            plain(SoftmaxFocalLoss()(choices, images)),
            plain(SoftmaxFocalLoss()(choices[..., None], images)),
            plain(SoftmaxFocalLoss(axis=1)(choices, first)),
            plain(SoftmaxFocalLoss(axis=1)(choices[:, None], first)),
        ],
        "sparse": [
            plain(SparseSigmoidFocalLoss()(labels, images)),
            plain(SparseSigmoidFocalLoss()(labels[..., None], images)),
            plain(SparseSigmoidFocalLoss(axis=1)(labels, first)),
            plain(SparseSigmoidFocalLoss(axis=1)(labels[:, None], first)),
        ],
        "flat": [
            plain(SigmoidFocalLoss()(SOFT[:, 0], column)),
            plain(SigmoidFocalLoss()(SOFT[:, :1], column)),
        ],
        # bfloat16 has no 257.
        "labels of a half type": [
            plain(kind(dtype=dtype)(np.array([257, 257]), many))
            for kind in (SparseSigmoidFocalLoss, SoftmaxFocalLoss)
            for dtype in ("float32", "bfloat16", "float16")
        ],
        "nothing counted": [
            plain(SparseSigmoidFocalLoss()(np.array([-2, -2]), LOGITS[:2])),
            plain(SoftmaxFocalLoss()(np.array([-100, -100]), LOGITS[:2])),
        ],
    }


def mask() -> dict[str, Any]:
    """Samples that Keras masks, and samples that are ignored."""
    logits = masked()(SEQUENCES)
    found: dict[str, Any] = {}
    for reduction in REDUCTIONS:
        function = loss("sparse", reduction=reduction)
        found[f"{reduction}"] = plain(function(SEQUENCE_LABELS, logits))
        found[f"{reduction}, weighted"] = plain(function(SEQUENCE_LABELS, logits, SEQUENCE_WEIGHT))
    return found


def by_torch_compile() -> float:
    """What `jit_compile=True` does with a loss in PyTorch."""
    import keras
    import torch

    function = torch.compile(loss("sparse"), backend="eager")
    return plain(function(*map(keras.ops.convert_to_tensor, (LABELS, LOGITS))))


def outside() -> dict[str, Any]:
    """Labels of K: in eager code, and where `evaluate` compiles."""
    import keras

    found: dict[str, Any] = {}
    for kind, ignored in (("sparse", -2), ("softmax", -100)):
        wrong = np.where(np.arange(ROWS) % 5 == 0, CLASSES, TARGETS[kind])
        right = np.where(wrong == CLASSES, ignored, wrong)
        told = told_by(lambda kind=kind, wrong=wrong: loss(kind)(wrong, LOGITS))
        found[kind] = {"eager": told}
        if keras.backend.backend() in ("tensorflow", "jax"):
            evaluated = network(kind).evaluate
            options = {"batch_size": ROWS, "verbose": 0}
            found[kind]["compiled"] = [evaluated(INPUTS, y, **options) for y in (wrong, right)]
    return found


def biases() -> dict[str, Any]:
    import keras

    from focal.keras import PriorBias

    again = keras.initializers.deserialize(
        json.loads(json.dumps(keras.initializers.serialize(PriorBias(np.array([0.02, 0.5])))))
    )
    half = PriorBias(0.02)((2,), "bfloat16")
    return {
        "layer": plain(network(weights=False).layers[-1].bias),
        "again": plain(again((4,))),
        "config": again.get_config(),
        "half": [keras.backend.standardize_dtype(half.dtype), plain(half)],
    }


WRONG: dict[str, Callable[[ModuleType], Any]] = {
    "ValueError: SigmoidFocalLoss: gamma must be a finite number >= 0; got -1": (
        lambda K: K.SigmoidFocalLoss(gamma=-1)
    ),
    "TypeError: SigmoidFocalLoss: gamma must be a number; got None": (
        lambda K: K.SigmoidFocalLoss(gamma=None)
    ),
    "ValueError: SigmoidFocalLoss: alpha must lie in [0, 1], or be None or -1 to turn it off; "
    "got 2": lambda K: K.SigmoidFocalLoss(alpha=2),
    "ValueError: SigmoidFocalLoss: alpha must be a finite number in [0, 1]; got 5.0": (
        lambda K: K.SigmoidFocalLoss(alpha=[0.1, 5.0])
    ),
    "TypeError: SigmoidFocalLoss: alpha must be a number or None; got 'x'": (
        lambda K: K.SigmoidFocalLoss(alpha="x")
    ),
    "ValueError: SigmoidFocalLoss: label_smoothing must be a finite number in [0, 1]; got 2": (
        lambda K: K.SigmoidFocalLoss(label_smoothing=2)
    ),
    "TypeError: SparseSigmoidFocalLoss: alpha must be a number; got list": (
        lambda K: K.SparseSigmoidFocalLoss(alpha=[[0.1]])
    ),
    "ValueError: SoftmaxFocalLoss: alpha must be a finite number >= 0; got -3": (
        lambda K: K.SoftmaxFocalLoss(alpha=-3)
    ),
    "ValueError: SoftmaxFocalLoss: alpha must be a finite number >= 0; got -2.0": (
        lambda K: K.SoftmaxFocalLoss(alpha=np.array([-2.0, 1.0]))
    ),
    "TypeError: SoftmaxFocalLoss: axis must be an integer; got 'x'": (
        lambda K: K.SoftmaxFocalLoss(axis="x")
    ),
    "TypeError: SoftmaxFocalLoss: ignore_index must be an integer; got 0.5": (
        lambda K: K.SoftmaxFocalLoss(ignore_index=0.5)
    ),
    "ValueError: SigmoidFocalLossStar: gamma must be > 0, the loss is divided by it; got 0": (
        lambda K: K.SigmoidFocalLossStar(gamma=0)
    ),
    "TypeError: BalancedCrossEntropyLoss: alpha must be a number or None; got list": (
        lambda K: K.BalancedCrossEntropyLoss(alpha=[0.1])
    ),
    "ValueError: QualityFocalLoss: beta must be a finite number >= 0; got -1": (
        lambda K: K.QualityFocalLoss(beta=-1)
    ),
    "ValueError: VarifocalLoss: alpha must be a finite number >= 0; got -1": (
        lambda K: K.VarifocalLoss(alpha=-1)
    ),
    "ValueError: HeatmapFocalLoss: beta must be a finite number >= 0; got nan": (
        lambda K: K.HeatmapFocalLoss(beta=float("nan"))
    ),
    "ValueError: AsymmetricLoss: margin must be < 1; got 1.0": (
        lambda K: K.AsymmetricLoss(margin=1.0)
    ),
    "ValueError: prior_bias: pi must lie inside (0, 1); got 0": lambda K: K.PriorBias(0),
    "ValueError: PriorBias: pi must be a number or one per class; got shape (1, 1)": (
        lambda K: K.PriorBias([[0.1]])
    ),
    "ValueError: PriorBias: the length of the bias must be a multiple of that of pi (2); "
    "got shape (3,)": lambda K: K.PriorBias([0.1, 0.2])((3,)),
    "ValueError: sigmoid_focal_loss: targets must have the shape of inputs; got inputs (48, 3), "
    "targets (48,)": lambda K: K.SigmoidFocalLoss()(LABELS, LOGITS),
    "ValueError: sigmoid_focal_loss: alpha must have shape (K,) = (3,); got (2,)": (
        lambda K: K.SigmoidFocalLoss([0.1, 0.2])(SOFT, LOGITS)
    ),
    "ValueError: SigmoidFocalLoss: Keras must run on tensorflow, jax, torch or numpy "
    "(KERAS_BACKEND); it runs on openvino. To predict alone, load a model with compile=False.": (
        lambda K: on_another_backend(K.SigmoidFocalLoss)
    ),
}
"""Messages, and what brings them about."""


def on_another_backend(make: Callable[[], Any]) -> None:
    """As if Keras ran on a backend without an adapter."""
    import keras

    with unittest.mock.patch.object(keras.backend, "backend", lambda: "openvino"):
        make()


def errors() -> list[str]:
    """The errors of the wrong arguments, in the order of `WRONG`."""
    import focal.keras

    return [told_by(lambda wrong=wrong: wrong(focal.keras)) for wrong in WRONG.values()]


def hints() -> dict[str, bool]:
    """Whether the type hints of each constructor resolve, and name every parameter."""
    import focal.keras

    found = {}
    for name in focal.keras.__all__:
        public = getattr(focal.keras, name)
        parameters = inspect.signature(public).parameters
        found[name] = set(typing.get_type_hints(public.__init__)) == {*parameters, "return"}
    return found


def told_by(function: Callable[[], Any]) -> str:
    """The error of a call."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def loaded(folder: Path) -> dict[str, float]:
    """Losses of the models that every backend has saved, by the name of the file."""
    import keras

    found = {}
    for path in sorted(folder.glob("*.keras")):
        model = keras.models.load_model(path)
        model.jit_compile = False  # from JAX it comes as True
        target = TARGETS[path.stem.rpartition("-")[2]]
        found[path.stem] = model.evaluate(INPUTS, target, batch_size=ROWS, verbose=0)
    return found


def evaluate(folder: Path) -> dict[str, Any]:
    import keras

    import focal.keras

    tested = doctest.testmod(focal.keras)
    found = {
        "examples": [tested.attempted, tested.failed],
        "values": {kind: values(kind) for kind in LOSSES},
        "copies": {kind: copies(kind) for kind in LOSSES},
        "earlier": earlier(),
        "shapes": shapes(),
        "outside": outside(),
        "bias": biases(),
        "errors": errors(),
        "hints": hints(),
        "loaded": loaded(folder),
    }
    backend = keras.backend.backend()
    if backend != "numpy":  # where older releases of Keras have no masks
        found["mask"] = mask()
    if backend == "torch":
        found["compiled"] = by_torch_compile()
    return found


if __name__ == "__main__":
    # Keras imports all its backends to read a model, and newer Triton aborts beside TensorFlow.
    sys.modules["triton"] = None
    import keras

    # Keras and the frameworks warn of themselves, and of one another's versions.
    warnings.filterwarnings("error", module=r"focal\b")
    what, place = sys.argv[1], Path(sys.argv[2])
    found = {"train": train, "evaluate": evaluate}[what](place)
    file = place / f"{keras.backend.backend()}-{what}.json"
    file.write_text(json.dumps(found))
