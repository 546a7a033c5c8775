"""Classification losses of the detector: focal loss, FL*, online hard example mining."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from focal.core.namespace import Array
from focal.retinanet.config import RetinaNetConfig

__all__ = ["OHEM_CANDIDATES", "classification_loss"]

OHEM_CANDIDATES = 1000
"""Hard examples are looked for among this many anchors of greatest loss, since NMS is quadratic."""


def classification_loss(
    F: ModuleType,
    logits: Array,
    anchors: Array,
    labels: Array,
    config: RetinaNetConfig,
    weight: Array | None,
) -> Array:
    """The sum of the loss over the anchors of a batch.

    Args:
        F: The framework's module, such as `focal.torch`.
        logits: (B, N, K) class logits.
        anchors: (N, 4).
        labels: (B, N): class, -1 background, -2 ignored.
        config: Which loss, and its parameters.
        weight: Factors of the images, (B, 1, 1), or None.
    """
    if config.loss == "focal_star":
        return _focal_star(F, logits, labels, config, weight)
    if config.loss == "ohem":
        return _hard_examples(F, logits, anchors, labels, config, weight)
    return F.sparse_sigmoid_focal_loss(
        logits, labels, config.alpha, config.gamma, "sum", weight=weight
    )


def _focal_star(
    F: ModuleType, logits: Array, labels: Array, config: RetinaNetConfig, weight: Array | None
) -> Array:
    """FL* (paper, appendix A), which has dense targets only."""
    xp = F.xp
    classes = xp.astype(xp.constant(np.arange(config.num_classes), labels), labels.dtype)
    targets = xp.astype(labels[..., None] == classes, xp.float32)
    used = xp.astype(labels >= -1, xp.float32)[..., None]
    weight = used if weight is None else used * weight
    return F.sigmoid_focal_loss_star(
        logits, targets, config.alpha, config.gamma, config.star_beta, "sum", weight=weight
    )


def _hard_examples(
    F: ModuleType,
    logits: Array,
    anchors: Array,
    labels: Array,
    config: RetinaNetConfig,
    weight: Array | None,
) -> Array:
    """Online hard example mining (paper, table 1d): an anchor is an example, its loss the score.

    The ratio is kept among the candidates, so a positive that is easier than all of them is none.
    """
    xp, ratio = F.xp, config.ohem_ratio
    losses = F.sparse_sigmoid_focal_loss(logits, labels, config.alpha, config.gamma, weight=weight)
    losses, at = xp.top_k(xp.sum(losses, axis=-1), min(OHEM_CANDIDATES, labels.shape[1]))
    positive = xp.take_along_axis(labels, at, axis=-1) >= 0
    total = 0.0
    for image in range(losses.shape[0]):
        mask = F.hard_example_mask(
            losses[image],
            config.ohem_examples,
            positive=None if ratio is None else positive[image],
            negative_ratio=ratio,
            boxes=xp.take(anchors, at[image], axis=0),
            iou_threshold=config.ohem_iou,
        )
        total = total + xp.sum(losses[image] * xp.astype(mask, xp.float32))
    return total
