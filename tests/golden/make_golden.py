"""Reference values of the formulas, from their definitions in high precision.

    python tests/golden/make_golden.py

writes the JSON files beside this script. Nothing of focal is imported and no stable form is
used: the textbook formulas are evaluated with so many digits that 1 - p still has fifty at a
logit of 1000, and the derivatives are mpmath's numerical ones. Numbers are stored as the nearest
float64, which JSON round-trips.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mpmath
from mpmath import mpf

HERE = Path(__file__).parent
mpmath.mp.dps = 1000  # 1 - sigmoid(1000) starts at the 435th digit

LOGITS = [0.0] + [
    sign * x
    for x in (1e-3, 0.5, 1.0, 2.0, 4.0, 10.0, 17.0, 20.0, 50.0, 88.0, 100.0, 400.0, 1000.0)
    for sign in (1, -1)
]
TARGETS = [0.0, 1.0, 0.3, 1e-6, 1 - 1e-6]
GAMMAS = [0.0, 0.5, 1.0, 1.7, 2.0, 3.0, 5.0]
ALPHAS = [None, 0.25]
STAR = [(2.0, 1.0), (4.0, 0.0), (1.0, 0.0), (0.5, -3.0)]
VARIANT_LOGITS = [x for x in LOGITS if abs(x) in (0, 0.5, 2, 10, 20, 88, 100, 1000)]
VARIANTS = {
    "quality_focal_loss": [[0.0], [0.5], [1.0], [2.0], [5.0]],
    "varifocal_loss": [[0.75, 2.0], [0.75, 0.5], [1.0, 0.0], [0.25, 5.0]],
    "heatmap_focal_loss": [[2.0, 4.0], [0.5, 0.0], [0.0, 1.0], [5.0, 0.5]],
    "asymmetric_loss": [[1.0, 4.0, 0.05], [0.5, 0.5, 0.05], [2.0, 2.0, 0.0], [5.0, 0.0, 0.3]],
}
ROWS = [
    ([2.0, 0.5, -1.0], 0),
    ([2.0, 0.5, -1.0], 2),
    ([1000.0, 999.5, 998.0], 0),
    ([1000.0, 999.5, 998.0], 2),
    ([-1000.0, -1000.5, -1002.0], 1),
    ([0.0, 0.0, 0.0, 0.0], 3),
    ([7.0, 7.0, -3.0], 1),
    ([60.0, 0.0, -5.0, 1.0], 0),
    ([60.0, 0.0, -5.0, 1.0], 3),
    ([0.0, 200.0], 0),
    ([0.0, 200.0], 1),
    ([1e-3], 0),
]
SMOOTHING = 0.125
PRIORS = [1e-12, 1e-6, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1 - 1e-6]
BOXES = [
    [0.0, 0.0, 10.0, 10.0],
    [5.0, 5.0, 15.0, 15.0],
    [2.0, 3.0, 7.5, 4.25],
    [-20.0, -30.0, -10.0, 0.5],
    [0.1, 0.2, 640.3, 480.7],
    [300.0, 200.0, 333.0, 211.0],
    [4.0, 4.0, 4.0, 9.0],
]
DELTAS = [
    [0.0, 0.0, 0.0, 0.0],
    [0.1, -0.2, 0.3, -0.4],
    [2.5, 1.0, -3.0, 1.5],
    [0.0, 0.0, 5.0, -9.0],
]


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


def focal(x: mpf, y: mpf, alpha: float | None, gamma: float) -> mpf:
    p = sigmoid(x)
    not_p_t = y * (1 - p) + (1 - y) * p
    alpha_t = 1 if alpha is None else mpf(alpha) * y + (1 - mpf(alpha)) * (1 - y)
    return alpha_t * not_p_t**gamma * (-y * mpmath.log(p) - (1 - y) * mpmath.log(1 - p))


def focal_star(x: mpf, y: mpf, gamma: float, beta: float) -> mpf:
    def loss(margin: mpf) -> mpf:
        return -mpmath.log(sigmoid(gamma * margin + beta)) / gamma

    return y * loss(x) + (1 - y) * loss(-x)


def quality_focal(x: mpf, y: mpf, beta: float) -> mpf:
    return abs(y - sigmoid(x)) ** beta * focal(x, y, None, 0)


def varifocal(x: mpf, y: mpf, alpha: float, gamma: float) -> mpf:
    return y * focal(x, y, None, 0) if y > 0 else alpha * focal(x, y, None, gamma)


def heatmap_focal(x: mpf, y: mpf, gamma: float, beta: float) -> mpf:
    return focal(x, y, None, gamma) if y == 1 else (1 - y) ** beta * focal(x, mpf(0), None, gamma)


def asymmetric(x: mpf, y: mpf, gamma_positive: float, gamma_negative: float, margin: float) -> mpf:
    shifted = max(sigmoid(x) - margin, mpf(0))
    negative = shifted**gamma_negative * -mpmath.log(1 - shifted)
    return y * focal(x, mpf(1), None, gamma_positive) + (1 - y) * negative


def softmax_focal(row: Sequence[mpf], label: int, gamma: float) -> mpf:
    powers = [mpmath.exp(x) for x in row]
    p = powers[label] / mpmath.fsum(powers)
    return (1 - p) ** gamma * -mpmath.log(p) if len(row) > 1 else mpf(0)


def overlap(a: Sequence[mpf], b: Sequence[mpf]) -> tuple[mpf, mpf]:
    """IoU and GIoU, with a quotient without denominator as 0."""
    w = max(min(a[2], b[2]) - max(a[0], b[0]), mpf(0))
    h = max(min(a[3], b[3]) - max(a[1], b[1]), mpf(0))
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - w * h
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = w * h / union if union else mpf(0)
    return iou, iou - ((hull - union) / hull if hull else mpf(0))


def encode(box: Sequence[mpf], anchor: Sequence[mpf]) -> list[mpf]:
    w, h, wa, ha = box[2] - box[0], box[3] - box[1], anchor[2] - anchor[0], anchor[3] - anchor[1]
    dx = ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / wa
    dy = ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / ha
    return [dx, dy, mpmath.log(w / wa), mpmath.log(h / ha)]


def decode(delta: Sequence[mpf], anchor: Sequence[mpf]) -> list[mpf]:
    wa, ha = anchor[2] - anchor[0], anchor[3] - anchor[1]
    clip = mpmath.log(mpf(1000) / 16)
    w, h = wa * mpmath.exp(min(delta[2], clip)), ha * mpmath.exp(min(delta[3], clip))
    x = (anchor[0] + anchor[2]) / 2 + wa * delta[0]
    y = (anchor[1] + anchor[3]) / 2 + ha * delta[1]
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def derivatives(function: Callable[[mpf], mpf], x: mpf, orders: int) -> list[float]:
    """Value and derivatives; a step far below any scale of the formulas, far above the digits."""
    h = mpf(10) ** -100
    low, at, high = function(x - h), function(x), function(x + h)
    return [float(v) for v in (at, (high - low) / (2 * h), (high - 2 * at + low) / h**2)[:orders]]


def exact(values: Sequence[float]) -> list[mpf]:
    return [mpf(v) for v in values]


def sigmoid_table() -> dict[str, Any]:
    axes = itertools.product(ALPHAS, GAMMAS, TARGETS, LOGITS)
    rows = [
        derivatives(lambda x, a=a, g=g, y=y: focal(x, mpf(y), a, g), mpf(x), 3)
        for a, g, y, x in axes
    ]
    value, grad, hess = zip(*rows, strict=True)
    return {
        "order": "alphas, gammas, targets, logits; the last varies fastest",
        "alphas": ALPHAS,
        "gammas": GAMMAS,
        "targets": TARGETS,
        "logits": LOGITS,
        "value": value,
        "grad": grad,
        "hess": hess,
    }


def star_table() -> dict[str, Any]:
    axes = itertools.product(STAR, TARGETS, LOGITS)
    rows = [
        derivatives(lambda x, s=s, y=y: focal_star(x, mpf(y), *s), mpf(x), 2) for s, y, x in axes
    ]
    value, grad = zip(*rows, strict=True)
    return {
        "order": "settings, targets, logits; the last varies fastest",
        "settings": STAR,
        "targets": TARGETS,
        "logits": LOGITS,
        "value": value,
        "grad": grad,
    }


def variant_table() -> dict[str, Any]:
    table: dict[str, Any] = {
        "order": "settings, targets, logits; the last varies fastest",
        "targets": TARGETS,
        "logits": VARIANT_LOGITS,
    }
    functions = (quality_focal, varifocal, heatmap_focal, asymmetric)
    for (name, settings), function in zip(VARIANTS.items(), functions, strict=True):
        rows = [
            derivatives(lambda x, f=function, s=s, y=y: f(x, mpf(y), *s), mpf(x), 3)
            for s, y, x in itertools.product(settings, TARGETS, VARIANT_LOGITS)
        ]
        value, grad, hess = zip(*rows, strict=True)
        table[name] = {"settings": settings, "value": value, "grad": grad, "hess": hess}
    return table


def smoothed_softmax_table() -> list[dict[str, Any]]:
    table = []
    for row, label in ROWS:

        def loss(x: mpf, j: int, row: Any = row, label: int = label) -> mpf:
            logits = [*row[:j], x, *row[j + 1 :]]
            each = [softmax_focal(logits, k, 0.5) for k in range(len(row))]
            return (1 - mpf(SMOOTHING)) * each[label] + mpf(SMOOTHING) * sum(each) / len(row)

        logits = exact(row)
        grad = [
            derivatives(lambda x, j=j, loss=loss: loss(x, j), logits[j], 2)[1]
            for j in range(len(row))
        ]
        table.append(
            {
                "logits": row,
                "label": label,
                "gamma": 0.5,
                "smoothing": SMOOTHING,
                "value": float(loss(logits[0], 0)),
                "grad": grad,
            }
        )
    return table


def softmax_table() -> list[dict[str, Any]]:
    table = []
    for (row, label), gamma in itertools.product(ROWS, GAMMAS):

        def loss(x: mpf, j: int, row: Any = row, label: int = label, gamma: float = gamma) -> mpf:
            return softmax_focal([*row[:j], x, *row[j + 1 :]], label, gamma)

        logits = exact(row)
        grad = [
            derivatives(lambda x, j=j, loss=loss: loss(x, j), logits[j], 2)[1]
            for j in range(len(row))
        ]
        value = float(softmax_focal(logits, label, gamma))
        table.append({"logits": row, "label": label, "gamma": gamma, "value": value, "grad": grad})
    return table


def box_tables() -> dict[str, Any]:
    boxes = [exact(b) for b in BOXES]
    solid = boxes[:-1]
    overlaps = [[overlap(a, b) for b in boxes] for a in boxes]
    return {
        "boxes": BOXES,
        "iou": [[float(iou) for iou, _ in row] for row in overlaps],
        "giou": [[float(giou) for _, giou in row] for row in overlaps],
        "encode": [[[float(v) for v in encode(b, a)] for a in solid] for b in solid],
        "deltas": DELTAS,
        "decode": [[[float(v) for v in decode(exact(d), a)] for a in solid] for d in DELTAS],
    }


def main() -> None:
    tables = {
        "sigmoid_focal": sigmoid_table(),
        "sigmoid_focal_star": star_table(),
        "variants": variant_table(),
        "softmax_focal": softmax_table(),
        "softmax_focal_smoothed": smoothed_softmax_table(),
        "prior_bias": [[p, float(-mpmath.log((1 - mpf(p)) / mpf(p)))] for p in PRIORS],
        "boxes": box_tables(),
    }
    for name, table in tables.items():
        (HERE / f"{name}.json").write_text(json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
