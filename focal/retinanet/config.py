"""What a RetinaNet is and how it is trained: two frozen dataclasses and their presets.

Everything a run needs to be repeated is in here, in plain numbers. `RetinaNetConfig`
describes the detector (network, anchors, target rules, loss, inference) and travels inside
the weights file; `TrainConfig` describes one training run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from focal.core import checks
from focal.core.anchors import AnchorConfig

__all__ = ["RetinaNetConfig", "TrainConfig"]


BackboneName = Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d"]


@dataclass(frozen=True)
class RetinaNetConfig:
    """The detector: network, anchors, targets, loss and inference.

    The defaults are the paper's RetinaNet-50 (arXiv:1708.02002), but for the canvas.
    """

    classes: tuple[str, ...] = ()
    """Names of the foreground classes; class index k is `classes[k]`. Their number is K."""
    canvas: tuple[int, int] = (1024, 1024)
    """(height, width) in pixels. Images are scaled to fit, keeping their aspect."""

    # Network
    backbone: BackboneName = "resnet50"
    norm: Literal["batch", "frozen_batch", "group"] = "frozen_batch"
    """Normalisation in the backbone. `frozen_batch` only makes sense with loaded weights."""
    levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    channels: int = 256
    p6_from: Literal["c5", "p5"] = "c5"
    head_depth: int = 4
    head_norm: Literal["none", "group"] = "none"
    prior: float = 0.01
    """Every class score of a new network; 0.5, a bias of 0, is none."""

    # Anchors and targets
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    foreground: float = 0.5
    background: float = 0.4
    allow_low_quality: bool | float = False

    # Loss
    loss: Literal["focal", "focal_star", "ohem"] = "focal"
    """What classifies: focal loss (gamma 0 is cross entropy), FL*, or the loss of hard examples."""
    alpha: float | None = 0.25
    gamma: float = 2.0
    star_beta: float = 1.0
    """The shift of FL*."""
    ohem_examples: int = 128
    """The most hard examples taken from an image."""
    ohem_iou: float = 0.7
    """Above this IoU, the anchor of smaller loss is no example."""
    ohem_ratio: float | None = None
    """Negatives per positive, 3 in the variant "1:3"; None: whatever is hardest."""
    box_loss: Literal["smooth_l1", "giou"] = "smooth_l1"
    box_beta: float = 1.0
    """Where smooth L1 turns from square to linear; 0 is L1."""
    box_weight: float = 1.0
    normaliser: Literal["batch", "image", "ema"] = "batch"
    """Divide by the positives of the batch (paper), of each image, or by a running mean."""

    # Inference
    score_threshold: float = 0.05
    candidates: int = 1000
    """Best-scoring predictions kept per level before NMS."""
    nms_threshold: float = 0.5
    max_detections: int = 100

    # Input: RGB in [0, 255] becomes (image / 255 - mean) / std
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        name = "RetinaNetConfig"
        _check_words(name, self)
        _check_size(name, "canvas", self.canvas)
        for parameter in ("channels", "candidates", "max_detections", "ohem_examples"):
            checks.check_integer(name, parameter, getattr(self, parameter), 1)
        checks.check_integer(name, "head_depth", self.head_depth, 0)
        for parameter in ("foreground", "score_threshold", "nms_threshold", "ohem_iou"):
            checks.check_number(name, parameter, getattr(self, parameter), 0, 1)
        checks.check_number(name, "background", self.background, 0, self.foreground)
        if not isinstance(self.allow_low_quality, bool):
            checks.check_number(name, "allow_low_quality", self.allow_low_quality, 0, 1)
        for parameter in ("box_beta", "box_weight"):
            checks.check_number(name, parameter, getattr(self, parameter), 0)
        checks.check_alpha(name, self.alpha)
        checks.check_gamma(name, self.gamma)
        checks.check_number(name, "star_beta", self.star_beta)
        if self.ohem_ratio is not None:
            checks.check_number(name, "ohem_ratio", self.ohem_ratio, 0)
        _check_numbers(name, "mean", self.mean, 3, 0, 1)
        _check_numbers(name, "std", self.std, 3, 1e-6)
        _check_numbers(name, "levels", self.levels, None, 0)
        if not isinstance(self.anchors, AnchorConfig):
            raise TypeError(f"{name}: anchors must be an AnchorConfig; got {self.anchors!r}")
        strides = tuple(2**level for level in self.levels)
        if self.anchors.strides != strides:
            raise ValueError(
                f"{name}: anchors.strides must be those of levels {self.levels}, {strides}; "
                f"got {self.anchors.strides}"
            )

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes; there is no background class."""
        return len(self.classes)

    def replace(self, **changes: Any) -> RetinaNetConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The config as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RetinaNetConfig:
        """Read what `to_json` wrote."""
        fields = _tuples(json.loads(text))
        return cls(**{**fields, "anchors": AnchorConfig(**fields["anchors"])})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the paper's schedule."""

    steps: int = 90_000
    batch_size: int = 16
    """Images of one step, over all replicas."""
    accumulate: int = 1
    """Gradient-accumulation steps: parts of each replica's share, one after the other."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    reference_batch: int | None = None
    """The batch size that `learning_rate` is given for: with another it is scaled in proportion.
    None: it is taken as it is."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (60 / 90, 80 / 90)
    """Fractions of `steps` at which the learning rate is divided by 10 (schedule "step")."""
    warmup: int = 500
    clip_norm: float | None = None
    ema: float | None = None
    """Decay of the moving average of the weights that is evaluated and saved; None: off."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    compile: bool = False
    """`torch.compile`, or XLA in TensorFlow. JAX compiles in any case."""
    recompute: bool = False
    """Activation checkpointing of residual blocks and subnets: less memory, more time, the same
    gradient."""

    # Input
    crop: tuple[int, int] | None = None
    """(height, width) of the training canvas; None trains on the whole canvas."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the random scale applied before cropping."""
    flips: Literal["none", "horizontal", "eightfold"] = "horizontal"
    """`eightfold`: all symmetries of the square, for images that have no upright."""
    jitter: float = 0.0
    """Strength of the random brightness, contrast and saturation, 0 to 1."""
    workers: int = 1

    # Records
    log_every: int = 20
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0: only at the end."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    seed: int = 0

    def __post_init__(self) -> None:
        name = "TrainConfig"
        _check_words(name, self)
        for parameter in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            checks.check_integer(name, parameter, getattr(self, parameter), 1)
        for parameter in ("warmup", "workers", "eval_every", "save_every", "seed"):
            checks.check_integer(name, parameter, getattr(self, parameter), 0)
        for parameter in ("learning_rate", "weight_decay"):
            checks.check_number(name, parameter, getattr(self, parameter), 0)
        for parameter in ("momentum", "jitter"):
            checks.check_number(name, parameter, getattr(self, parameter), 0, 1)
        if self.reference_batch is not None:
            checks.check_integer(name, "reference_batch", self.reference_batch, 1)
        for parameter in ("compile", "recompute"):
            if not isinstance(getattr(self, parameter), bool):
                value = getattr(self, parameter)
                raise TypeError(f"{name}: {parameter} must be True or False; got {value!r}")
        if self.ema is not None:
            checks.check_number(name, "ema", self.ema, 0, 1)
        if self.clip_norm is not None:
            checks.check_number(name, "clip_norm", self.clip_norm, 0)
        if self.crop is not None:
            _check_size(name, "crop", self.crop)
        _check_numbers(name, "milestones", self.milestones, None, 0, 1)
        _check_numbers(name, "zoom", self.zoom, 2, 1e-6)
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"{name}: zoom must be (least, most); got {self.zoom!r}")

    def average_decay(self, step: int) -> float:
        """The weight of the old moving average in step `step`.

        Early on the average follows closely; it would else remember the initial weights.
        """
        return min(self.ema or 0.0, (1 + step) / (10 + step))

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The config as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what `to_json` wrote."""
        return cls(**_tuples(json.loads(text)))


def _check_words(name: str, config: Any) -> None:
    """Every field that is annotated with a few words has one of them."""
    for parameter, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            checks.check_choice(name, parameter, getattr(config, parameter), get_args(hint))


def _check_size(name: str, parameter: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name}: {parameter} must be (height, width); got {value!r}")
    for side in value:
        checks.check_integer(name, parameter, side, 1)


def _check_numbers(
    name: str,
    parameter: str,
    value: Any,
    count: int | None,
    low: float = -checks.INFINITY,
    high: float = checks.INFINITY,
) -> None:
    if not isinstance(value, tuple) or len(value) != (len(value) if count is None else count):
        numbers = "a tuple of numbers" if count is None else f"{count} numbers"
        raise ValueError(f"{name}: {parameter} must be {numbers}; got {value!r}")
    for number in value:
        checks.check_number(name, parameter, number, low, high)


def _tuples(value: Any) -> Any:
    """JSON has lists where the dataclasses have tuples."""
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return value
