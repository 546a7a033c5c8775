"""The core's array namespace on TensorFlow: the operations, and formulas with their gradient."""

import sys
from typing import cast

from focal.core.namespace import Namespace
from focal.tensorflow._ops import *  # noqa: F403
from focal.tensorflow._pointwise import class_margins, label_margin, pointwise, pointwise_sum  # noqa: F401

xp = cast(Namespace, sys.modules[__name__])
