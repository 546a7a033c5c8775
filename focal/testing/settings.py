"""The values of a reference's parameters that a loss is checked at."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from focal.core import checks
from focal.testing.references import is_valid, parameters_of

__all__ = ["checked", "names_taken", "settings"]

Params = dict[str, Any]
EXPONENTS = (0.0, 0.5, 1.0, 2.0, 3.7)
VALUES: dict[str, tuple[float, ...]] = {
    "alpha": (0.1, 0.25, 0.75),
    "gamma": EXPONENTS,
    "beta": (0.0, 0.11, 1.0, 4.0),
    "gamma_positive": EXPONENTS,
    "gamma_negative": EXPONENTS,
    "margin": (0.0, 0.05, 0.2),
    "label_smoothing": (0.0, 0.1, 0.3),
}


def checked(function: str, reference: str, params: Params) -> Params:
    """The parameters given, each a number that the reference takes."""
    known = parameters_of(reference)
    for name, value in params.items():
        if name not in known:
            raise TypeError(
                f"{function}: params must be among those of {reference}, "
                f"{', '.join(known) or 'which has none'}; got {name}"
            )
        if value is not None:
            checks.check_number(function, name, value)
    return params


def names_taken(fn: Callable[..., Any]) -> dict[str, Any]:
    """The parameters that a function can be given by name, and their defaults."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some that are written in C have none
        return {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p.default for name, p in signature.parameters.items() if p.kind in by_name}


def settings(reference: str, params: Params, taken: Params, seed: int) -> list[Params]:
    """The parameters to check at: first the defaults of the function, or else of the reference.

    Then settings in which each parameter that the function takes, and that is not given, has
    each of its values at least once, in random combinations.
    """
    base = parameters_of(reference) | params
    columns = {}
    for name in [name for name in base if name in taken and name not in params]:
        values: list[Any] = [v for v in VALUES[name] if is_valid(reference, {name: v})]
        own = taken[name]
        if is_valid(reference, {name: own}):
            base[name] = own
        elif base[name] is None:  # a function says by its default whether it takes None
            base[name] = values[0]
        values.insert(0, base[name])
        columns[name] = list(dict.fromkeys(values))
    if not columns:
        return [base]
    random = np.random.default_rng(seed)
    count = max(map(len, columns.values()))
    drawn = {
        name: [values[i % len(values)] for i in random.permutation(count)]
        for name, values in columns.items()
    }
    rows = [base | {name: drawn[name][i] for name in drawn} for i in range(count)]
    return [base, *(row for row in rows if row != base)]
