"""Binding the core to a framework: its functions, less their first parameter `xp`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from focal.core.namespace import Namespace

__all__ = ["bind"]

NUMPY = "focal.numpy"
"""The module that the examples of the core are written for."""

P = ParamSpec("P")
R = TypeVar("R")


def bind(
    function: Callable[Concatenate[Namespace, P], R], xp: Namespace, module: str
) -> Callable[P, R]:
    """`function` with `xp` filled in, as a public function of `module`.

    Name, docstring and the rest of the signature stay, so that every framework offers the
    same function. `inspect.getsource` and `typing.get_type_hints` find the core's by
    `__wrapped__`, `inspect.signature` and `help` the bound one's by `__signature__`.
    """

    @functools.wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(xp, *args, **kwargs)

    signature = inspect.signature(function)
    bound.__module__ = module
    bound.__doc__ = _doc(function, module)
    bound.__annotations__ = {k: v for k, v in function.__annotations__.items() if k != "xp"}
    bound.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:]
    )
    return bound


def _doc(function: Callable[..., object], module: str) -> str:
    """The docstring, which says so where its example is of another framework."""
    doc = function.__doc__ or ""
    if module == NUMPY:
        return doc
    note = f"This is {NUMPY}; {module} takes and returns arrays of its framework."
    return re.sub(r"^( *)Example:\n", rf"\g<0>\1    {note}\n\n", doc, flags=re.M)
