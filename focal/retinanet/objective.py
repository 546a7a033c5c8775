"""What the network is trained to minimise: targets and losses of a batch, in any framework."""

from __future__ import annotations

from typing import NamedTuple

from focal.core.box_losses import giou_loss, smooth_l1_loss
from focal.core.boxes import decode_boxes
from focal.core.namespace import Array, Namespace
from focal.core.targets import assign_targets
from focal.retinanet.classification import classification_loss
from focal.retinanet.config import RetinaNetConfig

__all__ = ["EMA_START", "Objective", "Targets", "divisor", "objective", "running_mean", "targets"]

EMA_START = 100.0
"""Where detectron2 starts its running mean of the positives, the normaliser "ema"."""


class Targets(NamedTuple):
    """What each anchor is to learn: labels (B, N) and deltas (B, N, 4)."""

    labels: Array
    deltas: Array


class Objective(NamedTuple):
    """The loss parts of a batch, normalised, and its number of positive anchors."""

    classification: Array
    box: Array
    positives: Array


def targets(
    xp: Namespace, anchors: Array, boxes: Array, labels: Array, config: RetinaNetConfig
) -> Targets:
    """Match anchors (N, 4) with boxes (B, M, 4), padded with zeros, of classes `labels` (B, M)."""
    assigned, deltas = assign_targets(
        xp,
        anchors,
        boxes,
        labels,
        foreground=config.foreground,
        background=config.background,
        allow_low_quality=config.allow_low_quality,
    )
    return Targets(assigned, deltas)


def objective(
    xp: Namespace,
    logits: Array,
    deltas: Array,
    anchors: Array,
    target: Targets,
    config: RetinaNetConfig,
    normaliser: Array | None = None,
) -> Objective:
    """Classification and box loss, each divided by the number of positive anchors.

    Args:
        xp: The array namespace.
        logits: (B, N, K) class logits.
        deltas: (B, N, 4) box deltas.
        anchors: (N, 4).
        target: The batch's targets.
        config: The losses, their parameters, and the normaliser.
        normaliser: Divide by this instead: the `divisor` of the whole batch, where this is a part
            of it. Parts add up to the whole.
    """
    positive = xp.astype(target.labels >= 0, xp.float32)
    count = xp.sum(positive)
    if config.normaliser == "image":
        # Each image divided by its own positives, then the mean over images.
        each = xp.maximum(xp.sum(positive, axis=-1, keepdims=True), 1.0)
        weight, scale = (1 / each)[..., None], positive.shape[0]
        scale = scale if normaliser is None else normaliser
    else:
        weight, scale = None, xp.maximum(count if normaliser is None else normaliser, 1.0)

    classification = classification_loss(xp, logits, anchors, target.labels, config, weight)
    deltas = xp.astype(deltas, xp.float32)
    if config.box_loss == "giou":
        predicted = decode_boxes(xp, deltas, anchors)
        each = giou_loss(xp, predicted, decode_boxes(xp, target.deltas, anchors))
    else:
        each = xp.sum(smooth_l1_loss(xp, deltas, target.deltas, config.box_beta), axis=-1)
    mask = positive if weight is None else positive * weight[..., 0]
    box = xp.sum(each * mask) * config.box_weight
    return Objective(classification / scale, box / scale, count)


def divisor(
    config: RetinaNetConfig, images: int, positives: Array, mean: Array
) -> tuple[Array | int, Array]:
    """What the loss of a batch is divided by, and the running mean of the positives after it.

    Args:
        config: The normaliser.
        images: Of the whole batch, over all replicas.
        positives: The positive anchors of the whole batch.
        mean: The running mean before it.
    """
    if config.normaliser == "image":
        return images, mean
    if config.normaliser == "ema":
        mean = running_mean(mean, positives)
        return mean, mean
    return positives, mean


def running_mean(mean: Array, positives: Array) -> Array:
    """The running mean of the positives after one more batch, as in detectron2."""
    return mean + 0.1 * (positives - mean)
