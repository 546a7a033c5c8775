"""Wrong arguments: the exception, and the same message in every framework.

`ARRAY` in an expected message stands for what the framework calls its arrays.
"""

from __future__ import annotations

import math
import re
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
INTEGERS, COMPLEX = np.zeros((4, 3), np.int64), np.zeros((4, 3), complex)

DENSE = {"sigmoid_focal_loss": (X, Y), "sigmoid_focal_loss_star": (X, Y)}
DENSE_AND_CE = {**DENSE, "balanced_cross_entropy": (X, Y)}
SPARSE = {"sparse_sigmoid_focal_loss": (X, LABELS)}
SOFTMAX = {"softmax_focal_loss": (X, LABELS)}
VARIANTS = {
    "quality_focal_loss": (X, Y),
    "varifocal_loss": (X, Y),
    "heatmap_focal_loss": (X, Y),
    "asymmetric_loss": (X, Y),
}
REDUCED = {
    **DENSE_AND_CE,
    **VARIANTS,
    **SPARSE,
    **SOFTMAX,
    "smooth_l1_loss": (X, Y),
    "giou_loss": (BOXES, BOXES),
}
PAIRS = ("box_iou", "generalized_box_iou", "giou_loss")
MATCHERS = {"match_anchors": (ANCHORS, BOXES), "assign_targets": (ANCHORS, BOXES, CLASSES)}


class Case(NamedTuple):
    function: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    error: type[Exception]
    message: str

    def __str__(self) -> str:
        return f"{self.function}: {self.message}"


def case(
    error: type[Exception], function: str, args: tuple[Any, ...], message: str, **options: Any
) -> Case:
    return Case(function, args, options, error, message)


def numbers() -> list[Case]:
    """alpha, gamma, beta and thresholds."""
    T, V = TypeError, ValueError
    cases = []
    for name, args in {**DENSE_AND_CE, **SPARSE}.items():
        off = "alpha must lie in [0, 1], or be None or -1 to turn it off; got"
        cases += [
            case(V, name, args, f"{off} {alpha}", alpha=alpha)
            for alpha in (1.5, -0.5, -2, math.nan, math.inf)
        ]
        cases += [
            case(T, name, args, f"alpha must be a number or None; got {got}", alpha=alpha)
            for alpha, got in (("0.5", "'0.5'"), (True, "True"), (1j, "1j"))
        ]
    for name in ("sigmoid_focal_loss_star", "balanced_cross_entropy"):
        message = "alpha must be a number or None; got list"
        cases.append(case(T, name, (X, Y), message, alpha=[0.5]))
    for name, args in {"sigmoid_focal_loss": (X, Y), **SPARSE}.items():
        bad = "must be a finite number in [0, 1]; got"
        cases += [
            case(V, name, args, "alpha must have shape (K,) = (3,); got (1,)", alpha=[0.5]),
            case(V, name, args, "alpha must have shape (K,) = (3,); got (3, 1)", alpha=X[:3, :1]),
            case(V, name, args, f"alpha {bad} 2", alpha=[0.5, 2, 0.5]),
            case(V, name, args, f"alpha {bad} -1", alpha=(0.5, -1, 0.5)),
            case(T, name, args, "alpha must be a number; got '1'", alpha=[0.5, "1", 0.5]),
            case(V, name, args, f"label_smoothing {bad} 1.5", label_smoothing=1.5),
            case(T, name, args, "label_smoothing must be a number; got None", label_smoothing=None),
        ]
    message = "one alpha per class needs inputs with a class axis; got shape ()"
    cases.append(case(V, "sigmoid_focal_loss", (np.zeros(()), np.ones(())), message, alpha=[0.5]))
    for name, parameters in {
        "quality_focal_loss": ["beta"],
        "varifocal_loss": ["alpha", "gamma"],
        "heatmap_focal_loss": ["gamma", "beta"],
        "asymmetric_loss": ["gamma_positive", "gamma_negative"],
    }.items():
        for parameter in parameters:
            low = f"{parameter} must be a finite number >= 0; got"
            cases += [
                case(V, name, (X, Y), f"{low} -1", **{parameter: -1}),
                case(V, name, (X, Y), f"{low} nan", **{parameter: math.nan}),
                case(
                    T, name, (X, Y), f"{parameter} must be a number; got None", **{parameter: None}
                ),
            ]
    name = "asymmetric_loss"
    cases += [
        case(V, name, (X, Y), "margin must be a finite number in [0, 1]; got -0.1", margin=-0.1),
        case(V, name, (X, Y), "margin must be < 1; got 1", margin=1),
    ]
    for name, args in {**DENSE, **SPARSE, **SOFTMAX}.items():
        cases += [
            case(V, name, args, f"gamma must be a finite number >= 0; got {gamma}", gamma=gamma)
            for gamma in (-1, -0.5, math.nan, math.inf)
        ]
        cases += [
            case(T, name, args, f"gamma must be a number; got {got}", gamma=gamma)
            for gamma, got in ((None, "None"), ("2", "'2'"), (True, "True"), ((2,), "tuple"))
        ]
    name = "sigmoid_focal_loss_star"
    cases += [
        case(V, name, (X, Y), "gamma must be > 0, the loss is divided by it; got 0", gamma=0),
        case(V, name, (X, Y), "beta must be a finite number; got nan", beta=math.nan),
        case(T, name, (X, Y), "beta must be a number; got None", beta=None),
    ]
    name = "softmax_focal_loss"
    args = SOFTMAX[name]
    cases += [
        case(V, name, args, "alpha must be a finite number >= 0; got -0.5", alpha=-0.5),
        case(V, name, args, "alpha must be a finite number >= 0; got -3", alpha=[1, -3, 1]),
        case(V, name, args, "alpha must have shape (K,) = (3,); got (2,)", alpha=[1, 2]),
        case(T, name, args, "alpha must be a number; got '1'", alpha="1"),
        case(
            V,
            name,
            args,
            "label_smoothing must be a finite number in [0, 1]; got -1",
            label_smoothing=-1,
        ),
        case(T, name, args, "ignore_index must be an integer; got 1.5", ignore_index=1.5),
        case(T, name, args, "axis must be an integer; got 1.0", axis=1.0),
        case(V, name, args, "axis must be an axis of inputs (4, 3); got 2", axis=2),
        case(V, name, args, "axis must be an axis of inputs (4, 3); got -3", axis=-3),
    ]
    name = "smooth_l1_loss"
    cases += [
        case(V, name, (X, Y), "beta must be a finite number >= 0; got -1", beta=-1),
        case(T, name, (X, Y), "beta must be a number; got None", beta=None),
    ]
    for name, args in MATCHERS.items():
        cases += [
            case(
                V, name, args, "foreground must be a finite number in [0, 1]; got 2", foreground=2
            ),
            case(
                V,
                name,
                args,
                "background must be a finite number in [0, 0.5]; got 0.6",
                background=0.6,
            ),
            case(
                V,
                name,
                args,
                "allow_low_quality must be a finite number in [0, 1]; got 1.5",
                allow_low_quality=1.5,
            ),
            case(
                T,
                name,
                args,
                "allow_low_quality must be a number; got 'yes'",
                allow_low_quality="yes",
            ),
        ]
    for name, args in {"nms": (BOXES, FIVE), "batched_nms": (BOXES, FIVE, CLASSES)}.items():
        cases += [
            case(
                V, name, (*args, -0.1), "iou_threshold must be a finite number in [0, 1]; got -0.1"
            ),
            case(T, name, (*args, None), "iou_threshold must be a number; got None"),
        ]
    name = "subsample"
    cases += [
        case(V, name, (LABELS, -1), "num_samples must be >= 0; got -1"),
        case(T, name, (LABELS, 2.5), "num_samples must be an integer; got 2.5"),
        case(T, name, (LABELS, True), "num_samples must be an integer; got True"),
        case(V, name, (LABELS, 4, 2), "positive_fraction must be a finite number in [0, 1]; got 2"),
    ]
    name = "hard_example_mask"
    pair = {"boxes": BOXES, "iou_threshold": 3}
    cases += [
        case(V, name, (FIVE, -1), "num_examples must be >= 0; got -1"),
        case(T, name, (FIVE, 2.5), "num_examples must be an integer; got 2.5"),
        case(V, name, (FIVE,), "iou_threshold must be a finite number in [0, 1]; got 3", **pair),
        case(
            V,
            name,
            (FIVE,),
            "negative_ratio must be a finite number >= 0; got -1",
            positive=CLASSES,
            negative_ratio=-1,
        ),
        case(V, name, (FIVE,), "boxes needs iou_threshold, which is None", boxes=BOXES),
        case(V, name, (FIVE,), "iou_threshold needs boxes, which is None", iou_threshold=0.5),
        case(V, name, (FIVE,), "positive needs negative_ratio, which is None", positive=CLASSES),
        case(V, name, (FIVE,), "negative_ratio needs positive, which is None", negative_ratio=3),
    ]
    for name in ("encode_boxes", "decode_boxes"):
        args = (BOXES, ANCHORS[:5])
        cases += [
            case(V, name, args, "weights must be > 0; got (1, 1, 0, 1)", weights=(1, 1, 0, 1)),
            case(T, name, args, "weights must be a number; got None", weights=(1, 1, None, 1)),
            case(
                T,
                name,
                args,
                "weights must be four numbers (wx, wy, ww, wh); got (1, 1)",
                weights=(1, 1),
            ),
            case(T, name, args, "weights must be four numbers (wx, wy, ww, wh); got 1", weights=1),
        ]
    cases.append(
        case(V, "decode_boxes", args, "clip must be a finite number; got nan", clip=math.nan)
    )
    for name, args in {"clip_boxes": (BOXES,), "anchors": ()}.items():
        cases += [
            case(T, name, (*args, 5), "image_size must be (height, width); got 5"),
            case(T, name, (*args, (5,)), "image_size must be (height, width); got (5,)"),
            case(T, name, (*args, (1, 2, 3)), "image_size must be (height, width); got (1, 2, 3)"),
            case(T, name, (*args, ("5", 5)), "image_size[0] must be a number; got '5'"),
            case(T, name, (*args, (True, 5)), "image_size[0] must be a number; got True"),
            case(V, name, (*args, (5.5, 5)), "image_size[0] must be a whole number; got 5.5"),
            case(
                V,
                name,
                (*args, (5, math.nan)),
                "image_size[1] must be a finite number; got nan",
            ),
            case(V, name, (*args, (5, 0)), "image_size[1] must be >= 1; got 0"),
        ]
    cases.append(
        case(T, "anchors", ((8, 8), "paper"), "config must be a focal.AnchorConfig; got 'paper'")
    )
    return cases


def words() -> list[Case]:
    """reduction."""
    cases = []
    for name, args in REDUCED.items():
        choices = "'none', 'mean', 'sum'" + (
            ", 'positives'" if name in {**SPARSE, "heatmap_focal_loss": ()} else ""
        )
        cases += [
            case(
                ValueError,
                name,
                args,
                f"reduction must be one of {choices}; got {word!r}",
                reduction=word,
            )
            for word in ("avg", None, "Mean", 1)
        ]
    message = "reduction must be one of 'none', 'mean', 'sum'; got 'positives'"
    cases.append(case(ValueError, "sigmoid_focal_loss", (X, Y), message, reduction="positives"))
    return cases


def types() -> list[Case]:
    """Arrays of the wrong type, and what is no array."""
    T = TypeError
    floating, labels = "must have a floating-point type; got int64", "must have an integer type"
    real = "must have a real or boolean type; got complex128"
    cases = []
    for name in {**DENSE_AND_CE, **VARIANTS}:
        cases += [
            case(T, name, (INTEGERS, Y), f"inputs {floating}"),
            case(T, name, (X, COMPLEX), f"targets {real}"),
            case(T, name, (X, Y), f"weight {real}", weight=COMPLEX),
            case(T, name, (None, Y), "inputs must be ARRAY; got None"),
            case(T, name, (X, "y"), "targets must be ARRAY; got 'y'"),
            case(T, name, (X, Y), "weight must be ARRAY; got 'w'", weight="w"),
        ]
    for name in {**SPARSE, **SOFTMAX}:
        cases += [
            case(T, name, (INTEGERS, LABELS), f"inputs {floating}"),
            case(T, name, (X, np.zeros(4)), f"labels {labels}; got float64"),
            case(T, name, (X, np.zeros(4, bool)), f"labels {labels}; got bool"),
            case(T, name, (X, None), "labels must be ARRAY; got None"),
        ]
    cases += [
        case(T, "smooth_l1_loss", (INTEGERS, Y), f"inputs {floating}"),
        case(T, "smooth_l1_loss", (X, COMPLEX), f"targets {real}"),
    ]
    flags = np.zeros((5, 4), bool)
    not_flags = "must have a floating-point type; got bool"
    cases += [
        case(T, "num_positives", (np.zeros(4),), f"labels {labels}; got float64"),
        case(T, "num_positives", (None,), "labels must be ARRAY; got None"),
        case(T, "box_area", (flags,), f"boxes {not_flags}"),
        case(T, "clip_boxes", (flags, (8, 8)), f"boxes {not_flags}"),
        case(T, "encode_boxes", (flags, BOXES), f"boxes {not_flags}"),
        case(T, "encode_boxes", (BOXES, flags), f"anchors {not_flags}"),
        case(T, "decode_boxes", (BOXES.astype(int), BOXES), f"deltas {floating}"),
        case(T, "decode_boxes", (BOXES, flags), f"anchors {not_flags}"),
        case(T, "match_anchors", (flags, BOXES), f"anchors {not_flags}"),
        case(T, "match_anchors", (ANCHORS, flags), f"boxes {not_flags}"),
        case(T, "assign_targets", (ANCHORS, flags, CLASSES), f"boxes {not_flags}"),
        case(T, "assign_targets", (ANCHORS, BOXES, FIVE), f"labels {labels}; got float64"),
        case(T, "nms", (flags, FIVE, 0.5), f"boxes {not_flags}"),
        case(T, "nms", (BOXES, CLASSES, 0.5), f"scores {floating}"),
        case(T, "nms", (BOXES, None, 0.5), "scores must be ARRAY; got None"),
        case(T, "batched_nms", (BOXES, CLASSES, CLASSES, 0.5), f"scores {floating}"),
        case(T, "batched_nms", (BOXES, FIVE, FIVE, 0.5), f"classes {labels}; got float64"),
        case(T, "subsample", (FIVE, 2), f"labels {labels}; got float64"),
        case(T, "subsample", (CLASSES, 2), f"noise {floating}", noise=CLASSES),
        case(T, "hard_example_mask", (CLASSES,), f"losses {floating}"),
    ]
    for name in PAIRS:
        cases += [
            case(T, name, (flags, BOXES), f"boxes1 {not_flags}"),
            case(T, name, (BOXES, flags), f"boxes2 {not_flags}"),
            case(T, name, (None, BOXES), "boxes1 must be ARRAY; got None"),
        ]
    return cases


def shapes() -> list[Case]:
    """Nothing broadcasts unless the documentation says so."""
    V = ValueError
    cases = []
    for name in (*DENSE_AND_CE, *VARIANTS, "smooth_l1_loss"):
        same = "targets must have the shape of inputs; got inputs"
        cases += [
            case(V, name, (X[:, :1], Y[:, 0]), f"{same} (4, 1), targets (4,)"),
            case(V, name, (X, Y[:1]), f"{same} (4, 3), targets (1, 3)"),
            case(V, name, (X, np.ones(())), f"{same} (4, 3), targets ()"),
        ]
    for name, args in {**DENSE_AND_CE, **SPARSE}.items():
        wide = "weight must broadcast to the shape of inputs; got inputs (4, 3), weight"
        cases += [
            case(V, name, args, f"{wide} (4,)", weight=np.ones(4)),
            case(V, name, args, f"{wide} (2, 4, 3)", weight=np.ones((2, 4, 3))),
            case(V, name, args, f"{wide} (1, 1, 1)", weight=np.ones((1, 1, 1))),
        ]
    scalar = np.zeros(())
    cases += [
        case(
            V,
            "sparse_sigmoid_focal_loss",
            (X, LABELS[:3]),
            "labels must have shape inputs.shape without axis = (4,); got (3,)",
        ),
        case(
            V,
            "sparse_sigmoid_focal_loss",
            (X, LABELS[:, None]),
            "labels must have shape inputs.shape without axis = (4,); got (4, 1)",
        ),
        case(
            V,
            "sparse_sigmoid_focal_loss",
            (scalar, np.zeros((), np.int64)),
            "inputs must have at least one class on their class axis; got shape ()",
        ),
        case(
            V,
            "softmax_focal_loss",
            (X, LABELS[:3]),
            "labels must have shape inputs.shape without axis = (4,); got (3,)",
        ),
        case(
            V,
            "softmax_focal_loss",
            (X, LABELS),
            "labels must have shape inputs.shape without axis = (3,); got (4,)",
            axis=0,
        ),
        case(
            V,
            "softmax_focal_loss",
            (scalar, np.zeros((), np.int64)),
            "axis must be an axis of inputs (); got -1",
        ),
    ]
    flat, last, lists = np.zeros((5, 3)), "must have shape (..., 4); got (5, 3)", "(..., N, 4)"
    one = np.zeros(4)
    cases += [
        case(V, "box_area", (flat,), f"boxes {last}"),
        case(V, "box_area", (scalar,), "boxes must have shape (..., 4); got ()"),
        case(V, "clip_boxes", (flat, (8, 8)), f"boxes {last}"),
        case(V, "encode_boxes", (flat, BOXES), f"boxes {last}"),
        case(V, "encode_boxes", (BOXES, flat), f"anchors {last}"),
        case(V, "decode_boxes", (flat, BOXES), f"deltas {last}"),
        case(V, "decode_boxes", (BOXES, flat), f"anchors {last}"),
        case(V, "giou_loss", (flat, BOXES), f"boxes1 {last}"),
        case(
            V,
            "giou_loss",
            (BOXES, BOXES[:4]),
            "boxes2 must have the shape of boxes1; got boxes1 (5, 4), boxes2 (4, 4)",
        ),
        case(V, "match_anchors", (flat, BOXES), f"anchors {last}"),
        case(
            V,
            "match_anchors",
            (ANCHORS[None], BOXES),
            "anchors must have shape (N, 4); got (1, 6, 4)",
        ),
        case(V, "match_anchors", (ANCHORS, one), f"boxes must have shape {lists}; got (4,)"),
        case(
            V,
            "assign_targets",
            (ANCHORS, BOXES, CLASSES[:2]),
            "labels must have shape boxes.shape[:-1] = (5,); got (2,)",
        ),
        case(V, "nms", (one, FIVE, 0.5), "boxes must have shape (N, 4); got (4,)"),
        case(V, "nms", (BOXES[None], FIVE, 0.5), "boxes must have shape (N, 4); got (1, 5, 4)"),
        case(
            V,
            "nms",
            (BOXES, FIVE[:3], 0.5),
            "scores must have shape boxes.shape[:1] = (5,); got (3,)",
        ),
        case(
            V,
            "batched_nms",
            (BOXES, FIVE, CLASSES[:3], 0.5),
            "classes must have the shape of scores; got scores (5,), classes (3,)",
        ),
        case(
            V,
            "subsample",
            (CLASSES, 2),
            "noise must have the shape of labels; got labels (5,), noise (2,)",
            noise=np.zeros(2),
        ),
        case(V, "hard_example_mask", (X,), "losses must have shape (N,); got (4, 3)"),
        case(
            V,
            "hard_example_mask",
            (FIVE,),
            "boxes must have shape (N, 4) = (5, 4); got (6, 4)",
            boxes=ANCHORS,
            iou_threshold=0.5,
        ),
        case(
            V,
            "hard_example_mask",
            (FIVE,),
            "positive must have the shape of losses; got losses (5,), positive (4,)",
            positive=LABELS,
            negative_ratio=3,
        ),
    ]
    for name in ("box_iou", "generalized_box_iou"):
        cases += [
            case(V, name, (one, BOXES), f"boxes1 must have shape {lists}; got (4,)"),
            case(V, name, (BOXES, flat), f"boxes2 must have shape {lists}; got (5, 3)"),
        ]
    return cases


CASES = [*numbers(), *words(), *types(), *shapes()]


@pytest.mark.parametrize("wrong", CASES, ids=str)
def test_message(backend: Backend, wrong: Case) -> None:
    message = wrong.message.replace("ARRAY", backend.array_name)
    with pytest.raises(wrong.error) as raised:
        backend(wrong.function, *wrong.args, **wrong.options)
    said = re.sub(r"\b(torch|array_api_strict)\.(?=bool|int|float|complex)", "", str(raised.value))
    assert said == f"{wrong.function}: {message}"


def test_every_function_is_here(backend: Backend) -> None:
    constants = {"AnchorConfig", "prior_bias", "inverse_frequency_alpha", "expected_initial_loss"}
    public = {name for name in focal.numpy.__all__ if not name.endswith(("_grad", "_hess"))}
    assert {c.function for c in CASES} == public - constants


@pytest.mark.parametrize("order", ["grad", "hess"])
def test_closed_forms_name_themselves(closed_form: Backend, order: str) -> None:
    name = f"sigmoid_focal_loss_{order}"
    with pytest.raises(ValueError, match=f"^{name}: gamma must be a finite number >= 0; got -1$"):
        closed_form(name, X, Y, gamma=-1)
    with pytest.raises(ValueError, match=f"^{name}: targets must have the shape of inputs; got "):
        closed_form(name, X, Y[0])


@pytest.mark.parametrize("name", ["sigmoid_focal_loss_star_grad", "softmax_focal_loss_grad"])
def test_other_closed_forms_name_themselves(closed_form: Backend, name: str) -> None:
    arguments = (X, LABELS if "softmax" in name else Y)
    with pytest.raises(ValueError, match=f"^{name}: gamma must be a finite number >= 0; got -1$"):
        closed_form(name, *arguments, gamma=-1)


CONSTANTS = [
    (lambda: focal.prior_bias(0.0), ValueError, "prior_bias: pi must lie inside (0, 1); got 0.0"),
    (lambda: focal.prior_bias(1), ValueError, "prior_bias: pi must lie inside (0, 1); got 1"),
    (
        lambda: focal.prior_bias([0.1, math.nan]),
        ValueError,
        "prior_bias: pi must lie inside (0, 1); got [0.1, nan]",
    ),
    (lambda: focal.prior_bias(None), TypeError, "prior_bias: pi must be numeric; got None"),
    (lambda: focal.prior_bias("x"), TypeError, "prior_bias: pi must be numeric; got 'x'"),
    (lambda: focal.prior_bias("0.5"), TypeError, "prior_bias: pi must be numeric; got '0.5'"),
    (
        lambda: focal.inverse_frequency_alpha([1, 2], [3]),
        ValueError,
        "inverse_frequency_alpha: num_negative must have the shape of num_positive; "
        "got num_positive (2,), num_negative (1,)",
    ),
    (
        lambda: focal.inverse_frequency_alpha(-1, 3),
        ValueError,
        "inverse_frequency_alpha: num_positive must be finite and >= 0; got -1.0",
    ),
    (
        lambda: focal.inverse_frequency_alpha(0, 0),
        ValueError,
        "inverse_frequency_alpha: num_positive and num_negative must not both be 0",
    ),
    (
        lambda: focal.expected_initial_loss(5, 6),
        ValueError,
        "expected_initial_loss: num_positives must be a finite number in [0, 5]; got 6",
    ),
    (
        lambda: focal.expected_initial_loss(5, 1, 0),
        ValueError,
        "expected_initial_loss: num_classes must be a finite number >= 1; got 0",
    ),
    (
        lambda: focal.expected_initial_loss(5, 1, math.nan),
        ValueError,
        "expected_initial_loss: num_classes must be a finite number >= 1; got nan",
    ),
    (
        lambda: focal.expected_initial_loss(5, 1, pi=1.0),
        ValueError,
        "expected_initial_loss: pi must lie inside (0, 1) or be None; got 1.0",
    ),
    (
        lambda: focal.expected_initial_loss(5, 1, gamma=-1),
        ValueError,
        "expected_initial_loss: gamma must be a finite number >= 0; got -1",
    ),
    (
        lambda: focal.expected_initial_loss(5, "x"),
        TypeError,
        "expected_initial_loss: num_positives must be a number; got 'x'",
    ),
    (
        lambda: focal.expected_initial_loss(5, "3"),
        TypeError,
        "expected_initial_loss: num_positives must be a number; got '3'",
    ),
    (
        lambda: focal.AnchorConfig(strides=()),
        ValueError,
        "AnchorConfig: strides must not be empty",
    ),
    (
        lambda: focal.AnchorConfig(scales=(1.0, 0.0)),
        ValueError,
        "AnchorConfig: scales must be > 0; got 0.0",
    ),
    (
        lambda: focal.AnchorConfig(ratios=("1",)),
        TypeError,
        "AnchorConfig: ratios must be a number; got '1'",
    ),
    (
        lambda: focal.AnchorConfig(sizes=(32.0,)),
        ValueError,
        "AnchorConfig: sizes must have one number per stride (5); got 1",
    ),
    (
        lambda: focal.AnchorConfig(offset=math.nan),
        ValueError,
        "AnchorConfig: offset must be a finite number; got nan",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CONSTANTS, ids=[c[2] for c in CONSTANTS])
def test_constants(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_expected_initial_loss_takes_no_arrays() -> None:
    with pytest.raises(
        TypeError, match=r"^expected_initial_loss: num_anchors must be a number; got list$"
    ):
        focal.expected_initial_loss([5, 6], 1)  # type: ignore[arg-type]
