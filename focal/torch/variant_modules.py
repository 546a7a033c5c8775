"""The relatives of focal loss as `torch.nn.Module`s; the mean by default, as in `torch.nn`."""

from __future__ import annotations

from torch import Tensor

from focal.core import checks, variants
from focal.core.namespace import Reduction, SparseReduction
from focal.torch._namespace import xp
from focal.torch.modules import Loss

__all__ = ["AsymmetricFocalLoss", "HeatmapFocalLoss", "QualityFocalLoss", "VarifocalLoss"]


class QualityFocalLoss(Loss):
    """`focal.torch.quality_focal_loss` as a module.

    Args:
        beta: Exponent >= 0. Default 2.
        reduction: "none", "mean" (default) or "sum".

    Example:
        >>> import torch
        >>> from focal.torch import QualityFocalLoss
        >>> QualityFocalLoss()(torch.zeros(2), torch.tensor([0.5, 1.0]))
        tensor(0.0866)

    Source: Li et al. 2020, equation 2.
    """

    def __init__(self, beta: float = 2.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        name = type(self).__name__
        self.beta = checks.check_number(name, "beta", beta, low=0)
        self.reduction = checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` and `targets` in [0, 1]."""
        return variants.quality_focal_loss(
            xp, inputs, targets, self.beta, self.reduction, weight=weight
        )


class VarifocalLoss(Loss):
    """`focal.torch.varifocal_loss` as a module.

    Args:
        alpha: Factor of the negatives, >= 0. Default 0.75.
        gamma: Focusing parameter of the negatives, >= 0. Default 2.
        reduction: "none", "mean" (default) or "sum".

    Example:
        >>> import torch
        >>> from focal.torch import VarifocalLoss
        >>> VarifocalLoss()(torch.zeros(2), torch.tensor([0.5, 1.0]))
        tensor(0.5199)

    Source: Zhang et al. 2021, equation 2.
    """

    def __init__(
        self, alpha: float = 0.75, gamma: float = 2.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.alpha = checks.check_number(name, "alpha", alpha, low=0)
        self.gamma = checks.check_gamma(name, gamma)
        self.reduction = checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` and `targets` in [0, 1]."""
        return variants.varifocal_loss(
            xp, inputs, targets, self.alpha, self.gamma, self.reduction, weight=weight
        )


class HeatmapFocalLoss(Loss):
    """`focal.torch.heatmap_focal_loss` as a module.

    Args:
        gamma: Focusing parameter >= 0. Default 2.
        beta: Exponent of the penalty's reduction, >= 0. Default 4.
        reduction: "none", "mean", "sum" or "positives" (default): the papers' normaliser.

    Example:
        >>> import torch
        >>> from focal.torch import HeatmapFocalLoss
        >>> HeatmapFocalLoss()(torch.zeros(2), torch.tensor([0.0, 1.0]))
        tensor(0.3466)

    Source: Law and Deng 2018, equation 1.
    """

    def __init__(
        self, gamma: float = 2.0, beta: float = 4.0, reduction: SparseReduction = "positives"
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.gamma = checks.check_gamma(name, gamma)
        self.beta = checks.check_number(name, "beta", beta, low=0)
        self.reduction = checks.check_choice(
            name, "reduction", reduction, (*checks.REDUCTIONS, "positives")
        )

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` and `targets` in [0, 1], 1 at a keypoint."""
        return variants.heatmap_focal_loss(
            xp, inputs, targets, self.gamma, self.beta, self.reduction, weight=weight
        )


class AsymmetricFocalLoss(Loss):
    """`focal.torch.asymmetric_focal_loss` as a module.

    Args:
        gamma_positive: Focusing parameter of the positives, >= 0. Default 1.
        gamma_negative: Focusing parameter of the negatives, >= 0. Default 4.
        margin: The score that a negative may have without loss, in [0, 1). Default 0.05.
        reduction: "none", "mean" (default) or "sum".

    Example:
        >>> import torch
        >>> from focal.torch import AsymmetricFocalLoss
        >>> AsymmetricFocalLoss()(torch.zeros(2), torch.tensor([0.0, 1.0]))
        tensor(0.1855)

    Source: Ridnik et al. 2021.
    """

    def __init__(
        self,
        gamma_positive: float = 1.0,
        gamma_negative: float = 4.0,
        margin: float = 0.05,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.gamma_positive = checks.check_number(name, "gamma_positive", gamma_positive, low=0)
        self.gamma_negative = checks.check_number(name, "gamma_negative", gamma_negative, low=0)
        self.margin = checks.check_number(name, "margin", margin, 0, 1)
        self.reduction = checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` and `targets` in [0, 1]."""
        return variants.asymmetric_focal_loss(
            xp,
            inputs,
            targets,
            self.gamma_positive,
            self.gamma_negative,
            self.margin,
            self.reduction,
            weight=weight,
        )
