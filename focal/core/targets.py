"""Matching, target assignment, and the sampling baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from focal.core import checks
from focal.core.boxes import Weights, area, encoded, solid, solid_iou
from focal.core.namespace import Array, Framework, In, Namespace, Out
from focal.core.nms import suppress

__all__ = ["assign_targets", "hard_example_mask", "match_anchors", "subsample"]

Thresholds = tuple[float, float, float | None]
"""foreground, background, and the least IoU of a low-quality match, None where there is none."""


def match_anchors(
    xp: Framework[In, Out],
    anchors: In,
    boxes: In,
    foreground: float = 0.5,
    background: float = 0.4,
    allow_low_quality: bool | float = False,
) -> Out:
    """The box that each anchor is to predict.

    An anchor belongs to the box with which its IoU is greatest (the first of equals) if that
    is at least `foreground`; it is background if it is below `background`, ignored between.

    Args:
        anchors: (N, 4) as (x1, y1, x2, y2) in pixels, of a real type.
        boxes: (M, 4), or (..., M, 4) for a batch; M may be 0. A box (or anchor) without a finite
            area above 0 matches nothing, be it empty, inverted or NaN, so a list may be padded
            with zeros.
        foreground: Least IoU of a match, in [0, 1]. Default 0.5.
        background: IoU below which an anchor is background, in [0, foreground]. Default 0.4.
        allow_low_quality: Also match the anchors whose IoU with a box is the greatest that the
            box has with any anchor, if that is above 0 (True) or at least the number given.
            They keep the box that is best for them. Default False, as in the paper.

    Returns:
        (N,) or (..., N) integers: the index of the matched box, -1 background, -2 ignored.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a last axis is not 4, or a threshold is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import match_anchors
        >>> anchors = np.array([[0.0, 0, 10, 10], [0, 0, 10, 22], [50, 50, 60, 60]])
        >>> match_anchors(anchors, np.array([[0.0, 0.0, 10.0, 10.0]]))
        array([ 0, -2, -1])

    Source: Lin et al. 2017, section 4, "Anchors"; low-quality matches as in torchvision and
    detectron2.
    """
    name = "match_anchors"
    anchors, boxes = _match_arguments(xp, name, anchors, boxes)
    return _match(xp, anchors, boxes, _thresholds(name, foreground, background, allow_low_quality))


def _match(xp: Namespace, anchors: Array, boxes: Array, thresholds: Thresholds) -> Array:
    """`match_anchors` of checked arguments."""
    foreground, background, floor = thresholds
    anchors, boxes = checks.wide_pair(xp, anchors, boxes)
    kernels = xp.box_kernels(anchors, boxes)
    if kernels is not None:
        return kernels.match(anchors, boxes, *thresholds)
    count = 0 if anchors.shape[0] == 0 else xp.shape(boxes)[-2]
    grouped = xp.boxes_at_once(boxes) > 1 and count > 0
    if grouped:
        boxes = _in_groups(xp, boxes, xp.boxes_at_once(boxes))
        count = boxes.shape[-2]
    corners, areas = solid(xp, anchors[(None,) * (len(boxes.shape) - 2) + (...,)])  # (..., N)
    boxes = xp.stack(solid(xp, boxes)[0], axis=-1)

    def iou(i: int) -> Array:
        """IoU of every anchor with box i of each list: (..., N)."""
        x1, y1, x2, y2 = xp.take_box(boxes, i)
        box = x1, y1, x2, y2
        return solid_iou(xp, corners, areas, box, area(box))

    zeros = xp.zeros_like(xp.sum(boxes[..., 0], axis=-1, keepdims=True) + areas)  # (..., N)

    # One box at a time: only the running best is stored, never all N x M overlaps. The flags are
    # the numbers 0 and 1, which frameworks process faster than booleans.
    def compare(i: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
        best, match, *low_quality = state
        overlap = iou(i)
        not_better = xp.step(best - overlap)
        state = xp.maximum(best, overlap), i + not_better * (match - i)
        if floor is None:
            return state
        top = xp.max(overlap, axis=-1, keepdims=True)
        worthy = xp.astype((top > 0) & (top >= floor), top.dtype)
        return (*state, xp.maximum(low_quality[0], xp.step(overlap - top) * worthy))

    state = xp.fori_loop(count, compare, (zeros, zeros) if floor is None else (zeros, zeros, zeros))
    best, match, *low_quality = _of_all_groups(xp, count, *state) if grouped else state
    match = xp.astype(match, xp.index_type)
    return decided(xp, best, match, low_quality, (foreground, background))


def decided(
    xp: Namespace, best: Array, match: Array, low_quality: Sequence[Array], at: tuple[float, float]
) -> Array:
    """The label of each anchor from its best IoU, its best box, its flags and both thresholds."""
    foreground, background = at
    matched = (best >= foreground) & (best > 0)
    for flags in low_quality:
        matched = matched | (flags > 0)
    # With a background threshold of 0, what overlaps nothing is still background.
    is_background = (best < background) | (best <= 0)
    return xp.where(matched, match, xp.where(is_background, -1, xp.zeros_like(match) - 2))


def _in_groups(xp: Namespace, boxes: Array, most: int) -> Array:
    """(..., M, 4) as (..., groups, M / groups, 4), padded with boxes without area."""
    *lead, count, _ = boxes.shape
    size = -(-count // most)
    groups = -(-count // size)
    padding = xp.zeros_like(boxes[..., : groups * size - count, :])
    return xp.reshape(xp.concat([boxes, padding], axis=-2), (*lead, groups, size, 4))


def _of_all_groups(
    xp: Namespace, size: int, best: Array, match: Array, *flags: Array
) -> tuple[Array, ...]:
    """The state of all boxes (..., N) from that of each group of `size` (..., groups, N)."""
    top = xp.max(best, axis=-2, keepdims=True)
    start = np.arange(0, best.shape[-2] * size, size)[:, None]
    place = match + xp.astype(xp.constant(start, best), best.dtype)
    first = -xp.max(xp.where(best < top, -math.inf, -place), axis=-2)
    return top[..., 0, :], first, *(xp.max(x, axis=-2) for x in flags)


def _match_arguments(xp: Namespace, name: str, anchors: Array, boxes: Array) -> tuple[Array, Array]:
    anchors = checks.check_boxes(xp, name, "anchors", anchors)
    if len(anchors.shape) != 2:
        raise ValueError(f"{name}: anchors must have shape (N, 4); got {tuple(anchors.shape)}")
    return anchors, checks.check_boxes(xp, name, "boxes", boxes, at_least_2d=True)


def _thresholds(
    name: str, foreground: float, background: float, allow_low_quality: bool | float
) -> Thresholds:
    foreground = checks.check_number(name, "foreground", foreground, 0, 1)
    background = checks.check_number(name, "background", background, 0, foreground)
    if allow_low_quality is False or allow_low_quality is None:
        return foreground, background, None
    if allow_low_quality is True:
        return foreground, background, 0.0
    floor = checks.check_number(name, "allow_low_quality", allow_low_quality, 0, 1)
    return foreground, background, floor


def assign_targets(
    xp: Framework[In, Out],
    anchors: In,
    boxes: In,
    labels: In,
    foreground: float = 0.5,
    background: float = 0.4,
    allow_low_quality: bool | float = False,
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
) -> tuple[Out, Out]:
    """The training targets of each anchor: a label, and deltas to the box it matched.

    Args:
        anchors: (N, 4) as (x1, y1, x2, y2) in pixels, of a real type.
        boxes: (M, 4), or (..., M, 4) for a batch; M may be 0, and boxes without area (padding)
            match nothing.
        labels: (M,) or (..., M) integers, the class of each box.
        foreground: As in :func:`match_anchors`.
        background: As in :func:`match_anchors`.
        allow_low_quality: As in :func:`match_anchors`.
        weights: As in :func:`encode_boxes`.

    Returns:
        Labels (..., N): the class, -1 background, -2 ignored, as
        :func:`sparse_sigmoid_focal_loss` takes them; and deltas (..., N, 4), 0 where the label
        is below 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or a number is out of range.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import assign_targets
        >>> anchors = np.array([[0.0, 0, 10, 10], [50, 50, 60, 60]])
        >>> labels, deltas = assign_targets(anchors, np.array([[1.0, 0, 11, 10]]), np.array([7]))
        >>> labels, deltas[0]
        (array([ 7, -1]), array([0.1, 0. , 0. , 0. ]))

    Source: Lin et al. 2017, section 4.
    """
    name = "assign_targets"
    anchors, boxes = _match_arguments(xp, name, anchors, boxes)
    labels = checks.check_labels(xp, name, "labels", labels)
    checks.check_shape(name, "labels", labels, tuple(boxes.shape[:-1]), "boxes.shape[:-1]")
    weights = checks.check_weights(name, weights)
    thresholds = _thresholds(name, foreground, background, allow_low_quality)
    match = _match(xp, anchors, boxes, thresholds)
    # The matches where the host may look at them and shapes may depend on them.
    values = None if xp.box_kernels(anchors, boxes) is None else xp.to_numpy(match)
    if not boxes.shape[-2]:  # no boxes, or a number not known while tracing: there must be one
        boxes, labels = _with_an_empty_box(xp, boxes, labels)
    at = xp.maximum(match, 0)
    matched = match >= 0
    assigned = xp.where(matched, xp.take_along_axis(labels, at, axis=-1), match)
    if values is not None:
        return assigned, _deltas_of_matched(xp, anchors, boxes, values, weights)
    deltas = encoded(xp, xp.take_rows(boxes, at), anchors, weights)
    return assigned, xp.where(~matched[..., None], 0.0, deltas)


def _deltas_of_matched(
    xp: Namespace, anchors: Array, boxes: Array, match: np.ndarray, weights: Weights
) -> Array:
    """The deltas, computed only where there is a box."""
    rows = np.flatnonzero(match >= 0)
    image, anchor = np.divmod(rows, match.shape[-1])
    box = image * boxes.shape[-2] + match.reshape(-1)[rows]
    anchors = xp.take(anchors, xp.constant(anchor, anchors), axis=0)
    boxes = xp.take(xp.reshape(boxes, (-1, 4)), xp.constant(box, boxes), axis=0)
    deltas = xp.reshape(encoded(xp, boxes, anchors, weights), (1, -1))
    zeros = xp.astype(xp.constant(np.zeros((1, match.size * 4), bool), boxes), deltas.dtype)
    at = xp.constant((4 * rows[:, None] + np.arange(4)).reshape(1, -1), boxes)
    return xp.reshape(xp.put_along_axis(zeros, at, deltas), (*match.shape, 4))


def subsample(
    xp: Framework[In, Out],
    labels: In,
    num_samples: int,
    positive_fraction: float = 0.25,
    *,
    noise: In | None = None,
) -> Out:
    """A random minibatch of anchors with a bounded share of positives; the rest is ignored.

    Two-stage detectors handle class imbalance this way: at most `positive_fraction * num_samples`
    positives, the rest background.

    Args:
        labels: (..., N) integers: class >= 0, -1 background, -2 ignored.
        num_samples: Size of the minibatch, >= 0.
        positive_fraction: Greatest share of positives, in [0, 1]. Default 0.25, that is 1:3.
        noise: Random numbers of the shape of `labels`, floating-point; the smallest are taken.
            Default: new numbers at every call, also in compiled graphs. PyTorch and TensorFlow
            draw them from their own generators (`torch.manual_seed`, `tf.random.set_seed`), NumPy
            and JAX from one seeded by the operating system. Under `jax.jit` or `jax.vmap` noise
            must be given, such as `jax.random.uniform(key, labels.shape)`.

    Returns:
        (..., N) labels with -2 where not sampled.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, shapes differ, or JAX traces without `noise`.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import subsample
        >>> labels = np.array([3, 5, -1, -1, -1, -1, -2])
        >>> subsample(labels, 4, noise=np.arange(7.0))
        array([ 3, -2, -1, -1, -1, -2, -2])

    Source: Ren et al. 2015 (Faster R-CNN), section 3.1.3; Lin et al. 2017, section 5.
    """
    name = "subsample"
    labels = checks.check_labels(xp, name, "labels", labels)
    num_samples = checks.check_integer(name, "num_samples", num_samples, 0)
    share = checks.check_number(name, "positive_fraction", positive_fraction, 0, 1)
    if noise is None:
        noise = xp.random(labels)
    if noise is None:
        raise ValueError(
            f"{name}: noise must be given where the function is traced, or the same sample would "
            "be drawn at every call; got None"
        )
    noise = checks.check_floating(xp, name, "noise", noise)
    checks.check_same_shape(name, "noise", noise, "labels", labels)
    positive, negative = labels >= 0, labels == -1
    positive = positive & (_rank(xp, positive, noise) < int(num_samples * share))
    taken = _count(xp, positive)
    negative = negative & (_rank(xp, negative, noise) < num_samples - taken)
    return xp.where(~(positive | negative), -2, labels)


def hard_example_mask(
    xp: Framework[In, Out],
    losses: In,
    num_examples: int | None = None,
    *,
    positive: In | None = None,
    negative_ratio: float | None = None,
    boxes: In | None = None,
    iou_threshold: float | None = None,
) -> Out:
    """Online hard example mining: the examples with the greatest losses.

    With `boxes` and `iou_threshold`, NMS by loss first removes overlapping examples. With
    `positive` and `negative_ratio`, positives and negatives are then taken, hardest first, at a
    ratio of 1 : negative_ratio (the SSD variant; 3 in the paper).

    Args:
        losses: (N,) loss of each example, floating-point.
        num_examples: Greatest number taken, >= 0; None: no limit.
        positive: (N,) booleans; needed for `negative_ratio`.
        negative_ratio: Negatives taken per positive, >= 0. With `num_examples`, at most
            num_examples / (1 + negative_ratio) positives are taken.
        boxes: (N, 4) as (x1, y1, x2, y2) in pixels; needed for `iou_threshold`. The example of
            a box with NaN is never taken.
        iou_threshold: IoU above which the example of smaller loss is dropped, in [0, 1].

    Returns:
        (N,) booleans, true where the example is taken. Of equal losses the first is taken, NaN
        never.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, a number is out of range, or only one of a pair of
            arguments was given.

    Example:
        >>> import numpy as np
        >>> from focal.numpy import hard_example_mask
        >>> hard_example_mask(np.array([0.1, 0.9, 0.5, 0.2]), 2)
        array([False,  True,  True, False])

    Source: Shrivastava et al. 2016 (OHEM); Liu et al. 2016 (SSD); Lin et al. 2017, Table 1d.
    """
    name = "hard_example_mask"
    losses = checks.check_floating(xp, name, "losses", losses)
    if len(losses.shape) != 1:
        raise ValueError(f"{name}: losses must have shape (N,); got {tuple(losses.shape)}")
    limit = None
    if num_examples is not None:
        limit = checks.check_integer(name, "num_examples", num_examples, 0)
    _both_or_none(name, "boxes", boxes, "iou_threshold", iou_threshold)
    candidates = losses == losses
    if boxes is not None:
        boxes = checks.check_boxes(xp, name, "boxes", boxes)
        checks.check_shape(name, "boxes", boxes, (losses.shape[0], 4), "(N, 4)")
        threshold = checks.check_number(name, "iou_threshold", iou_threshold, 0, 1)
        order = xp.argsort(-losses, stable=True)
        sorted_boxes = xp.take(checks.wide(xp, boxes), order, axis=0)
        keep = suppress(xp, sorted_boxes, None, threshold)
        candidates = candidates & xp.take(keep, xp.argsort(order, stable=True), axis=0)
    _both_or_none(name, "positive", positive, "negative_ratio", negative_ratio)
    if negative_ratio is None:
        hardness = _rank(xp, candidates, -losses)
        return candidates if limit is None else candidates & (hardness < limit)

    proportion = checks.check_number(name, "negative_ratio", negative_ratio, low=0)
    positive = checks.check_real(xp, name, "positive", positive)
    checks.check_same_shape(name, "positive", positive, "losses", losses)
    is_positive = xp.astype(positive, xp.float32) != 0
    hard_positive = candidates & is_positive
    if limit is not None:
        most = math.floor(limit / (1 + proportion))
        hard_positive = hard_positive & (_rank(xp, hard_positive, -losses) < most)
    # Counts are compared in float32: half types cannot represent them exactly.
    quota = xp.astype(_count(xp, hard_positive), xp.float32) * proportion
    hard_negative = candidates & ~is_positive
    rank = xp.astype(_rank(xp, hard_negative, -losses), xp.float32)
    return hard_positive | (hard_negative & (rank + 1 <= quota))


def _with_an_empty_box(xp: Namespace, boxes: Array, labels: Array) -> tuple[Array, Array]:
    box = xp.zeros_like(xp.sum(boxes, axis=-2, keepdims=True))
    label = xp.zeros_like(xp.sum(labels, axis=-1, keepdims=True))
    return xp.concat([boxes, box], axis=-2), xp.concat([labels, label], axis=-1)


def _rank(xp: Namespace, mask: Array, keys: Array) -> Array:
    """Rank of each element among those of the mask by ascending key, on the last axis."""
    last = xp.where(~mask, math.inf, keys)
    return xp.argsort(xp.argsort(last, axis=-1, stable=True), axis=-1, stable=True)


def _count(xp: Namespace, mask: Array) -> Array:
    return xp.sum(xp.astype(mask, xp.index_type), axis=-1, keepdims=True)


def _both_or_none(name: str, a: str, a_value: object, b: str, b_value: object) -> None:
    if (a_value is None) != (b_value is None):
        given, missing = (a, b) if b_value is None else (b, a)
        raise ValueError(f"{name}: {given} needs {missing}, which is None")
