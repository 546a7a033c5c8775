"""The detector as a SavedModel: network and post-processing in one graph that needs no focal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import tensorflow as tf
from tensorflow import Tensor

from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.exported import check_backend, description, version
from focal.retinanet.tensorflow.network import RetinaNet
from focal.retinanet.tensorflow.trainer import detections_of

__all__ = ["export_saved_model"]

FORMAT = "focal.retinanet.saved_model"
DESCRIPTION = "detector.json"


def export_saved_model(
    model: RetinaNet, path: str | os.PathLike[str], canvas: bool = False
) -> None:
    """Write a detector as a TensorFlow SavedModel, from an image of any size to detections.

    Its one signature, `serving_default`, is also the loaded object's `detect`. Inputs, outputs and
    what is stored with them, in `assets/detector.json`, are those of `focal.retinanet.export`.

    Args:
        model: From `build` or `load`, with the backend "tensorflow".
        path: The folder. It may exist if it is empty or an earlier export, which is replaced.
        canvas: Take batches of images that are on the canvas already.

    Raises:
        TypeError: the model is not of TensorFlow.
        FileExistsError: at `path` is something else than an export; it is left alone.
        OSError: the folder cannot be written. What was there before still is.

    Example:
        >>> import tempfile
        >>> import numpy as np, tensorflow as tf
        >>> from focal.retinanet import PRESETS, build
        >>> from focal.retinanet.tensorflow.export import export_saved_model
        >>> config = PRESETS["tiny"].detector.replace(classes=("cell",), image_size=(64, 64))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_saved_model(build(config, "tensorflow"), folder)
        ...     detector = tf.saved_model.load(folder)
        >>> found = detector.detect(np.zeros((480, 640, 3), np.uint8))
        >>> found["boxes"].shape  # untrained, it finds nothing
        TensorShape([0, 4])

    Source: <https://www.tensorflow.org/guide/saved_model>
    """
    check_backend("export_saved_model", model, "tensorflow")
    path = Path(path).resolve()  # what a link leads to is replaced, not the link
    _check_replaceable(path)
    # In the same folder, since a rename across file systems is a copy, which can be cut short.
    with TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as partial:
        new, old = Path(partial) / "new", Path(partial) / "old"
        _write(model, new, canvas)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise


def _write(model: RetinaNet, folder: Path, canvas: bool) -> None:
    height, width = model.config.image_size

    def detect_canvases(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        # Without the device that the model is on: the loaded graph runs on whatever there is.
        boxes, scores, labels = detections_of(model, images, sizes)
        real = scores > 0
        return {
            "boxes": tf.where(real[..., None], boxes, 0.0),
            "scores": scores,
            "labels": tf.where(real, labels, tf.constant(-1, labels.dtype)),
            "count": tf.math.count_nonzero(real, axis=-1),
        }

    def detect(image: Tensor) -> dict[str, Tensor]:
        placed, size, scale = _on_canvas(image, model.config)
        boxes, scores, labels = detections_of(model, placed[None], size[None])
        real = scores[0] > 0
        # A sliver covers a whole pixel of the canvas, which can be more than the image has.
        limit = tf.cast(tf.gather(tf.shape(image), [1, 0, 1, 0]), tf.float32)
        boxes = tf.cast(tf.cast(boxes[0], tf.float64) / scale, tf.float32)
        return {
            "boxes": tf.minimum(boxes, limit)[real],
            "scores": scores[0][real],
            "labels": labels[0][real],
        }

    texts = {"format": FORMAT, "version": version(canvas), **description(model.config)}
    # The asset takes the name of the file, which must be there when the rest is written.
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / DESCRIPTION
        file.write_text(json.dumps(texts, indent=2))
        module = tf.Module()
        module.detect = tf.function(
            detect_canvases if canvas else detect,
            autograph=False,
            input_signature=[
                tf.TensorSpec((None, height, width, 3), tf.uint8, "images"),
                tf.TensorSpec((None, 2), tf.int64, "sizes"),
            ]
            if canvas
            else [tf.TensorSpec((None, None, 3), tf.uint8, "image")],
        )
        module.weights = [variable.value for variable in model.variables]
        module.description = tf.saved_model.Asset(str(file))
        # For inference alone: the gradients of the graph's operations stay behind.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(module, str(folder), module.detect, options)


def _on_canvas(image: Tensor, config: RetinaNetConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What `data.transforms.fit` and `place` do: the canvas, the (height, width) covered, scale."""
    room = tf.constant(config.image_size)
    sides = tf.cast(tf.shape(image)[:2], tf.float64)
    scale = tf.reduce_min(tf.cast(room, tf.float64) / sides)
    size = tf.maximum(1, tf.cast(tf.floor(sides * scale + 1e-6), tf.int32))
    end = tf.minimum(sides, tf.math.ceil(tf.cast(size, tf.float64) / scale))
    end = tf.cast(end, tf.int32)
    factors = tf.cast(tf.maximum(scale, 1 / sides), tf.float32)
    part = image[None, : end[0], : end[1]]
    # Columns, then rows, each rounded: so does Pillow.
    for axis in (1, 0):
        along = tf.one_hot(axis, 2, on_value=True, off_value=False)
        part = tf.raw_ops.ScaleAndTranslate(
            images=part,
            size=tf.where(along, size, tf.shape(part)[1:3]),
            scale=tf.where(along, factors, 1.0),
            translation=[0.0, 0.0],
            kernel_type="triangle",
            antialias=True,
        )
        part = tf.floor(part + 0.5)
    part = tf.cast(part[0], tf.uint8)
    right = tf.ones((size[0], room[1] - size[1], 1), tf.uint8) * tf.constant(config.fill, tf.uint8)
    below = tf.ones((room[0] - size[0], room[1], 1), tf.uint8) * tf.constant(config.fill, tf.uint8)
    canvas = tf.concat([tf.concat([part, right], 1), below], 0)
    return tf.ensure_shape(canvas, (*config.image_size, 3)), tf.cast(size, tf.int64), scale


def _check_replaceable(path: Path) -> None:
    """Only nothing, an empty folder or an export may make room for an export."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        found = json.loads((path / "assets" / DESCRIPTION).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileExistsError(
            f"export_saved_model: path must be new, an empty folder or an earlier export; "
            f"got {path}, which is something else and is left as it is"
        )
