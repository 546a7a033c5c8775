"""The normalizer of a batch that several processes share."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from focal.core import losses
from focal.torch._namespace import xp

__all__ = ["num_positives"]


def num_positives(labels: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    """The number of positive labels on all replicas, but at least 1: the paper's normalizer.

    The loss of a batch is divided by the positives of the whole batch. If each replica divided by
    its own, positives would weigh more where they are few, and the mean of the gradients would not
    be the gradient of the batch. Divide each replica's sum by this number instead, and
    add the gradients up. `DistributedDataParallel` takes their mean: multiply the loss by the
    number of processes.

    Args:
        labels: Integers of any shape, this replica's share: a class >= 0, -1 background,
            -2 ignored.
        group: The processes that share the batch. Default: all of them; one process alone where
            `torch.distributed` is not initialized.

    Returns:
        A float32 scalar, the same on every replica; it carries no gradient.

    Raises:
        TypeError: `labels` are not integers.

    Example:
        >>> import torch
        >>> from focal.torch import num_positives, sparse_sigmoid_focal_loss
        >>> labels = torch.tensor([1, -1, 0, -2])
        >>> total = sparse_sigmoid_focal_loss(torch.zeros(4, 2), labels, reduction="sum")
        >>> total / num_positives(labels)
        tensor(0.3033)

    Source: Lin et al. 2017, section 4.1.
    """

    def over_replicas(count: Tensor) -> Tensor:
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(count, group=group)
        return count

    with torch.no_grad():
        return losses.num_positives(xp, labels, over_replicas=over_replicas)
