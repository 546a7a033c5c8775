"""RetinaNet in Keras on TensorFlow: a residual network, a feature pyramid and two subnets.

Attributes have torchvision's names, so that the path to a variable is its name in the weights
file that serves all frameworks. Images and feature maps are channels-last: in shapes, N is
images, A anchors in a cell and K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from focal.retinanet.architecture import NORM_EPS, Backbone, backbone, frozen_parts, norm_groups
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.weights import check_names
from focal.tensorflow import PriorBias

__all__ = [
    "BatchNorm",
    "RetinaNet",
    "arrays",
    "assign",
    "build_network",
    "freeze",
    "load_state",
    "named_layers",
    "named_variables",
    "recompute",
    "state",
]

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "the TensorFlow detector needs Keras on TensorFlow; set KERAS_BACKEND=tensorflow before "
        f"Keras is imported (it runs on {keras.backend.backend()})"
    )

MOMENTUM = 0.1
"""Share of a batch in the running statistics, as in PyTorch."""


class Conv(keras.layers.Conv2D):
    """A convolution that keeps the size, divided by its stride."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, **options: Any
    ) -> None:
        # Keras would pad an even side at stride 2 on the right alone.
        self.margin = kernel // 2 if stride > 1 else 0
        super().__init__(
            outputs,
            kernel,
            stride,
            padding="valid" if stride > 1 else "same",
            data_format="channels_last",
            dtype="float32",
            **options,
        )
        self.build((None, None, None, inputs))

    def call(self, x: Tensor) -> Tensor:
        """(N, H, W, inputs) to (N, H / stride, W / stride, outputs)."""
        return super().call(_pad(x, self.margin))


def _pad(x: Tensor, margin: int, value: float = 0.0) -> Tensor:
    """A margin on all four sides."""
    sides = (margin, margin)
    return ops.pad(x, ((0, 0), sides, sides, (0, 0)), constant_values=value) if margin else x


class BatchNorm(keras.layers.Layer):
    """Batch normalization as one fused kernel each way, in less than half of the time of Keras's.

    Frozen, or while it is not `trainable`, it is a fixed scale and shift.
    """

    def __init__(self, channels: int, frozen: bool = False) -> None:
        super().__init__(dtype="float32")
        self.frozen = frozen
        weight = partial(self.add_weight, shape=(channels,), autocast=False)
        self.gamma = weight(name="gamma", initializer="ones", trainable=not frozen)
        self.beta = weight(name="beta", initializer="zeros", trainable=not frozen)
        self.moving_mean = weight(name="moving_mean", initializer="zeros", trainable=False)
        self.moving_variance = weight(name="moving_variance", initializer="ones", trainable=False)
        self.keep: Callable[[BatchNorm, tuple[Tensor, Tensor]], None] | None = None

    @property
    def learns(self) -> bool:
        """Whether training changes its weights and statistics."""
        return not self.frozen and self.trainable

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        """Normalize x, of shape (N, H, W, channels)."""
        if not self.learns:
            # As one scale and shift, the backward pass needs no feature map: the fused kernel does.
            scale = self.gamma * ops.rsqrt(self.moving_variance + NORM_EPS)
            shift = self.beta - self.moving_mean * scale
            return ops.cast(ops.cast(x, "float32") * scale + shift, x.dtype)
        # In the backward pass Keras no longer says that this is training.
        training = training or self.keep is not None
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=self.gamma.value,
            offset=self.beta.value,
            mean=self.moving_mean.value,
            variance=self.moving_variance.value,
            epsilon=NORM_EPS,
            exponential_avg_factor=MOMENTUM,
            is_training=training,
        )
        if self.keep is not None:
            self.keep(self, (mean, variance))
        elif training:
            self.update(mean, variance)
        return y

    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Set the running statistics."""
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)


def _group_norm(channels: int) -> keras.layers.GroupNormalization:
    norm = keras.layers.GroupNormalization(norm_groups(channels), epsilon=NORM_EPS, dtype="float32")
    norm.build((None, None, None, channels))
    return norm


_Conv = Callable[..., Conv]
_Norm = Callable[[int], keras.layers.Layer]
_NORMS: Mapping[str, _Norm] = {
    "batch": BatchNorm,
    "frozen_batch": partial(BatchNorm, frozen=True),
    "group": _group_norm,
}


def _chain(layers: Sequence[keras.layers.Layer], x: Tensor) -> Tensor:
    """Apply the layers in turn."""
    return reduce(lambda x, layer: layer(x), layers, x)


def _recomputed(
    compute: Callable[[Tensor], Tensor], norms: Sequence[BatchNorm] = ()
) -> Callable[[Tensor], Tensor]:
    """The function with activation checkpointing.

    TensorFlow calls it once more for the backward pass, and the batch must not count twice in the
    running statistics: they are results of the function, and are set outside of it.
    """

    def pure(x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        statistics: dict[BatchNorm, tuple[Tensor, Tensor]] = {}
        for norm in norms:
            norm.keep = statistics.__setitem__
        try:
            return compute(x), [statistics[norm] for norm in norms]
        finally:
            for norm in norms:
                norm.keep = None

    def forward(x: Tensor) -> Tensor:
        y, statistics = tf.recompute_grad(pure)(x)
        for norm, (mean, variance) in zip(norms, statistics, strict=True):
            norm.update(mean, variance)
        return y

    return forward


class Block(keras.layers.Layer):
    """A residual block."""

    recompute = False

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        """What `compute` gives."""
        if not (self.recompute and training):
            return self.compute(x)
        layers = (layer for _, layer in named_layers(self))
        norms = [x for x in layers if isinstance(x, BatchNorm) and x.learns]
        return _recomputed(self.compute, norms)(x)

    def compute(self, x: Tensor) -> Tensor:
        """The forward pass."""
        raise NotImplementedError


class BasicBlock(Block):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions."""

    def __init__(
        self, inputs: int, width: int, stride: int, net: Backbone, conv: _Conv, norm: _Norm
    ) -> None:
        super().__init__(dtype="float32")
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = norm(width)
        self.downsample = _shortcut(inputs, width, stride, conv, norm)

    def compute(self, x: Tensor) -> Tensor:
        """(N, H, W, inputs) to (N, H / stride, W / stride, width)."""
        y = ops.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return ops.relu(y + _chain(self.downsample, x))


class Bottleneck(Block):
    """The residual block of the deeper networks: 1x1, 3x3 and 1x1 convolutions."""

    def __init__(
        self, inputs: int, width: int, stride: int, net: Backbone, conv: _Conv, norm: _Norm
    ) -> None:
        super().__init__(dtype="float32")
        inner, outputs = net.inner(width), 4 * width
        self.conv1 = conv(inputs, inner, 1)
        self.bn1 = norm(inner)
        # The stride is here, not on the first convolution: ResNet "v1.5".
        self.conv2 = conv(inner, inner, 3, stride, groups=net.groups)
        self.bn2 = norm(inner)
        self.conv3 = conv(inner, outputs, 1)
        self.bn3 = norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, conv, norm)

    def compute(self, x: Tensor) -> Tensor:
        """(N, H, W, inputs) to (N, H / stride, W / stride, 4 * width)."""
        y = ops.relu(self.bn1(self.conv1(x)))
        y = ops.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return ops.relu(y + _chain(self.downsample, x))


def _shortcut(
    inputs: int, outputs: int, stride: int, conv: _Conv, norm: _Norm
) -> list[keras.layers.Layer]:
    if inputs == outputs and stride == 1:
        return []
    return [conv(inputs, outputs, 1, stride), norm(outputs)]


class ResNet(keras.layers.Layer):
    """The backbone, without its classifier."""

    def __init__(self, net: Backbone, norm: _Norm, seeds: keras.random.SeedGenerator) -> None:
        super().__init__(dtype="float32")
        kaiming = keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal", seeds)
        conv = partial(Conv, use_bias=False, kernel_initializer=kaiming)
        self.conv1 = conv(3, net.stem_channels, net.stem_kernel, 2)
        self.bn1 = norm(net.stem_channels)
        self.stem_pool = net.stem_pool

        block = BasicBlock if net.block == "basic" else Bottleneck
        inputs = (net.stem_channels, *net.channels)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            [
                block(inputs[i], net.widths[i], net.strides[i], net, conv, norm),
                *(block(inputs[i + 1], net.widths[i], 1, net, conv, norm) for _ in range(1, depth)),
            ]
            for i, depth in enumerate(net.depths)
        )

    def call(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, H, W, 3) to C3, C4 and C5, at strides 8, 16 and 32."""
        x = ops.relu(self.bn1(self.conv1(images)))
        if self.stem_pool:
            x = ops.max_pool(_pad(x, 1, -np.inf), 3, 2, data_format="channels_last")
        c2 = _chain(self.layer1, x)
        c3 = _chain(self.layer2, c2)
        c4 = _chain(self.layer3, c3)
        return c3, c4, _chain(self.layer4, c4)


class FeaturePyramid(keras.layers.Layer):
    """The feature pyramid: C3 to C5 in, the levels of the config out."""

    def __init__(
        self, config: RetinaNetConfig, inputs: Sequence[int], seeds: keras.random.SeedGenerator
    ) -> None:
        super().__init__(dtype="float32")
        # As in Detectron: keeps the variance of the features, unlike the Gaussian of the subnets.
        uniform = keras.initializers.VarianceScaling(1.0, "fan_in", "uniform", seeds)
        conv = partial(Conv, kernel_initializer=uniform)
        c = config.channels
        self.p6_from = config.p6_from
        self.inner_blocks = [[conv(n, c, 1)] for n in inputs]
        self.layer_blocks = [[conv(c, c, 3)] for _ in inputs]
        self.extra_blocks = {}
        if 6 in config.levels:
            p6_inputs = inputs[-1] if config.p6_from == "c5" else c
            self.extra_blocks["p6"] = conv(p6_inputs, c, 3, 2)
        if 7 in config.levels:
            self.extra_blocks["p7"] = conv(c, c, 3, 2)

    def call(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C3 to C5 to P3, P4, ..., each (N, H, W, channels)."""
        inner = [_chain(block, c) for block, c in zip(self.inner_blocks, features, strict=True)]
        for i in (1, 0):
            inner[i] = inner[i] + _upsample(inner[i + 1], like=inner[i])
        levels = [_chain(block, x) for block, x in zip(self.layer_blocks, inner, strict=True)]
        if "p6" in self.extra_blocks:
            source = features[-1] if self.p6_from == "c5" else levels[-1]
            levels.append(self.extra_blocks["p6"](source))
        if "p7" in self.extra_blocks:
            levels.append(self.extra_blocks["p7"](ops.relu(levels[-1])))
        return levels


def _upsample(x: Tensor, like: Tensor) -> Tensor:
    """The nearest of a coarser map, which has half of the rows and columns, rounded up."""
    _, height, width, _ = ops.shape(like)
    return ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]


def _tower(config: RetinaNetConfig, conv: _Conv) -> list[list[keras.layers.Layer]]:
    """The hidden layers of a subnet, each to be followed by a ReLU."""
    c, normed = config.channels, config.head_norm == "group"
    return [
        [conv(c, c, 3, use_bias=not normed), *([_group_norm(c)] if normed else [])]
        for _ in range(config.head_depth)
    ]


def _hidden(
    tower: Sequence[Sequence[keras.layers.Layer]], recompute: bool
) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        for layers in tower:
            x = ops.relu(_chain(layers, x))
        return x

    return _recomputed(compute) if recompute else compute


def _per_anchor(x: Tensor, values: int) -> Tensor:
    """(N, H, W, A * values) to (N, H * W * A, values)."""
    return ops.reshape(x, (ops.shape(x)[0], -1, values))


class ClassificationHead(keras.layers.Layer):
    """The class subnet, with the same weights at every level."""

    recompute = False

    def __init__(self, config: RetinaNetConfig, seeds: keras.random.SeedGenerator) -> None:
        super().__init__(dtype="float32")
        conv = partial(Conv, kernel_initializer=keras.initializers.RandomNormal(0, 0.01, seeds))
        self.conv = _tower(config, conv)
        # Every score starts at the prior; else the many negatives dominate the first loss.
        prior = PriorBias(config.prior)
        outputs = config.anchors.per_cell * config.num_classes
        self.cls_logits = conv(config.channels, outputs, 3, bias_initializer=prior)
        self.num_classes = config.num_classes

    def call(self, levels: Sequence[Tensor], training: bool = False) -> Tensor:
        """The levels, each (N, H, W, channels), to class logits (N, anchors, K)."""
        hidden = _hidden(self.conv, self.recompute and training)
        logits = [_per_anchor(self.cls_logits(hidden(x)), self.num_classes) for x in levels]
        return ops.concatenate(logits, axis=1)


class RegressionHead(keras.layers.Layer):
    """The box subnet, with the same weights at every level."""

    recompute = False

    def __init__(self, config: RetinaNetConfig, seeds: keras.random.SeedGenerator) -> None:
        super().__init__(dtype="float32")
        conv = partial(Conv, kernel_initializer=keras.initializers.RandomNormal(0, 0.01, seeds))
        self.conv = _tower(config, conv)
        self.bbox_reg = conv(config.channels, 4 * config.anchors.per_cell, 3)

    def call(self, levels: Sequence[Tensor], training: bool = False) -> Tensor:
        """The levels, each (N, H, W, channels), to box deltas (N, anchors, 4)."""
        hidden = _hidden(self.conv, self.recompute and training)
        deltas = [_per_anchor(self.bbox_reg(hidden(x)), 4) for x in levels]
        return ops.concatenate(deltas, axis=1)


class RetinaNet(keras.Model):
    """The detector of a config, from normalized images to the raw outputs for each anchor."""

    backend = "tensorflow"

    def __init__(self, config: RetinaNetConfig, seeds: keras.random.SeedGenerator) -> None:
        super().__init__(dtype="float32")
        self.config = config
        net = backbone(config)
        self.backbone: dict[str, Any] = {
            "body": ResNet(net, _NORMS[config.norm], seeds),
            "fpn": FeaturePyramid(config, net.channels[1:], seeds),
        }
        self.head: dict[str, Any] = {
            "classification_head": ClassificationHead(config, seeds),
            "regression_head": RegressionHead(config, seeds),
        }

    def call(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and box deltas of every anchor.

        Args:
            images: (N, H, W, 3), normalized; any size.

        Returns:
            Class logits (N, anchors, K) and box deltas (N, anchors, 4). Anchors are ordered by
            level, row, column, and last within the cell, as in `focal.tensorflow.anchors`.
        """
        levels = self.backbone["fpn"](self.backbone["body"](images))
        return self.head["classification_head"](levels), self.head["regression_head"](levels)


def recompute(model: RetinaNet) -> None:
    """Use activation checkpointing in residual blocks and subnets."""
    for _, layer in named_layers(model):
        if isinstance(layer, (Block, ClassificationHead, RegressionHead)):
            layer.recompute = True


def freeze(model: RetinaNet, stages: int) -> None:
    """Keep the weights and statistics of the backbone's first stages as they are."""
    for name in frozen_parts(stages):
        layers = getattr(model.backbone["body"], name)
        for layer in layers if isinstance(layers, list) else [layers]:
            layer.trainable = False


def build_network(config: RetinaNetConfig, seed: int) -> RetinaNet:
    """A network with the initial weights of this seed; global random state is kept."""
    return RetinaNet(config, keras.random.SeedGenerator(seed))


_NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""What torchvision calls the variables of a layer."""


def named_layers(node: Any, name: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """The layers of a model, by the attributes, indices and keys that lead to them."""
    if isinstance(node, keras.layers.Layer):
        yield name, node
        children = [(key, x) for key, x in vars(node).items() if not key.startswith("_")]
    elif isinstance(node, Mapping):
        children = list(node.items())
    elif isinstance(node, list):
        children = list(enumerate(node))
    else:
        return
    for key, child in children:
        yield from named_layers(child, f"{name}.{key}" if name else str(key))


def named_variables(model: RetinaNet) -> dict[str, keras.Variable]:
    """Weights and statistics by torchvision's names, in Keras's layout."""
    return {
        f"{path}.{theirs}": variable
        for path, layer in named_layers(model)
        for ours, theirs in _NAMES.items()
        if (variable := getattr(layer, ours, None)) is not None
    }


def arrays(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Contiguous float32 copies in torchvision's layout."""
    return {name: np.array(_out_first(x.numpy()), order="C") for name, x in variables.items()}


def _out_first(x: np.ndarray) -> np.ndarray:
    """Kernels are (height, width, in, out) in Keras and (out, in, height, width) in files."""
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x


def assign(variables: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Copy arrays in torchvision's layout into the variables of the same names."""
    for name, variable in variables.items():
        x = np.asarray(tensors[name], np.float32)
        variable.assign(x.transpose(2, 3, 1, 0) if x.ndim == 4 else x)


def state(model: RetinaNet) -> dict[str, np.ndarray]:
    """A copy of the weights and statistics by name, as `weights.save_weights` takes them."""
    return arrays(named_variables(model))


def load_state(model: RetinaNet, tensors: Mapping[str, np.ndarray]) -> None:
    """Copy weights into the model.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    own = named_variables(model)
    check_names(tensors, {name: x.shape for name, x in arrays(own).items()})
    assign(own, tensors)
