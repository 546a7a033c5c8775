"""Binding the core to a framework: its functions, less their first parameter `xp`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from focal.core.namespace import Namespace

__all__ = ["bind"]

P = ParamSpec("P")
R = TypeVar("R")


def bind(
    function: Callable[Concatenate[Namespace, P], R], xp: Namespace, module: str
) -> Callable[P, R]:
    """`function` with `xp` filled in, as a public function of `module`.

    Name, docstring and the rest of the signature stay, so that every framework offers the
    same function.
    """

    @functools.wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(xp, *args, **kwargs)

    signature = inspect.signature(function)
    bound.__module__ = module
    bound.__annotations__ = {k: v for k, v in function.__annotations__.items() if k != "xp"}
    bound.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:]
    )
    del bound.__wrapped__  # it would show the unbound signature
    return bound
