"""Detections in a results file, so that AP can be computed where pycocotools is."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from focal.retinanet.data import Dataset, eval_batches
from focal.retinanet.detector import detect
from focal.retinanet.training.evaluate import coco_metrics

SHOWN = ("AP", "AP50", "AP75", "AR100")
WITHOUT = (
    "pycocotools is not installed; python -m benchmarks.gpu.page computes AP from the detections"
)


def detections_on(model: Any, dataset: Dataset, batch_size: int = 8) -> list[dict[str, Any]]:
    """What a model finds in each image of a dataset."""
    found = []
    with contextlib.closing(eval_batches(dataset, model.config, batch_size)) as batches:
        for batch in batches:
            results = detect(model, batch)
            for image_id, result in zip(batch.image_ids, results, strict=True):
                if image_id >= 0:
                    found.append({"image_id": int(image_id), **result})
    return found


def scored(found: Sequence[Mapping[str, Any]], dataset: Dataset) -> dict[str, Any]:
    """Packed detections, and AP where it can be computed."""
    return {"detections": pack(found), "AP": average_precision(found, dataset)}


def average_precision(
    found: Sequence[Mapping[str, Any]], dataset: Dataset
) -> dict[str, float] | str:
    """COCO's AP, or why there is none."""
    if importlib.util.find_spec("pycocotools") is None:
        return WITHOUT
    metrics = coco_metrics(dataset.ground_truth(), found, dataset.category_ids)
    return {name: round(metrics[name], 4) for name in SHOWN}


def pack(found: Sequence[Mapping[str, Any]]) -> str:
    """Detections as text, without loss."""
    arrays = {
        "image_id": np.array([entry["image_id"] for entry in found], np.int64),
        "count": np.array([len(entry["scores"]) for entry in found], np.int64),
        "boxes": np.concatenate([np.zeros((0, 4), np.float32), *(e["boxes"] for e in found)]),
        "scores": np.concatenate([np.zeros(0, np.float32), *(e["scores"] for e in found)]),
        "labels": np.concatenate([[], *(e["labels"] for e in found)]).astype(np.int16),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return base64.b64encode(file.getvalue()).decode()


def unpack(text: str) -> list[dict[str, Any]]:
    """What `pack` wrote."""
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        ends = np.cumsum(arrays["count"])[:-1]
        columns = {name: np.split(arrays[name], ends) for name in ("boxes", "scores", "labels")}
        return [
            {"image_id": int(image_id), **{name: column[i] for name, column in columns.items()}}
            for i, image_id in enumerate(arrays["image_id"])
        ]
