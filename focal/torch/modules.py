"""The losses as `torch.nn.Module`s, and the prior bias of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from focal.core import box_losses, checks, losses, softmax
from focal.core.namespace import Reduction, SparseReduction
from focal.core.prior import prior_bias
from focal.torch._namespace import xp

__all__ = [
    "BalancedCrossEntropyLoss",
    "GIoULoss",
    "SigmoidFocalLoss",
    "SigmoidFocalLossStar",
    "SoftmaxFocalLoss",
    "SparseSigmoidFocalLoss",
    "init_prior_bias_",
]


class Loss(nn.Module):
    """Parameters as attributes, shown in the repr."""

    def extra_repr(self) -> str:
        """The parameters."""
        own = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{k}={v!r}" for k, v in own.items())


class SigmoidFocalLoss(Loss):
    """`focal.torch.sigmoid_focal_loss` as a module; the mean by default, as in `torch.nn`.

    Args:
        alpha: Weight of positives, or a list of one per class; None or -1 turns it off.
            Default 0.25.
        gamma: Focusing parameter >= 0. Default 2.
        reduction: "none", "mean" (default) or "sum".
        label_smoothing: s in [0, 1]: targets become `y (1 - s) + s / 2`. Default 0.

    Shape:
        inputs and targets: the same, any; the result is a scalar, or that shape for "none".

    Example:
        >>> import torch
        >>> from focal.torch import SigmoidFocalLoss
        >>> criterion = SigmoidFocalLoss(gamma=1.5)
        >>> criterion
        SigmoidFocalLoss(alpha=0.25, gamma=1.5, reduction='mean', label_smoothing=0.0)
        >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.1838)

    Source: Lin et al. 2017, equation 5.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] | None = 0.25,
        gamma: float = 2.0,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.alpha = alpha if checks.is_sequence(alpha) else checks.check_alpha(name, alpha)
        self.gamma = checks.check_gamma(name, gamma)
        self.reduction = checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)
        self.label_smoothing = checks.check_number(name, "label_smoothing", label_smoothing, 0, 1)

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` and `targets` in [0, 1]."""
        return losses.sigmoid_focal_loss(
            xp,
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            weight=weight,
            label_smoothing=self.label_smoothing,
        )


class SparseSigmoidFocalLoss(Loss):
    """`focal.torch.sparse_sigmoid_focal_loss` as a module, for class labels.

    Args:
        alpha: Weight of positives, or a list of one per class; None or -1 turns it off.
            Default 0.25.
        gamma: Focusing parameter >= 0. Default 2.
        reduction: "none", "mean", "sum" or "positives" (default): the paper's normaliser.
        label_smoothing: s in [0, 1]: the targets are `1 - s / 2` and `s / 2`. Default 0.

    Shape:
        inputs (..., K), labels (...) integers in [-2, K); the result is a scalar, or the shape
        of inputs for "none".

    Example:
        >>> import torch
        >>> from focal.torch import SparseSigmoidFocalLoss
        >>> criterion = SparseSigmoidFocalLoss()
        >>> criterion(torch.zeros(3, 2), torch.tensor([1, -1, -2]))
        tensor(0.4332)

    Source: Lin et al. 2017, equation 5 and section 4.1.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] | None = 0.25,
        gamma: float = 2.0,
        reduction: SparseReduction = "positives",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.alpha = alpha if checks.is_sequence(alpha) else checks.check_alpha(name, alpha)
        self.gamma = checks.check_gamma(name, gamma)
        self.reduction = checks.check_choice(
            name, "reduction", reduction, (*checks.REDUCTIONS, "positives")
        )
        self.label_smoothing = checks.check_number(name, "label_smoothing", label_smoothing, 0, 1)

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` (..., K) and `labels` (...)."""
        return losses.sparse_sigmoid_focal_loss(
            xp,
            inputs,
            labels,
            self.alpha,
            self.gamma,
            self.reduction,
            weight=weight,
            label_smoothing=self.label_smoothing,
        )


class SoftmaxFocalLoss(Loss):
    """`focal.torch.softmax_focal_loss` as a module.

    Args:
        alpha: None (default), a number, or one per class.
        gamma: Focusing parameter >= 0. Default 2.
        reduction: "none", "mean" (default, over labels not ignored) or "sum".
        ignore_index: Label without loss. Default -100.
        axis: The class axis. Default -1; pass 1 for the layout of `nn.CrossEntropyLoss`.
        label_smoothing: s in [0, 1], shared among the classes. Default 0.

    Shape:
        inputs (..., K) with K on `axis`, labels (...); the result is a scalar, or the shape of
        labels for "none".

    Example:
        >>> import torch
        >>> from focal.torch import SoftmaxFocalLoss
        >>> SoftmaxFocalLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.7798)

    Source: Lin et al. 2017, equation 4.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] | None = None,
        gamma: float = 2.0,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        axis: int = -1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.alpha = alpha
        self.gamma = checks.check_gamma(name, gamma)
        self.reduction = checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)
        self.ignore_index = ignore_index
        self.axis = axis
        self.label_smoothing = checks.check_number(name, "label_smoothing", label_smoothing, 0, 1)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits `inputs` and class indices `labels`."""
        return softmax.softmax_focal_loss(
            xp,
            inputs,
            labels,
            self.alpha,
            self.gamma,
            self.reduction,
            ignore_index=self.ignore_index,
            axis=self.axis,
            label_smoothing=self.label_smoothing,
        )


class SigmoidFocalLossStar(Loss):
    """`focal.torch.sigmoid_focal_loss_star` as a module.

    Args:
        alpha: Weight of positives; None or -1 turns it off. Default 0.25.
        gamma: Slope > 0. Default 2.
        beta: Shift. Default 1.
        reduction: "none", "mean" (default) or "sum".

    Shape:
        inputs and targets: the same, any; the result is a scalar, or that shape for "none".

    Example:
        >>> import torch
        >>> from focal.torch import SigmoidFocalLossStar
        >>> SigmoidFocalLossStar(alpha=None)(torch.zeros(2), torch.ones(2))
        tensor(0.1566)

    Source: Lin et al. 2017, appendix A.
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        beta: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.alpha = checks.check_alpha(name, alpha)
        self.gamma = checks.check_gamma(name, gamma)
        self.beta = checks.check_number(name, "beta", beta)
        self.reduction = checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` and `targets` in [0, 1]."""
        return losses.sigmoid_focal_loss_star(
            xp,
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.beta,
            self.reduction,
            weight=weight,
        )


class BalancedCrossEntropyLoss(Loss):
    """`focal.torch.balanced_cross_entropy` as a module.

    Args:
        alpha: Weight of positives; None or -1 turns it off. Default 0.75.
        reduction: "none", "mean" (default) or "sum".

    Shape:
        inputs and targets: the same, any; the result is a scalar, or that shape for "none".

    Example:
        >>> import torch
        >>> from focal.torch import BalancedCrossEntropyLoss
        >>> BalancedCrossEntropyLoss()(torch.zeros(2), torch.ones(2))
        tensor(0.5199)

    Source: Lin et al. 2017, equation 3.
    """

    def __init__(self, alpha: float | None = 0.75, reduction: Reduction = "mean") -> None:
        super().__init__()
        name = type(self).__name__
        self.alpha = checks.check_alpha(name, alpha)
        self.reduction = checks.check_choice(name, "reduction", reduction, checks.REDUCTIONS)

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` and `targets` in [0, 1]."""
        return losses.balanced_cross_entropy(
            xp, inputs, targets, self.alpha, self.reduction, weight=weight
        )


class GIoULoss(Loss):
    """`focal.torch.giou_loss` as a module.

    Args:
        reduction: "none", "mean" (default) or "sum".

    Shape:
        boxes1 and boxes2 (..., 4); the result is a scalar, or (...) for "none".

    Example:
        >>> import torch
        >>> from focal.torch import GIoULoss
        >>> GIoULoss()(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 0, 3, 1]]))
        tensor(1.3333)

    Source: Rezatofighi et al. 2019.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = checks.check_choice(
            type(self).__name__, "reduction", reduction, checks.REDUCTIONS
        )

    def forward(self, boxes1: Tensor, boxes2: Tensor) -> Tensor:
        """The loss of paired boxes."""
        return box_losses.giou_loss(xp, boxes1, boxes2, self.reduction)


def init_prior_bias_(layer: nn.Module, pi: ArrayLike = 0.01) -> nn.Module:
    r"""Fill the bias of a classification layer with the prior bias, in place.

    .. math:: b = -\log\frac{1 - \pi}{\pi}

    Args:
        layer: A layer with a one-dimensional `bias`, such as `nn.Linear` or `nn.Conv2d`.
        pi: The first score of every output, in (0, 1); or one per class, repeated to the
            length of the bias (one round of classes for each anchor). Default 0.01.

    Returns:
        The layer.

    Raises:
        TypeError: `layer` has no bias, or `pi` is not numeric.
        ValueError: a value of `pi` is not inside (0, 1), or the bias is not a whole number of
            rounds of `pi`.

    Example:
        >>> import torch
        >>> from focal.torch import init_prior_bias_
        >>> init_prior_bias_(torch.nn.Linear(4, 2)).bias
        Parameter containing:
        tensor([-4.5951, -4.5951], requires_grad=True)

    Source: Lin et al. 2017, section 4.1, "Initialization".
    """
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, Tensor) or bias.ndim != 1:
        raise TypeError(
            f"init_prior_bias_: layer must have a one-dimensional bias; got {type(layer).__name__}"
        )
    values = np.atleast_1d(prior_bias(pi))
    if values.ndim != 1 or bias.numel() % values.size:
        raise ValueError(
            f"init_prior_bias_: pi must be a number or have a length that divides that of the "
            f"bias ({bias.numel()}); got shape {values.shape}"
        )
    with torch.no_grad():
        repeated = np.tile(values, bias.numel() // values.size)
        bias.copy_(torch.as_tensor(repeated, dtype=bias.dtype))
    return layer
