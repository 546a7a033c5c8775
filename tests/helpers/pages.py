"""Functions that pages of the documentation define."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def from_page(page: Path, name: str) -> Callable[..., Any]:
    """The function of this name, from the block that has it."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    (block,) = (b for b in blocks if f"def {name}(" in b)
    found: dict[str, Any] = {}
    exec(block, found)
    function: Callable[..., Any] = found[name]
    return function
