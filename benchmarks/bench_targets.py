"""Matching and NMS in every framework against the plain way to write them there.

Matching: 100,000 random boxes as anchors with 100 boxes, and the anchors of a large image with 300,
against the whole matrix of IoUs. NMS: 5 images of 1,000 candidates over 80 classes, against a loop
over the candidates (TensorFlow: its own operation), and single images with up to 20,000 candidates.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
import torch

import focal.jax
import focal.numpy
import focal.tensorflow
import focal.torch
from benchmarks.common import Case, compare, record, table, times_table
from focal.core.nms import suppress
from focal.jax._namespace import xp as jax_xp
from focal.numpy._namespace import xp as numpy_xp
from focal.tensorflow._namespace import xp as tf_xp
from focal.torch._namespace import xp as torch_xp

ANCHORS, BOXES = 100_000, 100
IMAGES, CANDIDATES, CLASSES, THRESHOLD = 5, 1000, 80, 0.5
LARGE, MANY = (1024, 1024), 300
"""A canvas with 196,416 anchors, and the boxes on it."""
SLOW = 3
"""Repetitions where the other side takes seconds."""
OFFSET = 10_000.0
"""Moves the classes apart, so that boxes of different classes never overlap."""


def some_boxes(rng: np.random.Generator, *shape: int, extent: float = 1000.0) -> np.ndarray:
    corner = rng.uniform(0, extent, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(8, 200, (*shape, 2))], -1)


# Matching


def plain_match(xp: Any, anchors: Any, boxes: Any) -> Any:
    """The index of the best box, -1 background, -2 between: by the matrix of all IoUs."""
    low = xp.maximum(anchors[:, None, :2], boxes[None, :, :2])
    high = xp.minimum(anchors[:, None, 2:], boxes[None, :, 2:])
    side = xp.maximum(high - low, xp.zeros_like(low))
    overlap = side[..., 0] * side[..., 1]
    size_a, size_b = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    area_a, area_b = size_a[:, 0] * size_a[:, 1], size_b[:, 0] * size_b[:, 1]
    iou = overlap / (area_a[:, None] + area_b[None, :] - overlap)
    best, match = xp.max(iou, 1), xp.argmax(iou, 1)
    if isinstance(best, tuple) or hasattr(best, "indices"):
        best, match = best  # PyTorch's max gives both
    match = xp.where(best < 0.5, xp.zeros_like(match) - 2, match)
    return xp.where(best < 0.4, xp.zeros_like(match) - 1, match)


class _TensorFlow:
    """What `plain_match` needs, under NumPy's names."""

    maximum, minimum, zeros_like, where = tf.maximum, tf.minimum, tf.zeros_like, tf.where
    max, argmax = staticmethod(tf.reduce_max), staticmethod(tf.argmax)


def matching() -> tuple[dict[str, Any], dict[str, float]]:
    """Times in float32, and peak memory in NumPy and float64."""
    rng = np.random.default_rng(0)
    wide = some_boxes(rng, ANCHORS), some_boxes(rng, BOXES)
    anchors, boxes = (a.astype(np.float32) for a in wide)
    tensors = torch.from_numpy(anchors), torch.from_numpy(boxes)
    constants = tf.constant(anchors), tf.constant(boxes)
    run_jax = [jax.jit(f) for f in (focal.jax.match_anchors, partial(plain_match, jnp))]
    run_tf = [
        tf.function(f) for f in (focal.tensorflow.match_anchors, partial(plain_match, _TensorFlow))
    ]
    ours = focal.numpy.match_anchors
    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "numpy": (lambda: ours(anchors, boxes), lambda: plain_match(np, anchors, boxes)),
        "torch": (
            lambda: focal.torch.match_anchors(*tensors),
            lambda: plain_match(torch, *tensors),
        ),
        "jax": tuple(lambda f=f: jax.block_until_ready(f(anchors, boxes)) for f in run_jax),
        "tensorflow": tuple(lambda f=f: f(*constants).numpy() for f in run_tf),
    }
    times = {}
    for name, (own, other) in sides.items():
        np.testing.assert_array_equal(np.asarray(own()), np.asarray(other()))
        times[f"matching, {name}"] = compare({"focal": own, "other": other})
    large = focal.numpy.anchors(LARGE).astype(np.float32), boxes_on_large(rng)
    tensors = tuple(map(torch.from_numpy, large))
    sides = {
        "numpy": (lambda: ours(*large), lambda: plain_match(np, *large)),
        "torch": (
            lambda: focal.torch.match_anchors(*tensors),
            lambda: plain_match(torch, *tensors),
        ),
    }
    for name, (own, other) in sides.items():
        np.testing.assert_array_equal(np.asarray(own()), np.asarray(other()))
        case = f"matching {len(large[0]):,} x {MANY}, {name}"
        times[case] = compare({"focal": own, "other": other}, SLOW)
    memory = {
        "focal": peak_of(lambda: ours(*wide)),
        f"focal, {len(large[0]):,} x {MANY}": peak_of(lambda: ours(*large)),
        "matrix": peak_of(lambda: plain_match(np, *wide)),
    }
    return times, memory


def boxes_on_large(rng: np.random.Generator) -> np.ndarray:
    return some_boxes(rng, MANY, extent=LARGE[0] - 200.0).astype(np.float32)


def peak_of(run: Case) -> float:
    """Greatest MiB that NumPy held at once."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return round(peak / 2**20, 1)


# NMS


def plain_nms(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """What is kept of one image: from the best down, drop what a kept box overlaps."""
    order = np.argsort(-scores, kind="stable")
    moved = boxes + OFFSET * classes[:, None]
    iou = focal.numpy.box_iou(moved, moved)
    kept = np.ones(len(boxes), bool)
    for place, i in enumerate(order):
        if kept[i]:
            rest = order[place + 1 :]
            kept[rest[iou[i, rest] > THRESHOLD]] = False
    return kept


def plain_nms_torch(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor) -> Any:
    order = torch.argsort(scores, descending=True, stable=True)
    moved = (boxes + OFFSET * classes[:, None])[order]
    iou = focal.torch.box_iou(moved, moved)
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if kept[i]:
            kept[i + 1 :] &= iou[i, i + 1 :] <= THRESHOLD
    return torch.zeros_like(kept).index_put_((order,), kept)


def loop_nms(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Class by class, without the matrix: one box at a time against those that are left."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    for label in classes.unique():
        own = torch.nonzero(classes == label)[:, 0]
        left = own[torch.argsort(scores[own], descending=True, stable=True)]
        while len(left):
            first, left = left[0], left[1:]
            kept.append(first)
            others = boxes[left]
            low = torch.maximum(boxes[first, :2], others[:, :2])
            side = (torch.minimum(boxes[first, 2:], others[:, 2:]) - low).clamp(min=0)
            common = side[:, 0] * side[:, 1]
            left = left[common / (area[first] + area[left] - common) <= THRESHOLD]
    found = torch.stack(kept)
    return found[torch.argsort(scores[found], descending=True, stable=True)]


@jax.jit
@jax.vmap
def plain_nms_jax(boxes: jax.Array, scores: jax.Array, classes: jax.Array) -> jax.Array:
    order = jnp.argsort(-scores, stable=True)
    moved = (boxes + OFFSET * classes[:, None])[order]
    iou = focal.jax.box_iou(moved, moved)
    later = jnp.arange(CANDIDATES)

    def step(i: Any, kept: jax.Array) -> jax.Array:
        return kept & ~(kept[i] & (iou[i] > THRESHOLD) & (later > i))

    kept = jax.lax.fori_loop(0, CANDIDATES, step, jnp.ones(CANDIDATES, bool))
    return jnp.zeros_like(kept).at[order].set(kept)


@tf.function
def plain_nms_tf(boxes: tf.Tensor, scores: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    def one(arguments: tuple[tf.Tensor, ...]) -> tf.Tensor:
        box, score, label = arguments
        moved = box + OFFSET * tf.cast(label, tf.float32)[:, None]
        kept = tf.image.non_max_suppression(moved, score, CANDIDATES, THRESHOLD)
        return tf.reduce_any(tf.one_hot(kept, CANDIDATES, True, False), axis=0)

    return tf.map_fn(one, (boxes, scores, classes), fn_output_signature=tf.bool)


def batched(xp: Any, boxes: Any, scores: Any, classes: Any) -> Any:
    """What the detector does with candidates: sorted by score, all images at once."""
    _, order = xp.top_k(scores, CANDIDATES)
    columns = [xp.take_along_axis(boxes[..., i], order, axis=-1) for i in range(4)]
    kept = suppress(
        xp, xp.stack(columns, axis=-1), xp.take_along_axis(classes, order, axis=-1), THRESHOLD
    )
    return xp.take_along_axis(kept, xp.argsort(order, axis=-1), axis=-1)


def suppression() -> dict[str, Any]:
    """Times of all images together."""
    rng = np.random.default_rng(1)
    boxes = some_boxes(rng, IMAGES, CANDIDATES, extent=300.0).astype(np.float32)
    scores = rng.permutation(IMAGES * CANDIDATES).reshape(IMAGES, -1).astype(np.float32)
    classes = rng.integers(0, CLASSES, (IMAGES, CANDIDATES))
    data = boxes, scores, classes
    tensors, constants = [torch.from_numpy(a) for a in data], [tf.constant(a) for a in data]
    arrays = [jnp.asarray(a) for a in data]
    ours_jax = jax.jit(partial(batched, jax_xp))
    ours_tf = tf.function(partial(batched, tf_xp))

    def each(plain: Callable[..., Any], data: Any) -> list[Any]:
        return [plain(*(a[i] for a in data)) for i in range(IMAGES)]

    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "numpy": (lambda: batched(numpy_xp, *data), lambda: each(plain_nms, data)),
        "torch": (
            lambda: batched(torch_xp, *tensors),
            lambda: torch.stack(each(plain_nms_torch, tensors)),
        ),
        "jax": (
            lambda: jax.block_until_ready(ours_jax(*arrays)),
            lambda: jax.block_until_ready(plain_nms_jax(*arrays)),
        ),
        "tensorflow": (
            lambda: ours_tf(*constants).numpy(),
            lambda: plain_nms_tf(*constants).numpy(),
        ),
    }
    times = {}
    for name, (own, other) in sides.items():
        np.testing.assert_array_equal(np.asarray(own()), np.asarray(other()))
        times[f"NMS, {name}"] = compare({"focal": own, "other": other})
    return times


def single_images() -> tuple[dict[str, Any], dict[str, float]]:
    """Times of `nms` and `batched_nms` of one image in PyTorch, and peak memory in NumPy."""
    rng = np.random.default_rng(2)
    times, memory = {}, {}
    for name, count, classes in (
        ("1,000", 1000, 1),
        ("5,000", 5000, 1),
        ("20,000", 20_000, 1),
        ("20,000, all stay", 20_000, 1),
        (f"20,000 over {CLASSES} classes", 20_000, CLASSES),
    ):
        boxes = some_boxes(rng, count).astype(np.float32)
        if "stay" in name:
            places = rng.permutation(count)
            corner = 10.0 * np.stack([places % 150, places // 150], -1)
            boxes = np.concatenate([corner, corner + 12], -1).astype(np.float32)
        scores = rng.permutation(count).astype(np.float32)
        labels = rng.integers(0, classes, count)
        tensors = [torch.from_numpy(a) for a in (boxes, scores, labels)]

        def own(tensors: list[torch.Tensor] = tensors, classes: int = classes) -> torch.Tensor:
            if classes == 1:
                return focal.torch.nms(*tensors[:2], THRESHOLD)
            return focal.torch.batched_nms(*tensors, THRESHOLD)

        def other(tensors: list[torch.Tensor] = tensors) -> torch.Tensor:
            return loop_nms(*tensors)

        np.testing.assert_array_equal(own().numpy(), other().numpy())
        sides = {"focal": own, "other": other}
        times[f"NMS of {name}, torch"] = compare(sides, SLOW if count > 1000 else 41)
        memory[name] = peak_of(own)
    return times, memory


def main() -> None:
    """Measure, write, print."""
    times, memory = matching()
    times |= suppression()
    single, nms_memory = single_images()
    times |= single
    setting = (
        f"float32; matching {ANCHORS} anchors with {BOXES} boxes; NMS of {IMAGES} x {CANDIDATES} "
        f"candidates over {CLASSES} classes"
    )
    record(
        "targets_cpu",
        "python -m benchmarks",
        setting=setting,
        times=times,
        matching_mib=memory,
        nms_mib=nms_memory,
    )
    print(f"{setting}; median (least) in ms\n")
    print(times_table(times))
    print("\nPeak memory of matching in NumPy and float64, in MiB\n")
    print(table([("", *memory), ("", *map(str, memory.values()))]))
    print("\nPeak memory of NMS in MiB\n")
    print(table([("", *nms_memory), ("", *map(str, nms_memory.values()))]))


if __name__ == "__main__":
    main()
