"""The operations of the core's array namespace on PyTorch (all but `pointwise`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import (  # noqa: F401  (the part that has the standard's names)
    Tensor,
    abs,
    clip,
    exp,
    finfo,
    float32,
    log,
    log1p,
    sigmoid,
    sqrt,
    zeros_like,
)
from torch import int64 as index_type  # noqa: F401
from torch import movedim as moveaxis  # noqa: F401  (moveaxis itself has no rule for vmap)

from focal.torch._dispatch import is_plain

array_name = "a torch.Tensor"

DEVICE_BOXES = 16
"""Boxes per operation of matching on a device."""
DEVICE_ROUNDS = 8
"""Rounds of `fixed_point` on a device before the host waits for it, to look whether it is done."""


def to_array(value: object) -> Tensor | None:
    """Tensors only: a copy of a list would have another device and no gradient."""
    return value if isinstance(value, Tensor) else None


def constant(value: Any, like: Tensor | None) -> Tensor:
    """An array as a tensor on the device of `like`."""
    return torch.as_tensor(value, device=None if like is None else like.device)


def to_numpy(x: Tensor) -> Any | None:
    """On a CPU, in eager mode."""
    return x.detach().numpy() if x.device.type == "cpu" and is_plain(x) else None


def stop_gradient(x: Tensor) -> Tensor:
    """A constant in the eyes of autodiff."""
    return x.detach()


# The standard part, where PyTorch has other names


def isdtype(dtype: torch.dtype, kind: str | tuple[str, ...]) -> bool:
    """Whether a type is of one of the array API's kinds."""
    if dtype == torch.bool:
        own = "bool"
    elif dtype.is_complex:
        own = "complex floating"
    else:
        own = "real floating" if dtype.is_floating_point else "integral"
    return own == kind or (isinstance(kind, tuple) and own in kind)


def astype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """No copy where the type is already right."""
    return x.to(dtype)


def argsort(x: Tensor, axis: int = -1, stable: bool = True) -> Tensor:
    """Rising order; equal values keep theirs."""
    return torch.argsort(x, dim=axis, stable=stable)


def any(x: Tensor, axis: int) -> Tensor:
    """Over one axis."""
    return torch.any(x, dim=axis)


def max(x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
    """Over one axis."""
    return torch.amax(x, dim=axis, keepdim=keepdims)


def sum(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Over one axis or all."""
    return torch.sum(x) if axis is None else torch.sum(x, dim=axis, keepdim=keepdims)


def maximum(x: Tensor, y: Tensor | float) -> Tensor:
    """Of a tensor and a tensor or a number; at equality with a number, x gets the gradient."""
    if isinstance(y, Tensor):
        return torch.maximum(x, y)
    return where(x < y, y, x) if _differentiated(x) else torch.clamp(x, min=y)


def minimum(x: Tensor, y: Tensor | float) -> Tensor:
    """Of a tensor and a tensor or a number; at equality with a number, x gets the gradient."""
    if isinstance(y, Tensor):
        return torch.minimum(x, y)
    return where(x > y, y, x) if _differentiated(x) else torch.clamp(x, max=y)


def _differentiated(x: Tensor) -> bool:
    """Whether the gradient at a limit may matter: since PyTorch 2.15 that of a clamp is 0 there."""
    return x.requires_grad or not is_plain(x)


def where(condition: Tensor, x: Tensor | float, y: Tensor) -> Tensor:
    """With a number on the left, a fill: several times faster on a CPU."""
    if isinstance(x, Tensor):
        return torch.where(condition, x, y)
    return torch.masked_fill(y, condition, x)


def stack(arrays: Sequence[Tensor], axis: int) -> Tensor:
    """Along a new axis."""
    return torch.stack(list(arrays), dim=axis)


def concat(arrays: Sequence[Tensor], axis: int) -> Tensor:
    """Along an axis."""
    return torch.cat(list(arrays), dim=axis)


def shape(x: Tensor) -> tuple[int, ...]:
    """All sizes are known."""
    return tuple(x.shape)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In row-major order."""
    return torch.reshape(x, shape)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of the last axis and where they are, greatest first."""
    if k == 1:  # much faster
        values, indices = torch.max(x, dim=-1, keepdim=True)
    else:
        values, indices = torch.topk(x, k)
    return values, indices


def take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """The slices at one-dimensional `indices`."""
    return torch.index_select(x, axis, indices)


def take_along_axis(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """One element per index."""
    return torch.gather(x, axis, indices.long())


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """x[..., indices[..., n], :] of each n."""
    shape = (*indices.shape, x.shape[-1])
    return torch.gather(x, -2, indices.long()[..., None].expand(shape))


# Stable primitives


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); PyTorch's own softplus is linear from 20 on, too early for float64."""
    return -torch.nn.functional.logsigmoid(-x)


def logsumexp(x: Tensor) -> Tensor:
    """Over the last axis."""
    return torch.logsumexp(x, dim=-1)


# Fused operations


def _recorded(*operands: Tensor) -> bool:
    """Whether autograd or a trace records the operations, so that none may be in place."""
    return torch.is_grad_enabled() or not is_plain(*operands)


def step(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0; without a conversion where nothing records it."""
    if _recorded(x):
        return (x >= 0).to(x.dtype)
    return torch.ge(x, 0, out=torch.empty_like(x))


def addcmul(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor | float:
    """A + b * c."""
    if not isinstance(b, Tensor):
        return a + b * c
    if isinstance(a, Tensor) and isinstance(c, Tensor):
        return torch.addcmul(a, b, c)
    if isinstance(a, Tensor) or isinstance(c, Tensor):
        return b * c + a
    return torch.rsub(b, a, alpha=-c)


def put_along_axis(x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """One value replaced in each row; in place where nothing records it."""
    if _recorded(x, indices, values):
        return torch.scatter(x, -1, indices.long(), values)
    return x.scatter_(-1, indices.long(), values)


def keep_rows(x: Tensor, keep: Tensor) -> Tensor:
    """Rows that are not kept become exact zeros."""
    if _recorded(x, keep) or x.device.type != "cpu":
        return torch.masked_fill(x, ~keep[..., None], 0)
    # A mask that broadcasts is slow on a CPU, where `nonzero` needs no synchronization.
    dropped = torch.nonzero(~keep.reshape(-1))[:, 0]
    return x.reshape(keep.numel(), x.shape[-1]).index_fill_(0, dropped, 0).view(x.shape)


# Loops


def fori_loop(n: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """A plain loop."""
    for i in range(n):
        state = body(i, state)
    return state


def while_loop(
    condition: Callable[..., Tensor], body: Callable[..., Any], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A plain loop; while compiling or exporting, one of the graph."""
    if torch.compiler.is_compiling():
        return torch.while_loop(condition, body, state)
    while condition(*state):
        state = body(*state)
    return state


def fixed_point(step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Repeat until nothing changes; while compiling or exporting, as a loop of the graph."""
    if torch.compiler.is_compiling():

        def changed(before: Tensor, now: Tensor) -> Tensor:
            return torch.any(before != now)

        def again(_: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
            return now.clone(), step(now)  # no result of a loop may be one of its arguments

        return torch.while_loop(changed, again, (start.clone(), step(start)))[1]
    while True:
        for _ in range(_rounds(start) - 1):
            start = step(start)
        following = step(start)
        if torch.equal(following, start):
            return following
        start = following


def _rounds(x: Tensor) -> int:
    return 1 if x.device.type == "cpu" else DEVICE_ROUNDS


def take_box(boxes: Tensor, i: int) -> tuple[Tensor, ...]:
    """x1, y1, x2, y2 of box i of each list."""
    return boxes[..., i, :].split(1, dim=-1)


def boxes_at_once(boxes: Tensor) -> int:
    """One fits the cache of a CPU, and is all that a compiler needs; a device launches less."""
    return 1 if boxes.device.type == "cpu" or torch.compiler.is_compiling() else DEVICE_BOXES


sweep = None


def compress(rows: Sequence[Tensor], keep: Tensor) -> Sequence[Tensor]:
    """The kept ones; a batch must stay rectangular, and a graph must know its shapes."""
    if keep.ndim > 1 or torch.compiler.is_compiling():
        return rows
    at = torch.nonzero(keep)[:, 0]
    return [row[at] for row in rows]


def compiled(function: Callable[..., Any], xp: Any, *arrays: Any) -> Any:
    """Eager operations are compiled already."""
    return function(xp, *arrays)


def select(function: Callable[..., tuple[Tensor, Tensor]], xp: Any, *arrays: Any) -> Tensor:
    """The kept ones."""
    order, keep = function(xp, *arrays)
    return order[keep]


def random(like: Tensor) -> Tensor:
    """From PyTorch's own generator, which `torch.manual_seed` seeds; a graph draws anew as well."""
    return torch.rand(like.shape, device=like.device)
