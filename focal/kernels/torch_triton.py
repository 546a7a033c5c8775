"""The focal loss and its derivative in PyTorch on a GPU, in Triton: one pass over memory each.

The formulas are those of `SigmoidFocal` and `Sparse` in `focal.core.formulas`, in float32 from
logits of float32 or a half type. Nothing is saved between forward and backward: recomputing the
derivative from the logits is faster than reading a saved one. There are no atomics: a sum adds one
number per program, in a fixed order.

Triton's `exp` and `log` compile to approximate instructions of the GPU or to a library that the
interpreter lacks, so both functions are written below in additions and multiplications. Results of
the tests in the interpreter then hold on a GPU, except for fused multiply-adds, which round once
less, and the division `/`, which is exact to 2 ULP there.

A kernel is compiled at its first launch, which is not possible while a CUDA graph is captured: run
a step before, which PyTorch requires anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from focal.core.formulas import SigmoidFocal, Sparse

__all__ = ["slope", "takes", "total", "value"]

LOGITS = {torch.float32, torch.float16, torch.bfloat16}
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
TARGETS = LOGITS | INTEGERS | {torch.float64, torch.bool}

BLOCK = 1024
"""Logits per program."""
OWN_KERNEL = (0.0, 0.5, 1.0, 2.0)
"""Exponents with a kernel of their own; all others share one."""


def takes(x: Tensor, t: Tensor, *more: Tensor) -> bool:
    """Whether the kernels are for operands of these types, all on the device of x."""
    here = all(a.device == x.device for a in (t, *more))
    return here and x.dtype in LOGITS and t.dtype in TARGETS


def value(
    formula: SigmoidFocal | Sparse, x: Tensor, t: Tensor, out: Tensor | None = None
) -> Tensor:
    """FL of every logit.

    Args:
        formula: `SigmoidFocal`, for targets like the logits, or that in `Sparse`, for labels.
        x: Logits: any number of them, or (rows, classes) for labels.
        t: Targets, or a label for each row.
        out: Where it is written to, contiguous and of the shape of x. Default: a new tensor.
    """
    out = _like(x) if out is None else out
    _launch("value", formula, x, t, out)
    return out


def total(formula: SigmoidFocal | Sparse, x: Tensor, t: Tensor) -> Tensor:
    """The sum of FL in float32."""
    partial = x.new_empty(triton.cdiv(x.numel(), BLOCK), dtype=torch.float32)
    _launch("sum", formula, x, t, partial)
    return partial.sum()


def slope(
    formula: SigmoidFocal | Sparse,
    x: Tensor,
    t: Tensor,
    scale: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """dFL/dx * scale; `scale` is a scalar, or one number for each logit."""
    out = _like(x) if out is None else out
    if not any(scale.stride()):
        _launch("slope", formula, x, t, out, scale)
    else:
        _launch("slope", formula, x, t, out, scale.contiguous(), SCALES=True)
    return out


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch(
    task: str,
    formula: SigmoidFocal | Sparse,
    x: Tensor,
    t: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
    SCALES: bool = False,
) -> None:
    sparse = isinstance(formula, Sparse)
    loss: SigmoidFocal = formula.formula if isinstance(formula, Sparse) else formula
    alpha = loss.alpha or 0.0
    t = t.view(torch.uint8) if t.dtype == torch.bool else t
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _kernel[(triton.cdiv(x.numel(), BLOCK),)](
            *(x.contiguous(), t.contiguous(), scale, out, x.numel()),
            *(loss.gamma, alpha, 1 - alpha, loss.smoothing / 2),
            TASK=task,
            GAMMA=loss.gamma if loss.gamma in OWN_KERNEL else None,
            BALANCED=loss.alpha is not None,
            CLASSES=x.shape[-1] if sparse else 0,
            HARD=not t.is_floating_point() and loss.smoothing == 0,
            SMOOTHED=loss.smoothing != 0,
            SCALES=SCALES,
            BLOCK=BLOCK,
        )


@triton.jit
def _kernel(
    x,
    t,
    scale,
    out,
    n,
    gamma: tl.float64,  # the exponent of a small base; float32 would not be exact enough
    alpha,
    alpha_rest,
    half_smoothing,
    TASK: tl.constexpr,
    GAMMA: tl.constexpr,
    BALANCED: tl.constexpr,
    CLASSES: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, inside, logits, y, counted = _load(x, t, n, CLASSES, BLOCK)
    if SMOOTHED:
        y = y * (1 - 2 * half_smoothing) + half_smoothing
    sign, s, w, ce, m = _parts(logits, y)
    factor = _power(m, gamma, GAMMA)
    if BALANCED:
        factor *= alpha * y + alpha_rest * (1 - y)

    if TASK == "value":
        tl.store(out + at, tl.where(counted, factor * ce, 0.0), mask=inside)
    elif TASK == "sum":
        tl.store(out + tl.program_id(0), tl.sum(tl.where(counted, factor * ce, 0.0)))
    else:
        slope = w - s
        if GAMMA != 0:
            # p q / m; for a hard target it is the other one of p and q, without a division.
            bend = tl.abs(1 - w - s) if HARD else (s - s * s) / m
            slope += bend * tl.cast(gamma, tl.float32) * (2 * w - 1) * ce
        upstream = tl.load(scale + at, mask=inside, other=0.0) if SCALES else tl.load(scale)
        slope *= sign * factor * upstream.to(tl.float32)
        tl.store(out + at, tl.where(counted, slope, 0.0), mask=inside)


@triton.jit
def _load(x, t, n, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Indices of the program's logits, which exist, the logits, their targets, and which count."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = start + lane < n
    logits = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
    if CLASSES == 0:
        y = tl.load(t + start + lane, mask=inside, other=0).to(tl.float32)
        counted = inside
    else:
        # The division of each logit's place is by a constant and in 32 bits, or it would be slow.
        place = (start % CLASSES).to(tl.int32) + lane
        label = tl.load(t + start // CLASSES + place // CLASSES, mask=inside, other=0).to(tl.int32)
        y = (label == place % CLASSES).to(tl.float32)
        counted = inside & (label >= -1)
    return start + lane, inside, logits, y, counted


@triton.jit
def _parts(x, y):
    """sign(x), s, w, ce and m, as explained in `focal.core.formulas`.

    With `where`, because `minimum` and `maximum` drop NaN.
    """
    size = tl.abs(x)
    size = tl.where(size > 3.4028234663852886e38, 3.4028234663852886e38, size)
    e = _exp_of_minus(size)
    # e / (1 + e) from an approximate reciprocal and the remainder that it leaves.
    reciprocal = 1.0 / (1 + e)
    s = e * reciprocal
    s = tl.fma(tl.fma(-s, 1 + e, e), reciprocal, s)
    w = tl.where(x >= 0, 1 - y, y)
    ce = w * size + _log1p(e)  # log(1 + e) is -log(1 - s)
    m = w + s * (1 - 2 * w)
    m = tl.where(m < 1.1754943508222875e-38, 1.1754943508222875e-38, m)
    return tl.where(x >= 0, 1.0, -1.0), s, w, ce, m


@triton.jit
def _power(m, gamma, GAMMA: tl.constexpr):
    """m^gamma."""
    if GAMMA is None:
        power = tl.exp2(gamma * tl.log2(m.to(tl.float64))).to(tl.float32)
    elif GAMMA == 0:
        power = tl.full(m.shape, 1.0, tl.float32)
    elif GAMMA == 0.5:
        power = tl.sqrt_rn(m)
    elif GAMMA == 1:
        power = m
    else:
        tl.static_assert(GAMMA == 2)
        power = m * m
    return power


@triton.jit
def _exp_of_minus(size):
    """exp(-size) for size >= 0, within 1.1 ULP; 0 where it is less than a normal number.

    It is 2^-k exp(k log(2) - size), where log(2) is in two parts, the first of which has so few
    digits that k times it is exact. The rest is at most 0.35: eight terms of the series do.
    """
    beyond = size > 87.33654
    near = tl.where(beyond, 0.0, size)
    k = tl.floor(near * 1.4426950408889634 + 0.5)
    r = (k * 0.693359375 - near) + k * -2.12194440e-4
    series = r * (1.0 / 5040) + 1.0 / 720
    series = series * r + 1.0 / 120
    series = series * r + 1.0 / 24
    series = series * r + 1.0 / 6
    series = series * r + 0.5
    series = (series * r) * r + r + 1.0
    two_to_minus_k = ((127 - k.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    return tl.where(beyond, 0.0, series * two_to_minus_k)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], within 2.1 ULP: e + e^2 times a minimax polynomial."""
    series = e * -0.0036895473 + 0.02190995
    series = series * e - 0.060938265
    series = series * e + 0.11020409
    series = series * e - 0.15561585
    series = series * e + 0.19769031
    series = series * e - 0.24973336
    series = series * e + 0.3333197
    series = series * e - 0.49999982
    return (e * e) * series + e
