"""The progress bar."""

from __future__ import annotations

from tqdm import tqdm

__all__ = ["ProgressBar"]


class ProgressBar(tqdm):
    """Progress, without the thread that tqdm watches it with, which would outlive the run."""

    monitor_interval = 0
