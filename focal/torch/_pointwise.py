"""A formula of the core as a differentiable PyTorch operation.

Three `autograd.Function`s: the loss of each logit, its derivative times a scale (which can be
differentiated again), and the sum. They keep logits and targets and recompute the rest. Only
the sum works out its gradient together with the loss, where no kernel makes that a loss: one
pass over the logits instead of two, and the memory is that of the gradient, which is needed
next anyway.

In eager mode a pass is one kernel where there is Triton and a GPU for it. Otherwise it goes
block by block, so that temporaries stay in the cache and nothing but the result has the size of
the logits. `torch.compile` is given the whole formula: its own kernel reads and writes as little
as ours, and takes in what comes before and after the loss.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from focal.core.formulas import SigmoidFocal, Sparse
from focal.core.namespace import Formula, Namespace
from focal.kernels import torch_cpu
from focal.torch import _ops

__all__ = ["pointwise", "pointwise_sum"]

xp = cast(Namespace, _ops)
Targets = Tensor | float

CPU_KERNELS = torch_cpu.Kernels(xp)
CPU_BLOCK = 1 << 18
"""Elements per block: larger ones leave the cache, smaller ones wait for Python."""
DEVICE_BLOCK = 1 << 22
"""Large enough that launching kernels costs nothing beside running them."""
TRITON_DEVICE = "cuda"
"""Where the kernels of Triton run; its interpreter, for tests, runs them on the CPU."""
BATCHED = tuple(torch._C._dispatch_key_parse(name) for name in ("Batched", "FuncTorchBatched"))
"""What dispatch keys tell of a tensor that a vmap runs over."""


def pointwise(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """`formula.value` in the type of x, with its registered derivative."""
    if torch.compiler.is_compiling():
        return _Value.apply(x, t, formula)
    if isinstance(t, Tensor) and t.requires_grad:
        # Learned targets are rare: autograd adds the derivative in t to the registered one.
        by_t = formula.value(xp, *_wide_pair(x.detach(), t)).to(x.dtype)
        return _EagerValue.apply(x, t.detach(), formula) + (by_t - by_t.detach())
    return _EagerValue.apply(x, t, formula)


def pointwise_sum(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """The sum of `formula.value`, in float32 or better."""
    if torch.compiler.is_compiling() or (isinstance(t, Tensor) and t.requires_grad):
        return pointwise(formula, _wide(x), t).sum()
    # The slope of half-precision logits would be rounded before it is scaled: recompute it.
    with_slope = torch.is_grad_enabled() and x.requires_grad and _wide(x) is x
    with_slope = with_slope and _kernels(formula, x, t) in (None, CPU_KERNELS)
    return _Sum.apply(x, t, formula, with_slope)[0]


class _Value(torch.autograd.Function):
    """FL(x, t) of each logit."""

    @staticmethod
    def forward(x: Tensor, t: Targets, formula: Formula) -> Tensor:
        if (kernels := _kernels(formula, x, t)) is not None:
            flatten, restore = _layout(x, t)
            return restore(kernels.value(formula, flatten(x), flatten(t)))
        return _by_block(functools.partial(formula.value, xp), x, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, *inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t = _saved(ctx)
        if torch.compiler.is_compiling():
            slope = ctx.formula.value_and_grad(xp, *_wide_pair(x, t))[1]
            return (slope * grad).to(x.dtype), None, None
        return _Slope.apply(x, t, grad, ctx.formula), None, None


class _EagerValue(_Value):
    """What `torch.func` needs in addition, which `torch.compile` does not take."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, t: Targets, formula: Formula
    ) -> tuple[Tensor, int]:
        x, t = _batch_first(info.batch_size, in_dims, x, t)
        return _EagerValue.apply(x, t, formula), 0

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, *_: Any) -> Tensor:
        x, t = _saved(ctx)
        return _Slope.apply(x, t, x_tangent, ctx.formula)


class _Slope(torch.autograd.Function):
    """scale * dFL/dx, with `scale` of the shape of x or a scalar."""

    @staticmethod
    def forward(x: Tensor, t: Targets, scale: Tensor, formula: Formula) -> Tensor:
        if (kernels := _kernels(formula, x, t, scale)) is not None:
            flatten, restore = _layout(x, t)
            by = flatten(scale) if scale.ndim else scale
            return restore(kernels.slope(formula, flatten(x), flatten(t), by))

        def block(xb: Tensor, tb: Targets, sb: Tensor = scale) -> Tensor:
            return formula.value_and_grad(xp, xb, tb)[1] * sb

        if scale.ndim or _is_batched(scale):
            return _by_block(block, x, t, scale)
        return _by_block(block, x, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, t, scale, formula = inputs
        _save(ctx, x, t, formula, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t, scale = _saved(ctx)
        by_x = by_scale = None
        if ctx.needs_input_grad[0]:
            by_x = (_wide(grad) * _wide(scale) * _hess(ctx.formula, x, t)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            by_scale = _Slope.apply(x, t, grad, ctx.formula)
            by_scale = (by_scale if scale.ndim else by_scale.sum()).to(scale.dtype)
        return by_x, None, by_scale, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        t: Targets,
        scale: Tensor,
        formula: Formula,
    ) -> tuple[Tensor, int]:
        x, t = _batch_first(info.batch_size, in_dims, x, t)
        if in_dims[2] is not None:
            scale = scale.movedim(in_dims[2], 0)
            scale = scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
        return _Slope.apply(x, t, scale.expand_as(x), formula), 0

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, _: Any, scale_tangent: Any, __: Any) -> Tensor:
        x, t, scale = _saved(ctx)
        result = torch.zeros_like(x)
        if x_tangent is not None:
            result = result + x_tangent * scale * _hess(ctx.formula, x, t).to(x.dtype)
        if scale_tangent is not None:
            result = result + _Slope.apply(x, t, scale_tangent, ctx.formula)
        return result


class _Sum(torch.autograd.Function):
    """The sum of FL(x, t), and dFL/dx for the first backward pass."""

    @staticmethod
    def forward(x: Tensor, t: Targets, formula: Formula, with_slope: bool) -> tuple[Tensor, Tensor]:
        kernels = _kernels(formula, x, t)
        flatten, restore = _layout(x, t)
        if kernels is not None and not with_slope:
            return kernels.total(formula, flatten(x), flatten(t)), x.new_empty(0)
        if kernels is CPU_KERNELS:
            total, slope = kernels.total_and_slope(formula, flatten(x), flatten(t))
            return total, restore(slope)
        sums: list[Tensor] = []

        def block(xb: Tensor, tb: Targets) -> Tensor | None:
            slope = None
            if with_slope:
                value, slope = formula.value_and_grad(xp, xb, tb)
            else:
                value = formula.value(xp, xb, tb)
            sums.append(value.sum())
            return slope

        slope = _by_block(block, x, t, output=with_slope)
        return torch.stack(sums).sum(), slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, t, formula, with_slope = inputs
        _save(ctx, x, t, formula)
        ctx.slope = output[1].detach() if with_slope else None
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        slope, ctx.slope = ctx.slope, None
        if slope is not None and not (torch.is_grad_enabled() or _is_batched(grad)):
            # On a CPU it costs nothing to see that there is nothing to scale.
            is_one = type(grad) is Tensor and grad.device.type == "cpu" and bool(grad == 1)
            return slope if is_one else slope.mul_(grad), None, None, None
        # A second pass through the graph, or one that is itself differentiated.
        x, t = _saved(ctx)
        return _Slope.apply(x, t, grad, ctx.formula), None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        t: Targets,
        formula: Formula,
        with_slope: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
        x, t = _batch_first(info.batch_size, in_dims, x, t)
        losses = _EagerValue.apply(_wide(x), t, formula)
        return (losses.reshape(info.batch_size, -1).sum(1), x.new_empty(0)), (0, None)

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        x, t = _saved(ctx)
        return _wide(_Slope.apply(x, t, x_tangent, ctx.formula)).sum(), None


def _hess(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    return formula.hess(xp, *_wide_pair(x, t))


def _save(ctx: Any, x: Tensor, t: Targets, formula: Formula, *more: Tensor) -> None:
    """Keep the arguments; targets may be a tensor or a number."""
    tensors = (x, t, *more) if isinstance(t, Tensor) else (x, *more)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.formula = formula
    ctx.number = None if isinstance(t, Tensor) else t


def _saved(ctx: Any) -> tuple[Any, ...]:
    """The tensors of `_save`, with the targets in second place."""
    tensors = ctx.saved_tensors
    return tensors if ctx.number is None else (tensors[0], ctx.number, *tensors[1:])


def _wide(x: Tensor) -> Tensor:
    """Half types as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _wide_pair(x: Tensor, t: Targets) -> tuple[Tensor, Targets]:
    """Logits and dense targets in the type to compute in; labels and numbers as they are."""
    x = _wide(x)
    return x, t.to(x.dtype) if isinstance(t, Tensor) and t.shape == x.shape else t


def _batch_first(
    size: int, in_dims: tuple[Any, ...], x: Tensor, t: Targets
) -> tuple[Tensor, Targets]:
    """Logits and targets with the axis that vmap adds in front."""
    first, second = (
        a
        if not isinstance(a, Tensor)
        else a.expand(size, *a.shape)
        if d is None
        else a.movedim(d, 0)
        for a, d in zip((x, t), in_dims, strict=False)
    )
    return first, second


def _is_batched(a: Any) -> bool:
    """Whether a vmap runs over the backward pass, so that nothing can be written in place.

    `torch.autograd.grad(..., is_grads_batched=True)` has a batching of its own that reaches
    the inside of an `autograd.Function`; only the dispatch keys tell.
    """
    if not isinstance(a, Tensor):
        return False
    keys = torch._C._dispatch_keys(a)
    return any(keys.has(key) for key in BATCHED)


def _has_kernel(formula: Formula, x: Tensor, t: Targets, *more: Tensor) -> bool:
    """Whether kernels know this formula, and may go at the memory of these operands.

    What traces operations, or computes them elsewhere, must be given the formula instead.
    """
    loss = formula.formula if isinstance(formula, Sparse) else formula
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not (isinstance(loss, SigmoidFocal) and isinstance(t, Tensor))
        or (isinstance(formula, Sparse) and formula.smoothing != 0)
        or x.numel() == 0
        or is_in_torch_dispatch_mode()
        or any(type(a) not in (Tensor, Parameter) or _is_batched(a) for a in (x, t, *more))
    )


def _kernels(formula: Formula, x: Tensor, t: Targets, *more: Tensor) -> Any:
    """`focal.kernels.torch_triton` or its like for a CPU, where one takes these operands."""
    if not _has_kernel(formula, x, t, *more):
        return None
    if x.device.type == TRITON_DEVICE:
        kernels = _triton_on(x.device)
        if kernels and kernels.takes(x, t, *more):
            return kernels
    return CPU_KERNELS if x.device.type == "cpu" else None


@functools.cache
def _triton_on(device: torch.device) -> ModuleType | None:
    """The kernels of Triton, where it is installed and able to compile for this device."""
    try:
        from focal.kernels import torch_triton
    except ImportError:
        return None
    try:
        one = torch.ones(1, device=device)
        torch_triton.total(SigmoidFocal(None, 2.0), one, one)
    except Exception as error:  # no C compiler, an unknown GPU: Triton has no common exception
        warnings.warn(
            f"Triton cannot compile for {device}, focal does without: {error}", stacklevel=2
        )
        return None
    return torch_triton


def _by_block(
    function: Callable[..., Tensor | None],
    x: Tensor,
    t: Targets,
    *more: Tensor,
    output: bool = True,
) -> Tensor:
    """function(x, t, *more) elementwise, block by block, into a new tensor like x.

    Without `output` the function is only called, and the result is empty.
    """
    if torch.compiler.is_compiling() or any(map(_is_batched, (x, t, *more))):
        return cast(Tensor, function(*_wide_pair(x, t), *more)).to(x.dtype)
    flatten, restore = _layout(x, t)
    flat = flatten(x)
    result = flat.new_empty(flat.shape) if output else x.new_empty(0)
    size = CPU_BLOCK if x.device.type == "cpu" else DEVICE_BLOCK
    rows = max(1, size // max(1, math.prod(flat.shape[1:])))
    operands = [flat, t, *more]
    blocks = [flatten(a).split(rows) if isinstance(a, Tensor) else None for a in operands[1:]]
    for i, xb in enumerate(flat.split(rows)):
        tb, *rest = (t if b is None else b[i] for b in blocks)
        values = function(*_wide_pair(xb, tb), *rest)
        if output:
            result[i * rows : i * rows + len(xb)] = cast(Tensor, values)
    return restore(result) if output else result


def _layout(x: Tensor, t: Targets) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How to walk through memory: to one row per target, and back to the shape of x.

    Dense operands are taken in the memory order of x, so that channels-last logits (or any
    other permutation) are neither copied nor walked against the grain.
    """
    if isinstance(t, Tensor) and t.shape != x.shape:
        classes = x.shape[-1]

        def flatten_rows(a: Tensor) -> Tensor:
            return a.reshape(-1, classes) if a.ndim == x.ndim else a.reshape(-1)

        return flatten_rows, lambda flat: flat.view(x.shape)

    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    shape = [x.shape[d] for d in order]
    inverse = sorted(range(x.ndim), key=order.__getitem__)
    return (
        lambda a: a.permute(order).reshape(-1),
        lambda flat: flat.view(shape).permute(inverse),
    )
