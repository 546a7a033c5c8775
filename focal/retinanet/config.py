"""What a RetinaNet is and how it is trained: two frozen dataclasses.

Together they hold everything that is needed to repeat a run. `RetinaNetConfig` describes the
detector (network, anchors, target rules, loss, inference) and is stored in the weights file;
`TrainConfig` describes one training run. Every field is checked by its annotation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from focal.core import checks
from focal.core.anchors import AnchorConfig

__all__ = ["FORMER", "BackboneName", "RetinaNetConfig", "TrainConfig", "parse_fields"]

BackboneName = Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d"]

# Integers with their least value, numbers with their range
Count = Annotated[int, 1]
Natural = Annotated[int, 0]
Id = Annotated[int, -(2**63)]
Number = Annotated[float, (-checks.INFINITY, checks.INFINITY)]
NonNegative = Annotated[float, (0, checks.INFINITY)]
Positive = Annotated[float, (1e-6, checks.INFINITY)]
Fraction = Annotated[float, (0, 1)]
Size = tuple[Count, Count]


FORMER = {"canvas": "image_size", "normaliser": "normalizer"}
"""Old names of fields, which work for one release."""


def _current(values: Mapping[str, Any], warns: bool = True) -> dict[str, Any]:
    """The values under the current names of the fields."""
    for name in values.keys() & FORMER.keys():
        if FORMER[name] in values:
            raise TypeError(f"RetinaNetConfig: {name} is the old name of {FORMER[name]}; got both")
        if warns:
            warnings.warn(
                f"RetinaNetConfig.{name} is deprecated and will be removed; use {FORMER[name]}",
                DeprecationWarning,
                stacklevel=3,
            )
    return {FORMER.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True)
class _Config:
    """What the two have in common."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
            _check(type(self).__name__, name, getattr(self, name), hint)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Unpickle, also what was pickled under old names."""
        self.__dict__.update(_current(state, warns=False))

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **_current(changes))

    def to_json(self) -> str:
        """The config as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**parse_fields(json.loads(text)))


@dataclass(frozen=True)
class RetinaNetConfig(_Config):
    """The detector: network, anchors, targets, loss and inference.

    The defaults are the paper's RetinaNet-50 (arXiv:1708.02002), except for the image size.
    """

    classes: tuple[str, ...] = ()
    """Names of the foreground classes; class index k is `classes[k]`. Their number is K."""
    category_ids: tuple[Id, ...] = ()
    """The id of each class in the COCO files that the detector reads and writes; (): 1 to K."""
    image_size: Size = (1024, 1024)
    """(height, width) in pixels of the canvas. Images are scaled to fit it, keeping their aspect
    ratio, and padded."""

    # Network
    backbone: BackboneName = "resnet50"
    norm: Literal["batch", "frozen_batch", "group"] = "frozen_batch"
    """Normalization in the backbone. `frozen_batch` only makes sense with pretrained weights."""
    levels: tuple[Natural, ...] = (3, 4, 5, 6, 7)
    channels: Count = 256
    p6_from: Literal["c5", "p5"] = "c5"
    head_depth: Natural = 4
    head_norm: Literal["none", "group"] = "none"
    prior: Number = 0.01
    """The score of every class in a new network; 0.5 means a bias of 0."""

    # Anchors and targets
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    foreground: Fraction = 0.5
    background: Fraction = 0.4
    allow_low_quality: bool | Fraction = False

    # Loss
    loss: Literal["focal", "focal_star", "ohem"] = "focal"
    """Classification loss: focal loss (gamma 0 is cross entropy), FL*, or OHEM."""
    alpha: Number | None = 0.25
    gamma: NonNegative = 2.0
    star_beta: Number = 1.0
    """The shift of FL*."""
    ohem_examples: Count = 128
    """The largest number of hard examples per image."""
    ohem_iou: Fraction = 0.7
    """OHEM's NMS threshold: of two anchors above this IoU, the one with the smaller loss is
    dropped."""
    ohem_ratio: NonNegative | None = None
    """Negatives per positive, 3 in the variant "1:3"; None: the hardest examples of any kind."""
    box_loss: Literal["smooth_l1", "giou"] = "smooth_l1"
    box_beta: NonNegative = 1.0
    """Where smooth L1 turns from quadratic to linear; 0 is L1."""
    box_weight: NonNegative = 1.0
    normalizer: Literal["batch", "image", "ema"] = "batch"
    """Divide by the positives of the batch (paper), of each image, or by a running mean."""

    # Inference
    score_threshold: Fraction = 0.05
    candidates: Count = 1000
    """Top-scoring predictions kept per level before NMS."""
    nms_threshold: Fraction = 0.5
    max_detections: Count = 100

    # Input: RGB in [0, 255] becomes (image / 255 - mean) / std
    mean: tuple[Fraction, Fraction, Fraction] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "RetinaNetConfig"
        checks.check_number(name, "background", self.background, 0, self.foreground)
        checks.check_alpha(name, self.alpha)
        if self.category_ids and len(self.category_ids) != len(self.classes):
            raise ValueError(
                f"{name}: category_ids must be () or one for each of the {len(self.classes)} "
                f"classes; got {len(self.category_ids)}"
            )
        strides = tuple(2**level for level in self.levels)
        if self.anchors.strides != strides:
            raise ValueError(
                f"{name}: anchors.strides must be those of levels {self.levels}, {strides}; "
                f"got {self.anchors.strides}"
            )

    if not TYPE_CHECKING:  # a type checker would accept any name

        def __getattr__(self, name: str) -> Any:
            if name not in FORMER:
                raise AttributeError(f"RetinaNetConfig has no field {name!r}")
            _current({name: None})
            return getattr(self, FORMER[name])

    @property
    def fill(self) -> tuple[int, ...]:
        """The mean color, in [0, 255], that images are padded with."""
        return tuple(round(255 * x) for x in self.mean)

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes; there is no background class."""
        return len(self.classes)


_init = RetinaNetConfig.__init__


@functools.wraps(_init)
def _init_by_any_name(self: RetinaNetConfig, *values: Any, **named: Any) -> None:
    _init(self, *values, **_current(named))


RetinaNetConfig.__init__ = _init_by_any_name  # type: ignore[method-assign]


@dataclass(frozen=True)
class TrainConfig(_Config):
    """One training run. The defaults are the paper's schedule."""

    steps: Count = 90_000
    batch_size: Count = 16
    """Images per step, over all replicas."""
    accumulate: Count = 1
    """Gradient-accumulation steps."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: NonNegative = 0.01
    reference_batch: Count | None = None
    """The batch size that `learning_rate` is meant for; the rate is scaled in proportion to
    `batch_size`. None: it is used as it is."""
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[Fraction, ...] = (60 / 90, 80 / 90)
    """Fractions of `steps` at which the learning rate is divided by 10 (schedule "step")."""
    warmup: Natural = 500
    clip_norm: NonNegative | None = None
    ema: Fraction | None = None
    """Decay of the moving average of the weights that is evaluated and saved; None: off."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 where the hardware is known to be faster with it, else float32."""
    compile: bool = False
    """`torch.compile`, or XLA in TensorFlow. JAX always compiles."""
    recompute: bool = False
    """Activation checkpointing of residual blocks and subnets."""
    freeze: Annotated[int, 0, 5] = 0
    """Stages of the backbone whose weights and statistics stay as they are: 1 is the stem, 5 the
    whole backbone, without the feature pyramid (FREEZE_AT in detectron2)."""

    # Input
    crop: Size | None = None
    """(height, width) of the training canvas; None trains on the whole canvas."""
    zoom: tuple[Positive, Positive] = (1.0, 1.0)
    """Range of the random scale applied before cropping."""
    flips: Literal["none", "horizontal", "d4"] = "horizontal"
    """`d4`: the 8 symmetries of the square, for images without a natural orientation."""
    jitter: Fraction = 0.0
    """Strength of the random brightness, contrast and saturation, 0 to 1."""
    workers: Natural | None = None
    """Threads that read, augment and collate; 0: none. None: cores less one, from 1 to 8."""

    # Records
    log_every: Count = 20
    eval_every: Natural = 0
    """Steps between evaluations on the validation split; 0: only at the end."""
    patience: Natural = 0
    """Stop after this many evaluations in a row without a better AP; 0: never."""
    save_every: Natural = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """How many checkpoints are kept, newest first."""
    seed: Natural = 0

    def __post_init__(self) -> None:
        if str(self.flips) == "eightfold":  # its old name
            object.__setattr__(self, "flips", "d4")
        super().__post_init__()
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"TrainConfig: zoom must be (least, most); got {self.zoom!r}")

    def average_decay(self, step: int) -> float:
        """The weight of the old moving average in step `step`.

        It is small in early steps, so that the average soon forgets the initial weights.
        """
        return min(self.ema or 0.0, (1 + step) / (10 + step))


def parse_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as JSON has them, as the dataclasses take them: tuples, and `AnchorConfig`."""
    fields = {
        k: tuple(v) if isinstance(v, list) else v for k, v in _current(values, warns=False).items()
    }
    if isinstance(anchors := values.get("anchors"), dict):
        fields["anchors"] = AnchorConfig(**parse_fields(anchors))
    return fields


def _check(owner: str, name: str, value: Any, hint: Any) -> None:
    """Whether a value is what an annotation in this file says."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        if type(value) not in inner:  # neither None nor a bool, where these may be
            (hint,) = set(inner) - {NoneType, bool}
            _check(owner, name, value, hint)
    elif kind is Literal:
        checks.check_choice(owner, name, value, inner)
    elif kind is tuple:
        count = None if inner[-1] is ... else len(inner)
        if not isinstance(value, tuple) or count not in (None, len(value)):
            kind = "names" if inner[0] is str else "numbers"
            wanted = f"a tuple of {kind}" if count is None else f"{count} {kind}"
            wanted = "(height, width)" if hint == Size else wanted
            raise ValueError(f"{owner}: {name} must be {wanted}; got {value!r}")
        for item in value:
            _check(owner, name, item, inner[0])
    elif kind is Annotated and inner[0] is int:
        checks.check_integer(owner, name, value, *inner[1:])
    elif kind is Annotated:
        checks.check_number(owner, name, value, *inner[1])
    elif not isinstance(value, hint):
        words = {bool: "True or False", str: "text", AnchorConfig: "an AnchorConfig"}
        raise TypeError(f"{owner}: {name} must be {words[hint]}; got {value!r}")
