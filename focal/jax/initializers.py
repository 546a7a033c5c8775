"""The paper's initialization as a bias initializer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer
from numpy.typing import ArrayLike

from focal.core.prior import class_prior_bias, tile_bias

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
    bias = class_prior_bias("prior_bias_init", pi)

    def init(
        key: Array | None, shape: tuple[int, ...], dtype: Any = None, out_sharding: Any = None
    ) -> Array:
        values = tile_bias("prior_bias_init", bias, shape)
        return jnp.asarray(values, float if dtype is None else dtype, device=out_sharding)

    return init
