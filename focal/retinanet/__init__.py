"""The reference RetinaNet: one detector, the same in every framework.

    >>> import numpy as np
    >>> from focal.retinanet import PRESETS, build, predict
    >>> config = PRESETS["tiny"].detector.replace(classes=("cat", "dog"))
    >>> model = build(config, backend="torch")
    >>> found = predict(model, [np.zeros((100, 120, 3), np.uint8)])
    >>> sorted(found[0])
    ['boxes', 'labels', 'scores']

A model is the framework's own (an `nn.Module` in PyTorch) with its `config`; these functions
hide which framework it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.detector import build, export, load, predict, raw_outputs, save
from focal.retinanet.presets import CONVENTIONS, PRESETS, Preset
from focal.retinanet.torchvision import load_torchvision

if TYPE_CHECKING:
    from focal.retinanet.training.evaluate import evaluate

__all__ = [
    "CONVENTIONS",
    "PRESETS",
    "Preset",
    "RetinaNetConfig",
    "TrainConfig",
    "build",
    "evaluate",
    "export",
    "load",
    "load_torchvision",
    "predict",
    "raw_outputs",
    "save",
]


def __getattr__(name: str) -> Any:
    """What needs more packages than NumPy is imported where it is asked for."""
    if name != "evaluate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from focal.retinanet.training.evaluate import evaluate

    return evaluate
