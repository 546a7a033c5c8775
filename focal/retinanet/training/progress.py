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


class Progress:
    """The progress of a run on stderr.

    Args:
        steps: Of the run.
        first: Those that are done already.
        shown: False shows nothing.
    """

    def __init__(self, steps: int, first: int, shown: bool = True) -> None:
        self._steps, self._done, self._shown = steps, first, shown
        self._bar = ProgressBar(
            total=steps,
            initial=first,
            unit="step",
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
        )
        self._last = -LINE_SECONDS

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self) -> None:
        """One more step is done."""
        self._done += 1
        self._bar.update()

    def show(self, text: str) -> None:
        """What was logged of the step: beside the bar, or as a line if the last was long ago."""
        self._bar.set_postfix_str(text)
        due = time.monotonic() - self._last >= LINE_SECONDS or self._done == self._steps
        if self._bar.disable and due:
            self._last = time.monotonic()
            self.write(f"step {self._done} of {self._steps}: {text}")

    def write(self, text: str) -> None:
        """A line of its own."""
        if self._shown:
            tqdm.write(text, file=sys.stderr)
