"""The kernels for boxes, where there are Triton and a GPU."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from focal.torch import _pointwise
from focal.torch._dispatch import is_plain

__all__ = ["box_kernels"]


def box_kernels(boxes: Tensor, others: Tensor | None) -> ModuleType | None:
    """`focal.kernels.torch_boxes`, where it takes these arrays."""
    if boxes.device.type != _pointwise.TRITON_DEVICE or not is_plain(boxes, others):
        return None
    if _pointwise._triton_on(boxes.device) is None:
        return None
    from focal.kernels import torch_boxes

    return torch_boxes if torch_boxes.takes(boxes, others) else None
