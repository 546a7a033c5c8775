"""The kernels for boxes, where there are Triton and a GPU."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from focal.torch import _pointwise
from focal.torch._dispatch import is_plain

__all__ = ["box_kernels"]


def box_kernels(*arrays: Tensor) -> ModuleType | None:
    """`focal.kernels.torch_boxes`, where it takes these arrays."""
    device = arrays[0].device
    if device.type != _pointwise.TRITON_DEVICE or not is_plain(*arrays):
        return None
    if _pointwise._triton_on(device) is None:
        return None
    from focal.kernels import torch_boxes

    return torch_boxes if torch_boxes.takes(*arrays) else None
