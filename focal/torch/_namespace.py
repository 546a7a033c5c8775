"""The core's array namespace on PyTorch: the operations, and formulas with their gradient."""

import sys
from typing import cast

from torch import Tensor

from focal.core.namespace import Framework
from focal.torch._boxes import box_kernels  # noqa: F401
from focal.torch._margins import label_margin, softmax_pass  # noqa: F401
from focal.torch._ops import *  # noqa: F403
from focal.torch._pointwise import pointwise, pointwise_sum  # noqa: F401

input_type = array_type = Tensor
xp = cast(Framework[Tensor, Tensor], sys.modules[__name__])
