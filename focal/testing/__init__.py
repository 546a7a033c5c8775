"""Checking a focal loss against the reference formulas, value and gradient.

`check_loss` takes a loss that somebody wrote (a kernel, a variant, a port) and compares it with
the closed forms in float64 where such losses break: at 0, beyond |x| = 17, 88 and 100, at
gamma < 1. It works with PyTorch, JAX, TensorFlow and NumPy; the framework is imported when it is
needed.

    >>> import numpy as np
    >>> from focal.numpy import sigmoid_focal_loss
    >>> from focal.testing import check_loss
    >>> report = check_loss(sigmoid_focal_loss, backend="numpy", gamma=2.0)
    >>> report.passed
    True
"""

from focal.testing.check import check_loss
from focal.testing.report import Errors, LossReport, Part, Place

__all__ = ["Errors", "LossReport", "Part", "Place", "check_loss"]
