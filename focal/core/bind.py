"""Binding the core to a framework: its functions, less their first parameter `xp`."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from focal.core.namespace import Framework, In, Out

__all__ = ["bind"]

NUMPY = "focal.numpy"
"""The module that the examples of the core are written for."""

P = ParamSpec("P")
R = TypeVar("R")


def bind(
    function: Callable[Concatenate[Framework[In, Out], P], R],
    xp: Framework[In, Out],
    module: str,
) -> Callable[P, R]:
    """`function` with `xp` filled in, as a public function of `module`.

    Every framework offers the same function: its name, docstring and signature stay, and the
    types of its arrays are those of the framework, for type checkers and at run time.
    `inspect.getsource` finds the function of the core by `__wrapped__`.
    """

    @functools.wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(xp, *args, **kwargs)

    types: dict[str, Any] = {"In": xp.input_type, "Out": xp.array_type}
    hints = {k: _filled(h, types) for k, h in typing.get_type_hints(function).items() if k != "xp"}
    bound.__module__ = module
    bound.__doc__ = _doc(function, module)
    bound.__annotations__ = hints
    bound.__signature__ = _signature(function, types)  # type: ignore[attr-defined]
    return bound


def _filled(hint: Any, types: dict[str, Any]) -> Any:
    """A type hint with types instead of type variables."""
    if isinstance(hint, TypeVar):
        return types[hint.__name__]
    variables = getattr(hint, "__parameters__", ())
    return hint[tuple(types[v.__name__] for v in variables)] if variables else hint


def _signature(function: Callable[..., object], types: dict[str, Any]) -> inspect.Signature:
    """The signature for `help`: types by their names, because some are unions of many."""
    names = {k: t.__name__ if isinstance(t, type) else "ArrayLike" for k, t in types.items()}

    def named(annotation: str) -> str:
        return re.sub(r"\b(In|Out)\b", lambda found: names[found[0]], annotation)

    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    return signature.replace(
        parameters=[p.replace(annotation=named(p.annotation)) for p in parameters],
        return_annotation=named(signature.return_annotation),
    )


def _doc(function: Callable[..., object], module: str) -> str:
    """The docstring, which says so where its example is of another framework."""
    doc = function.__doc__ or ""
    if module == NUMPY:
        return doc
    note = f"This is {NUMPY}; {module} takes and returns arrays of its framework."
    return re.sub(r"^( *)Example:\n", rf"\g<0>\1    {note}\n\n", doc, flags=re.M)
