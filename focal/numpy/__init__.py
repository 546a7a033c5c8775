"""focal on NumPy: the reference.

The core itself, run on NumPy arrays (or anything `numpy.asarray` takes). NumPy has no autodiff,
so the closed-form derivatives are here too.

`xp`: the array operations the core is written in, for functions of your own over all frameworks.

    >>> import numpy as np
    >>> from focal.numpy import sigmoid_focal_loss
    >>> sigmoid_focal_loss(np.array([0.0, 3.0]), np.array([1.0, 1.0])).round(4)
    array([0.0433, 0.    ])
"""

from typing import TYPE_CHECKING

from focal.core import anchors as _anchors
from focal.core import box_losses, boxes, derivatives, losses, softmax, targets, variants
from focal.core import nms as _nms
from focal.core.anchors import AnchorConfig
from focal.core.bind import bind
from focal.core.prior import expected_initial_loss, inverse_frequency_alpha, prior_bias
from focal.core.renamed import renamed
from focal.numpy._namespace import xp as xp

sigmoid_focal_loss = bind(losses.sigmoid_focal_loss, xp, __name__)
sparse_sigmoid_focal_loss = bind(losses.sparse_sigmoid_focal_loss, xp, __name__)
softmax_focal_loss = bind(softmax.softmax_focal_loss, xp, __name__)
sigmoid_focal_loss_star = bind(losses.sigmoid_focal_loss_star, xp, __name__)
balanced_cross_entropy = bind(losses.balanced_cross_entropy, xp, __name__)
quality_focal_loss = bind(variants.quality_focal_loss, xp, __name__)
varifocal_loss = bind(variants.varifocal_loss, xp, __name__)
heatmap_focal_loss = bind(variants.heatmap_focal_loss, xp, __name__)
asymmetric_loss = bind(variants.asymmetric_loss, xp, __name__)
num_positives = bind(losses.num_positives, xp, __name__)
smooth_l1_loss = bind(box_losses.smooth_l1_loss, xp, __name__)
giou_loss = bind(box_losses.giou_loss, xp, __name__)

sigmoid_focal_loss_grad = bind(derivatives.sigmoid_focal_loss_grad, xp, __name__)
sigmoid_focal_loss_hess = bind(derivatives.sigmoid_focal_loss_hess, xp, __name__)
sigmoid_focal_loss_star_grad = bind(derivatives.sigmoid_focal_loss_star_grad, xp, __name__)
softmax_focal_loss_grad = bind(softmax.softmax_focal_loss_grad, xp, __name__)

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
    "sigmoid_focal_loss_grad",
    "sigmoid_focal_loss_hess",
    "sigmoid_focal_loss_star",
    "sigmoid_focal_loss_star_grad",
    "smooth_l1_loss",
    "softmax_focal_loss",
    "softmax_focal_loss_grad",
    "sparse_sigmoid_focal_loss",
    "subsample",
    "varifocal_loss",
]

if not TYPE_CHECKING:  # a type checker knows the new names alone
    __getattr__ = renamed(__name__, {"asymmetric_focal_loss": "asymmetric_loss"})
