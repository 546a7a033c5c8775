"""The backbones and their normalization: what the networks of all frameworks share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from focal.retinanet.config import BackboneName, RetinaNetConfig

__all__ = [
    "BACKBONES",
    "NORM_EPS",
    "Backbone",
    "backbone",
    "backbone_of",
    "frozen_parts",
    "norm_groups",
]

NORM_EPS = 1e-5
"""Added to the variance by every normalization, batch or group."""


@dataclass(frozen=True)
class Backbone:
    """A residual network: a stem of stride 2 and four stages, whose outputs are C2 to C5.

    Attributes:
        block: "basic" is two 3x3 convolutions; "bottleneck" is 1x1, 3x3 (with the stride), 1x1.
        depths: blocks in each stage.
        widths: width of each stage, as the ResNet paper counts it.
        strides: stride of the first block of each stage.
        groups: groups of the bottleneck's 3x3 convolution (ResNeXt).
        width_per_group: channels of one such group in the first stage.
        stem_channels: filters of the stem.
        stem_kernel: side of the stem's filters.
        stem_pool: whether a 3x3 max-pool of stride 2 follows the stem.
    """

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    groups: int = 1
    width_per_group: int = 64
    stem_channels: int = 64
    stem_kernel: int = 7
    stem_pool: bool = True

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of C2, C3, C4 and C5."""
        c2, c3, c4, c5 = self.widths
        return (4 * c2, 4 * c3, 4 * c4, 4 * c5) if self.block == "bottleneck" else self.widths

    def inner(self, width: int) -> int:
        """Channels of the 3x3 convolution in a bottleneck of a stage of this width."""
        return width * self.width_per_group // 64 * self.groups


BACKBONES: Mapping[BackboneName, Backbone] = MappingProxyType(
    {
        # No max-pool but a stride in the first stage: C3 is at stride 8, as in the others.
        "tiny": Backbone(
            block="basic",
            depths=(1, 1, 1, 1),
            widths=(32, 64, 128, 128),
            strides=(2, 2, 2, 2),
            stem_channels=16,
            stem_kernel=3,
            stem_pool=False,
        ),
        "resnet18": Backbone("basic", (2, 2, 2, 2)),
        "resnet34": Backbone("basic", (3, 4, 6, 3)),
        "resnet50": Backbone("bottleneck", (3, 4, 6, 3)),
        "resnet101": Backbone("bottleneck", (3, 4, 23, 3)),
        "resnext101_32x8d": Backbone("bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    }
)


def backbone_of(tensors: Mapping[str, np.ndarray]) -> BackboneName:
    """The name of the backbone with these weights, which may be a whole detector's.

    Raises:
        ValueError: there is none of ours among them.
    """
    shapes = {name.removeprefix("backbone.body."): x.shape for name, x in tensors.items()}
    deep, conv = "layer1.0.conv3.weight" in shapes, shapes.get("layer1.0.conv2.weight")
    blocks = [name[:6] for name in shapes if re.fullmatch(r"layer\d\.\d+\.conv2\.weight", name)]
    depths = tuple(blocks.count(f"layer{stage}") for stage in (1, 2, 3, 4))
    for name, net in BACKBONES.items():
        inner = net.inner(net.widths[0]) if net.block == "bottleneck" else net.widths[0]
        own = net.block == "bottleneck", (inner, inner // net.groups, 3, 3), net.depths
        if own == (deep, conv, depths):
            return name
    raise ValueError(
        f"expected weights of a RetinaNet or of one of {', '.join(BACKBONES)}; "
        f"got {len(tensors)} tensors such as {', '.join(list(tensors)[:2])}"
    )


def frozen_parts(stages: int) -> tuple[str, ...]:
    """Names of the backbone's modules in its first stages: the stem, then C2 to C5."""
    return ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")[: stages + 1 if stages else 0]


def norm_groups(channels: int) -> int:
    """Groups of a group normalization: 32, or as many as divide the channels."""
    return math.gcd(32, channels)


def backbone(config: RetinaNetConfig) -> Backbone:
    """The backbone of a config.

    Raises:
        ValueError: the config describes no network: it has no classes, or other levels than P3 to
            P5, P6 or P7.
    """
    if not config.classes:
        raise ValueError("RetinaNet: config.classes must name at least one class; got none")
    if config.levels not in ((3, 4, 5), (3, 4, 5, 6), (3, 4, 5, 6, 7)):
        raise ValueError(f"RetinaNet: config.levels must be 3 to 5, 6 or 7; got {config.levels}")
    return BACKBONES[config.backbone]
