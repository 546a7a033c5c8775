"""The core's array namespace on JAX: the operations, and formulas with their gradient."""

import sys
from typing import cast

from focal.core.namespace import Namespace
from focal.jax._ops import *  # noqa: F403
from focal.jax._pointwise import class_margins, label_margin, pointwise, pointwise_sum  # noqa: F401

xp = cast(Namespace, sys.modules[__name__])
