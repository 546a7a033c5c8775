"""RetinaNet in PyTorch: a residual network, a feature pyramid and two subnets.

Parameters have the names and layouts of torchvision's `retinanet_resnet50_fpn` and
`retinanet_resnet50_fpn_v2`, so that their weights load, and so that one weights file serves all
frameworks. In shapes, N is images, A anchors in a cell and K classes.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # SyncBatchNorm, too
from torch.utils.checkpoint import checkpoint

from focal.retinanet.architecture import NORM_EPS, Backbone, backbone, frozen_parts, norm_groups
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.weights import check_names
from focal.torch import anchors, init_prior_bias_

__all__ = [
    "BatchNorm",
    "RetinaNet",
    "build_network",
    "freeze",
    "load_state",
    "recompute",
    "state",
]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization with fixed statistics, scale and shift, all of them buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, of shape (N, channels, H, W)."""
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _FixedNorm.apply(x, *statistics)
            return result
        return F.batch_norm(x, *statistics, eps=NORM_EPS)


class _FixedNorm(torch.autograd.Function):
    """Batch normalization of which autograd saves no feature map: `F.batch_norm` would save x.

    One kernel each way, also for x of a half type, while the statistics are float32.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, eps=NORM_EPS)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight = ctx.saved_tensors
        # The gradient is scaled as x is, and not shifted.
        by_x = F.batch_norm(grad, torch.zeros_like(mean), var, weight, eps=NORM_EPS)
        return by_x, None, None, None, None


class GroupNorm(nn.GroupNorm):
    """Group normalization that keeps the type and the memory layout of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, of shape (N, channels, H, W)."""
        if x.dtype == self.weight.dtype:
            y = super().forward(x)
        else:  # Autocast would compute in float32, as the sums for half types are anyway.
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                # On a CPU, half types with the channels last are up to ten times slower.
                rows = x.contiguous() if x.device.type == "cpu" else x
                y = F.group_norm(rows, self.num_groups, weight, bias, self.eps)
        # Not every kernel keeps the channels last.
        if x.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)
        return y


def _group_norm(channels: int) -> nn.GroupNorm:
    return GroupNorm(norm_groups(channels), channels, eps=NORM_EPS)


_Norm = Callable[[int], nn.Module]
_NORMS: Mapping[str, _Norm] = {
    "batch": partial(nn.BatchNorm2d, eps=NORM_EPS),
    "frozen_batch": FrozenBatchNorm2d,
    "group": _group_norm,
}


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the size, divided by its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def _initialize(module: nn.Module, weight: Callable[[Tensor], Tensor]) -> None:
    """Draw the weights of all convolutions in the module with `weight`; set their biases to 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            weight(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


class Recomputed(nn.Module):
    """A part of the network that can use activation checkpointing."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """What `compute` gives."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self.compute(x)
        norms = [m for m in self.modules() if isinstance(m, BatchNorm)]
        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if norms:
            again["context_fn"] = lambda: (contextlib.nullcontext(), _statistics_kept(norms))
        return checkpoint(self.compute, x, **again)

    def compute(self, x: Tensor) -> Tensor:
        """The forward pass."""
        raise NotImplementedError


@contextlib.contextmanager
def _statistics_kept(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Running statistics do not change in here: the same batch would count twice."""
    before = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


class BasicBlock(Recomputed):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions."""

    def __init__(self, inputs: int, width: int, stride: int, net: Backbone, norm: _Norm) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = norm(width)
        self.downsample = _shortcut(inputs, width, stride, norm)

    def compute(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(Recomputed):
    """The residual block of the deeper networks: 1x1, 3x3 and 1x1 convolutions."""

    def __init__(self, inputs: int, width: int, stride: int, net: Backbone, norm: _Norm) -> None:
        super().__init__()
        inner, outputs = net.inner(width), 4 * width
        self.conv1 = _conv(inputs, inner, 1)
        self.bn1 = norm(inner)
        # The stride is here, not on the first convolution: ResNet "v1.5".
        self.conv2 = _conv(inner, inner, 3, stride, net.groups)
        self.bn2 = norm(inner)
        self.conv3 = _conv(inner, outputs, 1)
        self.bn3 = norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def compute(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 * width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int, norm: _Norm) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


class ResNet(nn.Module):
    """The backbone, without its classifier."""

    def __init__(self, net: Backbone, norm: _Norm) -> None:
        super().__init__()
        self.conv1 = _conv(3, net.stem_channels, net.stem_kernel, stride=2)
        self.bn1 = norm(net.stem_channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if net.stem_pool else nn.Identity()

        block = BasicBlock if net.block == "basic" else Bottleneck
        inputs = (net.stem_channels, *net.channels)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                block(inputs[i], net.widths[i], net.strides[i], net, norm),
                *(block(inputs[i + 1], net.widths[i], 1, net, norm) for _ in range(1, depth)),
            )
            for i, depth in enumerate(net.depths)
        )
        _initialize(self, partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) to C3, C4 and C5, at strides 8, 16 and 32."""
        c1 = F.relu(self.bn1(self.conv1(images)), inplace=True)
        c2 = self.layer1(self.maxpool(c1))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)


class FeaturePyramid(nn.Module):
    """The feature pyramid: C3 to C5 in, the levels of the config out."""

    def __init__(self, config: RetinaNetConfig, inputs: Sequence[int]) -> None:
        super().__init__()
        c = config.channels
        self.p6_from = config.p6_from
        self.inner_blocks = nn.ModuleList(nn.Sequential(_conv(n, c, 1, bias=True)) for n in inputs)
        self.layer_blocks = nn.ModuleList(nn.Sequential(_conv(c, c, 3, bias=True)) for _ in inputs)
        self.extra_blocks = nn.ModuleDict()
        if 6 in config.levels:
            p6_inputs = inputs[-1] if config.p6_from == "c5" else c
            self.extra_blocks["p6"] = _conv(p6_inputs, c, 3, stride=2, bias=True)
        if 7 in config.levels:
            self.extra_blocks["p7"] = _conv(c, c, 3, stride=2, bias=True)
        # As in Detectron: keeps the variance of the features, unlike the Gaussian of the subnets.
        _initialize(self, partial(nn.init.kaiming_uniform_, a=1))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C3 to C5 to P3, P4, ..., each (N, channels, H, W)."""
        inner = [block(c) for block, c in zip(self.inner_blocks, features, strict=True)]
        for i in (1, 0):
            size = inner[i].shape[-2:]  # twice the coarser map, less one where that is odd
            inner[i] = inner[i] + F.interpolate(inner[i + 1], size=size, mode="nearest")
        levels = [block(x) for block, x in zip(self.layer_blocks, inner, strict=True)]
        if "p6" in self.extra_blocks:
            source = features[-1] if self.p6_from == "c5" else levels[-1]
            levels.append(self.extra_blocks["p6"](source))
        if "p7" in self.extra_blocks:
            levels.append(self.extra_blocks["p7"](F.relu(levels[-1])))
        return levels


class Tower(Recomputed, nn.Sequential):
    """The hidden layers of a subnet."""

    def compute(self, x: Tensor) -> Tensor:
        """A level, (N, channels, H, W), of the same shape after it."""
        return nn.Sequential.forward(self, x)


def _tower(config: RetinaNetConfig) -> Tower:
    c, normed = config.channels, config.head_norm == "group"
    layers = Tower()
    for _ in range(config.head_depth):
        norm = [_group_norm(c)] if normed else []
        layers.append(nn.Sequential(_conv(c, c, 3, bias=not normed), *norm, nn.ReLU(inplace=True)))
    return layers


def _per_anchor(x: Tensor, values: int) -> Tensor:
    """(N, A * values, H, W) to (N, H * W * A, values); a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).unflatten(3, (-1, values)).flatten(1, 3)


class ClassificationHead(nn.Module):
    """The class subnet, with the same weights at every level."""

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        outputs = config.anchors.per_cell * config.num_classes
        self.conv = _tower(config)
        self.cls_logits = _conv(config.channels, outputs, 3, bias=True)
        _initialize(self, partial(nn.init.normal_, std=0.01))
        # Every score starts at the prior; else the many negatives dominate the first loss.
        init_prior_bias_(self.cls_logits, config.prior)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """The levels, each (N, channels, H, W), to class logits (N, anchors, K)."""
        logits = [_per_anchor(self.cls_logits(self.conv(x)), self.num_classes) for x in levels]
        return torch.cat(logits, dim=1)


class RegressionHead(nn.Module):
    """The box subnet, with the same weights at every level."""

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        self.conv = _tower(config)
        self.bbox_reg = _conv(config.channels, 4 * config.anchors.per_cell, 3, bias=True)
        _initialize(self, partial(nn.init.normal_, std=0.01))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """The levels, each (N, channels, H, W), to box deltas (N, anchors, 4)."""
        return torch.cat([_per_anchor(self.bbox_reg(self.conv(x)), 4) for x in levels], dim=1)


class RetinaNet(nn.Module):
    """The detector of a config, from normalized images to the raw outputs for each anchor."""

    backend = "torch"
    scale: Tensor
    shift: Tensor

    def __init__(self, config: RetinaNetConfig) -> None:
        super().__init__()
        self.config = config
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        # For (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        net = backbone(config)
        self.backbone = nn.Sequential(
            OrderedDict(
                body=ResNet(net, _NORMS[config.norm]),
                fpn=FeaturePyramid(config, net.channels[1:]),
            )
        )
        self.head = nn.ModuleDict(
            dict(
                classification_head=ClassificationHead(config),
                regression_head=RegressionHead(config),
            )
        )

        self._anchors: dict[tuple[Any, ...], Tensor] = {}

    def anchors(self, size: tuple[int, int]) -> Tensor:
        """The anchors (N, 4) of a canvas of (height, width) pixels, on the model's device."""
        key = (size, self.scale.device)
        if torch.compiler.is_compiling():
            return anchors(size, self.config.anchors).to(self.scale.device)
        if key not in self._anchors:
            with torch.inference_mode(False):  # training needs them, too
                self._anchors[key] = anchors(size, self.config.anchors).to(self.scale.device)
        return self._anchors[key]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and box deltas of every anchor.

        Args:
            images: (N, 3, H, W), normalized; any size. Channels-last is the faster layout.

        Returns:
            Class logits (N, anchors, K) and box deltas (N, anchors, 4). Anchors are ordered by
            level, row, column, and last within the cell, as in `focal.torch.anchors`.
        """
        levels = self.backbone(images)
        return self.head["classification_head"](levels), self.head["regression_head"](levels)


def recompute(model: RetinaNet) -> None:
    """Use activation checkpointing in residual blocks and subnets."""
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.recompute = True


def freeze(model: RetinaNet, stages: int) -> None:
    """Keep the weights and statistics of the backbone's first stages as they are."""
    for name in frozen_parts(stages):
        getattr(model.backbone.body, name).requires_grad_(False).eval()


def build_network(config: RetinaNetConfig, seed: int) -> RetinaNet:
    """A network on the CPU with the initial weights of this seed; global random state is kept."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed GPUs as well
        return RetinaNet(config)


# A count of batches that nothing is computed with, and that other frameworks lack: not a weight.
_COUNTER = "num_batches_tracked"


def state(model: RetinaNet) -> dict[str, np.ndarray]:
    """A copy of the weights and statistics by name, as `weights.save_weights` takes them."""
    return {
        name: x.detach().cpu().to(torch.float32, copy=True).contiguous().numpy()
        for name, x in model.state_dict().items()
        if not name.endswith(_COUNTER)
    }


def load_state(model: RetinaNet, tensors: Mapping[str, np.ndarray]) -> None:
    """Copy weights into the model.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    own = model.state_dict()
    check_names(tensors, {k: tuple(v.shape) for k, v in own.items() if not k.endswith(_COUNTER)})
    model.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
