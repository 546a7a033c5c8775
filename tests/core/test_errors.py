"""Wrong arguments: the exception, and the same message in every framework.

`ARRAY` in an expected message stands for what the framework calls its arrays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from backends import Backend

import focal

X, Y = np.zeros((4, 3)), np.ones((4, 3))
LABELS = np.zeros(4, np.int64)
BOXES, ANCHORS = np.zeros((5, 4)), np.ones((6, 4))
FIVE = np.zeros(5)
CLASSES = np.zeros(5, np.int64)
SCALAR, NO_ROWS = np.zeros(()), np.zeros((), np.int64)
ONE, FLAT = np.zeros(4), np.zeros((5, 3))
INTEGERS, COMPLEX, FLAGS = np.zeros((4, 3), np.int64), np.zeros((4, 3), complex), BOXES > 0

T, V = TypeError, ValueError
Calls = dict[str, tuple[Any, ...]]
"""Functions and their arguments."""


def each(functions: str, *args: Any) -> Calls:
    """The same arguments for each of some functions."""
    return dict.fromkeys(functions.split(), args)


STAR = each("sigmoid_focal_loss_star", X, Y)
CE = each("balanced_cross_entropy", X, Y)
DENSE = each("sigmoid_focal_loss", X, Y) | STAR
SPARSE = each("sparse_sigmoid_focal_loss", X, LABELS)
SOFTMAX = each("softmax_focal_loss", X, LABELS)
PER_CLASS = each("sigmoid_focal_loss", X, Y) | SPARSE
ASYMMETRIC = each("asymmetric_loss", X, Y)
VARIANTS = each("quality_focal_loss varifocal_loss heatmap_focal_loss", X, Y) | ASYMMETRIC
SMOOTH_L1 = each("smooth_l1_loss", X, Y)
REDUCED = DENSE | CE | VARIANTS | SPARSE | SOFTMAX | SMOOTH_L1 | each("giou_loss", BOXES, BOXES)
MATCHERS = {"match_anchors": (ANCHORS, BOXES), "assign_targets": (ANCHORS, BOXES, CLASSES)}
NMS = {"nms": (BOXES, FIVE), "batched_nms": (BOXES, FIVE, CLASSES)}
CODERS = each("encode_boxes decode_boxes", BOXES, ANCHORS[:5])
SIZED = {"clip_boxes": (BOXES,), "anchors": ()}
OHEM = each("hard_example_mask", FIVE)


class Case(NamedTuple):
    function: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    error: type[Exception]
    message: str

    def __str__(self) -> str:
        return f"{self.function}: {self.message}"


def wrong(error: type[Exception], calls: Calls, message: str, **options: Any) -> list[Case]:
    """The calls with options that make each of them fail with this message."""
    return [Case(name, args, options, error, message) for name, args in calls.items()]


def and_then(calls: Calls, *more: Any) -> Calls:
    """The calls with more arguments."""
    return {name: (*args, *more) for name, args in calls.items()}


FRACTION = "must be a finite number in [0, 1]; got"
AT_LEAST_0 = "must be a finite number >= 0; got"


def alphas() -> Iterator[list[Case]]:
    off = "alpha must lie in [0, 1], or be None or -1 to turn it off; got"
    for alpha in (1.5, -0.5, -2, math.nan, math.inf):
        yield wrong(V, DENSE | CE | SPARSE, f"{off} {alpha}", alpha=alpha)
    for alpha in ("0.5", True, 1j):
        message = f"alpha must be a number or None; got {alpha!r}"
        yield wrong(T, DENSE | CE | SPARSE, message, alpha=alpha)
    yield wrong(T, STAR | CE, "alpha must be a number or None; got list", alpha=[0.5])
    yield wrong(V, PER_CLASS, "alpha must have shape (K,) = (3,); got (1,)", alpha=[0.5])
    yield wrong(V, PER_CLASS, "alpha must have shape (K,) = (3,); got (3, 1)", alpha=X[:3, :1])
    yield wrong(V, PER_CLASS, f"alpha {FRACTION} 2", alpha=[0.5, 2, 0.5])
    yield wrong(V, PER_CLASS, f"alpha {FRACTION} -1", alpha=(0.5, -1, 0.5))
    yield wrong(T, PER_CLASS, "alpha must be a number; got '1'", alpha=[0.5, "1", 0.5])
    message = "one alpha per class needs inputs with a class axis; got shape ()"
    yield wrong(V, each("sigmoid_focal_loss", SCALAR, np.ones(())), message, alpha=[0.5])
    yield wrong(V, SOFTMAX, f"alpha {AT_LEAST_0} -0.5", alpha=-0.5)
    yield wrong(V, SOFTMAX, f"alpha {AT_LEAST_0} -3", alpha=[1, -3, 1])
    yield wrong(V, SOFTMAX, "alpha must have shape (K,) = (3,); got (2,)", alpha=[1, 2])
    yield wrong(T, SOFTMAX, "alpha must be a number; got '1'", alpha="1")


def exponents() -> Iterator[list[Case]]:
    """gamma, beta and the like."""
    for gamma in (-1, -0.5, math.nan, math.inf):
        yield wrong(V, DENSE | SPARSE | SOFTMAX, f"gamma {AT_LEAST_0} {gamma}", gamma=gamma)
    for gamma, got in ((None, "None"), ("2", "'2'"), (True, "True"), ((2,), "tuple")):
        message = f"gamma must be a number; got {got}"
        yield wrong(T, DENSE | SPARSE | SOFTMAX, message, gamma=gamma)
    yield wrong(V, STAR, "gamma must be > 0, the loss is divided by it; got 0", gamma=0)
    yield wrong(V, STAR, "beta must be a finite number; got nan", beta=math.nan)
    yield wrong(T, STAR, "beta must be a number; got None", beta=None)
    for name, parameters in {
        "quality_focal_loss": ["beta"],
        "varifocal_loss": ["alpha", "gamma"],
        "heatmap_focal_loss": ["gamma", "beta"],
        "asymmetric_loss": ["gamma_positive", "gamma_negative"],
    }.items():
        for p in parameters:
            yield wrong(V, each(name, X, Y), f"{p} {AT_LEAST_0} -1", **{p: -1})
            yield wrong(V, each(name, X, Y), f"{p} {AT_LEAST_0} nan", **{p: math.nan})
            yield wrong(T, each(name, X, Y), f"{p} must be a number; got None", **{p: None})
    yield wrong(V, ASYMMETRIC, f"margin {FRACTION} -0.1", margin=-0.1)
    yield wrong(V, ASYMMETRIC, "margin must be < 1; got 1", margin=1)
    yield wrong(V, PER_CLASS, f"label_smoothing {FRACTION} 1.5", label_smoothing=1.5)
    message = "label_smoothing must be a number; got None"
    yield wrong(T, PER_CLASS, message, label_smoothing=None)
    yield wrong(V, SOFTMAX, f"label_smoothing {FRACTION} -1", label_smoothing=-1)
    yield wrong(V, SMOOTH_L1, f"beta {AT_LEAST_0} -1", beta=-1)
    yield wrong(T, SMOOTH_L1, "beta must be a number; got None", beta=None)


def others() -> Iterator[list[Case]]:
    """Thresholds, counts, axes, sizes."""
    yield wrong(T, SOFTMAX, "ignore_index must be an integer; got 1.5", ignore_index=1.5)
    yield wrong(T, SOFTMAX, "axis must be an integer; got 1.0", axis=1.0)
    yield wrong(V, SOFTMAX, "axis must be an axis of inputs (4, 3); got 2", axis=2)
    yield wrong(V, SOFTMAX, "axis must be an axis of inputs (4, 3); got -3", axis=-3)

    yield wrong(V, MATCHERS, f"foreground {FRACTION} 2", foreground=2)
    message = "background must be a finite number in [0, 0.5]; got 0.6"
    yield wrong(V, MATCHERS, message, background=0.6)
    yield wrong(V, MATCHERS, f"allow_low_quality {FRACTION} 1.5", allow_low_quality=1.5)
    message = "allow_low_quality must be a number; got 'yes'"
    yield wrong(T, MATCHERS, message, allow_low_quality="yes")
    yield wrong(V, and_then(NMS, -0.1), f"iou_threshold {FRACTION} -0.1")
    yield wrong(T, and_then(NMS, None), "iou_threshold must be a number; got None")

    yield wrong(V, each("subsample", LABELS, -1), "num_samples must be >= 0; got -1")
    yield wrong(T, each("subsample", LABELS, 2.5), "num_samples must be an integer; got 2.5")
    yield wrong(T, each("subsample", LABELS, True), "num_samples must be an integer; got True")
    yield wrong(V, each("subsample", LABELS, 4, 2), f"positive_fraction {FRACTION} 2")

    yield wrong(V, and_then(OHEM, -1), "num_examples must be >= 0; got -1")
    yield wrong(T, and_then(OHEM, 2.5), "num_examples must be an integer; got 2.5")
    yield wrong(V, OHEM, f"iou_threshold {FRACTION} 3", boxes=BOXES, iou_threshold=3)
    yield wrong(V, OHEM, f"negative_ratio {AT_LEAST_0} -1", positive=CLASSES, negative_ratio=-1)
    yield wrong(V, OHEM, "boxes needs iou_threshold, which is None", boxes=BOXES)
    yield wrong(V, OHEM, "iou_threshold needs boxes, which is None", iou_threshold=0.5)
    yield wrong(V, OHEM, "positive needs negative_ratio, which is None", positive=CLASSES)
    yield wrong(V, OHEM, "negative_ratio needs positive, which is None", negative_ratio=3)

    yield wrong(V, CODERS, "weights must be > 0; got (1, 1, 0, 1)", weights=(1, 1, 0, 1))
    yield wrong(T, CODERS, "weights must be a number; got None", weights=(1, 1, None, 1))
    for weights in ((1, 1), 1):
        message = f"weights must be four numbers (wx, wy, ww, wh); got {weights}"
        yield wrong(T, CODERS, message, weights=weights)
    decode = {"decode_boxes": CODERS["decode_boxes"]}
    yield wrong(V, decode, "clip must be a finite number; got nan", clip=math.nan)
    for size in (5, (5,), (1, 2, 3)):
        message = f"image_size must be (height, width); got {size}"
        yield wrong(T, and_then(SIZED, size), message)
    for size, error, message in (
        (("5", 5), T, "image_size[0] must be a number; got '5'"),
        ((True, 5), T, "image_size[0] must be a number; got True"),
        ((5.5, 5), V, "image_size[0] must be a whole number; got 5.5"),
        ((5, math.nan), V, "image_size[1] must be a finite number; got nan"),
        ((5, 0), V, "image_size[1] must be >= 1; got 0"),
    ):
        yield wrong(error, and_then(SIZED, size), message)
    message = "config must be a focal.AnchorConfig; got 'paper'"
    yield wrong(T, each("anchors", (8, 8), "paper"), message)


def reductions() -> Iterator[list[Case]]:
    positives = {"sparse_sigmoid_focal_loss", "heatmap_focal_loss"}
    for name, args in REDUCED.items():
        choices = "'none', 'mean', 'sum'" + (", 'positives'" if name in positives else "")
        for word in ("avg", None, "Mean", 1):
            message = f"reduction must be one of {choices}; got {word!r}"
            yield wrong(V, {name: args}, message, reduction=word)
    message = "reduction must be one of 'none', 'mean', 'sum'; got 'positives'"
    yield wrong(V, each("sigmoid_focal_loss", X, Y), message, reduction="positives")


def types() -> Iterator[list[Case]]:
    """Arrays of the wrong type, and what is no array."""
    floating, labels = "must have a floating-point type; got int64", "must have an integer type"
    real = "must have a real or boolean type; got complex128"
    bools = "must have a floating-point type; got bool"
    dense = DENSE | CE | VARIANTS
    yield wrong(T, dense.fromkeys(dense, (INTEGERS, Y)), f"inputs {floating}")
    yield wrong(T, dense.fromkeys(dense, (X, COMPLEX)), f"targets {real}")
    yield wrong(T, dense.fromkeys(dense, (None, Y)), "inputs must be ARRAY; got None")
    yield wrong(T, dense.fromkeys(dense, (X, "y")), "targets must be ARRAY; got 'y'")
    yield wrong(T, dense, f"weight {real}", weight=COMPLEX)
    yield wrong(T, dense, "weight must be ARRAY; got 'w'", weight="w")
    labeled = "sparse_sigmoid_focal_loss softmax_focal_loss"
    yield wrong(T, each(labeled, INTEGERS, LABELS), f"inputs {floating}")
    yield wrong(T, each(labeled, X, np.zeros(4)), f"labels {labels}; got float64")
    yield wrong(T, each(labeled, X, np.zeros(4, bool)), f"labels {labels}; got bool")
    yield wrong(T, each(labeled, X, None), "labels must be ARRAY; got None")
    pairs = "box_iou generalized_box_iou giou_loss"
    yield wrong(T, each(pairs, FLAGS, BOXES), f"boxes1 {bools}")
    yield wrong(T, each(pairs, BOXES, FLAGS), f"boxes2 {bools}")
    yield wrong(T, each(pairs, None, BOXES), "boxes1 must be ARRAY; got None")
    yield wrong(T, each("subsample", CLASSES, 2), f"noise {floating}", noise=CLASSES)
    for name, args, message in (
        ("smooth_l1_loss", (INTEGERS, Y), f"inputs {floating}"),
        ("smooth_l1_loss", (X, COMPLEX), f"targets {real}"),
        ("num_positives", (np.zeros(4),), f"labels {labels}; got float64"),
        ("num_positives", (None,), "labels must be ARRAY; got None"),
        ("box_area", (FLAGS,), f"boxes {bools}"),
        ("clip_boxes", (FLAGS, (8, 8)), f"boxes {bools}"),
        ("encode_boxes", (FLAGS, BOXES), f"boxes {bools}"),
        ("encode_boxes", (BOXES, FLAGS), f"anchors {bools}"),
        ("decode_boxes", (BOXES.astype(int), BOXES), f"deltas {floating}"),
        ("decode_boxes", (BOXES, FLAGS), f"anchors {bools}"),
        ("match_anchors", (FLAGS, BOXES), f"anchors {bools}"),
        ("match_anchors", (ANCHORS, FLAGS), f"boxes {bools}"),
        ("assign_targets", (ANCHORS, FLAGS, CLASSES), f"boxes {bools}"),
        ("assign_targets", (ANCHORS, BOXES, FIVE), f"labels {labels}; got float64"),
        ("nms", (FLAGS, FIVE, 0.5), f"boxes {bools}"),
        ("nms", (BOXES, CLASSES, 0.5), f"scores {floating}"),
        ("nms", (BOXES, None, 0.5), "scores must be ARRAY; got None"),
        ("batched_nms", (BOXES, CLASSES, CLASSES, 0.5), f"scores {floating}"),
        ("batched_nms", (BOXES, FIVE, FIVE, 0.5), f"classes {labels}; got float64"),
        ("subsample", (FIVE, 2), f"labels {labels}; got float64"),
        ("hard_example_mask", (CLASSES,), f"losses {floating}"),
    ):
        yield wrong(T, {name: args}, message)


def shapes() -> Iterator[list[Case]]:
    """Nothing broadcasts unless the documentation says so."""
    dense = DENSE | CE | VARIANTS | SMOOTH_L1
    for args, got in (
        ((X[:, :1], Y[:, 0]), "inputs (4, 1), targets (4,)"),
        ((X, Y[:1]), "inputs (4, 3), targets (1, 3)"),
        ((X, np.ones(())), "inputs (4, 3), targets ()"),
    ):
        message = f"targets must have the shape of inputs; got {got}"
        yield wrong(V, dense.fromkeys(dense, args), message)
    for shape in ((4,), (2, 4, 3), (1, 1, 1)):
        got = f"got inputs (4, 3), weight {shape}"
        message = f"weight must broadcast to the shape of inputs; {got}"
        yield wrong(V, DENSE | CE | SPARSE, message, weight=np.ones(shape))
    rows = "labels must have shape inputs.shape without axis ="
    yield wrong(V, SOFTMAX, f"{rows} (3,); got (4,)", axis=0)
    last, lists = "must have shape (..., 4); got (5, 3)", "must have shape (..., N, 4); got"
    message = "noise must have the shape of labels; got labels (5,), noise (2,)"
    yield wrong(V, each("subsample", CLASSES, 2), message, noise=np.zeros(2))
    message = "boxes must have shape (N, 4) = (5, 4); got (6, 4)"
    yield wrong(V, OHEM, message, boxes=ANCHORS, iou_threshold=0.5)
    message = "positive must have the shape of losses; got losses (5,), positive (4,)"
    yield wrong(V, OHEM, message, positive=LABELS, negative_ratio=3)
    for name, args, message in (
        ("sparse_sigmoid_focal_loss", (X, LABELS[:3]), f"{rows} (4,); got (3,)"),
        ("sparse_sigmoid_focal_loss", (X, LABELS[:, None]), f"{rows} (4,); got (4, 1)"),
        (
            "sparse_sigmoid_focal_loss",
            (SCALAR, NO_ROWS),
            "inputs must have at least one class on their class axis; got shape ()",
        ),
        ("softmax_focal_loss", (X, LABELS[:3]), f"{rows} (4,); got (3,)"),
        (
            "softmax_focal_loss",
            (X[:, :0], NO_ROWS),
            "inputs must have at least one class on their class axis; got shape (4, 0)",
        ),
        ("softmax_focal_loss", (SCALAR, NO_ROWS), "axis must be an axis of inputs (); got -1"),
        ("box_area", (FLAT,), f"boxes {last}"),
        ("box_area", (SCALAR,), "boxes must have shape (..., 4); got ()"),
        ("clip_boxes", (FLAT, (8, 8)), f"boxes {last}"),
        ("encode_boxes", (FLAT, BOXES), f"boxes {last}"),
        ("encode_boxes", (BOXES, FLAT), f"anchors {last}"),
        ("decode_boxes", (FLAT, BOXES), f"deltas {last}"),
        ("decode_boxes", (BOXES, FLAT), f"anchors {last}"),
        ("box_iou", (ONE, BOXES), f"boxes1 {lists} (4,)"),
        ("box_iou", (BOXES, FLAT), f"boxes2 {lists} (5, 3)"),
        ("generalized_box_iou", (ONE, BOXES), f"boxes1 {lists} (4,)"),
        ("generalized_box_iou", (BOXES, FLAT), f"boxes2 {lists} (5, 3)"),
        ("giou_loss", (FLAT, BOXES), f"boxes1 {last}"),
        (
            "giou_loss",
            (BOXES, BOXES[:4]),
            "boxes2 must have the shape of boxes1; got boxes1 (5, 4), boxes2 (4, 4)",
        ),
        ("match_anchors", (FLAT, BOXES), f"anchors {last}"),
        (
            "match_anchors",
            (ANCHORS[None], BOXES),
            "anchors must have shape (N, 4); got (1, 6, 4)",
        ),
        ("match_anchors", (ANCHORS, ONE), f"boxes {lists} (4,)"),
        (
            "assign_targets",
            (ANCHORS, BOXES, CLASSES[:2]),
            "labels must have shape boxes.shape[:-1] = (5,); got (2,)",
        ),
        ("nms", (ONE, FIVE, 0.5), "boxes must have shape (N, 4); got (4,)"),
        ("nms", (BOXES[None], FIVE, 0.5), "boxes must have shape (N, 4); got (1, 5, 4)"),
        (
            "nms",
            (BOXES, FIVE[:3], 0.5),
            "scores must have shape boxes.shape[:1] = (5,); got (3,)",
        ),
        (
            "batched_nms",
            (BOXES, FIVE, CLASSES[:3], 0.5),
            "classes must have the shape of scores; got scores (5,), classes (3,)",
        ),
        ("hard_example_mask", (X,), "losses must have shape (N,); got (4, 3)"),
    ):
        yield wrong(V, {name: args}, message)


GROUPS = (alphas, exponents, others, reductions, types, shapes)
CASES = [case for group in GROUPS for cases in group() for case in cases]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_message(backend: Backend, case: Case) -> None:
    message = case.message.replace("ARRAY", backend.array_name)
    with pytest.raises(case.error) as raised:
        backend(case.function, *case.args, **case.options)
    said = re.sub(r"\b(torch|array_api_strict)\.(?=bool|int|float|complex)", "", str(raised.value))
    assert said == f"{case.function}: {message}"


def test_every_function_is_here(backend: Backend) -> None:
    constants = {"AnchorConfig", "prior_bias", "inverse_frequency_alpha", "expected_initial_loss"}
    public = {name for name in focal.numpy.__all__ if not name.endswith(("_grad", "_hess"))}
    assert {c.function for c in CASES} == public - constants


@pytest.mark.parametrize(
    "function",
    ["sigmoid_focal_loss_grad", "sigmoid_focal_loss_hess", "sigmoid_focal_loss_star_grad"],
)
def test_closed_forms_name_themselves(closed_form: Backend, function: str) -> None:
    with pytest.raises(V, match=f"^{function}: gamma {AT_LEAST_0} -1$"):
        closed_form(function, X, Y, gamma=-1)
    with pytest.raises(V, match=f"^{function}: targets must have the shape of inputs; got "):
        closed_form(function, X, Y[0])


def test_the_softmax_gradient_names_itself(closed_form: Backend) -> None:
    with pytest.raises(V, match=f"^softmax_focal_loss_grad: gamma {AT_LEAST_0} -1$"):
        closed_form("softmax_focal_loss_grad", X, LABELS, gamma=-1)


INITIAL, CONFIG = "expected_initial_loss", "AnchorConfig"
CONSTANTS = [
    (V, "prior_bias", (0.0,), {}, "pi must lie inside (0, 1); got 0.0"),
    (V, "prior_bias", (1,), {}, "pi must lie inside (0, 1); got 1"),
    (V, "prior_bias", ([0.1, math.nan],), {}, "pi must lie inside (0, 1); got [0.1, nan]"),
    (T, "prior_bias", (None,), {}, "pi must be numeric; got None"),
    (T, "prior_bias", ("x",), {}, "pi must be numeric; got 'x'"),
    (T, "prior_bias", ("0.5",), {}, "pi must be numeric; got '0.5'"),
    (
        V,
        "inverse_frequency_alpha",
        ([1, 2], [3]),
        {},
        "num_negative must have the shape of num_positive; "
        "got num_positive (2,), num_negative (1,)",
    ),
    (V, "inverse_frequency_alpha", (-1, 3), {}, "num_positive must be finite and >= 0; got -1.0"),
    (V, "inverse_frequency_alpha", (0, 0), {}, "num_positive and num_negative must not both be 0"),
    (V, INITIAL, (5, 6), {}, "num_positives must be a finite number in [0, 5]; got 6"),
    (V, INITIAL, (5, 1, 0), {}, "num_classes must be a finite number >= 1; got 0"),
    (V, INITIAL, (5, 1, math.nan), {}, "num_classes must be a finite number >= 1; got nan"),
    (V, INITIAL, (5, 1), {"pi": 1.0}, "pi must lie inside (0, 1) or be None; got 1.0"),
    (V, INITIAL, (5, 1), {"gamma": -1}, f"gamma {AT_LEAST_0} -1"),
    (T, INITIAL, (5, "x"), {}, "num_positives must be a number; got 'x'"),
    (T, INITIAL, (5, "3"), {}, "num_positives must be a number; got '3'"),
    (T, INITIAL, ([5, 6], 1), {}, "num_anchors must be a number; got list"),
    (V, CONFIG, (), {"strides": ()}, "strides must not be empty"),
    (V, CONFIG, (), {"scales": (1.0, 0.0)}, "scales must be > 0; got 0.0"),
    (T, CONFIG, (), {"ratios": ("1",)}, "ratios must be a number; got '1'"),
    (T, CONFIG, (), {"sizes": "32,64"}, "sizes must be a tuple of numbers; got '32,64'"),
    (V, CONFIG, (), {"sizes": (32.0,)}, "sizes must have one number per stride (5); got 1"),
    (V, CONFIG, (), {"offset": math.nan}, "offset must be a finite number; got nan"),
]


@pytest.mark.parametrize(("error", "function", "args", "options", "message"), CONSTANTS)
def test_constants(
    error: type[Exception],
    function: str,
    args: tuple[Any, ...],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(error) as raised:
        getattr(focal, function)(*args, **options)
    assert str(raised.value) == f"{function}: {message}"
