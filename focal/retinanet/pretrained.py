"""Weights to start a run from: a detector's or a backbone's, ours or torchvision's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focal.retinanet.architecture import backbone_of
from focal.retinanet.config import BackboneName, RetinaNetConfig
from focal.retinanet.presets import Preset
from focal.retinanet.settings import apply
from focal.retinanet.torchvision import LOGITS, read_torchvision, torchvision_detector
from focal.retinanet.weights import is_ours, load_weights

__all__ = ["Pretrained", "read_pretrained"]

_NETWORK = ("backbone", "levels", "channels", "p6_from", "head_depth", "head_norm")
"""Fields of the config that the shapes of the weights follow."""
_REST = ("backbone.fpn.", "head.")
"""Prefixes of what a backbone alone does not have."""


class Pretrained(NamedTuple):
    """Weights to start from."""

    source: str
    tensors: dict[str, np.ndarray]
    backbone: BackboneName
    config: RetinaNetConfig | None
    """The detector that they are of; None: they are of a backbone alone."""

    def settings(self, default: Preset, changes: Mapping[str, Any]) -> Preset:
        """The detector of the weights, and how to train it.

        Args:
            default: The run, and the detector around weights of a backbone alone.
            changes: Fields that were set by hand.

        Raises:
            ValueError: a change does not fit the weights.
        """
        base = self.config or default.detector.replace(backbone=self.backbone)
        chosen = apply(Preset(base, default.train), changes)
        detector = chosen.detector
        fields = ("backbone",) if self.config is None else _NETWORK
        for field in fields:
            given, wanted = getattr(base, field), getattr(detector, field)
            if given != wanted:
                raise ValueError(f"{self.source}: its weights are of {field} {given}; got {wanted}")
        if self.config and base.anchors.per_cell != detector.anchors.per_cell:
            raise ValueError(
                f"{self.source}: its weights are of {base.anchors.per_cell} anchors in a cell; "
                f"got {detector.anchors.per_cell}"
            )
        return chosen

    def fresh(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Prefixes of the tensors that start anew: of the class head, where the classes differ."""
        if self.config is None:
            return _REST
        return () if self.config.classes == classes else (LOGITS,)

    def summary(self, detector: RetinaNetConfig) -> str:
        """One line on what is taken from the weights, and what is not."""
        if self.config is None:
            return f"weights: backbone {self.backbone} from {self.source}, all else is new"
        text = f"weights: {self.backbone} detector from {self.source}"
        given = {
            field: value
            for field, value in vars(detector).items()
            if value != getattr(self.config, field) and field not in ("classes", "category_ids")
        }
        if given:
            text += ", with " + ", ".join(f"{field} {value}" for field, value in given.items())
        if self.fresh(detector.classes):
            count = self.config.num_classes
            text += f"; its {count} classes are others, so the last layer of the class head is new"
        return text


def read_pretrained(path: str | os.PathLike[str]) -> Pretrained:
    """Read weights to start from.

    Args:
        path: A weights file, checkpoint or run folder of this library; or torchvision's weights of
            a RetinaNet or a ResNet, as .pth or .safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds other things than such weights.
    """
    source = str(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"{source}: expected weights to start from; found no such file")
    if Path(path).is_dir() or is_ours(path):
        tensors, config = load_weights(path)
        return Pretrained(source, tensors, config.backbone, config)
    tensors = read_torchvision(path)
    try:
        if f"{LOGITS}bias" in tensors:
            tensors, config = torchvision_detector(tensors)
            return Pretrained(source, tensors, config.backbone, config)
        body = {name: x for name, x in tensors.items() if not name.startswith(_REST)}
        return Pretrained(source, body, backbone_of(body), None)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
