"""Binding the core to TensorFlow."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from focal.core import bind as core
from focal.core.namespace import Namespace

__all__ = ["bind"]


def bind(function: Callable[..., Any], xp: Namespace, module: str) -> Callable[..., Any]:
    """As `focal.core.bind.bind`, without `__wrapped__`.

    AutoGraph would follow it and call the function of the core, without `xp`.
    """
    bound: Any = core.bind(function, xp, module)
    bound.__annotations__ = typing.get_type_hints(bound)
    del bound.__wrapped__
    return bound
