"""The core's array namespace on TensorFlow: the operations, and formulas with their gradient."""

import sys
from typing import cast

from tensorflow import Tensor
from tensorflow.types.experimental import TensorLike

from focal.core.namespace import Framework
from focal.tensorflow._ops import *  # noqa: F403
from focal.tensorflow._pointwise import label_margin, pointwise, pointwise_sum  # noqa: F401

input_type, array_type = TensorLike, Tensor
xp = cast(Framework[TensorLike, Tensor], sys.modules[__name__])
