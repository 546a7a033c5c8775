"""Focal loss, written once, exact, the same in NumPy, PyTorch, JAX and TensorFlow.

Importing `focal` loads no framework. The losses, boxes, anchors and targets are in
`focal.numpy`, `focal.torch`, `focal.jax` and `focal.tensorflow` under the same names; here are
only the constants that need no framework.
"""

from focal.core.anchors import AnchorConfig
from focal.core.prior import expected_initial_loss, inverse_frequency_alpha, prior_bias

__version__ = "0.1.0"

__all__ = ["AnchorConfig", "expected_initial_loss", "inverse_frequency_alpha", "prior_bias"]
