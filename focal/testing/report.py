"""What a check has measured, and how it prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Errors", "LossReport", "Part"]

HEADER = ("targets", "what", "ULP", "allowed", "relative", "at logit", "target", "NaN", "inf")


@dataclass(frozen=True)
class Errors:
    """The largest error of the values, or of the gradients, over the grid.

    Attributes:
        ulp: Largest error in units in the last place, at the place where it is largest beside
            what is allowed there.
        allowed: What is allowed at that place: the bound, and for FL* and softmax what the
            rounding of a margin explains.
        relative: Largest relative error of results that are normal numbers.
        logit: The logit at the place of `ulp`.
        target: Its target: a number in [0, 1].
        nan: How many results are NaN.
        infinite: How many are infinite.
    """

    ulp: float
    allowed: float
    relative: float
    logit: float
    target: float
    nan: int
    infinite: int

    @property
    def kept(self) -> bool:
        """Whether every result is finite and within the bound."""
        return self.ulp <= self.allowed and not self.nan and not self.infinite


@dataclass(frozen=True)
class Part:
    """The results for one kind of targets.

    Attributes:
        targets: "hard", "soft" or "labels".
        value: Errors of the loss.
        gradient: Errors of the gradient; None where there is none.
        gradient_status: "kept", "beyond the bound", or "not available" and why.
        second_status: "close", "not close" and where, how many are NaN or infinite, or
            "not available" and why. It is reported and does not decide.
    """

    targets: str
    value: Errors
    gradient: Errors | None
    gradient_status: str
    second_status: str


@dataclass(frozen=True)
class LossReport:
    """What `check_loss` found; `str()` of it is a table.

    Attributes:
        loss: Name of the function that was checked.
        reference: Name of the reference.
        params: The reference's parameters.
        backend: The framework.
        dtype: The type of the logits.
        max_ulp: The bound.
        parts: The results, one for each kind of targets.
        kept: Whether every value and every gradient is within the bound.
    """

    loss: str
    reference: str
    params: Mapping[str, Any]
    backend: str
    dtype: str
    max_ulp: float
    parts: tuple[Part, ...]
    kept: bool

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [HEADER]
        notes = []
        for part in self.parts:
            for what, errors in (("value", part.value), ("gradient", part.gradient)):
                if errors is not None:
                    rows.append((part.targets, what, *_cells(errors)))
            notes += [
                f"gradient, {part.targets} targets: {part.gradient_status}",
                f"second derivative, {part.targets} targets: {part.second_status}",
            ]
        params = ", ".join(f"{name}={value}" for name, value in self.params.items())
        verdict = "kept" if self.kept else "NOT KEPT"
        return "\n".join(
            [
                f"{self.loss} against {self.reference}({params}), {self.backend}, {self.dtype}",
                *_table(rows),
                *notes,
                f"bound of {self.max_ulp:g} ULP: {verdict}",
            ]
        )


def _cells(errors: Errors) -> tuple[str, ...]:
    numbers = (errors.ulp, errors.allowed, errors.relative, errors.logit, errors.target)
    return (*(f"{number:.4g}" for number in numbers), str(errors.nan), str(errors.infinite))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
