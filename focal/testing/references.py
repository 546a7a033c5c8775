"""The public losses as references: their parameters, their formulas, their grids."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focal.core import box_losses, checks, losses, softmax, variants
from focal.core.namespace import Formula
from focal.numpy._namespace import xp

__all__ = ["REFERENCES", "derivatives", "exponent", "is_valid", "parameters_of"]

Wide = NDArray[Any]
Params = dict[str, Any]
CORE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        losses.sigmoid_focal_loss,
        losses.sparse_sigmoid_focal_loss,
        softmax.softmax_focal_loss,
        losses.sigmoid_focal_loss_star,
        losses.balanced_cross_entropy,
        variants.quality_focal_loss,
        variants.varifocal_loss,
        variants.heatmap_focal_loss,
        variants.asymmetric_loss,
        box_losses.smooth_l1_loss,
        box_losses.giou_loss,
    )
}
REFERENCES = tuple(CORE)
PARAMETERS = (
    "alpha",
    "gamma",
    "beta",
    "gamma_positive",
    "gamma_negative",
    "margin",
    "label_smoothing",
)
EXPONENTS = {
    "quality_focal_loss": ("beta",),
    "heatmap_focal_loss": ("gamma", "beta"),
    "asymmetric_loss": ("gamma_positive", "gamma_negative"),
}
"""The parameters that are exponents, where they are not gamma alone."""


def parameters_of(reference: str) -> Params:
    """The parameters of a reference and their defaults."""
    signature = inspect.signature(CORE[reference]).parameters
    return {name: signature[name].default for name in PARAMETERS if name in signature}


def is_valid(reference: str, params: Params) -> bool:
    """Whether a reference takes these values of its parameters, each one number or None."""
    if any(checks.is_sequence(value) for value in params.values()):
        return False
    try:
        CORE[reference](xp, *_smallest(reference), **params)
    except (TypeError, ValueError):
        return False
    return True


def exponent(reference: str, params: Params) -> float:
    """The largest exponent: an error of what it is applied to grows with it."""
    names = EXPONENTS.get(reference, ("gamma",))
    return max((params[name] for name in names if name in params), default=0.0)


def derivatives(
    reference: str, params: Params, x: Wide, targets: Wide, second: bool = False
) -> list[Wide]:
    """A loss of single logits, its first and perhaps its second derivative.

    They are those of the formula that the public loss hands to its framework.
    """
    recorder = _Recorder()
    CORE[reference](recorder, x, targets, **params)
    formula, x, t = recorder.handed
    found = list(formula.value_and_grad(xp, x, t))
    return [*found, formula.hess(xp, x, t)] if second else found


class _Recorder:
    """The NumPy namespace, but that it keeps a formula and what it is of."""

    handed: tuple[Formula, Wide, Wide]

    def __getattr__(self, name: str) -> Any:
        return getattr(xp, name)

    def pointwise(self, formula: Formula, x: Wide, t: Wide) -> Wide:
        self.handed = formula, x, t
        return x


def _smallest(reference: str) -> tuple[Wide, Wide]:
    """The smallest arguments that a reference takes."""
    if reference == "giou_loss":
        return np.zeros((1, 4)), np.zeros((1, 4))
    labels = reference in ("sparse_sigmoid_focal_loss", "softmax_focal_loss")
    return np.zeros((1, 1)), np.zeros(1, int) if labels else np.zeros((1, 1))
