"""COCO average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from focal.retinanet.data import Batch, Dataset, eval_batches
from focal.retinanet.data.dataset import (
    category_ids,
    class_names,
    coco_annotation,
    dataset_name,
)
from focal.retinanet.detector import detect
from focal.retinanet.training.progress import ProgressBar

__all__ = ["coco_metrics", "coco_results", "evaluate", "evaluate_model"]


def evaluate(
    model: Any, dataset: Dataset, *, batch_size: int = 8, progress: bool = False
) -> dict[str, float]:
    """COCO average precision of a detector on a dataset, by pycocotools.

    Args:
        model: From `build` or `load`.
        dataset: A `CocoDataset`, `ShapesDataset` or `Dataset` of your own with the classes of the
            model. Without a method `ground_truth()`, the boxes of its examples are the truth.
        batch_size: Images at a time; the metrics do not depend on it.
        progress: Show a progress bar on a terminal.

    Returns:
        Numbers in [0, 1], with at most 100 detections per image and class: "AP", the mean over IoU
        thresholds 0.50, 0.55, ... 0.95 and over classes; "AP50" and "AP75", at one threshold;
        "APs", "APm", "APl", of objects with areas up to 32^2, up to 96^2 and beyond, in pixels;
        "AR100", the mean recall; and "AP/<name>" of each class. NaN where there is no object.

    Raises:
        ValueError: the classes of the dataset are not the model's, or an image cannot be read.

    Example:
        >>> from focal.retinanet import PRESETS, build, evaluate
        >>> from focal.retinanet.data import ShapesDataset
        >>> data = ShapesDataset("test", size=(64, 64), num_images=4)
        >>> config = PRESETS["tiny"].detector.replace(classes=data.classes, image_size=(64, 64))
        >>> metrics = evaluate(build(config), data)
        >>> sorted(metrics)[:4], metrics["AP50"]  # untrained
        (['AP', 'AP/circle', 'AP/square', 'AP/triangle'], 0.0)

    Source: <https://cocodataset.org/#detection-eval>
    """
    return evaluate_model(model, dataset, batch_size, progress)[0]


def coco_metrics(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    category_ids: Sequence[int],
) -> dict[str, float]:
    """COCO's box metrics, each in [0, 1], with at most 100 detections per image and class.

    Args:
        ground_truth: `images`, `annotations` and `categories` in the COCO format, as a dataset's
            `ground_truth()` gives them. It is not changed.
        detections: at most one entry per image: `image_id`, `boxes` (n, 4) as `(x1, y1, x2, y2)`
            in pixels of the original image, `scores` (n,), `labels` (n,) class indices.
        category_ids: the ground truth's category id of each label.

    Returns:
        As in `evaluate`.

    Raises:
        ValueError: an unknown or repeated image id, a label that is no class, a box or score
            that is not finite, or arrays whose lengths differ.
    """
    from pycocotools.cocoeval import COCOeval

    names = {c["id"]: c["name"] for c in ground_truth["categories"]}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        # New ids from 1 on: pycocotools takes a match with annotation 0 for no match.
        truth = _index(ground_truth, ground_truth["annotations"])
        found = _index(ground_truth, _annotations(ground_truth, detections, category_ids))
        coco = COCOeval(truth, found, "bbox")
        coco.params.catIds = list(category_ids)
        coco.params.maxDets = [100]
        coco.evaluate()
        coco.accumulate()
    # precision: (IoU thresholds, recall points, classes, areas, 1); areas: all, s, m, l
    precision, recall = coco.eval["precision"][..., 0], coco.eval["recall"][..., 0]
    metrics = {
        "AP": _mean(precision[:, :, :, 0]),
        "AP50": _mean(precision[0, :, :, 0]),
        "AP75": _mean(precision[5, :, :, 0]),
        "APs": _mean(precision[:, :, :, 1]),
        "APm": _mean(precision[:, :, :, 2]),
        "APl": _mean(precision[:, :, :, 3]),
        "AR100": _mean(recall[:, :, 0]),
    }
    for label, category in enumerate(category_ids):
        metrics[f"AP/{names[category]}"] = _mean(precision[:, :, label, 0])
    return metrics


def _index(ground_truth: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]) -> Any:
    """A COCO object over copies of the annotations, which pycocotools writes into."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": [{**a, "id": number} for number, a in enumerate(annotations, 1)],
    }
    coco.createIndex()
    return coco


def coco_results(
    image_id: int, found: Mapping[str, np.ndarray], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The detections of an image as entries of a results file of COCO."""
    boxes = found["boxes"].reshape(-1, 4).astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    columns = found["labels"].tolist(), boxes.tolist(), found["scores"].tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": bbox, "score": score}
        for label, bbox, score in zip(*columns, strict=True)
    ]


def _annotations(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Detections in the form of annotations."""
    unseen = {image["id"] for image in ground_truth["images"]}
    annotations: list[dict[str, Any]] = []
    for entry in detections:
        image_id = int(entry["image_id"])
        if image_id not in unseen:
            raise ValueError(f"coco_metrics: image_id {image_id} is unknown or comes twice")
        unseen.remove(image_id)
        boxes, scores, labels = (np.asarray(entry[k]) for k in ("boxes", "scores", "labels"))
        n = len(scores)
        if boxes.size != 4 * n or scores.shape != (n,) or labels.shape != (n,):
            raise ValueError(
                f"coco_metrics: image_id {image_id}: expected boxes (n, 4), scores (n,), "
                f"labels (n,); got {boxes.shape}, {scores.shape}, {labels.shape}"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"coco_metrics: image_id {image_id}: boxes and scores must be finite")
        if n and not (labels.min() >= 0 and labels.max() < len(category_ids)):
            raise ValueError(
                f"coco_metrics: image_id {image_id}: labels must be in [0, {len(category_ids)})"
            )
        result = {"boxes": boxes, "scores": scores, "labels": labels}
        annotations += coco_results(image_id, result, category_ids)
    for entry in annotations:
        entry |= {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
    return annotations


def _mean(values: np.ndarray) -> float:
    """The mean over classes that occur; COCOeval has -1 for the others."""
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")


def evaluate_model(
    model: Any, dataset: Dataset, batch_size: int = 8, progress: bool = False
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of `evaluate`, and the detections in pixels of the images."""
    name, classes, ids = dataset_name(dataset), class_names(dataset), category_ids(dataset)
    if classes != model.config.classes:
        raise ValueError(
            f"evaluate: the detector's classes are {model.config.classes}, "
            f"those of {name} are {classes}"
        )
    found: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    batches = eval_batches(dataset, model.config, batch_size)
    total = -(-len(dataset) // batch_size)
    hidden = None if progress else True  # None: shown on a terminal alone
    bar = ProgressBar(batches, total=total, desc=name, unit="batch", disable=hidden)
    own = getattr(dataset, "ground_truth", None)
    with contextlib.closing(batches):
        for batch in bar:
            results = detect(model, batch)
            for row, (image_id, result) in enumerate(zip(batch.image_ids, results, strict=True)):
                if len(found) < len(dataset):  # what follows only fills up the batch
                    found.append({"image_id": int(image_id), **result})
                    if own is None:
                        images.append({"id": int(image_id)})
                        annotations += _truth(batch, row, ids)
    if own is not None:
        return coco_metrics(own(), found, ids), found
    categories = [{"id": i, "name": name} for i, name in zip(ids, classes, strict=True)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    return coco_metrics(truth, found, ids), found


def _truth(batch: Batch, row: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The boxes of an image as annotations, which `coco_metrics` numbers."""
    real = batch.labels[row] >= 0
    boxes = batch.boxes[row, real].astype(np.float64) / batch.scales[row]
    return [
        coco_annotation(0, int(batch.image_ids[row]), category_ids[label], box.tolist())
        for label, box in zip(batch.labels[row, real], boxes, strict=True)
    ]
