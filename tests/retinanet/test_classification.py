"""FL* and hard examples as a detector's loss, in every framework, against plain NumPy."""

import importlib

import numpy as np
import pytest
from backends import AUTODIFF, BACKENDS, load

import focal.numpy as F
from focal.core.anchors import AnchorConfig
from focal.retinanet import RetinaNetConfig
from focal.retinanet.classification import OHEM_CANDIDATES, classification_loss

CONFIG = RetinaNetConfig(
    classes=("a", "b"),
    image_size=(32, 32),
    levels=(3,),
    anchors=AnchorConfig(strides=(8,), sizes=(16.0,), scales=(1.0, 1.2), ratios=(1.0,)),
)
VARIANTS = {
    "cross entropy": CONFIG.replace(alpha=0.5, gamma=0.0),
    "FL*": CONFIG.replace(loss="focal_star", gamma=2.0, star_beta=1.0),
    "OHEM": CONFIG.replace(loss="ohem", alpha=None, gamma=0.0, ohem_examples=6, ohem_iou=0.3),
    "OHEM 1:3": CONFIG.replace(
        loss="ohem", alpha=None, gamma=0.0, ohem_examples=9, ohem_iou=0.6, ohem_ratio=3.0
    ),
}
ANCHORS = F.anchors(CONFIG.image_size, CONFIG.anchors).astype(np.float32)  # 32
FRAMEWORKS = [name for name in BACKENDS if name != "array_api_strict"]


def batch(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, (2, len(ANCHORS), 2)).astype(np.float32)
    labels = rng.choice([-2, -1, 0, 1], (2, len(ANCHORS)), p=[0.1, 0.6, 0.15, 0.15])
    return logits, labels.astype(np.int32)


def naive(logits, labels, config):
    """Image by image, with the public functions of `focal.numpy`."""
    total = 0.0
    for own_logits, own_labels in zip(logits.astype(np.float64), labels, strict=True):
        used = own_labels > -2
        onehot = (own_labels[:, None] == np.arange(2)).astype(np.float64)
        if config.loss == "focal_star":
            losses = F.sigmoid_focal_loss_star(
                own_logits, onehot, config.alpha, config.gamma, config.star_beta
            )
            total += losses[used].sum()
            continue
        losses = F.sigmoid_focal_loss(own_logits, onehot, config.alpha, config.gamma).sum(axis=1)
        losses[~used] = 0
        if config.loss == "focal":
            total += losses.sum()
            continue
        kept = []
        for i in np.argsort(-losses, stable=True):
            if (F.box_iou(ANCHORS[[i]], ANCHORS[kept]) <= config.ohem_iou).all():
                kept.append(i)
        if config.ohem_ratio is not None:
            most = int(config.ohem_examples / (1 + config.ohem_ratio))
            hard = [i for i in kept if own_labels[i] >= 0][:most]
            easy = [i for i in kept if own_labels[i] < 0][: int(len(hard) * config.ohem_ratio)]
            kept = hard + easy
        total += losses[kept[: config.ohem_examples]].sum()
    return total


def loss_in(name, labels, config):
    """The classification loss as a function of the logits, in a framework."""
    backend = load(name)
    library = importlib.import_module(f"focal.{name}")
    anchors, labels = (backend.asarray(a) for a in (ANCHORS, labels))
    return backend, lambda x: classification_loss(library, x, anchors, labels, config, None)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_framework_has_the_naive_loss(name, config):
    logits, labels = batch()
    backend, loss = loss_in(name, labels, config)
    found = float(backend.numpy(loss(backend.asarray(logits))))
    assert found == pytest.approx(naive(logits, labels, config), rel=1e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", AUTODIFF)
def test_the_gradient_is_that_of_the_chosen(name, config):
    logits, labels = batch(1)
    backend, loss = loss_in(name, labels, config)
    found = backend.grad(loss, backend.asarray(logits))
    assert np.isfinite(found).all()
    assert not found[labels == -2].any()
    taken = found.any(axis=-1).sum(axis=-1)
    if config.loss == "ohem":
        assert (taken > 0).all() and (taken <= config.ohem_examples).all()
    else:
        np.testing.assert_array_equal(taken, (labels > -2).sum(axis=-1))
    # Along a random direction, the change of the naive loss; nothing is chosen anew so near.
    step = np.random.default_rng(2).normal(0, 1e-6, logits.shape)
    wide = logits.astype(np.float64)
    change = naive(wide + step, labels, config) - naive(wide - step, labels, config)
    assert 2 * (found * step).sum() == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_the_hardest_are_found_when_compiled(name):
    framework = pytest.importorskip(name)
    logits, labels = batch()
    config = VARIANTS["OHEM 1:3"]
    backend, loss = loss_in(name, labels, config)

    def slope(x):
        with framework.GradientTape() as tape:
            tape.watch(x)
            value = loss(x)
        return value, tape.gradient(value, x)

    if name == "jax":
        compiled = framework.jit(framework.value_and_grad(loss))
    else:
        compiled = framework.function(slope, autograph=False)
    value, gradient = compiled(backend.asarray(logits))
    assert float(value) == pytest.approx(naive(logits, labels, config), rel=1e-5)
    np.testing.assert_allclose(gradient, backend.grad(loss, backend.asarray(logits)), rtol=1e-5)


def test_saturated_logits_have_finite_gradients():
    logits, labels = batch()
    for config in VARIANTS.values():
        backend, loss = loss_in("torch", labels, config)
        assert np.isfinite(backend.grad(loss, backend.asarray(logits * 1e4))).all()


def test_more_anchors_than_candidates():
    """Those beyond the candidates are no examples; the loss of the hardest is the same."""
    config = CONFIG.replace(loss="ohem", alpha=None, gamma=0.0, ohem_examples=5, ohem_iou=1.0)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (1, OHEM_CANDIDATES + 500, 2)).astype(np.float32)
    labels = np.full(logits.shape[:2], -1)
    anchors = np.tile(ANCHORS, (50, 1))[: logits.shape[1]]
    found = classification_loss(F, logits, anchors, labels, config, None)
    losses = F.sigmoid_focal_loss(logits, np.zeros_like(logits), None, 0.0).sum(axis=-1)
    assert found == pytest.approx(np.sort(losses[0])[-5:].sum(), rel=1e-5)
