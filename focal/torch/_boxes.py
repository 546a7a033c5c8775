"""The kernels for boxes: in NumPy on a CPU, in Triton where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from focal.kernels import numpy_boxes
from focal.torch import _pointwise
from focal.torch._dispatch import is_plain

__all__ = ["box_kernels"]


class OnCpu:
    """`focal.kernels.numpy_boxes` on the memory of tensors."""

    @staticmethod
    def match(anchors: Tensor, boxes: Tensor, *thresholds: Any) -> Tensor:
        """`match_anchors`."""
        return torch.from_numpy(numpy_boxes.match(_array(anchors), _array(boxes), *thresholds))

    @staticmethod
    def suppress(boxes: Tensor, classes: Tensor | None, threshold: float) -> Tensor:
        """`focal.core.nms.suppress`."""
        classes = None if classes is None else _array(classes)
        return torch.from_numpy(numpy_boxes.suppress(_array(boxes), classes, threshold))


def _array(x: Tensor) -> Any:
    return x.numpy(force=True)


def box_kernels(boxes: Tensor, others: Tensor | None) -> Any | None:
    """Those that take these arrays: a module of `focal.kernels`, or `OnCpu`."""
    if not is_plain(boxes, others):
        return None
    if boxes.device.type == _pointwise.TRITON_DEVICE:
        if _pointwise._triton_on(boxes.device) is None:
            return None
        from focal.kernels import torch_boxes

        return torch_boxes if torch_boxes.takes(boxes, others) else None
    own = all(a is None or (a.device.type == "cpu" and a.numel() > 0) for a in (boxes, others))
    return OnCpu if own and boxes.ndim == 2 else None  # a batch is faster in large steps
