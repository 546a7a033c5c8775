"""The report of a check, and how it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["NO_AUTODIFF", "Errors", "Findings", "LossReport", "Part", "Place"]

HEADER = ("targets", "what", "ULP", "allowed", "relative", "beyond", "NaN", "inf")
PASSED = "passed"
NO_AUTODIFF = "not available: NumPy has no autodiff"
PLACES = 3
"""Number of the worst places that are reported."""


@dataclass(frozen=True)
class Place:
    """One result, compared with the exact one.

    Attributes:
        inputs: The logit; for losses of a row all its logits, for boxes the box. None for a
            reduced loss.
        targets: Its target, label or box.
        column: Which of the inputs a gradient belongs to; None where there is one.
        params: The parameters of the reference there.
        expected: The exact result.
        got: The result of the loss that is checked.
        ulp: The error in units in the last place.
        allowed: The largest error allowed there, in the same unit.
    """

    inputs: float | tuple[float, ...] | None
    targets: float | tuple[float, ...] | None
    column: int | None
    params: Mapping[str, Any]
    expected: float
    got: float
    ulp: float
    allowed: float

    @property
    def badness(self) -> float:
        """The error divided by what is allowed; infinite for a result that is not finite."""
        return self.ulp / max(self.allowed, 1e-300)

    def __str__(self) -> str:
        where = ""
        if self.inputs is not None:
            column = "" if self.column is None else f"[{self.column}]"
            where = f"input {_numbers(self.inputs)}{column}, target {_numbers(self.targets)}: "
        got = f"expected {self.expected:.9g}, got {self.got:.9g}"
        return f"{where}{got}, {self.ulp:.4g} ULP ({self.allowed:.4g} allowed)"


@dataclass(frozen=True)
class Errors:
    """The errors of the values, or of the gradients, over the grid and all parameters.

    Attributes:
        ulp: Error in units in the last place where it is largest compared with what is allowed.
        allowed: What is allowed at that place: the bound, `atol`, and the rounding error of a
            margin or a smoothed label.
        relative: Largest relative error of results that are normal numbers.
        beyond: Number of results with a larger error than allowed, NaN and infinity included.
        nan: Number of NaN results.
        infinite: Number of infinite results.
        places: The worst places, the worst first.
    """

    ulp: float
    allowed: float
    relative: float
    beyond: int
    nan: int
    infinite: int
    places: tuple[Place, ...]

    @property
    def passed(self) -> bool:
        """Whether every result is finite and within the bound."""
        return not self.beyond

    @classmethod
    def merged(cls, parts: Sequence[Errors]) -> Errors:
        """The errors at several settings of the parameters, as one."""
        worst = max(parts, key=lambda e: e.ulp / max(e.allowed, 1e-300))
        places = sorted((p for e in parts for p in e.places), key=lambda p: -p.badness)
        return cls(
            ulp=worst.ulp,
            allowed=worst.allowed,
            relative=max(e.relative for e in parts),
            beyond=sum(e.beyond for e in parts),
            nan=sum(e.nan for e in parts),
            infinite=sum(e.infinite for e in parts),
            places=tuple(places[:PLACES]),
        )


class Findings(NamedTuple):
    """The errors for one kind of targets at one setting of the parameters."""

    value: Errors
    gradient: Errors | str
    """Where there is none, the reason."""
    second: str = "not checked"


@dataclass(frozen=True)
class Part:
    """The results for one kind of targets, or for one reduction.

    Attributes:
        targets: "hard", "soft", "labels", "zero", "any" or "boxes"; "mean" or "sum" for a
            reduction.
        value: Errors of the loss.
        gradient: Errors of the gradient; None where there is none.
        gradient_status: "passed", "beyond the bound", or "not available" and why.
        second_status: Of the second derivative: "close", "not close" and where, the number of
            NaN and infinite results, or "not available" or "not checked" and why. It is
            reported only and cannot fail the check.
    """

    targets: str
    value: Errors
    gradient: Errors | None
    gradient_status: str
    second_status: str

    @property
    def passed(self) -> bool:
        """Whether values and gradients are within the bound."""
        return self.value.passed and self.gradient_status in (PASSED, NO_AUTODIFF)

    @classmethod
    def merged(cls, targets: str, found: Sequence[Findings]) -> Part:
        """The findings at all settings of the parameters, as one part."""
        gradients = [f.gradient for f in found if isinstance(f.gradient, Errors)]
        missing = [f.gradient for f in found if isinstance(f.gradient, str)]
        passed = all(errors.passed for errors in gradients)
        status = missing[0] if missing else PASSED if passed else "beyond the bound"
        return cls(
            targets=targets,
            value=Errors.merged([f.value for f in found]),
            gradient=Errors.merged(gradients) if gradients else None,
            gradient_status=status,
            second_status=found[0].second,
        )


@dataclass(frozen=True)
class LossReport:
    """What `check_loss` found; `str()` of it is a table.

    Attributes:
        loss: Name of the function that was checked.
        reference: Name of the reference.
        params: The reference's parameters, in the first setting.
        settings: All settings of the parameters that were checked.
        backend: The framework.
        dtype: The type of the logits.
        max_ulp: The bound; the largest of those of all settings.
        parts: The results, one for each kind of targets and each reduction.
        passed: Whether every value and every gradient is within the bound.
    """

    loss: str
    reference: str
    params: Mapping[str, Any]
    settings: tuple[Mapping[str, Any], ...]
    backend: str
    dtype: str
    max_ulp: float
    parts: tuple[Part, ...]
    passed: bool

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [HEADER]
        notes, places = [], []
        for part in self.parts:
            for what, errors in (("value", part.value), ("gradient", part.gradient)):
                if errors is None:
                    continue
                rows.append((part.targets, what, *_cells(errors)))
                if not errors.passed:
                    places += [
                        f"{part.targets} {what}, {self._at(p)}"
                        for p in errors.places
                        if p.badness > 1
                    ]
            notes += [
                f"gradient, {part.targets}: {part.gradient_status}",
                f"second derivative, {part.targets}: {part.second_status}",
            ]
        bound = f"bound of {self.max_ulp:g} ULP: {PASSED if self.passed else 'FAILED'}"
        if len(self.settings) > 1:
            bound = f"{len(self.settings)} settings of the parameters, largest {bound}"
        name = f"{self.reference}({_params(self.params)})"
        title = f"{self.loss} against {name}, {self.backend}, {self.dtype}"
        return "\n".join([title, *_table(rows), *places, *notes, bound])

    def _at(self, place: Place) -> str:
        return f"{_params(place.params)}, {place}" if len(self.settings) > 1 else str(place)


def _params(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in params.items())


def _numbers(values: Any) -> str:
    if isinstance(values, tuple):
        return f"({', '.join(f'{v:.9g}' for v in values)})"
    return f"{values:.9g}"


def _cells(errors: Errors) -> tuple[str, ...]:
    numbers = (f"{number:.4g}" for number in (errors.ulp, errors.allowed, errors.relative))
    return (*numbers, str(errors.beyond), str(errors.nan), str(errors.infinite))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
