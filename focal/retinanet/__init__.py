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

import importlib
from typing import TYPE_CHECKING, Any

from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.detector import build, export, load, predict, raw_outputs, save
from focal.retinanet.presets import CONVENTIONS, PRESETS, Preset
from focal.retinanet.torchvision import load_torchvision

if TYPE_CHECKING:
    from focal.retinanet.data import CocoDataset, Dataset, Example, ShapesDataset, Transformed
    from focal.retinanet.run import fit
    from focal.retinanet.training.evaluate import evaluate

__all__ = [
    "CONVENTIONS",
    "PRESETS",
    "CocoDataset",
    "Dataset",
    "Example",
    "Preset",
    "RetinaNetConfig",
    "ShapesDataset",
    "TrainConfig",
    "Transformed",
    "build",
    "evaluate",
    "export",
    "fit",
    "load",
    "load_torchvision",
    "predict",
    "raw_outputs",
    "save",
]

_LATER = {"evaluate": "training.evaluate", "fit": "run"} | dict.fromkeys(
    ("CocoDataset", "Dataset", "Example", "ShapesDataset", "Transformed"), "data"
)
"""What needs more packages than NumPy is imported where it is asked for: the module of each."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
