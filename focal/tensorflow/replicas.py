"""The normalizer of a batch that several replicas share."""

from __future__ import annotations

import tensorflow as tf
from tensorflow import Tensor
from tensorflow.types.experimental import TensorLike

from focal.core import losses
from focal.tensorflow._namespace import xp

__all__ = ["num_positives"]


def num_positives(labels: TensorLike) -> Tensor:
    """The number of positive labels on all replicas, but at least 1: the paper's normalizer.

    The loss of a batch is divided by the positives of the whole batch. If each replica divided by
    its own, positives would weigh more where they are few, and the mean of the gradients would not
    be the gradient of the batch. Divide each replica's sum by this number instead, and
    add the gradients up, as a Keras optimizer does by itself inside `tf.distribute.Strategy.run`.

    Args:
        labels: Integers of any shape, this replica's share: a class >= 0, -1 background,
            -2 ignored.

    Returns:
        A float32 scalar, the same on every replica; it carries no gradient.

    Raises:
        TypeError: `labels` are not integers.
        RuntimeError: it is called in the scope of a strategy but not in its `run`.

    Example:
        >>> import tensorflow as tf
        >>> from focal.tensorflow import num_positives
        >>> strategy = tf.distribute.OneDeviceStrategy("cpu:0")
        >>> strategy.run(num_positives, args=(tf.constant([1, -1, 0, -2]),)).numpy().item()
        2.0

    Source: Lin et al. 2017, section 4.1.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            "num_positives: must be called in a function that tf.distribute.Strategy.run runs; "
            "got a call between the replicas"
        )

    def over_replicas(count: Tensor) -> Tensor:
        return context.all_reduce(tf.distribute.ReduceOp.SUM, count)

    return losses.num_positives(xp, labels, over_replicas=over_replicas)
