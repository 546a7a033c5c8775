"""Being told to stop: SIGINT (Ctrl-C) and SIGTERM (what a job queue sends)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Signals", "Stopped"]


class Stopped(KeyboardInterrupt):
    """A signal ended a run whose state is saved; the text says where.

    Attributes:
        signal: Its number; 128 more is the customary exit status.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.signal = number


class Signals:
    """Notes SIGINT and SIGTERM in a `with` block, for the block to end in good order.

    A second SIGINT raises KeyboardInterrupt at once. Signals that the process ignores stay
    ignored, and outside the main thread nothing is changed.

    Attributes:
        received: The number of the first one; 0: none yet.
        at_once: Set where there is nothing to finish: the first one, too, raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received = 0
        self.at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None: it was not Python that set the handler, so Python cannot put it back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        again = self.received > 0
        if not again:
            self.received = number
        if self.at_once or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        if not again:  # not through sys.stderr, which the signal may have interrupted
            with contextlib.suppress(OSError):  # a terminal that went away
                os.write(2, b"\nfocal: finishing this step; Ctrl-C stops at once\n")
