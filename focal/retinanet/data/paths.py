"""No name and no link in a dataset makes the loader read a file outside of it.

A dataset may come from an untrusted source. The data folder, its image folder and its annotation
folder may be links to another disk, since users set those up by hand. Every other path must resolve
to a place inside the data folder or the image folder: an archive can contain links to anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

__all__ = ["LINK_FAULT", "PathRule", "is_file", "leads_out"]

LINK_FAULT = "a link that leads out of the data folder, as only a whole image folder may"


class PathRule:
    """The rule for the names in one image folder.

    Args:
        root: the data folder.
        folder: the image folder in it.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = folder
        self._name = folder.name or "."  # of the folder one is in
        self._homes = _homes(root, folder)

    def fault(self, name: str) -> tuple[str, str] | None:
        """Why a file must not be read, as kind and text of the error; None if it may be read."""
        # PureWindowsPath splits at both kinds of slash, so the rule is the same on every system.
        parts = PureWindowsPath(name)
        if parts.anchor or ".." in parts.parts:
            return "path leads out", f"file_name leads out of {self._name}/"
        try:
            if not os.path.realpath(self._folder / name).startswith(self._homes):
                return "path leads out", LINK_FAULT
            if is_file(self._folder / name):
                return None
        except ValueError:  # characters that no file name has
            pass
        return "missing image", f"file not found in {self._name}/"


def leads_out(path: Path, *folders: Path) -> bool:
    """Whether a path, with links resolved, is in none of the folders."""
    return not os.path.realpath(path).startswith(_homes(*folders))


def _homes(*folders: Path) -> tuple[str, ...]:
    """The prefixes of the real paths of all files in the folders."""
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)


def is_file(path: Path) -> bool:
    """Whether this is a regular file; False for a name too long to exist."""
    try:
        return path.is_file()
    except OSError:
        return False
