"""docs/migration.md: the formula of each library in plain NumPy, and our call that replaces it.

The formulas are those that each library documents, in textbook form, so they are compared where
that form has its digits. optax and Keras are run themselves: over logits where they are right, and
where they are not it is asserted what they return. The functions that the page gives are taken from
the page.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import Backend
from folders import ROOT
from numpy.testing import assert_allclose, assert_array_equal
from pages import from_page

from focal.numpy import (
    asymmetric_loss,
    heatmap_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_grad,
    sigmoid_focal_loss_hess,
    sigmoid_focal_loss_star,
    softmax_focal_loss,
    softmax_focal_loss_grad,
    sparse_sigmoid_focal_loss,
    varifocal_loss,
)

X = np.array([[-3.0, -0.5, 0.0], [0.8, 2.0, -1.5], [4.0, 1.0, -2.5], [0.2, -4.0, 3.0]])
LABELS = np.array([0, 2, 1, -1])
HARD = (LABELS[:, None] == np.arange(3)).astype(float)
SOFT = np.array([[1.0, 0.3, 0.0], [0.5, 0.9, 0.1], [0.0, 0.0, 1.0], [0.7, 0.2, 0.4]])
CHOSEN = np.array([0, 2, 1, 1])
P = 1 / (1 + np.exp(-X))
RIGHT = {"rtol": 1e-12}
PAGE = ROOT / "docs" / "migration.md"


two_terms = from_page(PAGE, "two_terms")


def cross_entropy(y: np.ndarray) -> np.ndarray:
    return -y * np.log(P) - (1 - y) * np.log(1 - P)


def softmax() -> np.ndarray:
    e = np.exp(X)
    return e / e.sum(1, keepdims=True)


def torchvision(y: np.ndarray, alpha: float, gamma: float) -> np.ndarray:
    """The form of torchvision, fvcore, optax, Keras, Paddle and TensorFlow Addons."""
    p_t = P * y + (1 - P) * (1 - y)
    loss = cross_entropy(y) * (1 - p_t) ** gamma
    return loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("y", [HARD, SOFT])
def test_torchvision_and_fvcore(y: np.ndarray) -> None:
    assert_allclose(sigmoid_focal_loss(X, y), torchvision(y, 0.25, 2), **RIGHT)
    assert_allclose(sigmoid_focal_loss(X, y, -1, 1.5), torchvision(y, -1, 1.5), **RIGHT)
    mean = sigmoid_focal_loss(X, y, 0.25, 2, "mean")
    assert_allclose(mean, torchvision(y, 0.25, 2).mean(), **RIGHT)


def test_torchvision_has_no_gradient_from_logit_17_on() -> None:
    """In float32 its 1 - p_t is 0 there, and 0 ** (gamma - 1) is infinite; ours is neither."""
    x = np.float32(17.0)
    p = 1 / (1 + np.exp(-x))
    assert 1 - p == 0
    slope = sigmoid_focal_loss_grad(np.array([x]), np.ones(1), None, 0.5)
    assert slope.dtype == np.float32 and -1.3e-11 < slope[0] < -1.2e-11


def test_torchvision_half_types_on_a_cpu() -> None:
    """The formula there stays in float16, where the sum of a detector's losses is infinite."""
    torch = pytest.importorskip("torch")
    from focal.torch import sigmoid_focal_loss as ours

    x, y = torch.full((100_000,), 3.0, dtype=torch.float16), torch.zeros(100_000)
    p = torch.sigmoid(x)
    there = 0.75 * p**2 * torch.nn.functional.softplus(x)
    exact = 100_000 * sigmoid_focal_loss(np.array(3.0), np.array(0.0))
    assert ours(x, y).dtype == there.dtype == torch.float16
    assert there.sum().item() == np.inf
    for reduction, wanted in (("sum", exact), ("mean", exact / 100_000)):
        loss = ours(x, y, reduction=reduction)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted, rel=1e-5)


def test_fvcore_star() -> None:
    for gamma in (1.0, 2.0):
        there = np.log(1 + np.exp(-gamma * X * (2 * HARD - 1))) / gamma
        here = sigmoid_focal_loss_star(X, HARD, alpha=-1, gamma=gamma, beta=0)
        assert_allclose(here, there, **RIGHT)
    soft = np.log(1 + np.exp(-X * (2 * SOFT - 1)))  # at 0.5 it is log 2, whatever the logit
    assert not np.allclose(sigmoid_focal_loss_star(X, SOFT, -1, 1, 0), soft)


def test_detectron2() -> None:
    gt, ema = np.array([0, 3, 2, -1]), 7.5  # 3 is background, -1 ignored
    there = torchvision((gt[:, None] == np.arange(3)).astype(float), 0.25, 2)[gt >= 0].sum() / ema
    labels = np.where(gt == -1, -2, np.where(gt == 3, -1, gt))
    assert_allclose(sparse_sigmoid_focal_loss(X, labels, reduction="sum") / ema, there, **RIGHT)


def test_mmdetection_focal() -> None:
    label = np.where(LABELS < 0, 3, LABELS)  # 3 is background
    labels = np.where(label == 3, -1, label)
    there = torchvision(HARD, 0.25, 2).sum()
    total = sparse_sigmoid_focal_loss(X, labels, reduction="sum")
    assert_allclose(total / 3.0, there / 3.0, **RIGHT)  # avg_factor 3
    assert_allclose(total / len(X), there / 4, **RIGHT)  # mmcv's mean
    mean = torchvision(HARD, 0.25, 2).mean()  # FocalLoss's own
    assert_allclose(sparse_sigmoid_focal_loss(X, labels, reduction="mean"), mean, **RIGHT)
    weight = np.array([2.0, 0.0, 1.0, 0.5])
    weighted = (torchvision(HARD, 0.25, 2) * weight[:, None]).sum() / 3
    here = sparse_sigmoid_focal_loss(X, labels, reduction="sum", weight=weight[:, None]) / 3
    assert_allclose(here, weighted, **RIGHT)
    assert_allclose(sparse_sigmoid_focal_loss(X, labels, reduction="positives"), there / 3, **RIGHT)


def test_mmcv_softmax() -> None:
    p, weight, alpha = softmax()[np.arange(4), CHOSEN], np.array([1.0, 2.0, 0.5]), 0.25
    there = -alpha * weight[CHOSEN] * (1 - p) ** 2 * np.log(p)
    assert_allclose(softmax_focal_loss(X, CHOSEN, alpha * weight), there, **RIGHT)
    there[1] = 0
    label = np.where(np.arange(4) == 1, -1, CHOSEN)
    assert_allclose(softmax_focal_loss(X, label, alpha * weight, ignore_index=-1), there, **RIGHT)


def test_mmdetection_relatives() -> None:
    there = np.abs(SOFT - P) ** 2 * cross_entropy(SOFT)
    assert_allclose(quality_focal_loss(X, SOFT), there, **RIGHT)
    rows = there.sum(axis=1).mean()
    assert_allclose(quality_focal_loss(X, SOFT, reduction="sum") / len(X), rows, **RIGHT)
    assert_allclose(quality_focal_loss(X, SOFT, reduction="mean") * 3, rows, **RIGHT)
    weight = np.where(SOFT > 0, SOFT, 0.75 * np.abs(P - SOFT) ** 2)
    assert_allclose(varifocal_loss(X, SOFT), weight * cross_entropy(SOFT), **RIGHT)
    unweighted = np.where(SOFT > 0, 1, weight) * cross_entropy(SOFT)  # iou_weighted=False
    inverse = np.divide(1, SOFT, where=SOFT > 0, out=np.ones_like(SOFT))
    assert_allclose(varifocal_loss(X, SOFT, weight=inverse), unweighted, **RIGHT)
    heatmap = np.where(SOFT == 1, (1 - P) ** 2 * -np.log(P), 0)
    heatmap += np.where(SOFT < 1, (1 - SOFT) ** 4 * P**2 * -np.log(1 - P), 0)
    assert_allclose(heatmap_focal_loss(X, SOFT), heatmap, **RIGHT)
    count = heatmap_focal_loss(X, SOFT, reduction="positives")
    assert_allclose(count, heatmap.sum() / 2, **RIGHT)  # CenterNet's normalizer
    factors = np.where(SOFT == 1, 2.0, 0.5)
    assert_allclose(heatmap_focal_loss(X, SOFT, weight=factors), factors * heatmap, **RIGHT)


# ---------------------------------------------------------------- SAM 3


def sam3_slope(x: np.ndarray, y: np.ndarray, alpha: float, gamma: float) -> np.ndarray:
    """The gradient as its Triton kernel forms it, in the type of the logits."""
    p = 1 / (1 + np.exp(-x))
    ce = np.maximum(x, 0) - x * y + np.log(1 + np.exp(-np.abs(x)))
    p_t = p * y + (1 - p) * (1 - y)
    with np.errstate(divide="ignore", invalid="ignore"):
        power = (1 - p_t) ** np.asarray(gamma - 1, x.dtype)
        factor = (p - y) * (power * (1 - p_t)) - gamma * (2 * y - 1) * p * (1 - p) * power * ce
    return (alpha * y + (1 - alpha) * (1 - y)) * factor


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sam3_kernel(gamma: float) -> None:
    for y in (HARD, SOFT):
        here = sigmoid_focal_loss_grad(X, y, 0.25, gamma)
        assert_allclose(here, sam3_slope(X, y, 0.25, gamma), rtol=1e-9, atol=1e-12)
    x, y = np.array([18.0, -18.0], np.float32), np.array([1.0, 0.0], np.float32)
    assert np.isnan(sam3_slope(x, y, 0.5, gamma)).all() == (gamma < 1)
    slope = sigmoid_focal_loss_grad(x, y, 0.5, gamma)
    exact = sigmoid_focal_loss_grad(x.astype(float), y, 0.5, gamma)
    assert_allclose(slope, exact, rtol=3e-6)
    if gamma == 0:
        assert_allclose(exact, [-0.5 / (1 + np.exp(18.0)), 0.5 / (1 + np.exp(18.0))], rtol=1e-12)


def test_sam3_normalizers() -> None:
    x, y, boxes = np.stack([X, -X]), np.stack([HARD, HARD]), 3  # (N, Q, K)
    p = 1 / (1 + np.exp(-x))
    p_t = np.where(y == 1, p, 1 - p)
    there = np.where(y == 1, 0.25, 0.75) * (1 - p_t) ** 2 * -np.log(p_t)
    here = sigmoid_focal_loss(x, y, 0.25, 2, "sum") / (boxes * x.shape[1])
    assert_allclose(here, there.mean(axis=1).sum() / boxes, **RIGHT)
    masks, wanted = x[:, None], y[:, None]  # (N, M, H, W)
    here = sigmoid_focal_loss(masks, wanted).reshape(2, 1, -1).mean(-1) / boxes
    assert_allclose(here, there[:, None].reshape(2, 1, -1).mean(-1) / boxes, **RIGHT)


def test_apex() -> None:
    labels = np.array([0, 2, -2, -1])
    each = torchvision((labels[:, None] == np.arange(3)).astype(float), 0.25, 2)
    there = each[labels != -2].sum() / 2
    assert_allclose(sparse_sigmoid_focal_loss(X, labels, 0.25, 2, "positives"), there, **RIGHT)


def test_kornia() -> None:
    alpha, gamma = 0.25, 2.0
    positive, negative = -((1 - P) ** gamma) * np.log(P), -(P**gamma) * np.log(1 - P)
    there = alpha * positive * HARD + (1 - alpha) * negative * (1 - HARD)
    assert_allclose(sigmoid_focal_loss(X, HARD, alpha, gamma), there, **RIGHT)
    soft = SOFT * positive + (1 - SOFT) * negative
    assert_allclose(asymmetric_loss(X, SOFT, gamma, gamma, 0.0), soft, **RIGHT)
    assert_allclose(two_terms(X, SOFT, None, gamma), soft, **RIGHT)

    p = softmax()[np.arange(4), CHOSEN]
    factor = np.where(CHOSEN == 0, 1 - alpha, alpha)
    classes = -factor * (1 - p) ** gamma * np.log(p)
    here = softmax_focal_loss(X, CHOSEN, [1 - alpha] + [alpha] * 2, axis=1)
    assert_allclose(here, classes, **RIGHT)
    assert_allclose(here.sum() / X.size, classes.sum() / 12, **RIGHT)
    weight = np.array([2.0, 1.0, 0.5])
    alphas = np.array([1 - alpha, alpha, alpha])
    here = softmax_focal_loss(X, CHOSEN, alphas * weight, axis=1)
    assert_allclose(here, weight[CHOSEN] * classes, **RIGHT)


def test_kornia_weights_and_ignored_targets() -> None:
    """(N, K, H, W): both weights are of channels; a mean is over all elements, ignored or not."""
    alpha, gamma = 0.3, 1.5
    x = np.linspace(-4, 4, 48).reshape(2, 3, 2, 4)
    y = np.random.default_rng(0).uniform(0, 1, x.shape)
    y[0, 1] = -100
    pos_weight, weight = np.array([1.0, 3.0, 0.5]), np.array([2.0, 1.0, 0.25])
    p, valid = 1 / (1 + np.exp(-x)), y != -100
    t = np.where(valid, y, 0)
    there = t * alpha * pos_weight[:, None, None] * (1 - p) ** gamma * -np.log(p)
    there += (1 - t) * (1 - alpha) * p**gamma * -np.log(1 - p)
    there *= weight[:, None, None] * valid
    here = two_terms(x, t, alpha, gamma, pos_weight[:, None, None])
    here = here * weight[:, None, None] * valid
    assert_allclose(here, there, **RIGHT)
    hard = (t > 0.5).astype(float)
    there = np.where(hard == 1, alpha * (1 - p) ** gamma * -np.log(p), 0)
    there += np.where(hard == 0, (1 - alpha) * p**gamma * -np.log(1 - p), 0)
    there = (there * valid * weight[:, None, None]).mean()
    masked = valid * weight[:, None, None]
    assert_allclose(
        sigmoid_focal_loss(x, hard, alpha, gamma, "mean", weight=masked), there, **RIGHT
    )


def test_monai() -> None:
    for_hard_targets = (1 / (1 + np.exp(X * (2 * HARD - 1)))) ** 2 * cross_entropy(HARD)
    assert_allclose(sigmoid_focal_loss(X, HARD, None), for_hard_targets, **RIGHT)
    p = softmax()
    one_hot = (CHOSEN[:, None] == np.arange(3)).astype(float)
    there = -((1 - p) ** 2) * one_hot * np.log(p)
    here = softmax_focal_loss(X, CHOSEN, reduction="sum") / X.size
    assert_allclose(here, there.mean(), **RIGHT)
    weight, alpha = np.array([2.0, 1.0, 0.5]), 0.3
    alphas = np.array([1 - alpha, alpha, alpha])
    here = softmax_focal_loss(X, CHOSEN, alphas * weight, reduction="sum") / X.size
    assert_allclose(here, (there * alphas * weight).mean(), **RIGHT)


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (N, K, H, W), labels (N, H, W) and one-hot targets."""
    x = np.linspace(-4, 4, 120).reshape(2, 3, 4, 5)
    labels = np.random.default_rng(0).integers(0, 3, (2, 4, 5))
    return x, labels, (labels[:, None] == np.arange(3)[:, None, None]).astype(float)


def each(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Focal loss of gamma 2, without alpha, of hard targets."""
    p = 1 / (1 + np.exp(-x))
    p_t = np.where(y == 1, p, 1 - p)
    return -((1 - p_t) ** 2) * np.log(p_t)


def test_monai_of_images() -> None:
    x, labels, y = images()
    there, alphas = each(x, y), np.array([0.2, 0.5, 0.9])
    pixels = 4 * 5
    here = sigmoid_focal_loss(x, y, None, reduction="sum") / pixels  # space first
    assert_allclose(here, there.mean(axis=(2, 3)).sum(), **RIGHT)
    factor = np.where(y == 1, alphas[:, None, None], 1)  # of positives only
    here = sigmoid_focal_loss(x, y, None, weight=factor)
    assert_allclose(here, factor * there, **RIGHT)
    here = sigmoid_focal_loss(x, y, None, reduction="mean", weight=alphas[:, None, None])
    assert_allclose(here, (alphas[:, None, None] * there).mean(), **RIGHT)
    here = sigmoid_focal_loss(x[:, 1:], y[:, 1:], None, reduction="mean")
    assert_allclose(here, there[:, 1:].mean(), **RIGHT)
    valid = labels != 2
    here = sigmoid_focal_loss(x, y, None, reduction="sum", weight=valid[:, None]) / valid.sum()
    assert_allclose(here, (there * valid[:, None]).sum() / valid.sum(), **RIGHT)

    e = np.exp(x[:, 1:])  # softmax without the background: its pixels have no loss
    p = e / e.sum(axis=1, keepdims=True)
    there = (-((1 - p) ** 2) * np.log(p) * y[:, 1:]).mean()
    here = softmax_focal_loss(x[:, 1:], labels - 1, axis=1, ignore_index=-1, reduction="sum")
    assert_allclose(here / x[:, 1:].size, there, **RIGHT)


def test_segmentation_models() -> None:
    by_exp = (1 - np.exp(-cross_entropy(HARD))) ** 2 * cross_entropy(HARD)
    assert_allclose(sigmoid_focal_loss(X, HARD, None), by_exp, **RIGHT)


def test_segmentation_models_of_images() -> None:
    """The mean over pixels of each class, then over classes; needs the class axis."""
    x, labels, y = images()
    there = each(x, y)
    ours = lambda labels, reduction="mean", **weight: sparse_sigmoid_focal_loss(  # noqa: E731
        x, labels, None, reduction=reduction, axis=1, **weight
    )
    assert_allclose(ours(labels), there.mean(axis=(0, 2, 3)).mean(), **RIGHT)
    assert_allclose(ours(labels, "sum") / 3, there.sum(axis=(0, 2, 3)).mean(), **RIGHT)
    w = np.array([2.0, 1.0, 0.5])
    weighted = (there.mean(axis=(0, 2, 3)) * w).sum() / w.sum()
    assert_allclose(ours(labels, weight=(w / w.mean())[:, None, None]), weighted, **RIGHT)
    stray = labels.copy()
    stray[0, 0] = 255
    valid = stray != 255
    kept = np.moveaxis(there, 1, -1)[valid].mean(axis=0).mean()
    assert_allclose(ours(np.where(stray == 255, -2, stray)), kept, **RIGHT)
    background = each(x, y * valid[:, None]).mean()  # a label that is no class is background
    assert_allclose(ours(np.where(stray == 255, -1, stray)), background, **RIGHT)


def test_transformers() -> None:
    x, y, boxes = X[None], HARD[None], 5
    there = torchvision(HARD, 0.25, 2)[None].mean(1).sum() / boxes * x.shape[1]
    assert_allclose(sigmoid_focal_loss(x, y, reduction="sum") / boxes, there, **RIGHT)


def test_artemmavrin_paddle_and_model_garden() -> None:
    w = 3.0
    there = -w * HARD * (1 - P) ** 2 * np.log(P) - (1 - HARD) * P**2 * np.log(1 - P)
    here = sigmoid_focal_loss(X, HARD, None, 2.0, weight=1 + (w - 1) * HARD)
    assert_allclose(here, there, **RIGHT)
    p, c = softmax()[np.arange(4), CHOSEN], [0.5, 1.0, 2.0]
    assert_allclose(
        softmax_focal_loss(X, CHOSEN, c, 1.5), -np.take(c, CHOSEN) * (1 - p) ** 1.5 * np.log(p)
    )
    n, weight = 3.0, np.array([[1.0], [0.0], [1.0], [1.0]])
    total = torchvision(HARD, 0.25, 2).sum()
    assert_allclose(sigmoid_focal_loss(X, HARD, reduction="sum") / n, total / n, **RIGHT)
    weighted = (torchvision(HARD, 0.25, 1.5) * weight).sum() / (weight.sum() + 1)
    here = sigmoid_focal_loss(X, HARD, 0.25, 1.5, "sum", weight=weight) / (weight.sum() + 1)
    assert_allclose(here, weighted, **RIGHT)
    soft = np.where(SOFT == 1, P, 1 - P)  # the Model Garden's p_t of a soft target
    there = np.where(SOFT == 1, 0.25, 0.75) * (1 - soft) ** 1.5 * cross_entropy(SOFT)
    differ = ~np.isclose(sigmoid_focal_loss(X, SOFT, 0.25, 1.5), there)
    assert_array_equal(differ, (SOFT > 0) & (SOFT < 1))


def test_artemmavrin_smoothing_and_gammas() -> None:
    w, s = 3.0, 0.2
    y = HARD * (1 - s) + s / 2
    there = w * y * (1 - P) ** 2 * -np.log(P) + (1 - y) * P**2 * -np.log(1 - P)
    assert_allclose(two_terms(X, y, None, 2.0, w), there, **RIGHT)
    there = y * (1 - P) ** 2 * -np.log(P) + (1 - y) * P**2 * -np.log(1 - P)
    assert_allclose(asymmetric_loss(X, y, 2.0, 2.0, 0.0), there, **RIGHT)
    there = np.where(SOFT > 0, 1 - P, P) ** 2 * cross_entropy(SOFT)  # soft, without smoothing
    assert not np.allclose(two_terms(X, SOFT, None, 2.0), there)
    p, gammas = softmax()[np.arange(4), CHOSEN], [0.0, 1.0, 2.0]
    there = (1 - p) ** np.take(gammas, CHOSEN) * -np.log(p)
    here = sum(
        softmax_focal_loss(X, np.where(k == CHOSEN, k, -100), None, gammas[k]) for k in range(3)
    )
    assert_allclose(here, there, **RIGHT)


def test_tensorflow_addons_without_gamma_and_alpha() -> None:
    balance = 0.25 * SOFT + 0.75 * (1 - SOFT)
    there = (balance * cross_entropy(SOFT)).sum(axis=-1)  # gamma None or 0
    assert_allclose(sigmoid_focal_loss(X, SOFT, gamma=0).sum(axis=-1), there, **RIGHT)
    there = torchvision(SOFT, -1, 2).sum(axis=-1)  # alpha None or 0
    assert_allclose(sigmoid_focal_loss(X, SOFT, None).sum(axis=-1), there, **RIGHT)


def test_keras_cv_weights_what_is_not_one_as_negative() -> None:
    for smoothing in (0.0, 0.1):
        y = SOFT * (1 - smoothing) + smoothing / 2
        p_t = P * y + (1 - P) * (1 - y)
        there = np.where(y == 1, 0.25, 0.75) * (1 - p_t) ** 2 * cross_entropy(y)
        here = sigmoid_focal_loss(X, y, None, weight=np.where(y == 1, 0.25, 0.75))
        assert_allclose(here, there, **RIGHT)
    x, y, weight = np.array([0.8]), np.array([0.95]), np.array([0.75])
    assert sigmoid_focal_loss(x, y, None, weight=weight).round(4) == 0.0334
    assert sigmoid_focal_loss(x, np.ones(1), label_smoothing=0.1).round(4) == 0.0122


def test_keras_cv_clips_where_it_has_no_logits() -> None:
    def there(x: float) -> float:
        return -np.log(np.clip(1 / (1 + np.exp(-x)), 1e-7, 1 - 1e-7))

    assert there(-20.0) == there(-30.0) == pytest.approx(16.118, abs=1e-3)
    assert there(-16.0) < 16.1
    slopes = sigmoid_focal_loss_grad(np.array([-20.0, -30.0]), np.ones(2), None)
    assert_allclose(slopes, -1, rtol=1e-6)


def test_keras_cv_heatmap_peaks_are_above_the_threshold() -> None:
    near = np.array([[1.0, 0.995, 0.99], [0.5, 0.99, 0.991], [0.0, 0.98, 1.0], [0.99, 0.2, 0.4]])
    peak = near > 0.99
    there = np.where(peak, -((1 - P) ** 2) * np.log(P), 0)
    there += np.where(~peak, -((1 - near) ** 4) * P**2 * np.log(1 - P), 0)
    assert_allclose(heatmap_focal_loss(X, np.where(peak, 1, near)), there, **RIGHT)
    x, y = np.ones(1), np.array([0.99])
    assert heatmap_focal_loss(x, np.where(y > 0.99, 1, y))[0] == pytest.approx(7e-9, rel=0.01)
    assert heatmap_focal_loss(x, np.where(y >= 0.99, 1, y)).round(4) == 0.0227


def test_automl() -> None:
    normalizer = 2 + 1.0
    labels = np.array([0, 2, -2, -1])
    one_hot = (labels[:, None] == np.arange(3)).astype(float)
    there = (torchvision(one_hot, 0.25, 1.5) * (labels != -2)[:, None]).sum() / normalizer
    here = sparse_sigmoid_focal_loss(X, labels, 0.25, 1.5, "sum") / normalizer
    assert_allclose(here, there, **RIGHT)
    # Smoothing there is of the cross entropy alone.
    p, y = 1 / (1 + np.exp(-0.8)), 0.95
    there = 0.25 * (1 - p) ** 2 * (-y * np.log(p) - (1 - y) * np.log(1 - p))
    assert round(there, 4) == 0.0099
    here = sigmoid_focal_loss(np.array([0.8]), np.ones(1), label_smoothing=0.1)
    assert here.round(4) == 0.0122


def test_asymmetric_loss_of_the_paper() -> None:
    shifted = np.maximum(P - 0.05, 0)
    there = HARD * (1 - P) * -np.log(P) + (1 - HARD) * shifted**4 * -np.log(1 - shifted)
    assert_allclose(asymmetric_loss(X, HARD, reduction="sum"), there.sum(), **RIGHT)


def test_the_soft_targets_of_the_table() -> None:
    x, y = np.array([0.8]), np.array([0.3])
    assert sigmoid_focal_loss(x, y, None)[0].round(6) == 0.308906
    assert asymmetric_loss(x, y, 2.0, 2.0, 0.0)[0].round(6) == 0.400964
    assert quality_focal_loss(x, y)[0].round(6) == 0.141602
    p = 1 / (1 + np.exp(-0.8))
    ce = -0.3 * np.log(p) - 0.7 * np.log(1 - p)
    assert round((1 - np.exp(-ce)) ** 2 * ce, 6) == 0.341799
    assert round((1 / (1 + np.exp(0.8 * (2 * 0.3 - 1)))) ** 2 * ce, 6) == 0.312493


def test_boosting_objective() -> None:
    """Gradient and second derivative of the raw score, in the textbook's terms."""
    y, h = HARD.ravel(), 1e-4
    x = X.ravel()

    def loss(x: np.ndarray) -> np.ndarray:
        p = 1 / (1 + np.exp(-x))
        p_t = np.where(y == 1, p, 1 - p)
        return -np.where(y == 1, 0.25, 0.75) * (1 - p_t) ** 2 * np.log(p_t)

    grad, hess = sigmoid_focal_loss_grad(x, y), sigmoid_focal_loss_hess(x, y)
    assert_allclose(grad, (loss(x + h) - loss(x - h)) / (2 * h), atol=1e-8)
    assert_allclose(hess, (loss(x + h) - 2 * loss(x) + loss(x - h)) / h**2, atol=1e-6)
    assert hess.min() < 0  # why the page keeps it positive


# ---------------------------------------------------------------- side by side


def logits(bound: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-bound, bound, shape).astype(np.float32)


def targets(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).choice([0.0, 0.3, 1.0], shape).astype(np.float32)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_optax_is_right_everywhere(gamma: float) -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    from focal.jax import sigmoid_focal_loss as ours

    x = np.concatenate([logits(1000, 100), logits(20, 100), np.float32([0, 20, -20, 1000, -1000])])
    y = targets(x.size)
    close = {"rtol": 1e-5, "atol": 1e-37}  # XLA flushes what is smaller to zero
    for alpha in (None, 0.25):
        theirs = lambda x, a=alpha: optax.losses.sigmoid_focal_loss(x, y, alpha=a, gamma=gamma)  # noqa: E731
        here = lambda x, a=alpha: ours(x, y, a, gamma)  # noqa: E731
        assert_allclose(here(x), theirs(x), **close)
        there = jax.grad(lambda x, f=theirs: f(x).sum())(x)
        # A soft target's slope is a difference of terms below 1.
        assert_allclose(jax.grad(lambda x, f=here: f(x).sum())(x), there, rtol=1e-5, atol=2e-7)
        assert np.isfinite(there).all()


def test_optax_differentiates_gamma() -> None:
    """Gamma is traced, once for all its values; first and second derivatives, also mixed."""
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    from focal.jax import sigmoid_focal_loss as ours

    x = np.concatenate([logits(12, 50), np.float32([0, 12, -12])])
    y = targets(x.size)
    traced = []

    def theirs(x: Any, gamma: Any) -> Any:
        return optax.losses.sigmoid_focal_loss(x, y, gamma=gamma).sum()

    def here(x: Any, gamma: Any) -> Any:
        traced.append(gamma)
        return ours(x, y, None, gamma, "sum")

    jax.jit(here)(x, 2.0)
    once = len(traced)
    derivatives = [jax.grad(f, i) for i in (0, 1) for f in (theirs, here)]
    derivatives += [jax.jacfwd(d, 1) for d in derivatives]
    compiled = [jax.jit(d) for d in derivatives]
    for gamma in (0.5, 1.0, 2.0):
        values = [d(x, gamma) for d in compiled]
        for there, got in zip(values[::2], values[1::2], strict=True):
            assert_allclose(got, there, rtol=1e-4, atol=2e-6)
    assert len(traced) <= once * 5


def test_optax_issue_with_gamma_zero_and_hessians() -> None:
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    from focal.jax import sigmoid_focal_loss as ours

    x, y = np.float32([1000, 100, 17, -17]), np.float32([1, 1, 1, 0])

    def total(x: Any, gamma: Any) -> Any:
        return ours(x, y, None, gamma, "sum")

    slope, curvature = jax.jit(jax.grad(total)), jax.jit(jax.hessian(total))
    in_gamma = jax.jit(jax.grad(total, argnums=1))
    for gamma in (0.0, 0.5, 1.0, 1.5, 2.0):
        exact = sigmoid_focal_loss_grad(x.astype(float), y, None, gamma)
        assert_allclose(slope(x, gamma), exact, rtol=1e-5, atol=1e-37)
        exact = np.diag(sigmoid_focal_loss_hess(x.astype(float), y, None, gamma))
        assert_allclose(curvature(x, gamma), exact, rtol=1e-5, atol=1e-37)
        assert np.isfinite(in_gamma(x, gamma))


def test_optax_broadcasts_where_we_raise() -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    from focal.jax import sigmoid_focal_loss as ours

    x, y = jax.numpy.zeros((4, 1)), jax.numpy.zeros(3)
    assert optax.losses.sigmoid_focal_loss(x, y).shape == (4, 3)
    with pytest.raises(ValueError, match="targets must have the shape of inputs"):
        ours(x, y)


def keras_sides(theirs: object, ours: object, x: np.ndarray, there: object, here: object):
    """Value and gradient of both, of logits."""
    tf = pytest.importorskip("tensorflow")
    found = []
    for loss, y in ((theirs, there), (ours, here)):
        logit = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(logit)
            value = loss(y, logit)  # type: ignore[operator]
        found += [value.numpy(), tape.gradient(value, logit).numpy()]
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_keras_binary_within_five(gamma: float, smoothing: float) -> None:
    pytest.importorskip("tensorflow")
    import keras

    from focal.tensorflow import SigmoidFocalLoss

    x, y = logits(5, 8, 3), targets(8, 3)
    shared = {"gamma": gamma, "label_smoothing": smoothing}
    for alpha in (None, 0.25):
        theirs = keras.losses.BinaryFocalCrossentropy(
            apply_class_balancing=alpha is not None, alpha=0.25, from_logits=True, **shared
        )
        value, slope, ours, our_slope = keras_sides(
            theirs, SigmoidFocalLoss(alpha, **shared), x, y, y
        )
        assert_allclose(ours, value, rtol=1e-5)
        assert_allclose(our_slope, slope, rtol=1e-4, atol=1e-7)


def test_keras_binary_from_logit_17_on() -> None:
    pytest.importorskip("tensorflow")
    import keras

    from focal.tensorflow import SigmoidFocalLoss

    theirs = keras.losses.BinaryFocalCrossentropy(gamma=0.5, from_logits=True)
    one = np.ones((1, 1), np.float32)
    for logit, is_right in ((16.0, True), (17.0, False), (100.0, False)):
        x = np.full((1, 1), logit, np.float32)
        _, slope, _, ours = keras_sides(theirs, SigmoidFocalLoss(None, 0.5), x, one, one)
        assert np.isfinite(slope).all() == is_right
        exact = sigmoid_focal_loss_grad(x.astype(float), one, None, 0.5)
        assert_allclose(ours, exact, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [1.0, [0.5, 2.0, 1.0]])
def test_keras_categorical_within_five(alpha: float | list[float], smoothing: float) -> None:
    pytest.importorskip("tensorflow")
    import keras

    from focal.tensorflow import SoftmaxFocalLoss

    x, labels = logits(5, 8, 3), np.arange(8) % 3
    one_hot = np.eye(3, dtype=np.float32)[labels]
    shared = {"gamma": 2.0, "label_smoothing": smoothing}
    theirs = keras.losses.CategoricalFocalCrossentropy(alpha=alpha, from_logits=True, **shared)
    ours = SoftmaxFocalLoss(alpha, **shared)
    value, slope, our_value, our_slope = keras_sides(theirs, ours, x, one_hot, labels)
    assert_allclose(our_value, value, rtol=1e-5)
    assert_allclose(our_slope, slope, rtol=1e-3, atol=1e-6)


def test_keras_categorical_clips_at_sixteen() -> None:
    pytest.importorskip("tensorflow")
    import keras

    from focal.tensorflow import SoftmaxFocalLoss

    theirs = keras.losses.CategoricalFocalCrossentropy(alpha=1.0, from_logits=True)
    one_hot, labels = np.array([[1.0, 0.0, 0.0]], np.float32), np.zeros(1, np.int64)
    for logit, is_right in ((-15.0, True), (-16.0, False), (-20.0, False)):
        x = np.array([[logit, 0.0, 0.0]], np.float32)
        value, slope, our_value, our_slope = keras_sides(
            theirs, SoftmaxFocalLoss(), x, one_hot, labels
        )
        assert slope.any() == is_right
        assert_allclose(value, min(our_value, 16.118), rtol=1e-5)
        exact = softmax_focal_loss_grad(x.astype(float), labels)
        assert_allclose(our_slope, exact, rtol=1e-6)
    assert_array_equal(slope, 0)


# ---------------------------------------------------------------- what calls elsewhere pass


def test_a_class_axis_that_is_not_the_last(backend: Backend) -> None:
    x, labels, _ = images()
    labels = labels.copy()
    labels[0, 0, :2] = -1, -2
    last = np.moveaxis(x, 1, -1)
    w, alphas = np.array([2.0, 1.0, 0.5]), [0.1, 0.5, 0.9]
    for reduction in ("none", "mean", "sum", "positives"):
        wanted = sparse_sigmoid_focal_loss(last, labels, alphas, 1.5, reduction, weight=w)
        if reduction == "none":
            wanted = np.moveaxis(wanted, -1, 1)
        for axis in (1, -3):
            got = backend(
                "sparse_sigmoid_focal_loss",
                x.astype(np.float32),
                labels,
                alphas,
                1.5,
                reduction,
                weight=w.astype(np.float32)[:, None, None],
                axis=axis,
            )
            assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)


def test_the_gradient_along_a_class_axis(autodiff: Backend) -> None:
    x, labels, y = images()
    x = x.astype(np.float32)
    loss = autodiff.F.sparse_sigmoid_focal_loss
    t = autodiff.asarray(labels)
    got = autodiff.grad(lambda a: loss(a, t, reduction="sum", axis=1), autodiff.asarray(x))
    assert_allclose(got, sigmoid_focal_loss_grad(x.astype(float), y), rtol=1e-4, atol=1e-7)


def test_a_class_axis_that_is_none(backend: Backend) -> None:
    x, labels, _ = images()
    for axis, error in ((4, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="axis"):
            backend("sparse_sigmoid_focal_loss", x, labels, axis=axis)
    with pytest.raises(ValueError, match="labels must have shape"):
        backend("sparse_sigmoid_focal_loss", x, labels, axis=2)


def test_no_ignored_label(backend: Backend) -> None:
    """kornia's and MONAI's `ignore_index=None`: every label counts."""
    x = X.astype(np.float32)
    for reduction in ("none", "mean"):
        wanted = softmax_focal_loss(X, CHOSEN, reduction=reduction)
        got = backend("softmax_focal_loss", x, CHOSEN, reduction=reduction, ignore_index=None)
        assert_allclose(got, wanted, rtol=1e-5)


def test_numbers_as_arrays_without_axes(backend: Backend) -> None:
    x, y = X.astype(np.float32), SOFT.astype(np.float32)
    alpha, gamma, smoothing = (np.array(v, np.float32) for v in (0.3, 1.5, 0.1))
    got = backend("sigmoid_focal_loss", x, y, alpha, gamma, label_smoothing=smoothing)
    wanted = sigmoid_focal_loss(X, SOFT, 0.3, 1.5, label_smoothing=0.1)
    assert_allclose(got, wanted, rtol=1e-5)
    got = backend("softmax_focal_loss", x, CHOSEN, alpha, gamma)
    assert_allclose(got, softmax_focal_loss(X, CHOSEN, 0.3, 1.5), rtol=1e-5)
    got = backend("sparse_sigmoid_focal_loss", x, LABELS, alpha, gamma)
    assert_allclose(got, sparse_sigmoid_focal_loss(X, LABELS, 0.3, 1.5), rtol=1e-5)
