"""The description that goes into an exported detector, in every format."""

from __future__ import annotations

import json
from typing import Any

from focal.retinanet.config import RetinaNetConfig

__all__ = ["description"]


def description(config: RetinaNetConfig) -> dict[str, Any]:
    """What is needed to prepare images and to read the labels, as JSON can hold it."""
    return {
        "classes": config.classes,
        "category_ids": config.category_ids or [*range(1, config.num_classes + 1)],
        "image_size": config.image_size,
        "canvas": config.image_size,  # its old name
        "fill": config.fill,
        "config": json.loads(config.to_json()),
    }
