"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["PARTIAL", "write_atomically"]

PARTIAL = ".partial"
"""The suffix of a file that is being written; a killed process leaves it behind."""


def write_atomically(path: str | os.PathLike[str], *pieces: bytes | memoryview) -> None:
    """Write a file so that at any moment either the old or the new one exists, complete.

    Raises:
        OSError: the file cannot be written; the old one is kept, and no other is left.
    """
    path = Path(path)
    # In the same folder: a rename across file systems is a copy, which is not atomic.
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # does not name the file if the disk is full
        reason = f"{error.strerror or error}; what was there before is untouched"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # it would hide the first error
            partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make a rename in a folder durable."""
    if os.name == "posix":  # on Windows folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
