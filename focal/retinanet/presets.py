"""Named settings: what to train (`PRESETS`) and whose conventions to follow (`CONVENTIONS`)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from focal.core.anchors import AnchorConfig
from focal.retinanet.config import RetinaNetConfig, TrainConfig

__all__ = ["CONVENTIONS", "PRESETS", "Preset"]


class Preset(NamedTuple):
    """A detector and the run that trains it."""

    detector: RetinaNetConfig
    train: TrainConfig


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        # Small enough to learn from scratch on a CPU: 0.93 M parameters, anchors from 20 pixels.
        "tiny": Preset(
            RetinaNetConfig(
                image_size=(256, 320),
                backbone="tiny",
                norm="batch",
                levels=(3, 4, 5),
                channels=64,
                head_depth=2,
                anchors=AnchorConfig(strides=(8, 16, 32), sizes=(20.0, 40.0, 80.0)),
                allow_low_quality=0.2,
                box_beta=1 / 9,
            ),
            TrainConfig(
                steps=4000,
                batch_size=8,
                optimizer="adamw",
                learning_rate=1.5e-3,
                weight_decay=0.01,
                schedule="cosine",
                warmup=100,
                clip_norm=10.0,
                ema=0.998,
                crop=(240, 240),
                zoom=(0.7, 1.4),
                flips="d4",
                jitter=0.3,
                eval_every=1000,
            ),
        ),
        # The paper's RetinaNet-50 and schedule; without loaded weights use norm=batch or group.
        "r50": Preset(RetinaNetConfig(), TrainConfig()),
    }
)
"""What to train, by name: "tiny" and "r50", each a `Preset`."""

# retinanet_resnet50_fpn (v1): P6 from P5, whole-pixel anchors at the corners of stretched cells.
_TORCHVISION: Mapping[str, Any] = {
    "p6_from": "p5",
    "allow_low_quality": True,
    "anchors": AnchorConfig(offset=0.0, rounded=True, stretched=True),
    "box_beta": 0.0,
    "normalizer": "image",
    "max_detections": 300,
}

CONVENTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {},
        "torchvision": _TORCHVISION,
        # retinanet_resnet50_fpn_v2
        "torchvision_v2": {
            **_TORCHVISION,
            "p6_from": "c5",
            "head_norm": "group",
            "box_loss": "giou",
        },
        # Base-RetinaNet.yaml: L1 boxes, running mean of the positives as normalizer.
        "detectron2": {
            "allow_low_quality": True,
            "anchors": AnchorConfig(offset=0.0),
            "box_beta": 0.0,
            "normalizer": "ema",
        },
    }
)
"""Whose conventions to follow, by name: the fields of `RetinaNetConfig` that differ."""
