"""Each loss with its parameters, and operands for it."""

from __future__ import annotations

import numpy as np

DENSE = {
    "sigmoid_focal_loss": ("alpha", "gamma", "label_smoothing"),
    "sigmoid_focal_loss_star": ("alpha", "gamma", "beta"),
    "balanced_cross_entropy": ("alpha",),
    "quality_focal_loss": ("beta",),
    "varifocal_loss": ("alpha", "gamma"),
    "heatmap_focal_loss": ("gamma", "beta"),
    "asymmetric_loss": ("gamma_positive", "gamma_negative"),
}
LABELLED = {
    "sparse_sigmoid_focal_loss": ("alpha", "gamma", "label_smoothing"),
    "softmax_focal_loss": ("alpha", "gamma", "label_smoothing"),
}
NUMBERS = {"alpha": 0.3, "beta": 1.25, "label_smoothing": 0.1, "margin": 0.05}
PARAMETERS = [(loss, p) for loss, names in (DENSE | LABELLED).items() for p in names]


def number(parameter: str) -> float:
    return NUMBERS.get(parameter, 1.75)


def operands(loss: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal((6, 3))
    if loss in DENSE:
        return x, rng.uniform(0.05, 0.95, x.shape)
    return x, np.array([0, 1, 2, 0, 1, 2] if loss == "softmax_focal_loss" else [0, 1, 2, -1, -2, 0])
