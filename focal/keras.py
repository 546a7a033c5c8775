"""The losses and the prior bias as Keras objects, for whichever framework Keras runs on.

TensorFlow, JAX and PyTorch train; on Keras's NumPy backend the losses can be evaluated. Each loss
calls the function of the same kind in `focal.tensorflow`, `focal.jax`, `focal.torch` or
`focal.numpy`, so that value and gradient are those of the framework's own functions. Models saved
on one backend load on the others.

The constructor of a loss raises TypeError for a parameter of the wrong type, and ValueError for a
number out of range or where Keras runs on a backend without an adapter.

    >>> import keras
    >>> from focal.keras import PriorBias, SigmoidFocalLoss
    >>> head = keras.layers.Dense(3, bias_initializer=PriorBias(0.01))
    >>> model = keras.Sequential([keras.layers.Input((8,)), head])
    >>> model.compile(optimizer="adam", loss=SigmoidFocalLoss(alpha=0.25, gamma=2.0))
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from focal.core import checks
from focal.core.prior import class_prior_bias, tile_bias
from focal.core.renamed import renamed

__all__ = [
    "AsymmetricLoss",
    "BalancedCrossEntropyLoss",
    "HeatmapFocalLoss",
    "PriorBias",
    "QualityFocalLoss",
    "SigmoidFocalLoss",
    "SigmoidFocalLossStar",
    "SoftmaxFocalLoss",
    "SparseSigmoidFocalLoss",
    "VarifocalLoss",
]

MEAN = "sum_over_batch_size"  # Keras's default
Tensor = Any  # of the framework that Keras runs on

_registered = keras.saving.register_keras_serializable(package="focal")


class _Loss(keras.losses.Loss):
    """A loss with targets like the logits, by the function `_function` of an adapter.

    The `_parameters` of a subclass are its attributes, its configuration, and the arguments of the
    function.
    """

    _function: str
    _parameters: tuple[str, ...]

    def __init__(self, reduction: str | None, name: str | None, dtype: Any) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        _adapter(type(self).__name__)  # an error where there is none

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each sample: the mean over the last axis."""
        if len(y_true.shape) == len(y_pred.shape) - 1 and y_pred.shape[-1] == 1:
            y_true = ops.expand_dims(y_true, -1)
        return ops.mean(self._losses(y_true, y_pred), axis=-1)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        own = {name: getattr(self, name) for name in self._parameters}
        return {**super().get_config(), "dtype": self.dtype, **own}

    def _losses(self, targets: Tensor, logits: Tensor) -> Tensor:
        function = getattr(_adapter(type(self).__name__), self._function)
        return function(logits, targets, **{p: getattr(self, p) for p in self._parameters})


class _LabelLoss(_Loss):
    """A loss with class labels, some of which may be ignored: a mean does not count them."""

    axis: int

    def __init__(self, reduction: str | None, name: str | None, dtype: Any) -> None:
        # Keras casts labels to this type, too, and half types cannot represent every label.
        dtype = keras.dtype_policies.get(dtype or keras.config.floatx()).compute_dtype
        super().__init__(reduction, name, "float32" if dtype.endswith("float16") else dtype)
        self._sum = _Sum(reduction="sum", dtype=self.dtype)

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The reduced loss. Keras's mean is over all samples, ours over those not ignored."""
        loss = super().__call__(y_true, y_pred, sample_weight)
        if self.reduction in ("sum", "none", None):
            return loss
        counts = self._counted(y_true, y_pred)
        weight = sample_weight if self.reduction == "mean_with_sample_weight" else None
        total = self._sum(ops.ones_like(counts), y_pred, weight)
        used = self._sum(counts, y_pred, weight)
        return loss * (total / ops.where(used == 0, 1, used))

    def _labels(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Labels come as floating-point numbers, and may have a class axis of length 1."""
        if len(y_true.shape) == len(y_pred.shape) and y_true.shape[self.axis] == 1:
            y_true = ops.squeeze(y_true, self.axis)
        return ops.cast(y_true, "int32")

    def _counted(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Which samples are not ignored."""
        raise NotImplementedError


class _Sum(keras.losses.Loss):
    """The sum of `y_true` over the samples that Keras's mask of `y_pred` leaves."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return y_true


@_registered
class SigmoidFocalLoss(_Loss):
    """`sigmoid_focal_loss` as a Keras loss, from logits.

    The loss of a sample is the mean over the last axis, as in
    `keras.losses.BinaryFocalCrossentropy`.

    Args:
        alpha: Weight of positives, or a list of one per class; None or -1 turns it off.
            Default 0.25.
        gamma: Focusing parameter >= 0. Default 2.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32.
        label_smoothing: s in [0, 1]: targets become `y (1 - s) + s / 2`. Default 0.

    Shape:
        y_true and y_pred: the same; y_true may lack a last axis of length 1.

    Example:
        >>> import numpy as np
        >>> from focal.keras import SigmoidFocalLoss
        >>> loss = SigmoidFocalLoss(gamma=1.5)
        >>> round(float(loss(np.zeros((2, 3)), np.zeros((2, 3)))), 4)
        0.1838

    Source: Lin et al. 2017, equation 5.
    """

    _function = "sigmoid_focal_loss"
    _parameters = ("alpha", "gamma", "label_smoothing")

    def __init__(
        self,
        alpha: float | Sequence[float] | None = 0.25,
        gamma: float = 2.0,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(reduction, name, dtype)
        own = type(self).__name__
        self.alpha = _alpha(own, alpha)
        self.gamma = checks.check_gamma(own, gamma)
        self.label_smoothing = checks.check_number(own, "label_smoothing", label_smoothing, 0, 1)


@_registered
class SparseSigmoidFocalLoss(_LabelLoss):
    """`sparse_sigmoid_focal_loss` as a Keras loss, for class labels.

    The loss of a sample is the mean over the classes; a mean over samples does not count those
    labeled -2. For the paper's normalizer, the number of positives, call the function with
    `reduction="positives"` in a training step of your own.

    Args:
        alpha: Weight of positives, or a list of one per class; None or -1 turns it off.
            Default 0.25.
        gamma: Focusing parameter >= 0. Default 2.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32. Half types become float32:
            Keras casts the labels, too, and a half type cannot represent them all.
        label_smoothing: s in [0, 1]: the targets are `1 - s / 2` and `s / 2`. Default 0.
        axis: The class axis. Default -1.

    Shape:
        y_pred with K classes on `axis`; y_true the same without `axis` or with 1 there, whole
        numbers in [-2, K). K and above is an error in eager code on a CPU, and ignored in
        compiled code and on a GPU.

    Example:
        >>> import numpy as np
        >>> from focal.keras import SparseSigmoidFocalLoss
        >>> loss = SparseSigmoidFocalLoss()
        >>> round(float(loss(np.array([1, -1, -2]), np.zeros((3, 2)))), 4)
        0.1083

    Source: Lin et al. 2017, equation 5 and section 4.1.
    """

    _function = "sparse_sigmoid_focal_loss"
    _parameters = ("alpha", "gamma", "label_smoothing", "axis")

    def __init__(
        self,
        alpha: float | Sequence[float] | None = 0.25,
        gamma: float = 2.0,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
        label_smoothing: float = 0.0,
        axis: int = -1,
    ) -> None:
        super().__init__(reduction, name, dtype)
        own = type(self).__name__
        self.alpha = _alpha(own, alpha)
        self.gamma = checks.check_gamma(own, gamma)
        self.label_smoothing = checks.check_number(own, "label_smoothing", label_smoothing, 0, 1)
        self.axis = checks.check_integer(own, "axis", axis, -(2**31))

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each sample."""
        return ops.mean(self._losses(self._labels(y_true, y_pred), y_pred), axis=self.axis)

    def _counted(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        labels = self._labels(y_true, y_pred)
        return (labels >= -1) & (labels < ops.shape(y_pred)[self.axis])


@_registered
class SoftmaxFocalLoss(_LabelLoss):
    """`softmax_focal_loss` as a Keras loss, from logits and class labels.

    A mean does not count the labels equal to `ignore_index`.

    Args:
        alpha: None (default) or -1 (off), a number >= 0, or a list of one per class.
        gamma: Focusing parameter >= 0. Default 2.
        ignore_index: Label without loss. Default -100.
        axis: The class axis. Default -1.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32. Half types become float32:
            Keras casts the labels, too, and a half type cannot represent them all.
        label_smoothing: s in [0, 1], shared among the classes. Default 0.

    Shape:
        y_pred with K classes on `axis`; y_true the same without `axis` or with 1 there, whole
        numbers in [0, K) or `ignore_index`. Others are an error in eager code on a CPU, and
        ignored in compiled code and on a GPU.

    Example:
        >>> import numpy as np
        >>> from focal.keras import SoftmaxFocalLoss
        >>> loss = SoftmaxFocalLoss()
        >>> round(float(loss(np.array([0, 3]), np.zeros((2, 4)))), 4)
        0.7798

    Source: Lin et al. 2017, equation 4.
    """

    _function = "softmax_focal_loss"
    _parameters = ("alpha", "gamma", "ignore_index", "axis", "label_smoothing")

    def __init__(
        self,
        alpha: float | Sequence[float] | None = None,
        gamma: float = 2.0,
        ignore_index: int = -100,
        axis: int = -1,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(reduction, name, dtype)
        own = type(self).__name__
        self.alpha: float | list[float] | None = None
        if checks.is_sequence(alpha):
            self.alpha = _per_class(own, alpha)
        elif alpha is not None and alpha != -1:
            self.alpha = checks.check_number(own, "alpha", alpha, low=0)
        self.gamma = checks.check_gamma(own, gamma)
        self.ignore_index = checks.check_integer(own, "ignore_index", ignore_index, -(2**31))
        self.axis = checks.check_integer(own, "axis", axis, -(2**31))
        self.label_smoothing = checks.check_number(own, "label_smoothing", label_smoothing, 0, 1)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each sample."""
        return self._losses(self._labels(y_true, y_pred), y_pred)

    def _counted(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        labels = self._labels(y_true, y_pred)
        inside = (labels >= 0) & (labels < ops.shape(y_pred)[self.axis])
        return inside & (labels != self.ignore_index)


@_registered
class SigmoidFocalLossStar(_Loss):
    """`sigmoid_focal_loss_star`, the alternate form of focal loss, as a Keras loss.

    Args:
        alpha: Weight of positives; None or -1 turns it off. Default 0.25.
        gamma: Slope of the margin, > 0. Default 2.
        beta: Shift of the margin. Default 1.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32.

    Shape:
        y_true and y_pred: the same; y_true may lack a last axis of length 1.

    Example:
        >>> import numpy as np
        >>> from focal.keras import SigmoidFocalLossStar
        >>> round(float(SigmoidFocalLossStar(alpha=None)(np.ones((1, 2)), np.zeros((1, 2)))), 4)
        0.1566

    Source: Lin et al. 2017, appendix A.
    """

    _function = "sigmoid_focal_loss_star"
    _parameters = ("alpha", "gamma", "beta")

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        beta: float = 1.0,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        own = type(self).__name__
        self.alpha = checks.check_alpha(own, alpha)
        self.gamma = checks.check_slope(own, "gamma", gamma)
        self.beta = checks.check_number(own, "beta", beta)


@_registered
class BalancedCrossEntropyLoss(_Loss):
    """`balanced_cross_entropy` as a Keras loss: focal loss at gamma 0.

    Args:
        alpha: Weight of positives; None or -1 turns it off. Default 0.75.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32.

    Shape:
        y_true and y_pred: the same; y_true may lack a last axis of length 1.

    Example:
        >>> import numpy as np
        >>> from focal.keras import BalancedCrossEntropyLoss
        >>> round(float(BalancedCrossEntropyLoss()(np.ones((1, 2)), np.zeros((1, 2)))), 4)
        0.5199

    Source: Lin et al. 2017, equation 3.
    """

    _function = "balanced_cross_entropy"
    _parameters = ("alpha",)

    def __init__(
        self,
        alpha: float | None = 0.75,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        self.alpha = checks.check_alpha(type(self).__name__, alpha)


@_registered
class QualityFocalLoss(_Loss):
    """`quality_focal_loss` as a Keras loss: targets are qualities, such as an IoU.

    Args:
        beta: Exponent >= 0. Default 2.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32.

    Shape:
        y_true and y_pred: the same; y_true may lack a last axis of length 1.

    Example:
        >>> import numpy as np
        >>> from focal.keras import QualityFocalLoss
        >>> round(float(QualityFocalLoss()(np.array([[0.5, 1.0]]), np.zeros((1, 2)))), 4)
        0.0866

    Source: Li et al. 2020, equation 2.
    """

    _function = "quality_focal_loss"
    _parameters = ("beta",)

    def __init__(
        self,
        beta: float = 2.0,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        self.beta = checks.check_number(type(self).__name__, "beta", beta, low=0)


@_registered
class VarifocalLoss(_Loss):
    """`varifocal_loss` as a Keras loss: positives weighted by their quality.

    Args:
        alpha: Factor of the negatives, >= 0. Default 0.75.
        gamma: Focusing parameter of the negatives, >= 0. Default 2.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32.

    Shape:
        y_true and y_pred: the same; y_true may lack a last axis of length 1.

    Example:
        >>> import numpy as np
        >>> from focal.keras import VarifocalLoss
        >>> round(float(VarifocalLoss()(np.array([[0.5, 1.0]]), np.zeros((1, 2)))), 4)
        0.5199

    Source: Zhang et al. 2021, equation 2.
    """

    _function = "varifocal_loss"
    _parameters = ("alpha", "gamma")

    def __init__(
        self,
        alpha: float = 0.75,
        gamma: float = 2.0,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        own = type(self).__name__
        self.alpha = checks.check_number(own, "alpha", alpha, low=0)
        self.gamma = checks.check_gamma(own, gamma)


@_registered
class HeatmapFocalLoss(_Loss):
    """`heatmap_focal_loss` as a Keras loss, for keypoint heatmaps.

    For the papers' normalizer, the number of keypoints, call the function with
    `reduction="positives"` in a training step of your own.

    Args:
        gamma: Focusing parameter >= 0. Default 2.
        beta: Exponent of the penalty's reduction, >= 0. Default 4.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32.

    Shape:
        y_true and y_pred: the same; y_true may lack a last axis of length 1.

    Example:
        >>> import numpy as np
        >>> from focal.keras import HeatmapFocalLoss
        >>> round(float(HeatmapFocalLoss()(np.array([[0.5, 1.0]]), np.zeros((1, 2)))), 4)
        0.0921

    Source: Law and Deng 2018, equation 1.
    """

    _function = "heatmap_focal_loss"
    _parameters = ("gamma", "beta")

    def __init__(
        self,
        gamma: float = 2.0,
        beta: float = 4.0,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        own = type(self).__name__
        self.gamma = checks.check_gamma(own, gamma)
        self.beta = checks.check_number(own, "beta", beta, low=0)


@_registered
@keras.saving.register_keras_serializable("focal", "AsymmetricFocalLoss")  # in older files
class AsymmetricLoss(_Loss):
    """`asymmetric_loss` as a Keras loss, for many labels an image.

    Args:
        gamma_positive: Focusing parameter of the positives, >= 0. Default 1.
        gamma_negative: Focusing parameter of the negatives, >= 0. Default 4.
        margin: The score that a negative may have without loss, in [0, 1). Default 0.05.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in. Default: Keras's `floatx`, float32.

    Shape:
        y_true and y_pred: the same; y_true may lack a last axis of length 1.

    Example:
        >>> import numpy as np
        >>> from focal.keras import AsymmetricLoss
        >>> round(float(AsymmetricLoss()(np.array([[0.0, 1.0]]), np.zeros((1, 2)))), 4)
        0.1855

    Source: Ridnik et al. 2021.
    """

    _function = "asymmetric_loss"
    _parameters = ("gamma_positive", "gamma_negative", "margin")

    def __init__(
        self,
        gamma_positive: float = 1.0,
        gamma_negative: float = 4.0,
        margin: float = 0.05,
        reduction: str | None = MEAN,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        own = type(self).__name__
        self.gamma_positive = checks.check_number(own, "gamma_positive", gamma_positive, low=0)
        self.gamma_negative = checks.check_number(own, "gamma_negative", gamma_negative, low=0)
        self.margin = checks.check_margin(own, "margin", margin)


@_registered
class PriorBias(keras.initializers.Initializer):
    r"""The prior bias as a Keras initializer: `Dense(80, bias_initializer=PriorBias(0.01))`.

    .. math:: b = -\log\frac{1 - \pi}{\pi}

    Args:
        pi: The first score of every output, in (0, 1); or one per class, repeated to the
            length of the bias (one round of classes for each anchor). Default 0.01.

    Raises:
        TypeError: `pi` is not numeric.
        ValueError: a value of `pi` is not inside (0, 1) or `pi` has more than one axis; later,
            if the bias is not a whole number of rounds of `pi`.

    Example:
        >>> import numpy as np
        >>> from focal.keras import PriorBias
        >>> [round(float(b), 5) for b in PriorBias(0.01)((2,))]
        [-4.59512, -4.59512]

    Source: Lin et al. 2017, section 4.1, "Initialization".
    """

    def __init__(self, pi: ArrayLike = 0.01) -> None:
        self._bias = class_prior_bias("PriorBias", pi)
        self.pi = np.asarray(pi, np.float64).tolist()

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Tensor:
        """The bias of a layer."""
        bias = tile_bias("PriorBias", self._bias, shape)
        return ops.convert_to_tensor(bias, dtype or keras.config.floatx())

    def get_config(self) -> dict[str, Any]:
        """The argument of the constructor."""
        return {"pi": self.pi}


def _adapter(name: str) -> ModuleType:
    """The losses of the framework that Keras runs on; `name` is for the message."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import focal.tensorflow._losses

        return focal.tensorflow._losses
    if backend == "jax":
        import focal.jax

        return focal.jax
    if backend == "torch":
        import focal.torch

        return focal.torch
    if backend == "numpy":
        import focal.numpy

        return focal.numpy
    raise ValueError(
        f"{name}: Keras must run on tensorflow, jax, torch or numpy (KERAS_BACKEND); it runs on "
        f"{backend}. To predict alone, load a model with compile=False."
    )


def _alpha(name: str, alpha: Any) -> float | list[float] | None:
    """The weight of positives; one per class as a list, which a configuration can hold."""
    if checks.is_sequence(alpha):
        return _per_class(name, alpha, high=1)
    return checks.check_alpha(name, alpha)


def _per_class(name: str, alpha: Any, high: float = checks.INFINITY) -> list[float]:
    """One number in [0, high] per class, as a list."""
    numbers = alpha if isinstance(alpha, (list, tuple)) else np.asarray(alpha).tolist()
    return [checks.check_number(name, "alpha", a, 0, high) for a in numbers]


if not TYPE_CHECKING:  # a type checker knows the new names alone
    __getattr__ = renamed(__name__, {"AsymmetricFocalLoss": "AsymmetricLoss"})
