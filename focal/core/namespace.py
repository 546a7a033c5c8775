"""What the core asks of a framework.

The core is written against `xp`, a module (or any object) that offers the functions below.
Most are those of the array API standard. The rest exist because a framework does them better than
a composition would: a fused operation, a registered derivative, a loop that can be traced. Each
adapter binds them once, in `_namespace.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

__all__ = [
    "Array",
    "Formula",
    "Framework",
    "In",
    "Namespace",
    "Out",
    "Reduction",
    "SparseReduction",
]

Array = Any
"""An array of the bound framework, whichever it is."""

In = TypeVar("In", bound=Any)
"""What a framework takes for an array."""
Out = TypeVar("Out", bound=Any)
"""The arrays that it returns."""

Reduction = Literal["none", "mean", "sum"]
SparseReduction = Literal["none", "mean", "sum", "positives"]


class Formula(Protocol):
    """An elementwise loss of logits `x` and targets `t`, with its derivatives in `x`.

    It is a named tuple of its parameters: numbers, arrays without axes, or formulas.
    `t` is an array of the shape of `x`, a number, or (where a formula says so) an integer
    array of labels that lacks the last axis of `x`.
    """

    def value(self, xp: Namespace, x: Array, t: Array) -> Array:
        """The loss."""

    def value_and_grad(self, xp: Namespace, x: Array, t: Array) -> tuple[Array, Array]:
        """The loss and its first derivative, which share most of their work."""

    def hess(self, xp: Namespace, x: Array, t: Array) -> Array:
        """The second derivative, in operations that the framework can differentiate again."""


class Namespace(Protocol):
    """The functions the core may call."""

    # Array API standard
    abs: Callable[..., Array]
    any: Callable[..., Array]
    argsort: Callable[..., Array]
    astype: Callable[..., Array]
    clip: Callable[..., Array]
    concat: Callable[..., Array]
    exp: Callable[..., Array]
    finfo: Callable[..., Any]
    isdtype: Callable[..., bool]
    log: Callable[..., Array]
    log1p: Callable[..., Array]
    max: Callable[..., Array]
    maximum: Callable[..., Array]
    minimum: Callable[..., Array]
    moveaxis: Callable[..., Array]
    reshape: Callable[..., Array]
    sqrt: Callable[..., Array]
    stack: Callable[..., Array]
    sum: Callable[..., Array]
    take: Callable[..., Array]
    take_along_axis: Callable[..., Array]
    where: Callable[..., Array]
    zeros_like: Callable[..., Array]

    float32: Any
    index_type: Any
    array_name: str
    """How error messages call an array of this framework, such as "a torch.Tensor"."""

    def to_array(self, value: object) -> Array | None:
        """`value` as an array if this framework takes it for one, else None."""

    def constant(self, value: Any, like: Array) -> Array:
        """An array as one of this framework, where `like` is (device)."""

    def shape(self, x: Array) -> tuple[Any, ...]:
        """`x.shape`, with a scalar array for a size that is not known while tracing."""

    def to_numpy(self, x: Array) -> Any | None:
        """As a NumPy array, or None where x is traced or reading it would synchronize a device."""

    def stop_gradient(self, x: Array) -> Array:
        """The array as a constant for autodiff."""

    # Stable primitives, differentiable by the framework
    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + exp(-x)), with full relative accuracy where it is small."""

    def softplus(self, x: Array) -> Array:
        """log(1 + exp(x)), with full relative accuracy where it is small."""

    def logsumexp(self, x: Array) -> Array:
        """log(sum(exp(x))) over the last axis."""

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k greatest of the last axis and where they are, greatest first."""

    def take_rows(self, x: Array, indices: Array) -> Array:
        """x[..., indices[..., n], :] of each n, with equal leading axes."""

    # Fused where the framework can
    def step(self, x: Array) -> Array:
        """1 where x >= 0, else 0, in the type of x."""

    def addcmul(self, a: Array, b: Array, c: Array) -> Array:
        """A + b * c."""

    def put_along_axis(self, x: Array, indices: Array, values: Array) -> Array:
        """Put `values` at `indices` of the last axis, one per row; x may be overwritten."""

    def keep_rows(self, x: Array, keep: Array) -> Array:
        """Make rows zero where `keep` (it lacks the last axis) is false; x may be overwritten."""

    # The registered derivative
    def pointwise(self, formula: Formula, x: Array, t: Array) -> Array:
        """`formula.value` in the type of x, computed in float32 or better."""

    def pointwise_sum(self, formula: Formula, x: Array, t: Array) -> Array:
        """The sum of `formula.value`, in float32 or better."""

    def label_margin(self, x: Array, at: Array, valid: Array) -> Array:
        """The first result of `focal.core.softmax.margin`, differentiable."""

    softmax_pass: Callable[..., Array] | None
    """A faster way to the softmax focal loss of each row, without alphas; or None.

    It takes the function (x, at, valid) that it stands for, gamma, the smoothing, x, at and valid.
    """

    # Loops that may be traced
    def fori_loop(self, n: Any, body: Callable[[Any, Any], Any], state: Any) -> Any:
        """State = body(i, state) for i in 0 .. n - 1; i computes with the type of the state."""

    def while_loop(
        self, condition: Callable[..., Array], body: Callable[..., Any], state: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        """State = body(*state) while condition(*state)."""

    def fixed_point(self, step: Callable[[Array], Array], start: Array) -> Array:
        """start, step(start), step(step(start)), ... until nothing changes."""

    def take_box(self, boxes: Array, i: Any) -> Sequence[Array]:
        """The four coordinates of boxes[..., i, :], each with a new last axis of length 1."""

    sweep: Callable[..., Array] | None
    """The loop of `focal.core.nms` over blocks, where a plain one will not do; else None."""

    def boxes_at_once(self, boxes: Array) -> int:
        """How many boxes to compare with all anchors at once."""

    def box_kernels(self, boxes: Array, others: Array | None) -> Any | None:
        """`match` and `suppress` in a few kernels, where there are some.

        They are for float anchors and boxes, or for boxes and perhaps their integer classes.
        """

    def compress(self, rows: Sequence[Array], keep: Array) -> Sequence[Array]:
        """row[keep] of each row; the rows as they are where that may not depend on values."""

    def compiled(self, function: Callable[..., Any], xp: Namespace, *arrays: Any) -> Any:
        """function(xp, *arrays), as one program where operations are compiled one by one."""

    def select(
        self, function: Callable[..., tuple[Array, Array]], xp: Namespace, *arrays: Any
    ) -> Array:
        """order[keep] of order, keep = function(xp, *arrays).

        Where shapes must be static: padded with -1 to the length of `order`. `function` gives the
        same for arrays that were made longer, floats with NaN and integers with 0.
        """

    def random(self, like: Array) -> Array | None:
        """Uniform numbers in [0, 1) of the shape of `like`, new at every call.

        None where a trace would make them constants.
        """


class Framework(Namespace, Protocol[In, Out]):
    """A namespace and the types of its arrays.

    Public functions ask for this one, so that `focal.core.bind.bind` can give them the types of a
    framework.
    """

    input_type: type[In]
    array_type: type[Out]
