"""Parameters of a formula that are arrays, such as a gamma that is traced or learned.

A formula is a named tuple of its parameters. Most are Python numbers, which an adapter treats as
constants of the formula. Arrays it must pass to its registered derivative as operands, so that
they can be traced and differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from focal.core.namespace import Array, Formula

__all__ = ["fill", "is_number", "split"]


class _Slot(NamedTuple):
    """The place of an array in a formula."""

    number: int


def is_number(value: Any) -> bool:
    """Whether a parameter is a Python number, whose value may be looked at."""
    return isinstance(value, (int, float))


def split(formula: Formula) -> tuple[Formula, tuple[Array, ...]]:
    """The formula with a place instead of each array, and the arrays."""
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
