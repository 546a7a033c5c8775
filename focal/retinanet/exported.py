"""The description that goes into an exported detector, in every format."""

from __future__ import annotations

import json
from typing import Any

from focal.retinanet.config import RetinaNetConfig

__all__ = ["check_backend", "description", "version"]


def description(config: RetinaNetConfig) -> dict[str, Any]:
    """What is needed to prepare images and to read the labels, as JSON can hold it."""
    return {
        "classes": config.classes,
        "category_ids": config.category_ids or tuple(range(1, config.num_classes + 1)),
        "image_size": config.image_size,
        "fill": config.fill,
        "config": json.loads(config.to_json()),
    }


def version(canvas: bool) -> str:
    """Of the form of the graph: batches of canvases, or one image of any size."""
    return "1" if canvas else "2"


def check_backend(function: str, model: Any, backend: str) -> None:
    """Raise a TypeError if the model is not a detector of this framework."""
    found = getattr(model, "backend", type(model).__name__)
    if found != backend:
        raise TypeError(
            f"{function}: model must be a detector of the backend {backend!r}; got {found!r}"
        )
