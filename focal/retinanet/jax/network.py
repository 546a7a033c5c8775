"""RetinaNet in JAX (flax.nnx): a residual network, a feature pyramid and two subnets.

Modules are named as in torchvision's `retinanet_resnet50_fpn`, so that `state` gives its names
and layouts, and one weights file serves all frameworks. Images and feature maps are
(N, H, W, channels). In shapes, N is images, A anchors in a cell and K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.nn.initializers import Initializer

from focal.jax import prior_bias_init
from focal.retinanet.architecture import NORM_EPS, Backbone, backbone, frozen_parts, norm_groups
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.weights import check_names

__all__ = [
    "RetinaNet",
    "arrays",
    "build_network",
    "freeze",
    "load_state",
    "replaced",
    "state",
    "trained",
]


def _drawn_by_numpy(draw: Callable[[np.random.Generator, tuple[int, ...]], Any]) -> Initializer:
    """An initializer of kernels; JAX would compile its generator anew for each of the shapes."""

    def init(
        key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> Array:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return jnp.asarray(draw(rng, shape), dtype, device=out_sharding)

    return init


# Made once, not for each model: a model's static description holds its initializers, and equal
# models must compare equal, or each would be compiled again. Shapes are (H, W, inputs, outputs).
_HE_NORMAL = _drawn_by_numpy(
    lambda rng, shape: rng.normal(0, (2 / (math.prod(shape[:2]) * shape[3])) ** 0.5, shape)
)
_LECUN_UNIFORM = _drawn_by_numpy(
    lambda rng, shape: rng.uniform(-1, 1, shape) * (3 / math.prod(shape[:3])) ** 0.5
)
_GAUSSIAN = _drawn_by_numpy(lambda rng, shape: rng.normal(0, 0.01, shape))


# Normalization draws no numbers: any `rngs` will do.


class FrozenBatchNorm(nnx.BatchNorm):
    """Batch normalization as a fixed scale and shift: nothing in it is a parameter."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, epsilon=NORM_EPS, rngs=nnx.Rngs(0))
        self.scale: Any = nnx.BatchStat(jnp.ones(channels, jnp.float32))
        self.bias: Any = nnx.BatchStat(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """Normalize x, of shape (N, H, W, channels), with the running statistics."""
        return super().__call__(x, use_running_average=True)


def _batch_norm(channels: int) -> nnx.BatchNorm:
    """Of n pixels its running variance is (n - 1) / n of PyTorch's, which is unbiased."""
    return nnx.BatchNorm(
        channels, momentum=0.9, epsilon=NORM_EPS, use_fast_variance=False, rngs=nnx.Rngs(0)
    )


def _group_norm(channels: int) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        channels,
        norm_groups(channels),
        epsilon=NORM_EPS,
        use_fast_variance=False,
        rngs=nnx.Rngs(0),
    )


_Norm = Callable[[int], nnx.Module]
_NORMS: Mapping[str, _Norm] = {
    "batch": _batch_norm,
    "frozen_batch": FrozenBatchNorm,
    "group": _group_norm,
}


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    *,
    init: Initializer,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution that keeps the size, divided by its stride."""
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        stride,
        padding=kernel // 2,  # "SAME" would pad unevenly where it strides
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=init,
        precision=lax.Precision.HIGHEST,  # a GPU's default for float32 is TF32
        rngs=rngs,
    )


class Recomputed(nnx.Module):
    """A part of the network that can use activation checkpointing."""

    recompute = False  # what `train(recompute=True)` sets

    def __call__(self, x: Array) -> Array:
        """What `compute` gives."""
        return nnx.remat(type(self).compute)(self, x) if self.recompute else self.compute(x)

    def compute(self, x: Array) -> Array:
        """The forward pass."""
        raise NotImplementedError


class BasicBlock(Recomputed):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions."""

    def __init__(
        self, inputs: int, width: int, stride: int, net: Backbone, norm: _Norm, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = _conv(inputs, width, 3, stride, init=_HE_NORMAL, rngs=rngs)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, init=_HE_NORMAL, rngs=rngs)
        self.bn2 = norm(width)
        self.downsample = _shortcut(inputs, width, stride, norm, rngs)

    def compute(self, x: Array) -> Array:
        """(N, H, W, inputs) to (N, H / stride, W / stride, width)."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + self.downsample(x))


class Bottleneck(Recomputed):
    """The residual block of the deeper networks: 1x1, 3x3 and 1x1 convolutions."""

    def __init__(
        self, inputs: int, width: int, stride: int, net: Backbone, norm: _Norm, rngs: nnx.Rngs
    ) -> None:
        inner, outputs = net.inner(width), 4 * width
        self.conv1 = _conv(inputs, inner, 1, init=_HE_NORMAL, rngs=rngs)
        self.bn1 = norm(inner)
        # The stride is here, not on the first convolution: ResNet "v1.5".
        self.conv2 = _conv(inner, inner, 3, stride, net.groups, init=_HE_NORMAL, rngs=rngs)
        self.bn2 = norm(inner)
        self.conv3 = _conv(inner, outputs, 1, init=_HE_NORMAL, rngs=rngs)
        self.bn3 = norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm, rngs)

    def compute(self, x: Array) -> Array:
        """(N, H, W, inputs) to (N, H / stride, W / stride, 4 * width)."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + self.downsample(x))


def _shortcut(
    inputs: int, outputs: int, stride: int, norm: _Norm, rngs: nnx.Rngs
) -> nnx.Sequential:
    if inputs == outputs and stride == 1:
        return nnx.Sequential()  # the identity
    conv = _conv(inputs, outputs, 1, stride, init=_HE_NORMAL, rngs=rngs)
    return nnx.Sequential(conv, norm(outputs))


class ResNet(nnx.Module):
    """The backbone, without its classifier."""

    def __init__(self, net: Backbone, norm: _Norm, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv(3, net.stem_channels, net.stem_kernel, 2, init=_HE_NORMAL, rngs=rngs)
        self.bn1 = norm(net.stem_channels)
        self.stem_pool = net.stem_pool

        block = BasicBlock if net.block == "basic" else Bottleneck
        inputs = (net.stem_channels, *net.channels)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nnx.Sequential(
                block(inputs[i], net.widths[i], net.strides[i], net, norm, rngs),
                *(block(inputs[i + 1], net.widths[i], 1, net, norm, rngs) for _ in range(1, depth)),
            )
            for i, depth in enumerate(net.depths)
        )

    def __call__(self, images: Array) -> tuple[Array, Array, Array]:
        """(N, H, W, 3) to C3, C4 and C5, at strides 8, 16 and 32."""
        c1 = nnx.relu(self.bn1(self.conv1(images)))
        if self.stem_pool:
            c1 = nnx.max_pool(c1, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        c2 = self.layer1(c1)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)


class FeaturePyramid(nnx.Module):
    """The feature pyramid: C3 to C5 in, the levels of the config out."""

    def __init__(self, config: RetinaNetConfig, inputs: Sequence[int], rngs: nnx.Rngs) -> None:

        # As in Detectron: keeps the variance of the features, unlike the Gaussian of the subnets.
        def conv(inputs: int, kernel: int, stride: int = 1) -> nnx.Conv:
            return _conv(
                inputs, config.channels, kernel, stride, bias=True, init=_LECUN_UNIFORM, rngs=rngs
            )

        c = config.channels
        self.p6_from = config.p6_from
        self.inner_blocks = nnx.List([nnx.Sequential(conv(n, 1)) for n in inputs])
        self.layer_blocks = nnx.List([nnx.Sequential(conv(c, 3)) for _ in inputs])
        self.extra_blocks: nnx.Dict[nnx.Conv] = nnx.Dict()
        if 6 in config.levels:
            self.extra_blocks["p6"] = conv(inputs[-1] if config.p6_from == "c5" else c, 3, 2)
        if 7 in config.levels:
            self.extra_blocks["p7"] = conv(c, 3, 2)

    def __call__(self, features: Sequence[Array]) -> list[Array]:
        """C3 to C5 to P3, P4, ..., each (N, H, W, channels)."""
        inner = [block(c) for block, c in zip(self.inner_blocks, features, strict=True)]
        for i in (1, 0):
            inner[i] = inner[i] + _upsample(inner[i + 1], inner[i].shape)
        levels = [block(x) for block, x in zip(self.layer_blocks, inner, strict=True)]
        extra = list(self.extra_blocks)  # older versions of `nnx.Dict` cannot be asked with `in`
        if "p6" in extra:
            source = features[-1] if self.p6_from == "c5" else levels[-1]
            levels.append(self.extra_blocks["p6"](source))
        if "p7" in extra:
            levels.append(self.extra_blocks["p7"](nnx.relu(levels[-1])))
        return levels


def _upsample(x: Array, shape: tuple[int, ...]) -> Array:
    """Twice the map by nearest neighbors, less the last row or column where `shape` is odd."""
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    return doubled[:, : shape[1], : shape[2]]


class Tower(Recomputed, nnx.Sequential):  # type: ignore[misc]
    """The hidden layers of a subnet."""

    def compute(self, x: Array) -> Array:
        """A level, (N, H, W, channels), of the same shape after it."""
        return nnx.Sequential.__call__(self, x)


def _tower(config: RetinaNetConfig, rngs: nnx.Rngs) -> Tower:
    c, normed = config.channels, config.head_norm == "group"
    layers = []
    for _ in range(config.head_depth):
        conv = _conv(c, c, 3, bias=not normed, init=_GAUSSIAN, rngs=rngs)
        norm = [_group_norm(c)] if normed else []
        layers.append(nnx.Sequential(conv, *norm, nnx.relu))
    return Tower(*layers)


def _per_anchor(x: Array, values: int) -> Array:
    """(N, H, W, A * values) to (N, H * W * A, values)."""
    n, height, width, channels = x.shape
    return x.reshape(n, height * width * (channels // values), values)


class ClassificationHead(nnx.Module):
    """The class subnet, with the same weights at every level."""

    def __init__(self, config: RetinaNetConfig, rngs: nnx.Rngs) -> None:
        self.num_classes = config.num_classes
        outputs = config.anchors.per_cell * config.num_classes
        self.conv = _tower(config, rngs)
        self.cls_logits = _conv(config.channels, outputs, 3, bias=True, init=_GAUSSIAN, rngs=rngs)
        # Every score starts at the prior; else the many negatives dominate the first loss.
        bias = prior_bias_init(config.prior)(jax.random.key(0), (outputs,), jnp.float32)
        self.cls_logits.bias = nnx.Param(bias)

    def __call__(self, levels: Sequence[Array]) -> Array:
        """The levels, each (N, H, W, channels), to class logits (N, anchors, K)."""
        logits = [_per_anchor(self.cls_logits(self.conv(x)), self.num_classes) for x in levels]
        return jnp.concat(logits, axis=1)


class RegressionHead(nnx.Module):
    """The box subnet, with the same weights at every level."""

    def __init__(self, config: RetinaNetConfig, rngs: nnx.Rngs) -> None:
        outputs = 4 * config.anchors.per_cell
        self.conv = _tower(config, rngs)
        self.bbox_reg = _conv(config.channels, outputs, 3, bias=True, init=_GAUSSIAN, rngs=rngs)

    def __call__(self, levels: Sequence[Array]) -> Array:
        """The levels, each (N, H, W, channels), to box deltas (N, anchors, 4)."""
        return jnp.concat([_per_anchor(self.bbox_reg(self.conv(x)), 4) for x in levels], axis=1)


class RetinaNet(nnx.Module):
    """The detector of a config, from normalized images to the raw outputs for each anchor."""

    backend = "jax"

    def __init__(self, config: RetinaNetConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        net = backbone(config)
        self.backbone = nnx.Dict(
            body=ResNet(net, _NORMS[config.norm], rngs),
            fpn=FeaturePyramid(config, net.channels[1:], rngs),
        )
        self.head = nnx.Dict(
            classification_head=ClassificationHead(config, rngs),
            regression_head=RegressionHead(config, rngs),
        )

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Class logits and box deltas of every anchor.

        Args:
            images: (N, H, W, 3), normalized; any size.

        Returns:
            Class logits (N, anchors, K) and box deltas (N, anchors, 4). Anchors are ordered by
            level, row, column, and last within the cell, as in `focal.jax.anchors`.
        """
        levels = self.backbone["fpn"](self.backbone["body"](images))
        return self.head["classification_head"](levels), self.head["regression_head"](levels)


def trained(stages: int) -> Callable[[tuple[Any, ...], Any], bool]:
    """A filter of the parameters that are trained: all but those of the frozen stages."""
    frozen = frozen_parts(stages)

    def is_trained(path: tuple[Any, ...], variable: Any) -> bool:
        inside = path[:2] == ("backbone", "body") and path[2] in frozen
        return isinstance(variable, nnx.Param) and not inside

    return is_trained


def freeze(model: RetinaNet, stages: int) -> None:
    """Normalize with the running statistics in the backbone's first stages, and keep them."""
    for name in frozen_parts(stages):
        getattr(model.backbone["body"], name).eval()


def build_network(config: RetinaNetConfig, seed: int) -> RetinaNet:
    """A network with the initial weights of this seed."""
    return RetinaNet(config, nnx.Rngs(seed))


# PyTorch's words for the leaves of nnx modules, where they differ.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_TO_OIHW, _TO_HWIO = (3, 2, 0, 1), (2, 3, 1, 0)


def _name(path: tuple[Any, ...]) -> str:
    """The name of a variable in torchvision; the `layers` of an `nnx.Sequential` are not in it."""
    *modules, leaf = (str(part) for part in path if part != "layers")
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def arrays(variables: nnx.State) -> dict[str, np.ndarray]:
    """Copies of the variables of a network, under torchvision's names and in its layouts."""
    copies = {}
    for path, variable in nnx.to_flat_state(variables):
        x = np.asarray(variable[...], np.float32)
        copies[_name(path)] = np.array(x.transpose(_TO_OIHW) if x.ndim == 4 else x, order="C")
    return copies


def replaced(variables: nnx.State, tensors: Mapping[str, np.ndarray]) -> nnx.State:
    """The variables with the values that `arrays` gave, where they are now.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    check_names(tensors, {name: x.shape for name, x in arrays(variables).items()})
    flat = {}
    for path, variable in nnx.to_flat_state(variables):
        x = np.array(tensors[_name(path)], np.float32)
        x = x.transpose(_TO_HWIO) if x.ndim == 4 else x
        flat[path] = variable.replace(jax.device_put(x, variable[...].sharding))
    return nnx.from_flat_state(flat)


def state(model: RetinaNet) -> dict[str, np.ndarray]:
    """A copy of the weights and statistics by name, as `weights.save_weights` takes them."""
    return arrays(nnx.state(model))


def load_state(model: RetinaNet, tensors: Mapping[str, np.ndarray]) -> None:
    """Copy weights into the model.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    nnx.update(model, replaced(nnx.state(model), tensors))
