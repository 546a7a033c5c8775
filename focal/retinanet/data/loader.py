"""Batches of static shape, prefetched by threads; batch s depends on (seed, s) alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.dataset import Dataset, Example, dataset_name, image_name, read_example
from focal.retinanet.data.images import DataError
from focal.retinanet.data.transforms import augment, fit, place

__all__ = ["Batch", "collate", "eval_batches", "fitted", "prefetch", "train_batches"]

_T = TypeVar("_T")

# Independent streams of random numbers of one seed.
_ORDER, _AUGMENT = 0, 1


class Batch(NamedTuple):
    """B images on a canvas of (H, W), each at the top-left corner.

    Attributes:
        images: (B, H, W, 3) uint8, RGB; the padding is the mean color.
        boxes: (B, M, 4) float32, `(x1, y1, x2, y2)` in canvas pixels; zeros where there is none.
        labels: (B, M) int64, class indices; -1 where there is none.
        sizes: (B, 2) int64, the (height, width) of the canvas that each image covers.
        scales: (B,) float64, canvas pixels per pixel of the original image.
        image_ids: (B,) int64; -1 for an image that only fills up the last batch.
        image_sizes: (B, 2) int64, the (height, width) of the original image; in training of the
            part of it that is shown, `sizes / scales`, rounded.
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    scales: np.ndarray
    image_ids: np.ndarray
    image_sizes: np.ndarray


def train_batches(
    dataset: Dataset,
    config: RetinaNetConfig,
    train: TrainConfig,
    start: int = 0,
    cache_bytes: int = 2**30,
    share: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """An endless iterator of augmented batches from shuffled epochs.

    A batch depends only on the seed and its number, not on the number of workers, so a run that
    resumes with `start` continues as if it had not stopped. The threads end when the iterator is
    closed or collected.

    Args:
        dataset: at least one image.
        config: its canvas and mean color are used.
        train: batch size, seed, workers, crop and augmentation.
        start: number of the first batch.
        cache_bytes: memory limit of the cache of decoded images, scaled to the canvas, for a
            dataset that is `constant`.
        share: (index, count) of the equal part of each batch that this replica takes.

    Returns:
        Batches on a canvas of `train.crop`, no larger than `config.image_size`.

    Raises:
        ValueError: the dataset has no images.
        DataError: an example could not be read or is not as `Example` says; the message names it.
    """
    count, size = len(dataset), train.batch_size
    if count == 0:
        raise ValueError(f"train_batches: {dataset_name(dataset)} has no images")
    max_boxes, constant = getattr(dataset, "max_boxes", 0), getattr(dataset, "constant", False)
    height, width = map(min, train.crop or config.image_size, config.image_size)
    images = _FittedImages(dataset, config.image_size, cache_bytes if constant else 0)
    order = functools.lru_cache(maxsize=2)(
        lambda epoch: np.random.default_rng([train.seed, _ORDER, epoch]).permutation(count)
    )

    def item(step: int, slot: int) -> tuple[Example, float]:
        epoch, position = divmod(step * size + slot, count)
        index = int(order(epoch)[position])
        rng = np.random.default_rng([train.seed, _AUGMENT, step, slot])
        with _naming(dataset, index):
            example, scale = images[index]
            example, zoom = augment(
                example, (height, width), train.zoom, train.flips, train.jitter, rng
            )
        return example, scale * zoom

    which, shares = share
    slots = range(which * size // shares, (which + 1) * size // shares)

    def batch(step: int) -> Batch:
        items = [item(step, slot) for slot in slots]
        return collate(items, (height, width), max_boxes, config)

    return prefetch(batch, itertools.count(start), train.workers)


def eval_batches(
    dataset: Dataset, config: RetinaNetConfig, batch_size: int, workers: int | None = None
) -> Generator[Batch, None, None]:
    """Every image once, in order, on the whole canvas.

    The last batch is filled up by repeating the last image, with an image id of -1.
    """
    count, max_boxes = len(dataset), getattr(dataset, "max_boxes", 0)

    def item(index: int) -> tuple[Example, float, tuple[int, ...]]:
        last = min(index, count - 1)
        with _naming(dataset, last):
            whole = read_example(dataset, last)
            example, scale = fitted(whole, config.image_size)
        example = example if index < count else example._replace(image_id=-1)
        return example, scale, whole.image.shape[:2]

    def batch(first: int) -> Batch:
        items = [item(index) for index in range(first, first + batch_size)]
        collated = collate([item[:2] for item in items], config.image_size, max_boxes, config)
        return collated._replace(image_sizes=np.array([size for _, _, size in items], np.int64))

    return prefetch(batch, range(0, count, batch_size), workers)


@contextlib.contextmanager
def _naming(dataset: Dataset, index: int) -> Iterator[None]:
    """Turn any error of a dataset into a `DataError` that names the image."""
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        where = f"{dataset_name(dataset)}: {image_name(dataset, index)}"
        raise DataError(f"{where}: cannot be used ({reason})") from error


class _FittedImages:
    """The examples scaled to the canvas, cached up to a memory limit.

    Nothing is evicted: in shuffled epochs every image is equally likely to come next.
    """

    def __init__(self, dataset: Dataset, canvas: tuple[int, int], cache_bytes: int) -> None:
        self._dataset = dataset
        self._canvas = canvas
        self._free = cache_bytes
        self._kept: dict[int, tuple[Example, float]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> tuple[Example, float]:
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        item = fitted(read_example(self._dataset, index), self._canvas)
        with self._lock:
            needed = item[0].image.nbytes
            if index not in self._kept and needed <= self._free:
                self._kept[index] = item
                self._free -= needed
        return item


def fitted(example: Example, canvas: tuple[int, int]) -> tuple[Example, float]:
    """The example scaled to fit the canvas, and the scale."""
    image, boxes, scale = fit(example.image, example.boxes, canvas)
    return example._replace(image=image, boxes=boxes), scale


def collate(
    items: list[tuple[Example, float]],
    canvas: tuple[int, int],
    max_boxes: int,
    config: RetinaNetConfig,
) -> Batch:
    """Examples and their scales as one batch, whose image sizes are those that are shown."""
    rows = max(8, -(-max_boxes // 8) * 8)  # a multiple of 8: fewer shapes to compile
    most = max((len(example.boxes) for example, _ in items), default=0)
    rows = rows if most <= rows else 1 << (most - 1).bit_length()  # a power of two
    boxes = np.zeros((len(items), rows, 4), np.float32)
    labels = np.full((len(items), rows), -1, np.int64)
    for row, (example, _) in enumerate(items):
        boxes[row, : len(example.boxes)] = example.boxes
        labels[row, : len(example.labels)] = example.labels
    sizes = np.array([example.image.shape[:2] for example, _ in items], np.int64).reshape(-1, 2)
    scales = np.array([scale for _, scale in items], np.float64)
    images = [place(example.image, canvas, config.fill) for example, _ in items]
    return Batch(
        images=np.array(images, np.uint8).reshape(-1, *canvas, 3),
        boxes=boxes,
        labels=labels,
        sizes=sizes,
        scales=scales,
        image_ids=np.array([example.image_id for example, _ in items], np.int64),
        image_sizes=np.rint(sizes / scales[:, None]).astype(np.int64),
    )


def prefetch(
    make: Callable[[int], _T], numbers: Iterable[int], workers: int | None, ahead: int = 2
) -> Generator[_T, None, None]:
    """`map(make, numbers)`, in order, with up to `ahead` results per worker made in advance.

    With 0 workers the calling thread makes them; None is `_default_workers()`.
    """
    workers = _default_workers() if workers is None else workers
    if workers < 1:
        yield from map(make, numbers)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="focal-data")
    waiting: deque[Future[_T]] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > ahead * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the iterator is closed or collected
        pool.shutdown(cancel_futures=True)


def _default_workers() -> int:
    """The number of cores less one, which is left to the training loop, from 1 to 8."""
    own = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(own(0)) if own else os.cpu_count() or 1
    return max(1, min(8, cores - 1))
