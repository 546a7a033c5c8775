"""docs/migration.md: the formula of each library in plain NumPy, and our call that replaces it.

The formulas are those that each library documents, in textbook form, so they are compared where
that form has its digits. optax and Keras are run themselves: over logits where they are right, and
where they are not it is asserted what they return.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from focal.numpy import (
    asymmetric_focal_loss,
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
    weight = np.where(SOFT > 0, SOFT, 0.75 * np.abs(P - SOFT) ** 2)
    assert_allclose(varifocal_loss(X, SOFT), weight * cross_entropy(SOFT), **RIGHT)
    heatmap = np.where(SOFT == 1, (1 - P) ** 2 * -np.log(P), 0)
    heatmap += np.where(SOFT < 1, (1 - SOFT) ** 4 * P**2 * -np.log(1 - P), 0)
    assert_allclose(heatmap_focal_loss(X, SOFT), heatmap, **RIGHT)
    count = heatmap_focal_loss(X, SOFT, reduction="positives")
    assert_allclose(count, heatmap.sum() / 2, **RIGHT)  # CenterNet's normaliser


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
    assert_allclose(asymmetric_focal_loss(X, SOFT, gamma, gamma, 0.0), soft, **RIGHT)

    p = softmax()[np.arange(4), CHOSEN]
    factor = np.where(CHOSEN == 0, 1 - alpha, alpha)
    classes = -factor * (1 - p) ** gamma * np.log(p)
    here = softmax_focal_loss(X, CHOSEN, [1 - alpha] + [alpha] * 2, axis=1)
    assert_allclose(here, classes, **RIGHT)
    assert_allclose(here.sum() / X.size, classes.sum() / 12, **RIGHT)


def test_monai_and_segmentation_models() -> None:
    for_hard_targets = (1 / (1 + np.exp(X * (2 * HARD - 1)))) ** 2 * cross_entropy(HARD)
    assert_allclose(sigmoid_focal_loss(X, HARD, None), for_hard_targets, **RIGHT)
    by_exp = (1 - np.exp(-cross_entropy(HARD))) ** 2 * cross_entropy(HARD)
    assert_allclose(sigmoid_focal_loss(X, HARD, None), by_exp, **RIGHT)
    p = softmax()
    one_hot = (CHOSEN[:, None] == np.arange(3)).astype(float)
    there = (-((1 - p) ** 2) * one_hot * np.log(p)).mean()
    assert_allclose(softmax_focal_loss(X, CHOSEN, reduction="sum") / X.size, there, **RIGHT)


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
    near = np.array([[1.0, 0.995, 0.5]] * 4)  # keras-cv's threshold of a positive
    there = np.where(near >= 0.99, -((1 - P) ** 2) * np.log(P), 0)
    there += np.where(near < 0.99, -((1 - near) ** 4) * P**2 * np.log(1 - P), 0)
    assert_allclose(heatmap_focal_loss(X, np.where(near >= 0.99, 1, near)), there, **RIGHT)


def test_asymmetric_loss_of_the_paper() -> None:
    shifted = np.maximum(P - 0.05, 0)
    there = HARD * (1 - P) * -np.log(P) + (1 - HARD) * shifted**4 * -np.log(1 - shifted)
    assert_allclose(asymmetric_focal_loss(X, HARD, reduction="sum"), there.sum(), **RIGHT)


def test_the_soft_targets_of_the_table() -> None:
    x, y = np.array([0.8]), np.array([0.3])
    assert sigmoid_focal_loss(x, y, None)[0].round(6) == 0.308906
    assert asymmetric_focal_loss(x, y, 2.0, 2.0, 0.0)[0].round(6) == 0.400964
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
