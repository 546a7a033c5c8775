"""The variants of focal loss as `torch.nn.Module`s; the mean by default, as in `torch.nn`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focal.core import variants
from focal.core.namespace import Reduction, SparseReduction
from focal.core.renamed import renamed
from focal.torch.modules import DenseLoss, Number

__all__ = ["AsymmetricLoss", "HeatmapFocalLoss", "QualityFocalLoss", "VarifocalLoss"]


class QualityFocalLoss(DenseLoss, function=variants.quality_focal_loss):
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

    def __init__(self, beta: Number = 2.0, reduction: Reduction = "mean") -> None:
        super().__init__(beta=beta, reduction=reduction)


class VarifocalLoss(DenseLoss, function=variants.varifocal_loss):
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
        self, alpha: Number = 0.75, gamma: Number = 2.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(alpha=alpha, gamma=gamma, reduction=reduction)


class HeatmapFocalLoss(DenseLoss, function=variants.heatmap_focal_loss):
    """`focal.torch.heatmap_focal_loss` as a module.

    Args:
        gamma: Focusing parameter >= 0. Default 2.
        beta: Exponent of the penalty's reduction, >= 0. Default 4.
        reduction: "none", "mean", "sum" or "positives" (default): the papers' normalizer.

    Example:
        >>> import torch
        >>> from focal.torch import HeatmapFocalLoss
        >>> HeatmapFocalLoss()(torch.zeros(2), torch.tensor([0.0, 1.0]))
        tensor(0.3466)

    Source: Law and Deng 2018, equation 1.
    """

    def __init__(
        self, gamma: Number = 2.0, beta: Number = 4.0, reduction: SparseReduction = "positives"
    ) -> None:
        super().__init__(gamma=gamma, beta=beta, reduction=reduction)


class AsymmetricLoss(DenseLoss, function=variants.asymmetric_loss):
    """`focal.torch.asymmetric_loss` as a module.

    Args:
        gamma_positive: Focusing parameter of the positives, >= 0. Default 1.
        gamma_negative: Focusing parameter of the negatives, >= 0. Default 4.
        margin: The score that a negative may have without loss, in [0, 1). Default 0.05.
        reduction: "none", "mean" (default) or "sum".

    Example:
        >>> import torch
        >>> from focal.torch import AsymmetricLoss
        >>> AsymmetricLoss()(torch.zeros(2), torch.tensor([0.0, 1.0]))
        tensor(0.1855)

    Source: Ridnik et al. 2021.
    """

    def __init__(
        self,
        gamma_positive: Number = 1.0,
        gamma_negative: Number = 4.0,
        margin: float = 0.05,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            gamma_positive=gamma_positive,
            gamma_negative=gamma_negative,
            margin=margin,
            reduction=reduction,
        )


if not TYPE_CHECKING:  # for modules that were pickled whole
    __getattr__ = renamed(__name__, {"AsymmetricFocalLoss": "AsymmetricLoss"})
