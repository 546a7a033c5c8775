"""The paper's initialization as a bias initializer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer
from numpy.typing import ArrayLike

from focal.core.prior import prior_bias

__all__ = ["prior_bias_init"]


def prior_bias_init(pi: ArrayLike = 0.01) -> Initializer:
    r"""An initializer that fills the bias of a classification layer with the prior bias.

    .. math:: b = -\log\frac{1 - \pi}{\pi}

    Args:
        pi: The first score of every output, in (0, 1); or one per class, repeated to the
            length of the bias (one round of classes for each anchor). Default 0.01.

    Returns:
        An initializer `(key, shape, dtype)`, as in `jax.nn.initializers`: the `bias_init` of a
        layer of `flax.nnx` or `flax.linen`.

    Raises:
        TypeError: `pi` is not numeric.
        ValueError: a value of `pi` is not inside (0, 1) or `pi` has more than one axis; later,
            if the bias is not a whole number of rounds of `pi`.

    Example:
        >>> from flax import nnx
        >>> from focal.jax import prior_bias_init
        >>> nnx.Linear(4, 2, bias_init=prior_bias_init(0.01), rngs=nnx.Rngs(0)).bias[...]
        Array([-4.59512, -4.59512], dtype=float32)

    Source: Lin et al. 2017, section 4.1, "Initialization".
    """
    values = np.atleast_1d(prior_bias(pi))
    if values.ndim != 1:
        raise ValueError(
            f"prior_bias_init: pi must be a number or one per class; got shape {values.shape}"
        )

    def init(
        key: Array | None, shape: tuple[int, ...], dtype: Any = None, out_sharding: Any = None
    ) -> Array:
        if len(shape) != 1 or shape[0] % values.size:
            raise ValueError(
                f"prior_bias_init: the bias must have one axis, of a multiple of {values.size} "
                f"(the length of pi); got shape {tuple(shape)}"
            )
        repeated = np.tile(values, shape[0] // values.size)
        return jnp.asarray(repeated, float if dtype is None else dtype, device=out_sharding)

    return init
