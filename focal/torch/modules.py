"""The losses as `torch.nn.Module`s, and the prior bias of a layer.

The mean by default, as in `torch.nn`. Parameters that are tensors, such as one alpha per class,
are buffers and move with the module.

Annotations are not postponed here: TorchScript reads them as types.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from focal.core import box_losses, checks, losses, softmax
from focal.core.namespace import Reduction, SparseReduction
from focal.core.prior import class_prior_bias, tile_bias
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

Number = float | Tensor
"""A number, or a tensor without axes."""
Alphas = Number | Sequence[float] | None
"""One for all classes or one per class."""


class Loss(nn.Module):
    """A loss function and its parameters. They are attributes; tensors become buffers.

    They are checked when the module is made, by a call on a single zero logit.
    """

    _loss: ClassVar[Callable[..., Tensor]]
    _function_name: ClassVar[str]

    def __init_subclass__(cls, function: Callable[..., Tensor] | None = None) -> None:
        """A module of the loss `function` of the core."""
        super().__init_subclass__()
        if function is None:
            return

        # TorchScript compiles `forward` and calls this as a Python function; it takes no type of
        # `self`.
        @torch.jit.ignore
        def loss(self, a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
            options = {name: getattr(self, name) for name in self._names}
            if weight is not None:
                options["weight"] = weight
            return function(xp, a, b, **options)

        cls._loss = loss
        cls._function_name = function.__name__

    def __init__(self, **parameters: Any) -> None:
        super().__init__()
        for name, value in parameters.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._names = tuple(parameters)
        try:
            self._loss(*self._example(), None)
        except (TypeError, ValueError) as error:
            own = str(error).replace(self._function_name, type(self).__name__, 1)
            raise type(error)(own) from None

    def extra_repr(self) -> str:
        """The parameters."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)

    def _example(self) -> tuple[Tensor, Tensor]:
        """Arguments of as many classes as there are alphas."""
        zeros = torch.zeros(1, self._classes())
        return zeros, zeros

    def _classes(self) -> int:
        alpha: Any = getattr(self, "alpha", None)
        return len(alpha) if checks.is_sequence(alpha) else 1


class DenseLoss(Loss):
    """A loss of logits and targets of the same shape."""

    def forward(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs` and `targets` in [0, 1]."""
        return self._loss(inputs, targets, weight)


class LabelLoss(Loss):
    """A loss of logits with a class axis and of one label for each row."""

    axis: int

    def _example(self) -> tuple[Tensor, Tensor]:
        axis = self.axis if isinstance(self.axis, int) else -1
        axes = max(2, axis + 1, -axis)
        shape = [1] * axes
        shape[axis] = self._classes()
        return torch.zeros(shape), torch.zeros([1] * (axes - 1), dtype=torch.int64)


class SigmoidFocalLoss(DenseLoss, function=losses.sigmoid_focal_loss):
    """`focal.torch.sigmoid_focal_loss` as a module; the mean by default, as in `torch.nn`.

    Args:
        alpha: Weight of positives, or one per class (a list, or a tensor, which becomes a
            buffer); None or -1 turns it off. Default 0.25.
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
        alpha: Alphas = 0.25,
        gamma: Number = 2.0,
        reduction: Reduction = "mean",
        label_smoothing: Number = 0.0,
    ) -> None:
        super().__init__(
            alpha=alpha, gamma=gamma, reduction=reduction, label_smoothing=label_smoothing
        )


class SparseSigmoidFocalLoss(LabelLoss, function=losses.sparse_sigmoid_focal_loss):
    """`focal.torch.sparse_sigmoid_focal_loss` as a module, for class labels.

    Args:
        alpha: Weight of positives, or one per class (a list, or a tensor, which becomes a
            buffer); None or -1 turns it off. Default 0.25.
        gamma: Focusing parameter >= 0. Default 2.
        reduction: "none", "mean", "sum" or "positives" (default): the paper's normalizer.
        label_smoothing: s in [0, 1]: the targets are `1 - s / 2` and `s / 2`. Default 0.
        axis: The class axis. Default -1; image logits (N, K, H, W) have it at 1.

    Shape:
        inputs (..., K) with K on `axis`, labels (...) integers in [-2, K); the result is a
        scalar, or the shape of inputs for "none".

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
        alpha: Alphas = 0.25,
        gamma: Number = 2.0,
        reduction: SparseReduction = "positives",
        label_smoothing: Number = 0.0,
        axis: int = -1,
    ) -> None:
        super().__init__(
            alpha=alpha,
            gamma=gamma,
            reduction=reduction,
            label_smoothing=label_smoothing,
            axis=axis,
        )

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits `inputs`, with the classes on `axis`, and `labels`."""
        return self._loss(inputs, labels, weight)


class SoftmaxFocalLoss(LabelLoss, function=softmax.softmax_focal_loss):
    """`focal.torch.softmax_focal_loss` as a module.

    Args:
        alpha: None (default), a number, or one per class.
        gamma: Focusing parameter >= 0. Default 2.
        reduction: "none", "mean" (default, over labels not ignored) or "sum".
        ignore_index: Label without loss; None: there is none. Default -100.
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
        alpha: Alphas = None,
        gamma: Number = 2.0,
        reduction: Reduction = "mean",
        ignore_index: int | None = -100,
        axis: int = -1,
        label_smoothing: Number = 0.0,
    ) -> None:
        super().__init__(
            alpha=alpha,
            gamma=gamma,
            reduction=reduction,
            ignore_index=ignore_index,
            axis=axis,
            label_smoothing=label_smoothing,
        )

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits `inputs`, with the classes on `axis`, and class indices `labels`."""
        return self._loss(inputs, labels, None)


class SigmoidFocalLossStar(DenseLoss, function=losses.sigmoid_focal_loss_star):
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
        alpha: Number | None = 0.25,
        gamma: Number = 2.0,
        beta: Number = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(alpha=alpha, gamma=gamma, beta=beta, reduction=reduction)


class BalancedCrossEntropyLoss(DenseLoss, function=losses.balanced_cross_entropy):
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

    def __init__(self, alpha: Number | None = 0.75, reduction: Reduction = "mean") -> None:
        super().__init__(alpha=alpha, reduction=reduction)


class GIoULoss(Loss, function=box_losses.giou_loss):
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
        super().__init__(reduction=reduction)

    def forward(self, boxes1: Tensor, boxes2: Tensor) -> Tensor:
        """The loss of paired boxes."""
        return self._loss(boxes1, boxes2, None)

    def _example(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 4), torch.zeros(1, 4)


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
    name = "init_prior_bias_"
    values = tile_bias(name, class_prior_bias(name, pi), bias.shape)
    with torch.no_grad():
        bias.copy_(torch.as_tensor(values, dtype=bias.dtype))
    return layer
