"""The core's array namespace on JAX: the operations, and formulas with their gradient."""

import sys
from typing import cast

from jax import Array
from jax.typing import ArrayLike

from focal.core.namespace import Framework
from focal.jax._ops import *  # noqa: F403
from focal.jax._pointwise import label_margin, pointwise, pointwise_sum  # noqa: F401

input_type, array_type = ArrayLike, Array
xp = cast(Framework[ArrayLike, Array], sys.modules[__name__])
