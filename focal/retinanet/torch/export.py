"""The detector as one graph, network and post-processing, that needs no focal: PyTorch and ONNX.

Non-maximum suppression is `focal.core.nms.best`, the same as in `predict`. Its loops become loops
of the graph (`torch.while_loop`, `Loop` in ONNX).
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from focal.files import write_atomically
from focal.retinanet.exported import check_backend, description, version
from focal.retinanet.torch import any_size
from focal.retinanet.torch.network import RetinaNet
from focal.retinanet.torch.trainer import detections_of

__all__ = ["export_onnx", "export_program"]

FORMAT = "focal.retinanet.onnx"
INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "count")
DESCRIPTION = """\
RetinaNet with its pre- and post-processing, for one image of any size, with n detections, best
first. image (height, width, 3) uint8: RGB. boxes (n, 4) float32: (x1, y1, x2, y2) in pixels of the
image. scores (n,) float32. labels (n,) int64: indices into the metadata's classes.
"""
CANVAS_DESCRIPTION = """\
RetinaNet with its post-processing. B images, at most D detections of each, best first.
images (B, H, W, 3) uint8: RGB, scaled to fit the canvas (H, W), in its top left corner, the rest
filled. sizes (B, 2) int64: the (height, width) in pixels that each image covers of the canvas.
boxes (B, D, 4) float32: (x1, y1, x2, y2) in pixels of the canvas. scores (B, D) float32. labels
(B, D) int64: indices into the metadata's classes. count (B,) int64: how many detections there are;
what comes after is padding, boxes and scores of 0 and labels of -1.
"""


def export_onnx(model: RetinaNet, path: str | os.PathLike[str], canvas: bool = False) -> None:
    """Write a detector as one ONNX file, from an image of any size to detections.

    Inputs, outputs and what is stored with them are those of `focal.retinanet.export`. The metadata
    has them as JSON. The file uses standard operators only, of opset 18.

    Args:
        model: From `build` or `load`, with the backend "torch"; on any device, in any mode.
        path: The file, by custom ending in .onnx; replaced if it exists, whole or not at all.
        canvas: Take batches of images that are on the canvas already.

    Raises:
        TypeError: the model is not of PyTorch.
        ImportError: `onnx` or `onnxscript` is not installed.
        OSError: the file cannot be written.

    Example:
        >>> import os, tempfile
        >>> import numpy as np, onnxruntime
        >>> from focal.retinanet import PRESETS, build
        >>> from focal.retinanet.torch.export import export_onnx
        >>> config = PRESETS["tiny"].detector.replace(classes=("cell",), image_size=(64, 64))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "detector.onnx")
        ...     export_onnx(build(config), path)
        ...     session = onnxruntime.InferenceSession(path)
        >>> image = np.zeros((480, 640, 3), np.uint8)
        >>> boxes, scores, labels = session.run(None, {"image": image})
        >>> boxes.shape  # untrained, it finds nothing
        (0, 4)

    Source: <https://docs.pytorch.org/docs/stable/onnx.html>
    """
    import onnx
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    check_backend("export_onnx", model, "torch")
    with _quiet():
        graph = torch.onnx.export(
            _program(model),
            input_names=INPUTS,
            output_names=OUTPUTS if canvas else any_size.OUTPUTS,
            dynamic_shapes={"images": {0: "batch"}, "sizes": None},  # only to name the axis
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    assert graph is not None  # dynamo=True returns the graph
    ClearMetadataAndDocStringPass()(graph.model)  # each operation's place in the source files
    written = graph.model_proto if canvas else any_size.wrapped(graph.model_proto, model.config)
    written.doc_string = CANVAS_DESCRIPTION if canvas else DESCRIPTION
    texts = {key: json.dumps(value) for key, value in description(model.config).items()}
    onnx.helper.set_model_props(written, {"format": FORMAT, "version": version(canvas), **texts})
    write_atomically(path, written.SerializeToString())


def export_program(model: RetinaNet) -> torch.export.ExportedProgram:
    """The detector as a program of `torch.export`: what `export_onnx` writes, before ONNX.

    `torch.export.save` writes it to a file, `torch.export.load` reads that without focal.

    Args:
        model: From `build` or `load`, with the backend "torch"; it is copied to the CPU.

    Returns:
        A program of `images` and `sizes`, whose `.module()` gives the tuple (boxes, scores,
        labels, count), all as `focal.retinanet.export` describes them for `canvas=True`.

    Raises:
        TypeError: the model is not of PyTorch.

    Example:
        >>> import torch
        >>> from focal.retinanet import PRESETS, build
        >>> from focal.retinanet.torch.export import export_program
        >>> config = PRESETS["tiny"].detector.replace(classes=("cell",), image_size=(64, 64))
        >>> detector = export_program(build(config)).module()
        >>> images = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
        >>> boxes, scores, labels, count = detector(images, torch.tensor([[64, 64]] * 3))
        >>> boxes.shape, count
        (torch.Size([3, 100, 4]), tensor([0, 0, 0]))

    Source: <https://docs.pytorch.org/docs/stable/export.html>
    """
    check_backend("export_program", model, "torch")
    return _program(model)


def _program(model: RetinaNet) -> torch.export.ExportedProgram:
    # Channels-last weights would be written as they lie, and PyTorch warns of that.
    network = copy.deepcopy(model).cpu()
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    detector = _Detector(network).eval().requires_grad_(False)
    # A batch of two: a size of one would be taken for a constant.
    images = torch.zeros(2, *model.config.image_size, 3, dtype=torch.uint8)
    sizes = torch.tensor([model.config.image_size] * 2)
    batch = {0: torch.export.Dim("batch", min=1)}
    return torch.export.export(detector, (images, sizes), dynamic_shapes=(batch, batch))


class _Detector(nn.Module):
    """From canvases to detections."""

    def __init__(self, network: RetinaNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes, scores, labels and their number."""
        boxes, scores, labels = detections_of(self.network, images, sizes)
        real = scores > 0
        boxes = torch.where(real[..., None], boxes, 0.0)
        return boxes, scores, torch.where(real, labels, -1), real.sum(-1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporter says about itself, and about torchvision."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)
