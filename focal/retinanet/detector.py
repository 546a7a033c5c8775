"""The detector in any framework: build, save, load, raw outputs, predictions.

Images and files are imported where they are used: with NumPy alone, configs can be made and
`focal --help` and `focal prior-bias` work.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from focal.retinanet.config import RetinaNetConfig

if TYPE_CHECKING:
    from focal.retinanet.data import Batch

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
INFERENCE = ("score_threshold", "nms_threshold", "candidates", "max_detections")
"""The fields of the config that `load` may change."""
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


def load(
    source: str | os.PathLike[str],
    backend: str = "torch",
    device: str | None = None,
    **changes: Any,
) -> Any:
    """Read a detector that `save` or a training run wrote, in this framework or another.

    Args:
        source: A weights file; a checkpoint of a run, of which the moving average of the weights
            is taken where there is one; or a run folder: best.safetensors if it is there, else
            weights.safetensors, else the newest whole checkpoint.
        backend: "torch", "jax" or "tensorflow".
        device: As in `build`.
        **changes: Fields of `RetinaNetConfig` for inference, instead of those in the file:
            `score_threshold`, `nms_threshold`, `candidates`, `max_detections`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole weights file or checkpoint of this library, the backend is
            unknown, or a change is out of range.
        TypeError: a change is of another field.

    Example:
        >>> import os, tempfile
        >>> from focal.retinanet import PRESETS, build, load, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "detector.safetensors")
        ...     save(build(PRESETS["tiny"].detector.replace(classes=("cell",))), path)
        ...     model = load(path, score_threshold=0.5)
        >>> model.config.score_threshold
        0.5
    """
    from focal.retinanet.weights import load_weights

    if unknown := changes.keys() - set(INFERENCE):
        raise TypeError(
            f"load: changes must be among {', '.join(INFERENCE)}; got {', '.join(sorted(unknown))}"
        )
    tensors, config = load_weights(source)
    model = build(config.replace(**changes), backend, device=device)
    backend_module(backend).load_state(model, tensors)
    return model


def export(model: Any, path: str | os.PathLike[str], canvas: bool = False) -> None:
    """Write the detector with its post-processing, for programs that do without this library.

    ONNX is written by PyTorch and a SavedModel by TensorFlow, whichever framework the model is of.
    In: `image` (height, width, 3) uint8, RGB, as decoders give it. The graph scales it to fit the
    canvas, as `predict` does, fills up the canvas, and normalizes. Out, the best first:

    - `boxes` (n, 4) float32: (x1, y1, x2, y2) in pixels of the image, inside it
    - `scores` (n,) float32
    - `labels` (n,) int64: indices into `classes`

    With `canvas=True` it takes batches of images that are on the canvas already. B, the number of
    images, is any from 1 on; H and W are the config's canvas, D its `max_detections`. In:

    - `images` (B, H, W, 3) uint8: RGB, scaled to fit the canvas, in its top left corner, the rest
      of the color `fill`
    - `sizes` (B, 2) int64: the (height, width) in pixels that each image covers of the canvas

    Out, of each image the best first:

    - `boxes` (B, D, 4) float32: (x1, y1, x2, y2) in pixels of the canvas
    - `scores` (B, D) float32
    - `labels` (B, D) int64: indices into `classes`
    - `count` (B,) int64: how many there are; what comes after is padding, boxes and scores of 0
      and labels of -1

    With the graph are stored `classes`, `category_ids`, `image_size` (height, width) of the
    canvas, `fill` and the whole `config`; `version` is "2", or "1" with `canvas=True`.

    Args:
        model: From `build` or `load`.
        path: A file ending in .onnx, or a folder, without an ending, for a SavedModel of
            TensorFlow.
        canvas: Take batches of images that are scaled to the canvas already instead.

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

        export_onnx(model, path, canvas)
    else:
        from focal.retinanet.tensorflow.export import export_saved_model

        export_saved_model(model, path, canvas)


def export_backend(path: str | os.PathLike[str]) -> str:
    """The backend that writes such an export."""
    suffix = Path(path).suffix
    if suffix not in (".onnx", ""):
        raise ValueError(
            f"export: path must end in .onnx, or have no ending for a SavedModel; got {str(path)!r}"
        )
    return "torch" if suffix == ".onnx" else "tensorflow"


def raw_outputs(model: Any, images: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Class logits and box deltas of every anchor, before any threshold.

    Args:
        model: From `build` or `load`.
        images: As in `predict`; each is scaled to fit the config's `image_size`.

    Returns:
        Class logits (N, anchors, K) and box deltas (N, anchors, 4), float32.

    Raises:
        TypeError, ValueError: an image is none of these, or its file cannot be read.
    """
    _check_list("raw_outputs", images)
    batch = _batch("raw_outputs", model.config, images)
    return backend_module(model.backend).raw_outputs(model, batch.images)


def predict(model: Any, images: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Detect objects.

    Args:
        model: From `build` or `load`.
        images: Of any size, each an HWC uint8 RGB array, the path of a file, or an image of
            Pillow. Of files and Pillow's images the EXIF rotation is applied, transparency is put
            on white, and every mode is converted to RGB.

    Returns:
        For each image a dict, best detection first: `boxes` (n, 4) float32 as (x1, y1, x2, y2)
        in pixels of that image, `scores` (n,) float32, `labels` (n,) int64 indices into
        `model.config.classes`.

    Raises:
        TypeError, ValueError: an image is none of these, or its file cannot be read.

    Example:
        >>> from PIL import Image
        >>> from focal.retinanet import PRESETS, build, predict
        >>> model = build(PRESETS["tiny"].detector.replace(classes=("cell",)))
        >>> (found,) = predict(model, [Image.new("L", (640, 480))])
        >>> found["boxes"].shape  # untrained, it finds nothing
        (0, 4)
    """
    from focal.retinanet.data.loader import prefetch

    _check_list("predict", images)

    def batch(start: int) -> Batch:
        some = images[start : start + PREDICT_BATCH]
        return _batch("predict", model.config, some, start)

    # The next batch is read while the network works on one.
    several = len(images) > PREDICT_BATCH
    batches = prefetch(batch, range(0, len(images), PREDICT_BATCH), int(several), ahead=1)
    with contextlib.closing(batches):
        return [found for batch in batches for found in detect(model, batch)]


def detect(model: Any, batch: Batch) -> list[dict[str, np.ndarray]]:
    """`predict` for images that are on the canvas already."""
    found = backend_module(model.backend).detect(model, batch.images, batch.sizes)
    results = []
    for boxes, scores, labels, scale, (height, width) in zip(
        *found, batch.scales, batch.image_sizes, strict=True
    ):
        real = scores > 0
        # A sliver covers a whole pixel of the canvas, which can be more than the image has.
        limit = np.array([width, height, width, height], np.float32)
        results.append(
            {
                "boxes": np.minimum((boxes[real] / scale).astype(np.float32), limit),
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


def _check_list(name: str, images: Any) -> None:
    """One image or path instead of a list of them is the commonest mistake."""
    if isinstance(images, str) or not hasattr(images, "__len__"):
        kind = type(images).__name__
        raise TypeError(f"{name}: images must be a list of images, such as [image]; got {kind}")


def _batch(name: str, config: RetinaNetConfig, images: Sequence[Any], first: int = 0) -> Batch:
    """Images as `predict` takes them, numbered from `first` on, on the canvas."""
    from PIL import Image

    from focal.retinanet.data.dataset import Example
    from focal.retinanet.data.images import from_pil, read_image
    from focal.retinanet.data.loader import collate, fitted

    items, image_sizes = [], []
    for index, given in enumerate(images, first):
        image = given
        if isinstance(given, str | os.PathLike):
            image = read_image(given)
        elif isinstance(given, Image.Image):
            image = from_pil(given)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise TypeError(
                f"{name}: images[{index}] must be a uint8 array, a path or an image of Pillow; "
                f"got {kind}"
            )
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"{name}: images[{index}] must have shape (height, width, 3); got {image.shape}"
            )
        example = Example(image, np.zeros((0, 4)), np.zeros(0, np.int64), index)
        items.append(fitted(example, config.image_size))
        image_sizes.append(image.shape[:2])
    batch = collate(items, config.image_size, 0, config)
    return batch._replace(image_sizes=np.array(image_sizes, np.int64).reshape(-1, 2))
