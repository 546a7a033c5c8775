"""How an adapter hands operands to a formula.

A formula is a named tuple of its parameters. Python numbers are constants of the formula. Arrays
must be operands of the registered derivative, so that they can be traced and differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from focal.core import checks
from focal.core.namespace import Array, Formula, Namespace

__all__ = ["fill", "is_number", "split", "wide_operands"]


class _Slot(NamedTuple):
    """The placeholder of an array in a formula."""

    number: int


def wide_operands(xp: Namespace, x: Array, t: Array) -> tuple[Array, Array]:
    """Logits and dense targets in the type to compute in; labels and numbers as they are."""
    x = checks.wide(xp, x)
    is_dense = checks.is_array(t) and len(t.shape) == len(x.shape)
    return x, xp.astype(t, x.dtype) if is_dense and t.dtype != x.dtype else t


def is_number(value: Any) -> bool:
    """Whether a parameter is a Python number, whose value is known."""
    return isinstance(value, (int, float))


def split(formula: Formula) -> tuple[Formula, tuple[Array, ...]]:
    """The formula with a placeholder for each array, and the arrays."""
    fields = cast(tuple[Any, ...], formula)
    plain = all(value is None or is_number(value) for value in fields)  # the usual case
    return (formula, ()) if plain else _split(formula)


def _split(formula: Formula) -> tuple[Formula, tuple[Array, ...]]:
    arrays: list[Array] = []

    def without_arrays(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(without_arrays, value))
        if value is None or is_number(value):
            return value
        arrays.append(value)
        return _Slot(len(arrays) - 1)

    return without_arrays(formula), tuple(arrays)


def fill(formula: Formula, arrays: Sequence[Array]) -> Formula:
    """The inverse of `split`."""

    def with_arrays(value: Any) -> Any:
        if isinstance(value, _Slot):
            return arrays[value.number]
        return type(value)(*map(with_arrays, value)) if isinstance(value, tuple) else value

    return formula if not arrays else with_arrays(formula)
