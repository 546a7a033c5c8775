"""Progress of a run: a bar on a terminal, elsewhere a line every so often."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

__all__ = ["Progress", "ProgressBar"]

LINE_SECONDS = 15.0
"""Time between two lines where there is no terminal, such as in a log file."""


class ProgressBar(tqdm):
    """Progress, without the thread that tqdm watches it with, which would outlive the run."""

    monitor_interval = 0


class Progress(ProgressBar):
    """The progress of a run on stderr.

    Args:
        steps: Of the run.
        first: Those that are done already.
        shown: False shows nothing.
    """

    def __init__(self, steps: int, first: int, shown: bool = True) -> None:
        silent = not (shown and sys.stderr.isatty())
        super().__init__(
            total=steps, initial=first, unit="step", dynamic_ncols=True, disable=silent
        )
        self.shown, self.last = shown, -LINE_SECONDS

    def show(self, step: int, text: str) -> None:
        """What was logged of a step: beside the bar, or as a line if the last was long ago."""
        self.set_postfix_str(text)
        due = time.monotonic() - self.last >= LINE_SECONDS or step == self.total
        if self.disable and due:
            self.last = time.monotonic()
            self.say(f"step {step} of {self.total}: {text}")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.shown:
            self.write(text, file=sys.stderr)
