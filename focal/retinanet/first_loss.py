"""What the first classification loss of a run must be, to be compared with what it is."""

from __future__ import annotations

import numpy as np

from focal.core.anchors import anchors as core_anchors
from focal.core.prior import expected_initial_loss
from focal.numpy._namespace import xp
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.objective import EMA_START, running_mean, targets

__all__ = ["first_loss"]


def first_loss(
    boxes: np.ndarray, labels: np.ndarray, canvas: tuple[int, int], config: RetinaNetConfig
) -> float:
    """The classification loss of a batch where every score is the prior.

    Args:
        boxes: (B, M, 4), padded with zeros.
        labels: (B, M), padded with -1.
        canvas: (height, width) of the images.
        config: Anchors, matching, alpha, gamma, prior and normaliser.

    Returns:
        `focal.expected_initial_loss` of the batch, with the config's normaliser.
    """
    anchors = core_anchors(xp, canvas, config.anchors)
    counts = []
    for index in range(len(boxes)):  # one at a time: in NumPy all of them would fill the memory
        real = labels[index] >= 0
        target = targets(xp, anchors, boxes[index, real], labels[index, real], config)
        counts.append([np.sum(target.labels != -2), np.sum(target.labels >= 0)])

    def loss(used: int, positives: int) -> float:
        return expected_initial_loss(
            int(used),
            int(positives),
            config.num_classes,
            config.prior,
            config.alpha,
            config.gamma,
        )

    if config.normaliser == "image":
        return float(np.mean([loss(*each) for each in counts]))
    total, positives = np.sum(counts, axis=0)
    if config.normaliser == "ema":
        return loss(total, positives) * max(1, positives) / running_mean(EMA_START, positives)
    return loss(total, positives)
