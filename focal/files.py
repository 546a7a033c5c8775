"""Files that are whole at every moment."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["PARTIAL", "sync_folder", "write_atomically"]

PARTIAL = ".partial"
"""How the name of a file ends while it is written; a process that is killed leaves it behind."""


def write_atomically(path: str | os.PathLike[str], *pieces: bytes | memoryview) -> None:
    """Write a file so that at every moment the old one or the new one is there, whole.

    Raises:
        OSError: it cannot be written; the old file stays, and nothing beside it.
    """
    path = Path(path)
    # In the same folder, since a rename across file systems is a copy, which can be cut short.
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # which names no file where the disk is full
        reason = f"{error.strerror or error}; what was there before is untouched"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # which would hide the first one
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make what was renamed or removed in a folder last through a power cut."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
