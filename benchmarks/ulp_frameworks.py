"""A picture and a table of docs/numerics.md: errors over the logit axis in every framework.

python -m benchmarks.ulp_frameworks

The loss of a positive at gamma 2 and its gradient by autodiff, in float32, by this library and by
the textbook's formula written with the framework's own operations, beside float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import focal.numpy
from benchmarks.figures import ulp_errors
from benchmarks.pages import markdown, save_plot, write_tables
from focal.retinanet.report.draw import PALETTE
from focal.testing.frameworks import FRAMEWORKS
from focal.testing.ulp import allowed_ulp

PAGE = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
PICTURE = PAGE.parent / "pictures" / "ulp_frameworks.png"
NAMES = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}
GAMMA = 2.0
X = np.linspace(-28, 28, 2801).astype(np.float32)

Errors = dict[str, tuple[np.ndarray, np.ndarray]]
"""Of "textbook" and "focal": those of the loss and those of the gradient."""


def textbook(backend: str) -> Callable[[Any, Any], Any]:
    """`(1 - p_t) ** gamma` times the framework's own cross entropy with logits."""
    if backend == "torch":
        torch = importlib.import_module("torch")
        sigmoid = torch.sigmoid
        cross_entropy = torch.nn.BCEWithLogitsLoss(reduction="none")
    elif backend == "jax":
        sigmoid = importlib.import_module("jax").nn.sigmoid
        cross_entropy = importlib.import_module("optax").sigmoid_binary_cross_entropy
    else:
        tf = importlib.import_module("tensorflow")
        sigmoid = tf.sigmoid

        def cross_entropy(x: Any, y: Any) -> Any:
            return tf.nn.sigmoid_cross_entropy_with_logits(labels=y, logits=x)

    def loss(x: Any, y: Any) -> Any:
        p = sigmoid(x)
        p_t = p * y + (1 - p) * (1 - y)
        return (1 - p_t) ** GAMMA * cross_entropy(x, y)

    return loss


def errors(backend: str, x: np.ndarray) -> Errors:
    """Errors at the logits of positives, in ULP."""
    y = np.ones_like(x)
    wide = x.astype(np.float64), y.astype(np.float64), None, GAMMA
    value = focal.numpy.sigmoid_focal_loss(*wide)
    gradient = focal.numpy.sigmoid_focal_loss_grad(*wide)
    framework = FRAMEWORKS[backend]()
    own = importlib.import_module(f"focal.{backend}").sigmoid_focal_loss
    found = {}
    for name, loss in (
        ("textbook", textbook(backend)),
        ("focal", lambda x, y: own(x, y, None, GAMMA)),
    ):
        got = framework.value_and_gradient(loss, framework.asarray(x), framework.asarray(y))
        value_got, gradient_got = (framework.numpy(array).astype(np.float64) for array in got)
        found[name] = ulp_errors(value_got, value), ulp_errors(gradient_got, gradient)
    return found


def figure(found: dict[str, Errors]) -> Figure:
    """A row for each framework: the loss, the gradient."""
    plot = Figure(figsize=(8.5, 9), dpi=100, layout="constrained")
    axes = plot.subplots(len(NAMES), 2, sharex=True, sharey=True)
    for row, (backend, title) in zip(axes, NAMES.items(), strict=True):
        for name, color in (("textbook", PALETTE[6]), ("focal", PALETTE[0])):
            for axis, error in zip(row, found[backend][name], strict=True):
                shown = np.maximum(error, 0.05)
                axis.plot(X, shown, ".", color=color, label=name, markersize=1.5)
        for axis, what in zip(row, ("loss", "gradient"), strict=True):
            bound = allowed_ulp("float32", GAMMA)
            axis.axhline(bound, color="#555555", linewidth=1, label=r"bound, 6 + 4$\gamma$")
            axis.set(title=f"{title}, {what}", yscale="log", ylim=(0.04, 1e9), xlim=(X[0], X[-1]))
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("error, ULP")
    for axis in axes[-1]:
        axis.set_xlabel("logit of a positive")
    axes[0][0].legend(frameon=False, markerscale=8, loc="upper left")
    return plot


def table(found: dict[str, Errors]) -> str:
    """The largest errors, a row for each framework."""
    rows = [("", "textbook, loss", "gradient", "focal, loss", "gradient")]
    for backend, title in NAMES.items():
        there = (f"{error.max():,.0f}" for error in found[backend]["textbook"])
        here = (f"{error.max():.2f}" for error in found[backend]["focal"])
        rows.append((title, *there, *here))
    return markdown(rows)


def main() -> None:
    """Measure, draw, write the table."""
    found = {backend: errors(backend, X) for backend in NAMES}
    save_plot(PICTURE, figure(found))
    write_tables(PAGE, {"ulp": table(found)})
    print(PICTURE, PAGE)


if __name__ == "__main__":
    main()
