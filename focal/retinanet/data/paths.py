"""Which file a name in a dataset is: one inside the data folder, or none.

A dataset may come from a stranger, so no name and no link in it may make the loader read what lies
elsewhere. The folder that is asked for, its image folder and its annotation folder may be links to
another disk, since whoever uses them sets them up by hand. All else must end, links followed,
inside the data folder or the image folder, since archives can hold links to anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

__all__ = ["LINK_FAULT", "PathRule", "is_file", "leads_out"]

LINK_FAULT = "a link that leads out of the data folder, as only a whole image folder may"


class PathRule:
    """The rule for the names in one image folder.

    Args:
        root: The data folder.
        folder: The image folder in it.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = folder
        self._homes = _homes(root, folder)

    def fault(self, name: str) -> tuple[str, str] | None:
        """Why a file may not be read, as a kind and the end of a sentence; None if it may."""
        # PureWindowsPath splits at both kinds of slash, so this holds on every system.
        parts = PureWindowsPath(name)
        if parts.anchor or ".." in parts.parts:
            return "path leads out", f"file_name leads out of {self._folder.name}/"
        try:
            if not os.path.realpath(self._folder / name).startswith(self._homes):
                return "path leads out", LINK_FAULT
            if is_file(self._folder / name):
                return None
        except ValueError:  # characters that no file name has
            pass
        return "missing image", f"file not found in {self._folder.name}/"


def leads_out(path: Path, *folders: Path) -> bool:
    """Whether a path, all links followed, is inside none of the folders."""
    return not os.path.realpath(path).startswith(_homes(*folders))


def _homes(*folders: Path) -> tuple[str, ...]:
    """The beginnings that the real paths of all files in the folders have."""
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)


def is_file(path: Path) -> bool:
    """Whether there is a file; not a folder, pipe or device, nor a name too long to exist."""
    try:
        return path.is_file()
    except OSError:
        return False
