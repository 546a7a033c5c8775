"""Classification losses of the detector: focal loss, FL*, online hard example mining."""

from __future__ import annotations

import numpy as np

from focal.core.losses import sigmoid_focal_loss_star, sparse_sigmoid_focal_loss
from focal.core.namespace import Array, Namespace
from focal.core.targets import hard_example_mask
from focal.retinanet.config import RetinaNetConfig

__all__ = ["OHEM_CANDIDATES", "classification_loss"]

OHEM_CANDIDATES = 1000
"""Hard examples are looked for among this many anchors of greatest loss, since NMS is quadratic."""


def classification_loss(
    xp: Namespace,
    logits: Array,
    anchors: Array,
    labels: Array,
    config: RetinaNetConfig,
    weight: Array | None,
) -> Array:
    """The sum of the loss over the anchors of a batch.

    Args:
        xp: The array namespace.
        logits: (B, N, K) class logits.
        anchors: (N, 4).
        labels: (B, N): class, -1 background, -2 ignored.
        config: Which loss, and its parameters.
        weight: Factors of the images, (B, 1, 1), or None.
    """
    if config.loss == "focal_star":
        return _focal_star(xp, logits, labels, config, weight)
    if config.loss == "ohem":
        return _hard_examples(xp, logits, anchors, labels, config, weight)
    return sparse_sigmoid_focal_loss(
        xp, logits, labels, config.alpha, config.gamma, "sum", weight=weight
    )


def _focal_star(
    xp: Namespace, logits: Array, labels: Array, config: RetinaNetConfig, weight: Array | None
) -> Array:
    """FL* (paper, appendix A), which has dense targets only."""
    classes = xp.astype(xp.constant(np.arange(config.num_classes), labels), labels.dtype)
    targets = xp.astype(labels[..., None] == classes, xp.float32)
    used = xp.astype(labels >= -1, xp.float32)[..., None]
    return sigmoid_focal_loss_star(
        xp,
        logits,
        targets,
        config.alpha,
        config.gamma,
        config.star_beta,
        "sum",
        weight=used if weight is None else used * weight,
    )


def _hard_examples(
    xp: Namespace,
    logits: Array,
    anchors: Array,
    labels: Array,
    config: RetinaNetConfig,
    weight: Array | None,
) -> Array:
    """Online hard example mining (paper, table 1d): an anchor is an example, its loss the score.

    The ratio is kept among the candidates, so a positive that is easier than all of them is none.
    """
    losses = sparse_sigmoid_focal_loss(
        xp, logits, labels, config.alpha, config.gamma, weight=weight
    )
    losses, at = xp.top_k(xp.sum(losses, axis=-1), min(OHEM_CANDIDATES, labels.shape[1]))
    positive = xp.take_along_axis(labels, at, axis=-1) >= 0
    ratio = config.ohem_ratio
    total = 0.0
    for image in range(losses.shape[0]):
        mask = hard_example_mask(
            xp,
            losses[image],
            config.ohem_examples,
            positive=None if ratio is None else positive[image],
            negative_ratio=ratio,
            boxes=xp.take(anchors, at[image], axis=0),
            iou_threshold=config.ohem_iou,
        )
        total = total + xp.sum(losses[image] * xp.astype(mask, xp.float32))
    return total
