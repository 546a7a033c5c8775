"""The losses and the prior bias as Keras objects, for `compile`, `fit` and `.keras` files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike
from tensorflow import Tensor

from focal.core import checks, losses, softmax
from focal.core.prior import prior_bias
from focal.tensorflow._namespace import xp

__all__ = ["PriorBias", "SigmoidFocalLoss", "SoftmaxFocalLoss", "SparseSigmoidFocalLoss"]

REDUCTION = "sum_over_batch_size"


class _Loss(keras.losses.Loss):
    """What a subclass names in `_parameters` are its attributes and its configuration."""

    _parameters: tuple[str, ...] = ("alpha", "gamma")

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self._parameters}}


@keras.saving.register_keras_serializable(package="focal")
class SigmoidFocalLoss(_Loss):
    """`focal.tensorflow.sigmoid_focal_loss` as a Keras loss, from logits.

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
        >>> import tensorflow as tf
        >>> from focal.tensorflow import SigmoidFocalLoss
        >>> loss = SigmoidFocalLoss(gamma=1.5)
        >>> round(float(loss(tf.zeros((2, 3)), tf.zeros((2, 3)))), 4)
        0.1838

    Source: Lin et al. 2017, equation 5.
    """

    _parameters = ("alpha", "gamma", "label_smoothing")

    def __init__(
        self,
        alpha: float | Sequence[float] | None = 0.25,
        gamma: float = 2.0,
        reduction: str | None = REDUCTION,
        name: str | None = None,
        dtype: Any = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        own = type(self).__name__
        self.alpha = _alphas(alpha) if checks.is_sequence(alpha) else checks.check_alpha(own, alpha)
        self.gamma = checks.check_gamma(own, gamma)
        self.label_smoothing = checks.check_number(own, "label_smoothing", label_smoothing, 0, 1)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each sample."""
        if y_true.shape.rank == y_pred.shape.rank - 1 and y_pred.shape[-1] == 1:
            y_true = y_true[..., None]
        each = losses.sigmoid_focal_loss(
            xp,
            y_pred,
            y_true,
            self.alpha,
            self.gamma,
            label_smoothing=self.label_smoothing,
        )
        return tf.reduce_mean(each, axis=-1)


@keras.saving.register_keras_serializable(package="focal")
class SparseSigmoidFocalLoss(_Loss):
    """`focal.tensorflow.sparse_sigmoid_focal_loss` as a Keras loss, for class labels.

    The loss of a sample is the mean over the classes; samples labelled -2 are masked, so that a
    mean does not count them. For the paper's normaliser, the number of positives, call the
    function with `reduction="positives"` in a training step of your own.

    Args:
        alpha: Weight of positives, or a list of one per class; None or -1 turns it off.
            Default 0.25.
        gamma: Focusing parameter >= 0. Default 2.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in and, in Keras, of the labels too. Default: Keras's `floatx`,
            float32.

    Shape:
        y_pred (..., K); y_true (...) or (..., 1), whole numbers in [-2, K).

    Example:
        >>> import tensorflow as tf
        >>> from focal.tensorflow import SparseSigmoidFocalLoss
        >>> loss = SparseSigmoidFocalLoss()
        >>> round(float(loss(tf.constant([1, -1, -2]), tf.zeros((3, 2)))), 4)
        0.1083

    Source: Lin et al. 2017, equation 5 and section 4.1.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] | None = 0.25,
        gamma: float = 2.0,
        reduction: str | None = REDUCTION,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        own = type(self).__name__
        self.alpha = _alphas(alpha) if checks.is_sequence(alpha) else checks.check_alpha(own, alpha)
        self.gamma = checks.check_gamma(own, gamma)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each sample."""
        labels = _labels(y_true, y_pred.shape.rank - 1)
        each = losses.sparse_sigmoid_focal_loss(xp, y_pred, labels, self.alpha, self.gamma)
        return _masked(tf.reduce_mean(each, axis=-1), labels >= -1)


@keras.saving.register_keras_serializable(package="focal")
class SoftmaxFocalLoss(_Loss):
    """`focal.tensorflow.softmax_focal_loss` as a Keras loss, from logits and class labels.

    Labels equal to `ignore_index` are masked, so that a mean does not count them.

    Args:
        alpha: None (default), a number, or one per class.
        gamma: Focusing parameter >= 0. Default 2.
        ignore_index: Label without loss. Default -100.
        axis: The class axis. Default -1.
        reduction: A reduction of Keras. Default "sum_over_batch_size", the mean.
        name: Name of the loss.
        dtype: Type to compute in and, in Keras, of the labels too. Default: Keras's `floatx`,
            float32.
        label_smoothing: s in [0, 1], shared among the classes. Default 0.

    Shape:
        y_pred (..., K) with K on `axis`; y_true (...) or (..., 1), whole numbers.

    Example:
        >>> import tensorflow as tf
        >>> from focal.tensorflow import SoftmaxFocalLoss
        >>> loss = SoftmaxFocalLoss()
        >>> round(float(loss(tf.constant([0, 3]), tf.zeros((2, 4)))), 4)
        0.7798

    Source: Lin et al. 2017, equation 4.
    """

    _parameters = ("alpha", "gamma", "ignore_index", "axis", "label_smoothing")

    def __init__(
        self,
        alpha: float | Sequence[float] | None = None,
        gamma: float = 2.0,
        ignore_index: int = -100,
        axis: int = -1,
        reduction: str | None = REDUCTION,
        name: str | None = None,
        dtype: Any = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        own = type(self).__name__
        self.alpha = _alphas(alpha) if checks.is_sequence(alpha) else alpha
        self.gamma = checks.check_gamma(own, gamma)
        self.label_smoothing = checks.check_number(own, "label_smoothing", label_smoothing, 0, 1)
        self.ignore_index = ignore_index
        self.axis = axis

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each sample."""
        labels = _labels(y_true, y_pred.shape.rank - 1)
        each = softmax.softmax_focal_loss(
            xp,
            y_pred,
            labels,
            self.alpha,
            self.gamma,
            ignore_index=self.ignore_index,
            axis=self.axis,
            label_smoothing=self.label_smoothing,
        )
        return _masked(each, labels != self.ignore_index)


@keras.saving.register_keras_serializable(package="focal")
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
        >>> from focal.tensorflow import PriorBias
        >>> PriorBias(0.01)((2,)).numpy()
        array([-4.59512, -4.59512], dtype=float32)

    Source: Lin et al. 2017, section 4.1, "Initialization".
    """

    def __init__(self, pi: ArrayLike = 0.01) -> None:
        self._bias = np.atleast_1d(prior_bias(pi))
        if self._bias.ndim != 1:
            raise ValueError(
                f"PriorBias: pi must be a number or one per class; got shape {self._bias.shape}"
            )
        self.pi = np.asarray(pi, np.float64).tolist()

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Tensor:
        """The bias of a layer."""
        size = self._bias.size
        if len(shape) != 1 or shape[0] % size:
            raise ValueError(
                f"PriorBias: the bias must have one axis, of a multiple of {size} (the length of "
                f"pi); got shape {tuple(shape)}"
            )
        dtype = keras.config.floatx() if dtype is None else dtype
        return tf.cast(np.tile(self._bias, shape[0] // size), dtype)

    def get_config(self) -> dict[str, Any]:
        """The argument of the constructor."""
        return {"pi": self.pi}


def _alphas(alpha: Any) -> list[float]:
    """One per class, as a configuration can hold them."""
    return np.asarray(alpha, np.float64).tolist()


def _labels(y_true: Tensor, rank: int) -> Tensor:
    """Keras hands labels over as numbers of its `floatx`, and at times with an axis too many."""
    if y_true.shape.rank == rank + 1 and y_true.shape[-1] == 1:
        y_true = tf.squeeze(y_true, -1)
    return tf.cast(y_true, tf.int64)


def _masked(values: Tensor, valid: Tensor) -> Tensor:
    """Losses with Keras's mask, which it takes into account when it reduces them."""
    values._keras_mask = valid
    return values
