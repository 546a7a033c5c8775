"""SIGINT (Ctrl-C) and SIGTERM (sent by job queues) end a run after its current step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Signals", "Stopped"]


class Stopped(KeyboardInterrupt):
    """A signal ended a run. Its state is saved; the text says where.

    Attributes:
        signal: Its number. The customary exit status is 128 more.
    """

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.signal = number


class Signals:
    """Records SIGINT and SIGTERM in a `with` block instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. Ignored signals stay ignored. Outside the main
    thread it does nothing.

    Attributes:
        received: The number of the first signal; 0: none yet.
        at_once: Set while there is nothing to finish: the first signal, too, raises
            KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received = 0
        self.at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None: the handler was not set by Python, which cannot restore it.
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
                os.write(2, b"\nfocal: stopping after this step; Ctrl-C stops at once\n")
