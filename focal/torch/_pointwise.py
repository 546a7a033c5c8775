"""A formula of the core as a differentiable PyTorch operation.

Three `autograd.Function`s: the loss of each logit, its derivative times a scale (which can be
differentiated again), and the sum. They save their operands and recompute the rest. Only the sum
computes its gradient in the forward pass, except with Triton, whose kernels are faster without:
one pass over the logits instead of two, for the memory of a gradient that is needed next anyway.

The operands are the logits, the targets and the formula's parameters that are tensors. The
derivatives in the logits are the core's formulas. Those in the other operands are autodiff of
these formulas, computed only where they are needed.

In eager mode a pass is one kernel where there are Triton and a GPU. Otherwise it goes block by
block, so that temporaries stay in the cache and only the result has the size of the logits.
`torch.compile` gets the whole formula (on a CPU that of `focal.kernels.torch_inductor`), which it
fuses with what comes before and after the loss. So does `torch.export`, whose programs then run
without focal.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from focal.core import parameters
from focal.core.formulas import Positive, SigmoidFocal, Sparse
from focal.core.namespace import Formula, Namespace
from focal.kernels import torch_cpu, torch_inductor
from focal.torch import _ops
from focal.torch._blocks import (
    Layout,
    Targets,
    batch_first,
    by_block,
    narrow,
    pushforward,
    wide,
    wide_pair,
)
from focal.torch._dispatch import apply, is_plain, is_wrapped, nests_forward_mode

__all__ = ["pointwise", "pointwise_sum"]

xp = cast(Namespace, _ops)
Function = Callable[..., Tensor]
"""function(x, t, *numbers), where `numbers` are the parameters that are tensors."""

CPU_KERNELS = torch_cpu.Kernels(xp)
EXPONENTS = ("gamma", "beta", "gamma_positive", "gamma_negative")
"""Parameters that a training run may change from step to step."""
OWN_CODE = (0.0, 0.5, 1.0, 2.0)
"""Exponents for which `focal.core.formulas.power` needs no power."""
TRITON_DEVICE = "cuda"
"""Where the kernels of Triton run; its interpreter, for tests, runs them on the CPU."""


def pointwise(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """`formula.value` in the type of x, with its registered derivative."""
    if torch.compiler.is_compiling():
        return _compiled(formula, x, t)
    formula, numbers = parameters.split(formula)
    if nests_forward_mode():
        return _value(formula)(x, t, *numbers)
    return cast(Tensor, apply(_Value, x, t, formula, *numbers))


def pointwise_sum(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """The sum of `formula.value`, in float32 or better."""
    if torch.compiler.is_compiling():
        return _compiled(formula, wide(x), t).sum()
    formula, numbers = parameters.split(formula)
    if nests_forward_mode():
        return _value(formula)(wide(x), t, *numbers).sum()
    # The slope of half-precision logits would be rounded before it is scaled, so recompute it.
    with_slope = torch.is_grad_enabled() and x.requires_grad and wide(x) is x and not numbers
    with_slope = with_slope and _kernels(formula, x, t) in (None, CPU_KERNELS)
    return cast(Tensor, apply(_Sum, x, t, formula, with_slope, *numbers)[0])


# ---------------------------------------------------------------- the three operations


class _Value(torch.autograd.Function):
    """FL(x, t) of each logit."""

    @staticmethod
    def forward(x: Tensor, t: Targets, formula: Formula, *numbers: Tensor) -> Tensor:
        if (kernels := _kernels(formula, x, t, *numbers)) is not None:
            if _are_few(kernels, x):
                return narrow(kernels.few(formula, x, t, with_slope=False)[0], x)
            layout = Layout(x, t)
            out = layout.new()
            kernels.value(formula, *map(layout.flat, (x, t)), out=layout.flat(out))
            return out
        return by_block(_value(formula), numbers, x, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, t, formula, *numbers = inputs
        _save(ctx, formula, x, t, *numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t, *numbers = _saved(ctx)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = apply(_Slope, x, t, grad, ctx.formula, *numbers)
        needed = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        by_t, *by_numbers = _pull(_value(ctx.formula), x, (t, *numbers), needed, grad)
        return by_x, by_t, None, *by_numbers

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        return _Value.apply(*batch_first(info.batch_size, in_dims, operands)), 0

    @staticmethod
    def jvp(ctx: Any, dx: Any, dt: Any, _: Any, *dnumbers: Any) -> Tensor:
        x, t, *numbers = _saved(ctx)
        result = _push(_value(ctx.formula), x, (t, *numbers), (dt, *dnumbers))
        return result if dx is None else result + apply(_Slope, x, t, dx, ctx.formula, *numbers)


class _Slope(torch.autograd.Function):
    """scale * dFL/dx, with `scale` of the shape of x or a scalar."""

    @staticmethod
    def forward(x: Tensor, t: Targets, scale: Tensor, formula: Formula, *numbers: Tensor) -> Tensor:
        slope = _slope(formula)
        if is_wrapped(scale):
            return slope(x, t, *numbers) * scale
        if (kernels := _kernels(formula, x, t, scale, *numbers)) is not None:
            if _are_few(kernels, x):
                return narrow(kernels.few(formula, x, t)[1] * scale, x)
            layout = Layout(x, t)
            out = layout.new()
            by = layout.flat(scale) if scale.ndim else scale
            kernels.slope(formula, *map(layout.flat, (x, t)), by, out=layout.flat(out))
            return out

        def scaled(x: Tensor, t: Targets, *more: Tensor) -> Tensor:
            factor, *rest = more if scale.ndim else (scale, *more)
            return slope(x, t, *rest) * factor

        return by_block(scaled, numbers, x, t, *([scale] if scale.ndim else []))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, t, scale, formula, *numbers = inputs
        _save(ctx, formula, x, t, scale, *numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t, scale, *numbers = _saved(ctx)
        by_x = by_scale = None
        if ctx.needs_input_grad[0]:
            by_x = (wide(grad) * wide(scale) * _hess(ctx.formula)(x, t, *numbers)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            by_scale = apply(_Slope, x, t, grad, ctx.formula, *numbers)
            by_scale = (by_scale if scale.ndim else by_scale.sum()).to(scale.dtype)
        needed = (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        by_t, *by_numbers = _pull(_slope(ctx.formula), x, (t, *numbers), needed, grad * scale)
        return by_x, by_t, by_scale, None, *by_numbers

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        x, t, scale, formula, *numbers = batch_first(info.batch_size, in_dims, operands)
        return _Slope.apply(x, t, scale.expand_as(x), formula, *numbers), 0

    @staticmethod
    def jvp(ctx: Any, dx: Any, dt: Any, dscale: Any, _: Any, *dnumbers: Any) -> Tensor:
        x, t, scale, *numbers = _saved(ctx)
        result = scale * _push(_slope(ctx.formula), x, (t, *numbers), (dt, *dnumbers))
        if dx is not None:
            bend = wide(dx) * wide(scale) * _hess(ctx.formula)(x, t, *numbers)
            result = result + bend.to(x.dtype)
        if dscale is not None:
            result = result + apply(_Slope, x, t, dscale, ctx.formula, *numbers)
        return result


class _Sum(torch.autograd.Function):
    """The sum of FL(x, t), and dFL/dx for the first backward pass."""

    @staticmethod
    def forward(
        x: Tensor, t: Targets, formula: Formula, with_slope: bool, *numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        kernels = _kernels(formula, x, t, *numbers)
        if _are_few(kernels, x):
            value, slope = kernels.few(formula, x, t, with_slope)
            return value.sum(), slope if with_slope else x.new_empty(0)
        layout = Layout(x, t)
        if kernels is not None and not with_slope:
            return kernels.total(formula, *map(layout.flat, (x, t))), x.new_empty(0)
        # Under `torch.func` these may be Triton's, which the wrapped operands did not show before.
        if kernels is CPU_KERNELS:
            slope = layout.new()
            flat = map(layout.flat, (x, t, slope))
            return kernels.total_and_slope(cast(Any, formula), *flat)[0], slope
        sums: list[Tensor] = []

        def block(x: Tensor, t: Targets, *numbers: Tensor) -> Tensor | None:
            loss = cast(Any, parameters.fill(formula, numbers))
            if with_slope:
                value, slope = loss.value_and_grad(xp, x, t)
            else:
                value, slope = loss.value(xp, x, t), None
            sums.append(value.sum())
            return slope

        slope = by_block(block, numbers, x, t, output=with_slope)
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(), slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, t, formula, with_slope, *numbers = inputs
        _save(ctx, formula, x, t, *numbers)
        ctx.slope = output[1].detach() if with_slope else None
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, t, *numbers = _saved(ctx)
        if grad is None:
            return (None,) * (4 + len(numbers))
        by_x = None
        if ctx.needs_input_grad[0]:
            slope, ctx.slope = ctx.slope, None
            if slope is None or torch.is_grad_enabled() or is_wrapped(grad):
                # A second backward pass, or one that is itself differentiated.
                by_x = apply(_Slope, x, t, grad, ctx.formula, *numbers)
            else:
                # On a CPU it is cheap to look whether there is anything to scale.
                is_one = grad.device.type == "cpu" and is_plain(grad) and bool(grad == 1)
                by_x = slope if is_one else slope.mul_(grad)
        needed = (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        by_t, *by_numbers = _pull(_value(ctx.formula), x, (t, *numbers), needed, grad)
        return by_x, by_t, None, None, *by_numbers

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, tuple[int, None]]:
        x, t, formula, _, *numbers = batch_first(info.batch_size, in_dims, operands)
        losses = _Value.apply(wide(x), t, formula, *numbers)
        return (losses.reshape(info.batch_size, -1).sum(1), x.new_empty(0)), (0, None)

    @staticmethod
    def jvp(ctx: Any, dx: Any, dt: Any, _: Any, __: Any, *dnumbers: Any) -> tuple[Tensor, None]:
        x, t, *numbers = _saved(ctx)
        result = _push(_value(ctx.formula), wide(x), (t, *numbers), (dt, *dnumbers))
        if dx is not None:
            result = result + wide(apply(_Slope, x, t, dx, ctx.formula, *numbers))
        return result.sum(), None


class _Compiled(torch.autograd.Function):
    """FL(x, t) for `torch.compile`, which differentiates once and batches by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Targets, formula: Formula, *numbers: Tensor) -> Tensor:
        _save(ctx, formula, x, t, *numbers)
        if torch_inductor.takes(formula, x):
            loss = cast(Any, parameters.fill(formula, numbers))
            return narrow(torch_inductor.value_and_grad(xp, loss, wide(x), t)[0], x)
        return _value(formula)(x, t, *numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t, *numbers = _saved(ctx)
        loss = parameters.fill(ctx.formula, numbers)
        if torch_inductor.takes(ctx.formula, x):
            slope = torch_inductor.value_and_grad(xp, cast(Any, loss), wide(x), t)[1]
        else:
            slope = loss.value_and_grad(xp, *wide_pair(x, t))[1]
        return narrow(slope * grad, x), None, None, *(None for _ in numbers)


def _compiled(formula: Formula, x: Tensor, t: Targets) -> Tensor:
    """`pointwise` in operations to compile."""
    if isinstance(formula, Sparse) and torch.compiler.is_exporting():
        return _exported(formula, x, cast(Tensor, t))
    formula, numbers = parameters.split(_with_operands(formula, x))
    others = [a for a in (t, *numbers) if isinstance(a, Tensor)]
    if not any(a.requires_grad for a in others):
        return _Compiled.apply(x, t, formula, *numbers)
    fixed = [a.detach() if isinstance(a, Tensor) else a for a in (t, *numbers)]
    value = _Compiled.apply(x, fixed[0], formula, *fixed[1:])
    # Autodiff adds the derivatives in the other operands to the registered one.
    by_others = _value(formula)(x.detach(), t, *numbers)
    return value + (by_others - by_others.detach())


def _exported(formula: Sparse, x: Tensor, labels: Tensor) -> Tensor:
    """A loss of labels as one of dense targets.

    An exported program has no registered derivatives: it is differentiated operation by operation.
    For dense targets that is as exact; the shorter formula of `Sparse` would be wrong at 0.
    """
    classes = torch.arange(x.shape[-1], device=x.device)
    y = (labels[..., None] == classes).to(wide(x).dtype)
    return _compiled(formula.formula, x, y).masked_fill(labels[..., None] < -1, 0)


def _with_operands(formula: Any, x: Tensor) -> Any:
    """The formula with its exponents as tensors: one that changes does not compile anew.

    The exponents that have code of their own in the core stay numbers.
    """
    fields = {}
    for name, value in zip(type(formula)._fields, formula, strict=True):
        if isinstance(value, tuple):
            fields[name] = _with_operands(value, x)
        elif name in EXPONENTS and parameters.is_number(value) and value not in OWN_CODE:
            fields[name] = wide(x).new_ones(()) * value
        else:
            fields[name] = value
    return type(formula)(**fields)


# ---------------------------------------------------------------- derivatives


def _value(formula: Formula) -> Function:
    def value(x: Tensor, t: Targets, *numbers: Tensor) -> Tensor:
        return narrow(parameters.fill(formula, numbers).value(xp, *wide_pair(x, t)), x)

    return value


def _slope(formula: Formula) -> Function:
    def slope(x: Tensor, t: Targets, *numbers: Tensor) -> Tensor:
        loss = parameters.fill(formula, numbers)
        return narrow(loss.value_and_grad(xp, *wide_pair(x, t))[1], x)

    return slope


def _hess(formula: Formula) -> Function:
    def hess(x: Tensor, t: Targets, *numbers: Tensor) -> Tensor:
        return parameters.fill(formula, numbers).hess(xp, *wide_pair(x, t))

    return hess


def _pull(
    function: Function,
    x: Tensor,
    others: Sequence[Any],
    needed: Sequence[bool],
    upstream: Tensor,
) -> list[Tensor | None]:
    """The gradients of upstream * function(x, *others) in those of the others that need one."""
    if not any(needed):
        return [None] * len(others)
    chosen = [a for a, wanted in zip(others, needed, strict=True) if wanted]
    value, pull, *_ = torch.func.vjp(_of(function, x, others, needed), *chosen)
    gradients = iter(pull(upstream.to(value.dtype).expand_as(value)))
    return [next(gradients) if wanted else None for wanted in needed]


def _push(function: Function, x: Tensor, others: Sequence[Any], tangents: Sequence[Any]) -> Tensor:
    """What the tangents of the others add to function(x, *others)."""
    given = [a is not None for a in tangents]
    if not any(given):
        return torch.zeros_like(x)
    chosen = [a for a, wanted in zip(others, given, strict=True) if wanted]
    directions = [a for a in tangents if a is not None]
    return pushforward(_of(function, x, others, given), chosen, directions)


def _of(
    function: Function, x: Tensor, others: Sequence[Any], chosen: Sequence[bool]
) -> Callable[..., Tensor]:
    """`function` of the chosen ones alone."""

    def of_chosen(*values: Tensor) -> Tensor:
        given = iter(values)
        return function(x, *(next(given) if c else a for a, c in zip(others, chosen, strict=True)))

    return of_chosen


# ---------------------------------------------------------------- operands


def _save(ctx: Any, formula: Formula, x: Tensor, t: Targets, *more: Tensor) -> None:
    """Keep the operands; targets may be a tensor or a number."""
    tensors = (x, t, *more) if isinstance(t, Tensor) else (x, *more)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.formula = formula
    ctx.number = None if isinstance(t, Tensor) else t


def _saved(ctx: Any) -> tuple[Any, ...]:
    """The operands of `_save`, with the targets in second place."""
    tensors = ctx.saved_tensors
    return tensors if ctx.number is None else (tensors[0], ctx.number, *tensors[1:])


# ---------------------------------------------------------------- kernels


def _kernels(formula: Formula, x: Tensor, t: Targets, *more: Tensor) -> Any:
    """`focal.kernels.torch_triton` or its like for a CPU, where one takes these operands."""
    loss = formula.formula if isinstance(formula, (Sparse, Positive)) else formula
    if not (
        isinstance(loss, SigmoidFocal)
        and all(n is None or parameters.is_number(n) for n in loss)
        and isinstance(t, Tensor) != isinstance(formula, Positive)
        and x.numel() > 0
        and is_plain(x, t, *more)
    ):
        return None
    if x.device.type == TRITON_DEVICE and isinstance(t, Tensor):
        kernels = _triton_on(x.device)
        if kernels and kernels.takes(x, t, *more):
            return kernels
    return CPU_KERNELS if x.device.type == "cpu" else None


def _are_few(kernels: Any, x: Tensor) -> bool:
    """Whether calls take longer than arithmetic, so that the layout does not matter."""
    return kernels is CPU_KERNELS and x.numel() <= torch_cpu.FEW


@functools.cache
def _triton() -> ModuleType | None:
    """The kernels of Triton, where it is installed."""
    try:
        from focal.kernels import torch_triton
    except ImportError:
        return None
    return torch_triton


class _Trial:
    """Whether Triton can compile for a device: no C compiler, an unknown GPU, no free memory.

    A failure may pass. After one, the next attempts are at the 2nd, 4th, 8th ... call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.works, self.calls = device, False, 0

    def passed(self, kernels: ModuleType) -> bool:
        """Whether the kernels have run on this device, now or before."""
        if self.works:
            return True
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # where nothing can be compiled
        self.calls += 1
        if self.calls & (self.calls - 1) == 0:  # a power of two
            try:
                one = torch.ones(1, device=self.device)
                kernels.total(SigmoidFocal(None, 2.0), one, one)
                self.works = True
            except Exception as error:  # Triton has no common exception
                if self.calls == 1:
                    warnings.warn(
                        f"Triton cannot compile for {self.device}, focal does without: {error}",
                        stacklevel=2,
                    )
        return self.works


_trial = functools.cache(_Trial)


def _triton_on(device: torch.device) -> ModuleType | None:
    """The kernels of Triton, where it is installed and able to compile for this device."""
    kernels = _triton()
    return kernels if kernels and _trial(device).passed(kernels) else None
