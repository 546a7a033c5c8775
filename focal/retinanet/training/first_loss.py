"""The first classification loss of a run beside the expected one."""

from __future__ import annotations

import logging

import numpy as np

import focal.numpy as F
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.data import Batch
from focal.retinanet.objective import EMA_START, running_mean, targets

__all__ = ["check_first_loss", "first_loss"]

_log = logging.getLogger(__name__)


def first_loss(
    boxes: np.ndarray, labels: np.ndarray, canvas: tuple[int, int], config: RetinaNetConfig
) -> float:
    """The classification loss of a batch if every score is the prior.

    Args:
        boxes: (B, M, 4), padded with zeros.
        labels: (B, M), padded with -1.
        canvas: (height, width) of the images.
        config: Anchors, matching, alpha, gamma, prior and normalizer.

    Returns:
        `focal.expected_initial_loss` of the batch, with the config's normalizer.
    """
    anchors = F.anchors(canvas, config.anchors)
    counts = []
    for index in range(len(boxes)):  # one at a time, to save memory
        real = labels[index] >= 0
        target = targets(F, anchors, boxes[index, real], labels[index, real], config)
        counts.append([np.sum(target.labels != -2), np.sum(target.labels >= 0)])

    def loss(used: int, positives: int) -> float:
        rest = config.num_classes, config.prior, config.alpha, config.gamma
        return F.expected_initial_loss(int(used), int(positives), *rest)

    if config.normalizer == "image":
        return float(np.mean([loss(*each) for each in counts]))
    total, positives = np.sum(counts, axis=0)
    if config.normalizer == "ema":
        least = max(1, positives)
        return loss(total, positives) * least / running_mean(EMA_START, least)
    return loss(total, positives)


def check_first_loss(found: float, batch: Batch, config: RetinaNetConfig) -> None:
    """Warn if the first classification loss is not what random weights with the prior bias give."""
    expected = first_loss(batch.boxes, batch.labels, batch.images.shape[1:3], config)
    if not expected / 3 <= found <= 3 * expected:
        _log.warning(
            "the first classification loss is %.4g; expected with prior %g, alpha %s and gamma %g: "
            "%.4g (focal.expected_initial_loss). Is the prior bias missing in the last layer, or "
            "are the features badly scaled?",
            *(found, config.prior, config.alpha, config.gamma, expected),
        )
