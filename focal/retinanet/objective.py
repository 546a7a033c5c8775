"""What the network is trained to minimize, in any framework.

`F` is the module of a framework, such as `focal.torch`. The functions here are its public ones.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np

from focal.core.namespace import Array
from focal.retinanet.classification import classification_loss
from focal.retinanet.config import RetinaNetConfig

__all__ = ["EMA_START", "Losses", "Targets", "losses", "normalizer", "running_mean", "targets"]

EMA_START = 100.0
"""The first value of the running mean of the positives (normalizer "ema"), as in detectron2."""


class Targets(NamedTuple):
    """Targets of each anchor: labels (B, N) and box deltas (B, N, 4)."""

    labels: Array
    deltas: Array


class Losses(NamedTuple):
    """Both parts of the loss of a batch, normalized."""

    classification: Array
    box: Array


def targets(
    F: ModuleType, anchors: Array, boxes: Array, labels: Array, config: RetinaNetConfig
) -> Targets:
    """Match anchors (N, 4) with boxes (B, M, 4), padded with zeros, of classes `labels` (B, M)."""
    return Targets(
        *F.assign_targets(
            anchors,
            boxes,
            labels,
            foreground=config.foreground,
            background=config.background,
            allow_low_quality=config.allow_low_quality,
        )
    )


def normalizer(
    config: RetinaNetConfig, images: int, positives: Array, mean: Array
) -> tuple[Array | int, Array]:
    """What the loss of a batch is divided by, and the running mean of the positives after it.

    Args:
        config: The normalizer.
        images: Of the whole batch, over all replicas.
        positives: `F.num_positives` of the whole batch.
        mean: The running mean before it.
    """
    if config.normalizer == "image":
        return images, mean
    if config.normalizer == "ema":
        mean = running_mean(mean, positives)
        return mean, mean
    return positives, mean


def running_mean(mean: Array, positives: Array) -> Array:
    """The running mean of the positives after one more batch, as in detectron2."""
    return mean + 0.1 * (positives - mean)


def losses(
    F: ModuleType,
    logits: Array,
    deltas: Array,
    anchors: Array,
    target: Targets,
    config: RetinaNetConfig,
    divisor: Array | float,
) -> Losses:
    """Classification and box loss of a batch, or of a part of it: parts add up to the whole.

    Args:
        F: The framework's module.
        logits: (B, N, K) class logits.
        deltas: (B, N, 4) box deltas.
        anchors: (N, 4).
        target: The targets.
        config: The losses, their parameters, and whether each image has a normalizer of its own.
        divisor: Of both sums, from `normalizer` of the whole batch.
    """
    xp = F.xp
    logits, deltas = xp.astype(logits, xp.float32), xp.astype(deltas, xp.float32)
    positive = xp.astype(target.labels >= 0, xp.float32)
    weight = None
    if config.normalizer == "image":  # each image's loss is divided by its own positives
        weight = 1 / xp.maximum(xp.sum(positive, axis=-1, keepdims=True), 1.0)
        positive = positive * weight
        weight = weight[..., None]
    classification = classification_loss(F, logits, anchors, target.labels, config, weight)
    wanted, values = target.deltas, xp.to_numpy(target.labels)
    if values is not None:  # where the host may look at them, the rows of objects are enough
        image, anchor = np.nonzero(values >= 0)
        rows = xp.constant(image * len(anchors) + anchor, deltas)
        anchors = xp.take(anchors, xp.constant(anchor, deltas), axis=0)
        deltas, wanted = (xp.take(xp.reshape(x, (-1, 4)), rows, axis=0) for x in (deltas, wanted))
        positive = xp.take(xp.reshape(positive, (-1,)), rows, axis=0)
    if config.box_loss == "giou":
        boxes = F.decode_boxes(deltas, anchors)
        box = F.giou_loss(boxes, F.decode_boxes(wanted, anchors))
    else:
        box = xp.sum(F.smooth_l1_loss(deltas, wanted, config.box_beta), axis=-1)
    box = xp.sum(box * positive) * config.box_weight
    return Losses(classification / divisor, box / divisor)
