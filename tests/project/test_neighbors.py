"""docs/neighbors.md: every row's call, taken from the page, against that project's formula.

The formulas are written from the mathematics in the textbook's form, in float64 and over logits
where that form has its digits. Alpha and gamma are those of the row. Gradients are autograd's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from folders import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pages import from_page

pytest.importorskip("torch")

import torch

import focal.torch
from focal import prior_bias

PAGE = ROOT / "docs" / "neighbors.md"
Tensor = torch.Tensor
Values = dict[str, Tensor]


def rows() -> dict[str, list[str]]:
    """The cells of each project."""
    table = re.search(r"^\| project \| alpha .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(), re.M)
    assert table is not None
    lines = [line.strip("| ").split(" | ") for line in table[1].splitlines()]
    assert all(len(cells) == 7 for cells in lines)
    return {re.sub(r"\(?\[.*", "", cells[0]).strip(): cells[1:] for cells in lines}


ROWS = rows()


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]


# ---------------------------------------------------------------- formulas


def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    p = 1 / (1 + torch.exp(-x))
    return -y * torch.log(p) - (1 - y) * torch.log(1 - p)


def fl(x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    p = 1 / (1 + torch.exp(-x))
    p_t = p * y + (1 - p) * (1 - y)
    return (alpha * y + (1 - alpha) * (1 - y)) * (1 - p_t) ** gamma * cross_entropy(x, y)


def anchors(v: Values, alpha: float, gamma: float) -> Tensor:
    """Focal loss of all anchors that are not ignored, one-hot."""
    one_hot = (v["labels"][..., None] == torch.arange(v["x"].shape[-1])).to(v["x"])
    return (fl(v["x"], one_hot, alpha, gamma) * (v["labels"][..., None] >= -1)).sum((1, 2))


def positives(v: Values) -> Tensor:
    return (v["labels"] >= 0).sum(1)


def by_batch(v: Values, alpha: float, gamma: float) -> Tensor:
    return anchors(v, alpha, gamma).sum() / max(1, int(positives(v).sum()))


def by_given(v: Values, alpha: float, gamma: float) -> Tensor:
    return anchors(v, alpha, gamma).sum() / v["n"]


def by_image(v: Values, alpha: float, gamma: float) -> Tensor:
    return (anchors(v, alpha, gamma) / positives(v).clamp(min=1)).mean()


def plus_one(v: Values, alpha: float, gamma: float) -> Tensor:
    return anchors(v, alpha, gamma).sum() / (positives(v).sum() + 1)


def dense_plus_one(v: Values, alpha: float, gamma: float) -> Tensor:
    return fl(v["x"], v["y"], alpha, gamma).sum() / (v["y"].sum() + 1)


def heatmap(v: Values, gamma: float, beta: float) -> Tensor:
    p, y = 1 / (1 + torch.exp(-v["x"])), v["q"]
    peak, around = (1 - p) ** gamma * torch.log(p), (1 - y) ** beta * p**gamma * torch.log(1 - p)
    count = (y == 1).sum()
    total = -torch.where(y == 1, peak, around).sum()
    return total / count if count > 0 else total


def quality(v: Values, beta: float) -> Tensor:
    p = 1 / (1 + torch.exp(-v["x"]))
    return ((v["q"] - p).abs() ** beta * cross_entropy(v["x"], v["q"])).sum() / v["n"]


def varifocal(v: Values, alpha: float, gamma: float) -> Tensor:
    p = 1 / (1 + torch.exp(-v["x"]))
    weight = torch.where(v["q"] > 0, v["q"], alpha * p**gamma)
    return (weight * cross_entropy(v["x"], v["q"])).sum()


def stopped_varifocal(v: Values, alpha: float, gamma: float) -> Tensor:
    p = (1 / (1 + torch.exp(-v["x"]))).detach()
    weight = torch.where(v["q"] > 0, v["q"], alpha * p**gamma)
    return (weight * cross_entropy(v["x"], v["q"])).sum() / v["n"]


def weighted_softmax(v: Values, first: float, last: float, gamma: float) -> Tensor:
    assert gamma == 0
    w = torch.tensor([first] * (v["x"].shape[-1] - 1) + [last], dtype=torch.float64)
    p = torch.exp(v["x"]) / torch.exp(v["x"]).sum(-1, keepdim=True)
    chosen = p.gather(-1, v["c"][..., None])[..., 0]
    return -(w[v["c"]] * torch.log(chosen)).sum() / w[v["c"]].sum()


def queries(v: Values, alpha: float, gamma: float) -> Tensor:
    """DETR's habit: the mean over queries, times their number."""
    each = fl(v["x"], v["y"], alpha, gamma)
    return each.mean(1).sum() / v["n"] * v["x"].shape[1]


def matching_cost(v: Values, alpha: float, gamma: float) -> Tensor:
    p = 1 / (1 + torch.exp(-v["x"]))
    negative = (1 - alpha) * p**gamma * -torch.log(1 - p)
    return alpha * (1 - p) ** gamma * -torch.log(p) - negative


def tokens(v: Values, alpha: float, gamma: float) -> Tensor:
    chosen = v["valid"] > 0
    return fl(v["x"][chosen], v["y"][chosen], alpha, gamma).sum() / v["n"]


def masks(v: Values, alpha: float, gamma: float) -> Tensor:
    return fl(v["m"], v["t"], alpha, gamma).mean(1).sum() / v["n"]


def sam3(v: Values, gamma: float) -> Tensor:
    p = 1 / (1 + torch.exp(-v["x"]))
    positive = 10 * v["y"] * cross_entropy(v["x"], v["q"])
    negative = (1 - v["y"]) * p**gamma * -torch.log(1 - p)
    return (positive + negative).mean()


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "RetinaNet": by_batch,
    "detectron2": by_given,
    "torchvision, OpenPCDet": by_image,
    "TF Model Garden": dense_plus_one,
    "EfficientDet": plus_one,
    "FCOS": by_given,
    "CornerNet, CenterNet": heatmap,
    "GFL": quality,
    "VFNet": lambda v, *a: varifocal(v, *a) / v["n"],
    "PP-YOLOE": lambda v, *a: varifocal(v, *a) / max(1.0, float(v["q"].sum())),
    "DETR": weighted_softmax,
    "Deformable, Conditional and H-DETR, DINO": queries,
    "their matching cost": matching_cost,
    "RT-DETR": stopped_varifocal,
    "Grounding DINO": tokens,
    "MaskFormer, SAM 2: masks": masks,
    "Mask2Former: masks": lambda v, g: cross_entropy(v["m"], v["t"]).mean(1).sum() / v["n"],
    "SAM 3: detection": sam3,
    "YOLOX: objectness": lambda v, g: cross_entropy(v["x"], v["y"]).sum() / v["n"],
    "YOLOv5 with `fl_gamma` 1.5": lambda v, *a: fl(v["x"], v["q"], *a).mean(),
}


# ---------------------------------------------------------------- rows


def example(seed: int, bound: float, rate: float) -> Values:
    """Two images of six rows and three classes, this fraction of them positive; two masks."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(
        [-2, -1, 0, 1, 2], (2, 6), p=[0.2 * (1 - rate), 0.8 * (1 - rate), *[rate / 3] * 3]
    )
    y = (labels[..., None] == np.arange(3)).astype(float)
    q = y * np.where(rng.uniform(size=(2, 6, 1)) < 0.3, 1, rng.uniform(0.05, 1, (2, 6, 1)))
    arrays = {
        "x": rng.uniform(-bound, bound, (2, 6, 3)),
        "m": rng.uniform(-bound, bound, (2, 12)),
        "t": rng.integers(0, 2, (2, 12)).astype(float),
        "valid": np.broadcast_to(rng.integers(0, 2, 3).astype(float), (2, 6, 3)).copy(),
        "n": np.array(max(1.0, y.sum())),
        "labels": labels,
        "y": y,
        "q": q,
        "c": rng.integers(0, 3, (2, 6)),
        "w": np.array([1.0, 1.0, 0.1]),
    }
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def gradient(loss: Tensor, x: Tensor) -> np.ndarray:
    (found,) = torch.autograd.grad(loss.sum(), x)
    return found.numpy()


@pytest.mark.parametrize("project", ROWS)
@given(
    seed=st.integers(0, 2**32 - 1),
    bound=st.sampled_from([1.0, 10.0]),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_row_is_that_projects_loss(project: str, seed: int, bound: float, rate: float) -> None:
    alpha, gamma, _, _, _, cell = ROWS[project]
    values = example(seed, bound, rate)
    logits = values["m" if "masks" in project else "x"].requires_grad_()
    here = eval(cell.strip("`"), vars(focal.torch) | {"torch": torch} | values)
    there = FORMULAS[project](values, *numbers(alpha), *numbers(gamma.replace("1 - y", "")))
    np.testing.assert_allclose(here.detach(), there.detach(), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(
        gradient(here, logits), gradient(there, logits), rtol=1e-9, atol=1e-14
    )


def test_every_row_has_a_formula_and_a_source() -> None:
    assert list(ROWS) == list(FORMULAS)
    table = PAGE.read_text().partition("| project | alpha |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        assert re.search(r"\]\(https://(github\.com|arxiv\.org)/", line), line


def test_the_priors() -> None:
    bias = -2.19  # CornerNet's and CenterNet's
    (prior,) = numbers(ROWS["CornerNet, CenterNet"][2])
    assert prior_bias(prior) == pytest.approx(bias, abs=0.01)
    objects, side, _ = numbers(ROWS["YOLOv5 with `fl_gamma` 1.5"][2])
    for stride in (8, 16, 32):  # a bias of log(8 / (640 / stride)^2)
        rate = objects / (side / stride) ** 2
        assert prior_bias(rate) == pytest.approx(math.log(rate), abs=0.03)
    others = {cells[2] for cells in ROWS.values() if numbers(cells[2])}
    assert others == {"0.01", "0.1", ROWS["YOLOv5 with `fl_gamma` 1.5"][2]}


def test_rt_detr_has_the_value_of_varifocal_loss_and_a_smaller_gradient() -> None:
    x = torch.tensor([-6.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(x)
    theirs = stopped_varifocal({"x": x, "q": zero, "n": torch.tensor(1.0)}, 0.75, 2)
    ours = focal.torch.varifocal_loss(x, zero)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-9)
    slope = gradient(theirs, x).item()
    assert slope == pytest.approx(0.75 / (1 + math.exp(6.0)) ** 3, rel=1e-9)
    assert gradient(ours, x).item() == pytest.approx(3 * slope, rel=0.01)


# ---------------------------------------------------------------- YOLOv3


def test_the_shares_of_the_negatives() -> None:
    share = from_page(PAGE, "share")
    lines = re.findall(r"^\| (?:RetinaNet|YOLOv3), .*$", PAGE.read_text(), re.M)
    assert len(lines) == 3
    for line in lines:
        _, positive, negative, *shown = line.strip("| ").split(" | ")
        counts = int(positive), int(negative.replace(",", ""))
        settings = [(None, 0), (0.5, 0.5), (0.25, 2)]
        found = [f"{share(*counts, *setting):.2%}".replace("%", " %") for setting in settings]
        assert found == shown
    assert share(8, 10_639, None, 0, 0.5) == pytest.approx(0.999, abs=5e-4)
    assert share(8, 10_639, 0.25, 2, 0.5) == pytest.approx(0.999, abs=8e-4)


def test_the_score_that_focal_loss_trains() -> None:
    """Where the two slopes balance; near the root of the page for a rare class; increasing."""
    trained = from_page(PAGE, "trained_score")
    rates = np.array([1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9])
    for alpha, gamma in ((0.25, 2.0), (0.5, 0.5)):
        p = np.array([trained(rate, alpha, gamma) for rate in rates])
        q = 1 - p
        up = rates * alpha * q**gamma * (gamma * p * -np.log(p) + q)
        down = (1 - rates) * (1 - alpha) * p**gamma * (gamma * q * -np.log(q) + p)
        np.testing.assert_allclose(up, down, rtol=1e-3)
        assert (np.diff(p) > 0).all()
        root = (rates[0] * alpha / ((1 - alpha) * (gamma + 1))) ** (1 / (gamma + 1))
        assert p[0] == pytest.approx(root, rel=0.05)
    np.testing.assert_allclose([trained(rate, 0.5, 0.0) for rate in rates], rates, rtol=1e-3)
