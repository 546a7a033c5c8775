"""The figures of the paper and additional ones, drawn with this library's functions.

python -m benchmarks.figures --out docs/pictures/figures --weights weights.safetensors --data DATA

Lin et al. 2017, arXiv:1708.02002. Each `..._figure` function draws one figure. The numbers come
from separate functions, so that they can be tested.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot

import focal
from benchmarks.pages import save_plot
from focal.cli.options import add_backend, open_dataset
from focal.files import write_atomically
from focal.numpy import anchors as make_anchors
from focal.numpy import (
    assign_targets,
    sigmoid_focal_loss,
    sigmoid_focal_loss_grad,
    sigmoid_focal_loss_star,
    sigmoid_focal_loss_star_grad,
)
from focal.retinanet.data import Dataset, eval_batches
from focal.retinanet.detector import backend_module, load
from focal.retinanet.report.draw import PALETTE

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
COLORS = (PALETTE[0], PALETTE[6], PALETTE[1], PALETTE[3], PALETTE[2])
OURS, OTHER = PALETTE[0], PALETTE[6]
SATURATED = 16.64
"""From this logit on, the float32 sigmoid is 1 and `1 - p_t` is 0."""
X_T = np.linspace(-5, 5, 501)
ANCHORS, POSITIVES, CLASSES = 100_000, 50, 80


class Figure(NamedTuple):
    """A figure and its caption."""

    draw: Callable[[], Plot]
    caption: str


def write_figures(out: Path, model: Any = None, dataset: Dataset | None = None) -> dict[str, str]:
    """Draw all figures into a folder, with `figures.md` that shows them.

    Args:
        out: The folder; made if it does not exist.
        model: A trained detector for figure 4, which is left out without it.
        dataset: Images with boxes for figure 4.

    Returns:
        The caption of each picture, by file name.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = dict(FIGURES)
    if model is not None and dataset is not None:
        positives, negatives = anchor_logits(model, dataset)
        figures["cumulative_loss"] = Figure(
            lambda: cumulative_figure(positives, negatives),
            _cumulative_caption(positives, negatives, dataset.name),
        )
    captions = {}
    page = ["# Figures of the focal loss", ""]
    for name, figure in figures.items():
        file = f"{name}.png"
        save_plot(out / file, figure.draw())
        captions[file] = figure.caption
        page += [f"![{name}]({file})", "", figure.caption, ""]
    write_atomically(out / "figures.md", "\n".join(page).encode())
    return captions


# The numbers


def textbook(x: np.ndarray, y: float, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Focal loss without alpha as it is often written, `(1 - p_t)^gamma ce`, and its gradient.

    In the type of `x`, with the operations of an autodiff of that expression.
    """
    one = x.dtype.type(1)
    sign = x.dtype.type(2 * y - 1)
    with np.errstate(all="ignore"):
        p = one / (one + np.exp(-x))
        p_t = p if y else one - p
        ce = np.maximum(-sign * x, 0) + np.log1p(np.exp(-np.abs(x)))
        m = one - p_t
        # autodiff: the product rule, each factor's derivative by the chain rule
        power = gamma * m ** x.dtype.type(gamma - 1) if gamma else np.zeros_like(x)
        return m**gamma * ce, sign * (-power * p * (one - p) * ce - m**gamma * (one - p_t))


def ulp_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The distances from float64 numbers in units in the last place of float32."""
    unit = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32))
    return np.abs(found - exact) / unit


def cumulative_share(losses: np.ndarray, points: int = 1001) -> tuple[np.ndarray, np.ndarray]:
    """The share of the sum that the lowest losses hold, over the share of the losses they are.

    Returns:
        Shares of the losses from 0 to 1, and of the sum, each (points,).
    """
    total = np.concatenate([[0.0], np.cumsum(np.sort(losses.astype(np.float64)))])
    share = np.linspace(0, 1, points)
    return share, np.interp(share, np.linspace(0, 1, len(total)), total / total[-1])


def anchor_logits(model: Any, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The logits of a detector for all anchors of a dataset.

    Returns:
        The logits of the true class of positive anchors, and all other logits of anchors that
        are not ignored.
    """
    config = model.config
    grid = make_anchors(config.image_size, config.anchors).astype(np.float32)
    positives, negatives = [], []
    batches = eval_batches(dataset, config, 8)
    with contextlib.closing(batches):
        for batch in batches:
            logits, _ = backend_module(model.backend).raw_outputs(model, batch.images)
            labels, _ = assign_targets(
                grid,
                batch.boxes,
                batch.labels,
                config.foreground,
                config.background,
                config.allow_low_quality,
            )
            real = (batch.image_ids >= 0)[:, None]
            right = (labels[..., None] == np.arange(config.num_classes)) & real[..., None]
            used = ((labels > -2) & real)[..., None]
            positives.append(logits[right])
            negatives.append(logits[used & ~right])
    return np.concatenate(positives), np.concatenate(negatives)


# The drawing


def loss_figure() -> Plot:
    """Figure 1."""
    p = np.linspace(0.002, 0.998, 500)
    logits = np.log(p) - np.log1p(-p)
    plot, (axis,) = blank()
    for gamma, color in zip(GAMMAS, COLORS, strict=True):
        loss = sigmoid_focal_loss(logits, np.ones_like(p), None, gamma)
        name = r"$\gamma$ = 0, cross entropy" if gamma == 0 else rf"$\gamma$ = {gamma:g}"
        axis.plot(p, loss, color=color, label=name)
    axis.axvspan(0.6, 1, color="#eeeeee", zorder=0)
    axis.text(0.8, 2.1, "well classified", ha="center", color="#555555")
    axis.set(xlabel="probability of the true class, $p_t$", ylabel="loss", xlim=(0, 1), ylim=(0, 5))
    axis.legend(frameon=False)
    return plot


def _variants() -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """Name, color, loss and derivative in x_t of figures 5 and 6, over `X_T`."""
    y = np.ones_like(X_T)
    found = []
    for name, gamma, color in (("CE", 0.0, COLORS[0]), (r"FL, $\gamma$ = 2", 2.0, COLORS[3])):
        loss = sigmoid_focal_loss(X_T, y, None, gamma)
        found.append((name, color, loss, sigmoid_focal_loss_grad(X_T, y, None, gamma)))
    for gamma, beta, color in ((2.0, 1.0, COLORS[1]), (4.0, 0.0, COLORS[4])):
        name = rf"FL*, $\gamma$ = {gamma:g}, $\beta$ = {beta:g}"
        loss = sigmoid_focal_loss_star(X_T, y, None, gamma, beta)
        found.append((name, color, loss, sigmoid_focal_loss_star_grad(X_T, y, None, gamma, beta)))
    return found


def star_figure() -> Plot:
    """Figure 5."""
    plot, (axis,) = blank()
    for name, color, loss, _ in _variants():
        axis.plot(X_T, loss, color=color, label=name)
    axis.set(xlabel="signed logit, $x_t = yx$", ylabel="loss", xlim=(-5, 5), ylim=(0, 5))
    axis.legend(frameon=False)
    return plot


def derivative_figure() -> Plot:
    """Figure 6."""
    plot, (axis,) = blank()
    for name, color, _, slope in _variants():
        axis.plot(X_T, slope, color=color, label=name)
    axis.axhline(-1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.set(xlabel="signed logit, $x_t = yx$", ylabel="derivative in $x_t$", xlim=(-5, 5))
    axis.set_ylim(-1.2, 0.05)
    axis.legend(frameon=False)
    return plot


def cumulative_figure(positives: np.ndarray, negatives: np.ndarray) -> Plot:
    """Figure 4."""
    plot, axes = blank(2)
    sides = (("positives", positives, 1.0), ("negatives", negatives, 0.0))
    for axis, (name, logits, y) in zip(axes, sides, strict=True):
        for gamma, color in zip(GAMMAS[:4], COLORS, strict=False):
            losses = sigmoid_focal_loss(logits, np.full_like(logits, y), None, gamma)
            axis.plot(*cumulative_share(losses), color=color, label=rf"$\gamma$ = {gamma:g}")
        axis.set(xlabel=f"fraction of {name}, easiest first", xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("cumulative share of the loss")
    axes[0].legend(frameon=False)
    return plot


def ulp_figure() -> Plot:
    """Errors of float32 over the logit axis."""
    x = np.linspace(-28, 28, 2801).astype(np.float32)
    y = np.ones_like(x)
    plot, axes = blank(2)
    for axis, order, name in zip(axes, (0, 1), ("loss", "gradient"), strict=True):
        functions = (sigmoid_focal_loss, sigmoid_focal_loss_grad)
        exact = functions[order](x.astype(np.float64), y.astype(np.float64), None, 2.0)
        ours = functions[order](x, y, None, 2.0)
        sides = (("textbook", OTHER, textbook(x, 1.0, 2.0)[order]), ("focal", OURS, ours))
        for label, color, found in sides:
            error = np.maximum(ulp_errors(found, exact), 0.05)
            axis.plot(x, error, ".", color=color, label=label, markersize=1.5)
        axis.axhline(14, color="#555555", linewidth=1, label=r"bound, 6 + 4$\gamma$")
        axis.set(yscale="log", ylim=(0.04, 1e8), xlim=(-28, 28))
        axis.set(xlabel="logit of a positive", ylabel=f"error of the {name}, ULP")
    axes[0].legend(frameon=False, markerscale=8, loc="upper left")
    return plot


def saturation_figure() -> Plot:
    """The gradient of a well classified positive."""
    x = np.linspace(0, 28, 901).astype(np.float32)
    y = np.ones_like(x)
    plot, axes = blank(2)
    for axis, gamma in zip(axes, (0.5, 2.0), strict=True):
        _, slope = textbook(x, 1.0, gamma)
        ours = -sigmoid_focal_loss_grad(x, y, None, gamma)
        axis.plot(x, ours, color=OURS, label="focal", linewidth=4, alpha=0.6)
        shown = np.where(slope < 0, -slope, np.nan)
        axis.plot(x, shown, color=OTHER, label="textbook")
        word = "NaN" if np.isnan(slope[-1]) else "exactly 0"
        axis.axvspan(SATURATED, x[-1], color="#eeeeee", zorder=0)
        axis.text(22.3, 1e-3, f"textbook: {word}", ha="center", color="#555555")
        axis.set(yscale="log", ylim=(1e-37, 10), xlim=(0, x[-1]))
        axis.set(xlabel="logit of a positive", title=rf"$\gamma$ = {gamma:g}")
    axes[0].set_ylabel("size of the gradient")
    axes[0].legend(frameon=False, loc="lower left")
    return plot


def initial_loss_figure() -> Plot:
    """The initial classification loss, with and without the prior."""
    plot, axes = blank(2)
    cases = (("CE", 0.5, 0.0, COLORS[0]), (r"FL, $\gamma$ = 2", 0.25, 2.0, COLORS[3]))
    counts = np.logspace(3, 5.5, 60)
    priors = np.logspace(-5, np.log10(0.5), 60)
    for name, alpha, gamma, color in cases:
        for prior, style, word in ((0.01, "-", r"$\pi$ = 0.01"), (None, "--", "no prior")):
            losses = [
                focal.expected_initial_loss(n, POSITIVES, CLASSES, prior, alpha, gamma)
                for n in counts
            ]
            axes[0].plot(counts, losses, style, color=color, label=f"{name}, {word}")
        losses = [
            focal.expected_initial_loss(ANCHORS, POSITIVES, CLASSES, prior, alpha, gamma)
            for prior in priors
        ]
        axes[1].plot(priors, losses, color=color, label=name)
    for axis in axes:
        axis.set(xscale="log", yscale="log", ylim=(0.3, 3e5))
        axis.legend(frameon=False, loc="upper left", fontsize=9)
    axes[0].set(xlabel="anchors", ylabel="first classification loss", xlim=(1e3, 10**5.5))
    axes[1].set(xlabel=rf"prior $\pi$, {ANCHORS:,} anchors", xlim=(1e-5, 0.5))
    return plot


def blank(columns: int = 1) -> tuple[Plot, Sequence[Axes]]:
    """An empty figure in the style of all."""
    plot = Plot(figsize=(6 if columns == 1 else 8.5, 4), dpi=100, layout="constrained")
    axes = plot.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return plot, axes


def _cumulative_caption(positives: np.ndarray, negatives: np.ndarray, name: str) -> str:
    """The share of the loss in the hardest examples of each kind, at gamma 0 and 2."""
    held = {}
    for kind, logits, y, hardest in (("p", positives, 1.0, 20), ("n", negatives, 0.0, 1)):
        for gamma in (0.0, 2.0):
            losses = sigmoid_focal_loss(logits, np.full_like(logits, y), None, gamma)
            held[kind, gamma] = 1 - cumulative_share(losses, 101)[1][100 - hardest]
    return (
        f"The paper's figure 4, from {len(positives):,} logits of positives and "
        f"{len(negatives):,} of negatives of a detector on {name}: examples sorted by loss, and "
        "the share of the total loss in the easiest of them. The hardest fifth of the positives "
        f"has {held['p', 0.0]:.0%} of the loss at gamma 0 and {held['p', 2.0]:.0%} at gamma 2; the "
        f"hardest hundredth of the negatives {held['n', 0.0]:.0%} and {held['n', 2.0]:.0%}: gamma "
        "suppresses the easy background."
    )


FIGURES: Mapping[str, Figure] = {
    "loss": Figure(
        loss_figure,
        "The paper's figure 1: the larger gamma, the less a well-classified example contributes. "
        "At gamma 2 and $p_t$ = 0.9 the loss is a hundredth of the cross entropy.",
    ),
    "loss_star": Figure(
        star_figure,
        "The paper's figure 5: FL and the two FL* of its table 3 against the signed logit. Both "
        "reduce the loss for $x_t > 0$.",
    ),
    "derivatives": Figure(
        derivative_figure,
        "The paper's figure 6: the derivatives. All approach 0 for confident, correct "
        "predictions, those of focal loss sooner. The derivative of FL falls to -1.13 before it "
        "returns to -1.",
    ),
    "ulp": Figure(
        ulp_figure,
        "Errors in float32 at gamma 2, in units in the last place (points below 0.05 are drawn "
        "there). The error of the textbook formula, with `(1 - p_t) ** gamma`, grows with the "
        "logit; from 17 on no digit is correct. This library stays within a few units everywhere.",
    ),
    "saturation": Figure(
        saturation_figure,
        "The gradient of a well-classified positive in float32. Where the sigmoid rounds to 1, "
        "the gradient of the textbook formula is 0 or, for gamma below 1, NaN. The true gradient "
        "decays as $(1 + \\gamma)\\,e^{-(1 + \\gamma) x}$.",
    ),
    "initial_loss": Figure(
        initial_loss_figure,
        "The initial classification loss by `focal.expected_initial_loss` (80 classes, 50 "
        "positives). Without the prior it is in the thousands, almost all from background, and "
        "grows with the number of anchors. With $\\pi$ = 0.01 focal loss starts near 1, about the "
        "minimum over all priors.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all figures, and print the names of the files."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.weights is None) != (options.data is None):
        parser.error("--weights and --data: figure 4 needs both; got one")
    model = dataset = None
    if options.weights is not None:
        model = load(options.weights, options.backend, options.device)
        dataset = open_dataset(options.data, options.split, model.config.image_size)
    for name in write_figures(options.out, model, dataset):
        print(options.out / name)
    print(options.out / "figures.md")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description="draw the figures of the paper, and our own",
    )
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder to write")
    parser.add_argument("--weights", type=Path, help="a trained detector, for figure 4")
    parser.add_argument("--data", help="images for it: a COCO folder, or 'shapes' (generated)")
    parser.add_argument("--split", default="test", help="train, val or test (default)")
    add_backend(parser)
    return parser


if __name__ == "__main__":
    main()
