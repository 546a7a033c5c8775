"""The normalizer of a batch that several devices share."""

from __future__ import annotations

from collections.abc import Hashable

import jax
from jax import Array
from jax.typing import ArrayLike

from focal.core import losses
from focal.jax._namespace import xp

__all__ = ["num_positives"]


def num_positives(
    labels: ArrayLike, axis_name: Hashable | tuple[Hashable, ...] | None = None
) -> Array:
    """The number of positive labels on all replicas, but at least 1: the paper's normalizer.

    The loss of a batch is divided by the positives of the whole batch. If each replica divided by
    its own, positives would weigh more where they are few, and the mean of the gradients would not
    be the gradient of the batch. Divide each replica's sum by this number instead, add the
    quotients up (`jax.lax.psum`), and differentiate the mapped function.

    If you differentiate inside the mapped function, add the gradients up instead under `pmap`,
    `vmap` and `shard_map(..., check_vma=False)`. By default, `shard_map` has already added up the
    gradients in an array that all replicas share; one more `psum` would multiply them by the
    number of replicas.

    Under `jit` an array that is sharded over a mesh is still one array: its sums are those of the
    whole batch, and `axis_name` stays None.

    Args:
        labels: Integers of any shape, this replica's share: a class >= 0, -1 background,
            -2 ignored.
        axis_name: The mapped axis, or axes, that the batch is shared over. Default: none.

    Returns:
        A float32 scalar, the same on every replica; it carries no gradient.

    Raises:
        TypeError: `labels` are not integers.
        NameError: no mapped axis has that name.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from focal.jax import num_positives
        >>> labels = jnp.array([[1, 0, 0], [-1, -1, -2]])  # of two replicas
        >>> print(jax.vmap(lambda x: num_positives(x, "replicas"), axis_name="replicas")(labels))
        [3. 3.]

    Source: Lin et al. 2017, section 4.1.
    """

    def over_replicas(count: Array) -> Array:
        return count if axis_name is None else jax.lax.psum(count, axis_name)

    return losses.num_positives(xp, labels, over_replicas=over_replicas)
