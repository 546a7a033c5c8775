"""focal on TensorFlow, with Keras losses.

Differentiable twice, in eager mode, in a `tf.function` with or without `jit_compile=True`, with
batch sizes that are not known while tracing. float16 and bfloat16 logits are computed in float32.
As in TensorFlow, whatever converts to a tensor is taken: variables, NumPy arrays, lists.

`xp`: the array operations the core is written in, for functions of your own over all frameworks.

    >>> import tensorflow as tf
    >>> from focal.tensorflow import sigmoid_focal_loss
    >>> logits = tf.Variable([-100.0, 0.0, 100.0])
    >>> with tf.GradientTape() as tape:
    ...     loss = sigmoid_focal_loss(logits, tf.ones(3), alpha=None, gamma=0.5, reduction="sum")
    >>> loss.numpy().item(), tape.gradient(loss, logits).numpy().tolist()
    (100.49012756347656, [-1.0, -0.4760856628417969, 0.0])
"""

from typing import TYPE_CHECKING

from focal.core import anchors as _anchors
from focal.core import box_losses, boxes, targets
from focal.core import nms as _nms
from focal.core.anchors import AnchorConfig
from focal.core.prior import expected_initial_loss, inverse_frequency_alpha, prior_bias
from focal.core.renamed import renamed
from focal.keras import PriorBias, SigmoidFocalLoss, SoftmaxFocalLoss, SparseSigmoidFocalLoss
from focal.tensorflow._bind import bind
from focal.tensorflow._losses import (
    asymmetric_loss,
    balanced_cross_entropy,
    heatmap_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
    softmax_focal_loss,
    sparse_sigmoid_focal_loss,
    varifocal_loss,
)
from focal.tensorflow._namespace import xp as xp
from focal.tensorflow.replicas import num_positives

smooth_l1_loss = bind(box_losses.smooth_l1_loss, xp, __name__)
giou_loss = bind(box_losses.giou_loss, xp, __name__)

box_area = bind(boxes.box_area, xp, __name__)
box_iou = bind(boxes.box_iou, xp, __name__)
generalized_box_iou = bind(boxes.generalized_box_iou, xp, __name__)
encode_boxes = bind(boxes.encode_boxes, xp, __name__)
decode_boxes = bind(boxes.decode_boxes, xp, __name__)
clip_boxes = bind(boxes.clip_boxes, xp, __name__)
nms = bind(_nms.nms, xp, __name__)
batched_nms = bind(_nms.batched_nms, xp, __name__)
anchors = bind(_anchors.anchors, xp, __name__)
match_anchors = bind(targets.match_anchors, xp, __name__)
assign_targets = bind(targets.assign_targets, xp, __name__)
subsample = bind(targets.subsample, xp, __name__)
hard_example_mask = bind(targets.hard_example_mask, xp, __name__)

__all__ = [
    "AnchorConfig",
    "PriorBias",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "SparseSigmoidFocalLoss",
    "anchors",
    "assign_targets",
    "asymmetric_loss",
    "balanced_cross_entropy",
    "batched_nms",
    "box_area",
    "box_iou",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "expected_initial_loss",
    "generalized_box_iou",
    "giou_loss",
    "hard_example_mask",
    "heatmap_focal_loss",
    "inverse_frequency_alpha",
    "match_anchors",
    "nms",
    "num_positives",
    "prior_bias",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "smooth_l1_loss",
    "softmax_focal_loss",
    "sparse_sigmoid_focal_loss",
    "subsample",
    "varifocal_loss",
]

if not TYPE_CHECKING:  # a type checker knows the new names alone
    __getattr__ = renamed(__name__, {"asymmetric_focal_loss": "asymmetric_loss"})
