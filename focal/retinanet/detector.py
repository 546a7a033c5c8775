"""The detector in any framework: build, save, load, raw outputs, predictions.

Images and files are imported where they are used: with NumPy alone, configs can be made and
`focal --help` and `focal prior-bias` work.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from focal.retinanet.config import RetinaNetConfig

__all__ = [
    "BACKENDS",
    "backend_module",
    "build",
    "export",
    "export_backend",
    "load",
    "predict",
    "raw_outputs",
    "save",
]

BACKENDS = ("torch", "jax", "tensorflow")
PREDICT_BATCH = 8
"""Batch size of `predict`: memory does not grow with the number of images."""


def build(
    config: RetinaNetConfig, backend: str = "torch", seed: int = 0, device: str | None = None
) -> Any:
    """A new detector with the paper's initialization.

    Args:
        config: The detector; `classes` must not be empty.
        backend: "torch", "jax" or "tensorflow".
        seed: Of the initial weights; global random state is neither used nor changed.
        device: Such as "cpu" or "cuda"; default: a GPU where there is one.

    Returns:
        The framework's own model (in PyTorch an `nn.Module` in evaluation mode) with attributes
        `config` and `backend`.

    Raises:
        ValueError: unknown backend, or a config that describes no detector.
        ImportError: the backend's framework is not installed.

    Example:
        >>> from focal.retinanet import PRESETS, build
        >>> model = build(PRESETS["tiny"].detector.replace(classes=("cell",)))
        >>> model.config.num_classes
        1
    """
    return backend_module(backend).build(config, seed, device)


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write weights and config to one safetensors file, whole or not at all.

    The file is the same whichever framework wrote it: float32, under torchvision's names.

    Args:
        model: From `build` or `load`.
        path: The file, by custom ending in .safetensors; replaced if it exists.

    Raises:
        OSError: the file cannot be written.
    """
    from focal.retinanet.weights import save_weights

    save_weights(path, backend_module(model.backend).state(model), model.config)


def load(path: str | os.PathLike[str], backend: str = "torch", device: str | None = None) -> Any:
    """Read a detector that `save` or a training run wrote, in this framework or another.

    Args:
        path: The safetensors file.
        backend: "torch", "jax" or "tensorflow".
        device: As in `build`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole weights file of this library, or the backend is unknown.
    """
    from focal.retinanet.weights import load_weights

    tensors, config = load_weights(path)
    model = build(config, backend, device=device)
    backend_module(backend).load_state(model, tensors)
    return model


def export(model: Any, path: str | os.PathLike[str]) -> None:
    """Write the detector with its post-processing, for programs that do without this library.

    What goes in and what comes out is the same in both formats:
    `focal.retinanet.torch.export.export_onnx` and
    `focal.retinanet.tensorflow.export.export_saved_model` describe it. ONNX is written by
    PyTorch and a SavedModel by TensorFlow, whichever framework the model is of.

    Args:
        model: From `build` or `load`.
        path: A file ending in .onnx, or a folder, without an ending, for a SavedModel of
            TensorFlow.

    Raises:
        ValueError: `path` has another ending.
        ImportError: a package that writes the format is not installed.
        OSError: the file or folder cannot be written.
    """
    backend = export_backend(path)
    if model.backend != backend:
        tensors = backend_module(model.backend).state(model)
        model = build(model.config, backend, device="cpu")
        backend_module(backend).load_state(model, tensors)
    if backend == "torch":
        from focal.retinanet.torch.export import export_onnx

        export_onnx(model, path)
    else:
        from focal.retinanet.tensorflow.export import export_saved_model

        export_saved_model(model, path)


def export_backend(path: str | os.PathLike[str]) -> str:
    """The backend that writes such an export."""
    suffix = Path(path).suffix
    if suffix not in (".onnx", ""):
        raise ValueError(
            f"export: path must end in .onnx, or have no ending for a SavedModel; got {str(path)!r}"
        )
    return "torch" if suffix == ".onnx" else "tensorflow"


def raw_outputs(model: Any, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Class logits and box deltas of every anchor, before any threshold.

    Args:
        model: From `build` or `load`.
        images: HWC uint8 RGB arrays of any size; each is scaled to fit the config's canvas.

    Returns:
        Class logits (N, anchors, K) and box deltas (N, anchors, 4), float32.

    Raises:
        TypeError, ValueError: an image is not an HWC uint8 array.
    """
    canvases, _, _ = _canvases("raw_outputs", model.config, images)
    return backend_module(model.backend).raw_outputs(model, canvases)


def predict(model: Any, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Detect objects.

    Args:
        model: From `build` or `load`.
        images: HWC uint8 RGB arrays of any size.

    Returns:
        For each image a dict, best detection first: `boxes` (n, 4) float32 as (x1, y1, x2, y2)
        in pixels of that image, `scores` (n,) float32, `labels` (n,) int64 indices into
        `model.config.classes`.

    Raises:
        TypeError, ValueError: an image is not an HWC uint8 array.
    """
    results: list[dict[str, np.ndarray]] = []
    for start in range(0, len(images), PREDICT_BATCH):
        some = images[start : start + PREDICT_BATCH]
        canvases, sizes, scales = _canvases("predict", model.config, some)
        for image, found in zip(some, detect(model, canvases, sizes, scales), strict=True):
            # A sliver covers a whole pixel of the canvas, which can be more than the image has.
            height, width = image.shape[:2]
            limit = np.array([width, height, width, height], np.float32)
            results.append(found | {"boxes": np.minimum(found["boxes"], limit)})
    return results


def detect(
    model: Any, canvases: np.ndarray, sizes: np.ndarray, scales: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """`predict` for images that are on the canvas already, as a `Batch` has them."""
    found = backend_module(model.backend).detect(model, canvases, sizes)
    results = []
    for boxes, scores, labels, scale in zip(*found, scales, strict=True):
        real = scores > 0
        results.append(
            {
                "boxes": (boxes[real] / scale).astype(np.float32),
                "scores": scores[real].astype(np.float32),
                "labels": labels[real].astype(np.int64),
            }
        )
    return results


def backend_module(backend: str) -> ModuleType:
    """The module that runs detectors in a framework; imports the framework."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return importlib.import_module(f"focal.retinanet.{backend}.trainer")


def _canvases(
    name: str, config: RetinaNetConfig, images: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images on the canvas, the (height, width) that each covers, and its scale."""
    from focal.retinanet.data.transforms import fit, place

    fitted = []
    for index, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise TypeError(f"{name}: images[{index}] must be a uint8 array; got {kind}")
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"{name}: images[{index}] must have shape (height, width, 3); got {image.shape}"
            )
        fitted.append(fit(image, np.zeros((0, 4)), config.image_size))
    canvases = [place(image, config.image_size, config.fill) for image, _, _ in fitted]
    return (
        np.stack(canvases) if canvases else np.zeros((0, *config.image_size, 3), np.uint8),
        np.array([image.shape[:2] for image, _, _ in fitted], np.int64).reshape(-1, 2),
        np.array([scale for _, _, scale in fitted], np.float64),
    )
