"""Binding the core to TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate

from focal.core import bind as core
from focal.core.bind import P, R
from focal.core.namespace import Framework, In, Out

__all__ = ["bind"]


def bind(
    function: Callable[Concatenate[Framework[In, Out], P], R],
    xp: Framework[In, Out],
    module: str,
) -> Callable[P, R]:
    """As `focal.core.bind.bind`, without `__wrapped__`.

    AutoGraph would follow it and call the function of the core, without `xp`.
    """
    bound = core.bind(function, xp, module)
    del bound.__wrapped__  # type: ignore[attr-defined]
    return bound
