"""torchvision's Python code, also where its compiled operators do not load.

A wheel that is built for another PyTorch, such as one for CUDA beside a PyTorch without, refuses to
be imported. For its detectors in inference only `nms` is missing. It is defined here as what it is
there, a plain loop in C++.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

SOURCE = r"""
#include <algorithm>
extern "C" void nms(long n, const float* boxes, float threshold, bool* gone) {
    for (long i = 0; i < n; i++) {
        if (gone[i]) continue;
        const float* a = boxes + 4 * i;
        float area = (a[2] - a[0]) * (a[3] - a[1]);
        for (long j = i + 1; j < n; j++) {
            if (gone[j]) continue;
            const float* b = boxes + 4 * j;
            float w = std::max(0.f, std::min(a[2], b[2]) - std::max(a[0], b[0]));
            float h = std::max(0.f, std::min(a[3], b[3]) - std::max(a[1], b[1]));
            float both = area + (b[2] - b[0]) * (b[3] - b[1]) - w * h;
            if (w * h / both > threshold) gone[j] = true;
        }
    }
}
"""
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def torchvision() -> ModuleType:
    """The package, from wherever Python finds it.

    Raises:
        ImportError: it is not installed, or it does not fit this PyTorch.
        OSError, subprocess.CalledProcessError: there is no C++ compiler.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        pass
    loop = _compiled()

    def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        order = scores.argsort(descending=True, stable=True)
        rows = boxes[order].contiguous()
        gone = torch.zeros(len(rows), dtype=torch.bool)
        loop(len(rows), rows.data_ptr(), threshold, gone.data_ptr())
        return order[~gone]

    try:
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        OPERATORS.impl("nms", nms, "CPU")
        package = importlib.import_module("torchvision")
    except RuntimeError as error:
        raise ImportError(f"torchvision does not fit this PyTorch: {error}") from error
    package.extension._has_ops = lambda: True
    return package


def _compiled() -> ctypes._CFuncPtr:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "nms.cpp"), Path(folder, "nms.so")
        source.write_text(SOURCE)
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", source, "-o", library], check=True)
        loop = ctypes.CDLL(str(library)).nms
    loop.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p]
    loop.restype = None
    return loop
