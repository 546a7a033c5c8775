"""The losses on TensorFlow: in a file of their own, because the Keras losses need them.

`focal.keras` imports this file, and `focal.tensorflow` imports both.
"""

from focal.core import losses, softmax, variants
from focal.tensorflow._bind import bind
from focal.tensorflow._namespace import xp

PUBLIC = "focal.tensorflow"

sigmoid_focal_loss = bind(losses.sigmoid_focal_loss, xp, PUBLIC)
sparse_sigmoid_focal_loss = bind(losses.sparse_sigmoid_focal_loss, xp, PUBLIC)
softmax_focal_loss = bind(softmax.softmax_focal_loss, xp, PUBLIC)
sigmoid_focal_loss_star = bind(losses.sigmoid_focal_loss_star, xp, PUBLIC)
balanced_cross_entropy = bind(losses.balanced_cross_entropy, xp, PUBLIC)
quality_focal_loss = bind(variants.quality_focal_loss, xp, PUBLIC)
varifocal_loss = bind(variants.varifocal_loss, xp, PUBLIC)
heatmap_focal_loss = bind(variants.heatmap_focal_loss, xp, PUBLIC)
asymmetric_loss = bind(variants.asymmetric_loss, xp, PUBLIC)
