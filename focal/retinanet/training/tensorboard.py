"""A callback that writes TensorBoard event files."""

from __future__ import annotations

import math
import os
from typing import Any

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes the metrics of a run to TensorBoard event files; a callback of `fit`.

    The tags are those of `metrics.jsonl`: `train/loss`, `train/learning_rate`, `eval/AP`, ...
    `tensorboard --logdir FOLDER` shows them.

    Args:
        folder: Where the event files go, such as the run folder.

    Raises:
        ImportError: tensorboardX is not installed (the extra `tensorboard`).

    Example:
        >>> import os, tempfile
        >>> from focal.retinanet.training.tensorboard import TensorBoard
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     board = TensorBoard(folder)
        ...     board(20, {"kind": "train", "step": 20, "loss": 1.5})
        ...     board.close()
        ...     found = os.listdir(folder)
        >>> found[0].startswith("events.out.tfevents")
        True
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        from tensorboardX import SummaryWriter

        self._open = SummaryWriter
        self._folder = os.fspath(folder)
        self._writer: Any = None

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the numbers of a step."""
        if self._writer is None:  # a resumed run takes the place of the steps that it repeats
            self._writer = self._open(self._folder, purge_step=step, flush_secs=10)
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(f"{metrics['kind']}/{name}", value, step)

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._writer is not None:
            self._writer.close()
