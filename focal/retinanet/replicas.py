"""Data-parallel replicas, as one of their processes sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from focal.retinanet.config import TrainConfig

__all__ = ["Replicas"]


@dataclass(frozen=True)
class Replicas:
    """The replicas of a run. Default: this process alone, on one device.

    A replica is a device with a copy of the weights and an equal share of each batch. PyTorch has
    one in a process; JAX and TensorFlow have one for each device of a process.
    """

    rank: int = 0
    """Of this process. Rank 0 writes the run folder and evaluates."""
    processes: int = 1
    local: int = 1
    """Replicas in each process."""
    handle: Any = None
    """A `jax.sharding.Mesh` or a `tf.distribute.Strategy`; None in PyTorch."""
    maximum: Callable[[int], int] = lambda value: value
    """The maximum over all processes; it waits for all of them."""

    @property
    def count(self) -> int:
        """All replicas."""
        return self.processes * self.local

    def check(self, train: TrainConfig) -> None:
        """Raise a ValueError if a batch cannot be split into equal shares."""
        parts = self.count * train.accumulate
        if train.batch_size % parts:
            raise ValueError(
                f"TrainConfig: batch_size must be a multiple of {parts} (replicas: {self.count}, "
                f"accumulate: {train.accumulate}), for equal shares; got {train.batch_size}"
            )
