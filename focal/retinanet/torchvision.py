"""Weights of torchvision's RetinaNets, and of its ResNets as backbones, for every framework."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from focal.retinanet.architecture import NORM_EPS, backbone_of
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.detector import backend_module, build
from focal.retinanet.presets import CONVENTIONS

__all__ = [
    "LOGITS",
    "from_torchvision",
    "load_torchvision",
    "read_torchvision",
    "torchvision_detector",
]

Source = str | os.PathLike[str] | Mapping[str, Any]
LOGITS = "head.classification_head.cls_logits."
"""The names of the last layer of the class head begin like this."""
_HIDDEN = re.compile(r"head\.classification_head\.conv\.\d\.0\.weight")


def load_torchvision(
    source: Source,
    backend: str = "torch",
    *,
    classes: Sequence[str] | None = None,
    image_size: tuple[int, int] = (1024, 1024),
    norm_eps: float | None = None,
    device: str | None = None,
    canvas: tuple[int, int] | None = None,
) -> Any:
    """A detector with the weights of torchvision's `retinanet_resnet50_fpn` or `..._v2`.

    Which of the two it is, and how many classes it has, is read from the tensors. Conventions
    are those of that model: P6 from P5 and L1 boxes in v1; P6 from C5, group normalization in
    the subnets and GIoU in v2; whole-pixel anchors at the corners of their cells in both.

    Args:
        source: A `.pth` or `.safetensors` file, or the state dict, under torchvision's names of
            any of its versions. A `.pth` file needs PyTorch to be read.
        backend: "torch", "jax" or "tensorflow".
        classes: Names by class index. Default: "0", "1", ...; torchvision's published weights
            count COCO's category ids, of which 0 is never used.
        image_size: (height, width) in pixels that images are scaled to fit.
        norm_eps: What the backbone's batch normalizations add to the variance. Default: 0 for
            v1, as in torchvision's published weights, and 1e-5 for v2.
        device: As in `build`.
        canvas: The old name of `image_size`, for one release.

    Returns:
        The framework's own model, as from `build`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the tensors are not those of such a network, or `classes` are too few or many.

    Source: torchvision's `retinanet_resnet50_fpn` and `retinanet_resnet50_fpn_v2`.
    """
    if canvas is not None:
        warnings.warn(
            "load_torchvision: canvas is deprecated and will be removed; use image_size",
            DeprecationWarning,
            stacklevel=2,
        )
        image_size = canvas
    tensors, config = torchvision_detector(read_torchvision(source), classes, norm_eps)
    model = build(config.replace(image_size=image_size), backend, device=device)
    backend_module(backend).load_state(model, tensors)
    return model


def torchvision_detector(
    tensors: Mapping[str, np.ndarray],
    classes: Sequence[str] | None = None,
    norm_eps: float | None = None,
) -> tuple[dict[str, np.ndarray], RetinaNetConfig]:
    """The weights of one of torchvision's RetinaNets for our networks, and its config.

    Args:
        tensors: From `read_torchvision`.
        classes: As in `load_torchvision`.
        norm_eps: As in `load_torchvision`.
    """
    if f"{LOGITS}bias" not in tensors:
        raise ValueError(
            "load_torchvision: source must be the weights of a RetinaNet; "
            f"got {len(tensors)} tensors without {LOGITS}bias"
        )
    second = "head.classification_head.conv.0.1.weight" in tensors
    convention = CONVENTIONS["torchvision_v2" if second else "torchvision"]
    config = RetinaNetConfig(
        backbone=backbone_of(tensors),
        norm="batch" if second else "frozen_batch",
        channels=len(tensors["backbone.fpn.layer_blocks.0.0.bias"]),
        head_depth=sum(bool(_HIDDEN.match(name)) for name in tensors),
        **convention,
    )
    count = len(tensors[f"{LOGITS}bias"]) // config.anchors.per_cell
    if classes is None:
        classes = [str(k) for k in range(count)]
    if len(classes) != count:
        raise ValueError(f"load_torchvision: classes must be {count} names; got {len(classes)}")
    if norm_eps is None:
        norm_eps = NORM_EPS if second else 0.0
    return _with_epsilon(tensors, norm_eps), config.replace(classes=tuple(classes))


def read_torchvision(source: Source, *, norm_eps: float = NORM_EPS) -> dict[str, np.ndarray]:
    """Read a state dict of torchvision: a RetinaNet's, or a classifier's as its backbone.

    To start from an ImageNet backbone: `load_state(model, state(model) | read_torchvision(path))`.

    Args:
        source: A `.pth` or `.safetensors` file, or the state dict itself.
        norm_eps: As in `from_torchvision`; 0 for the published v1, not for v2.
    """
    if isinstance(source, Mapping):
        tensors = source
    elif not Path(source).is_file():
        raise FileNotFoundError(f"{source}: expected a state dict of torchvision; found no file")
    elif os.fspath(source).endswith(".safetensors"):
        from focal.retinanet.weights import read_safetensors

        tensors, _ = read_safetensors(source)
    else:
        tensors = _read_pth(source)
    arrays = {name: _array(x) for name, x in tensors.items()}
    return from_torchvision(arrays, norm_eps=norm_eps)


def _read_pth(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors of a PyTorch file, a pickle, from which no code is run."""
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected a state dict of torchvision; "
            "it is damaged, or holds other things than tensors, which are not loaded"
        ) from error
    except (EOFError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: expected a state dict of torchvision; it is damaged") from error
    if not isinstance(tensors, Mapping) or not all(torch.is_tensor(x) for x in tensors.values()):
        raise ValueError(f"{path}: expected a state dict of torchvision; found other things")
    return dict(tensors)


def _array(x: Any) -> np.ndarray:
    """A float32 copy of an array or a PyTorch tensor, wherever it is."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().float()
    return np.array(x, np.float32)


def from_torchvision(
    tensors: Mapping[str, np.ndarray], *, norm_eps: float = NORM_EPS
) -> dict[str, np.ndarray]:
    """The weights of a torchvision RetinaNet, or of a ResNet as its backbone, under our names.

    Args:
        tensors: The arrays of torchvision's state dict, of any of its versions.
        norm_eps: What the batch normalizations of that network add to the variance. It is 0 in
            the published `retinanet_resnet50_fpn`, though not in `_v2`.

    Returns:
        The arrays by name; a classifier's last layer and the counters of batches are left out.
    """
    renamed = {
        _current_name(name): x
        for name, x in tensors.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    return _with_epsilon(renamed, norm_eps)


def _with_epsilon(tensors: Mapping[str, np.ndarray], norm_eps: float) -> dict[str, np.ndarray]:
    """Our networks have one epsilon; the scale is changed to make up for another."""
    adapted = dict(tensors)
    if norm_eps != NORM_EPS:
        for name, var in tensors.items():
            if name.endswith("running_var"):
                weight = name.replace("running_var", "weight")
                adapted[weight] = tensors[weight] * np.sqrt((var + NORM_EPS) / (var + norm_eps))
    return adapted


def _current_name(name: str) -> str:
    """Our name, which is the one in torchvision today; its published v1 file has older ones."""
    name = re.sub(r"(fpn\.\w+_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", name)
    name = re.sub(
        r"(_head\.conv)\.(\d)\.(weight|bias)$",
        lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}",  # convolutions alternated with ReLUs
        name,
    )
    return name if name.startswith(("backbone.", "head.")) else f"backbone.body.{name}"
