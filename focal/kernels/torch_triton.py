"""The focal loss and its derivative in PyTorch on a GPU, in Triton: one pass over memory each.

The formulas are those of `SigmoidFocal` and `Sparse` in `focal.core.formulas`, in float32 from
logits of float32 or a half type. Nothing is saved between forward and backward: recomputing the
derivative from the logits is faster than reading a saved one. There are no atomics: a sum adds one
number per program, in a fixed order.

From float32 logits, errors are within the documented 6 + 4 gamma ULP; exponential and logarithm are
made of additions and multiplications. From half types, errors before rounding are within 0.01 ULP
of that type, and a sum has a relative error of at most (2 + gamma) 1e-6; the exponential is the
GPU's own. Nothing is in float64: a gamma without code of its own is multiplied by the logarithm in
two parts.

`tl.exp2`, `tl.rsqrt` and `tl.sqrt` are one approximate instruction each, with errors of up to 2, 2
and 1 ULP, which the tests give the interpreter as well. 1 / d is made from `tl.rsqrt`, as `/` takes
eight instructions. Triton's `log` and `log2` take about thirty. `python -m benchmarks.instructions`
counts the instructions per logit.

A kernel is compiled at its first launch, which is not possible while a CUDA graph is captured: run
a step before, which PyTorch requires anyway.
"""

import math
import struct
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from focal.core.formulas import SigmoidFocal, Sparse

__all__ = ["slope", "takes", "total", "value"]

LOGITS = {torch.float32, torch.float16, torch.bfloat16}
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
TARGETS = LOGITS | INTEGERS | {torch.float64, torch.bool}

BLOCK = 2048
"""Logits per program, which has `WARPS` warps of 32 threads."""
WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}  # fusion is the default up to Triton 3.9
IN_32_BITS = 2**30
"""The most logits with indices of 32 bits; those of 64 cost a few instructions."""
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
        out: The result, contiguous and of the shape of x. Default: a new tensor.
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


def _launch(task: str, *arguments: Any, **options: Any) -> None:
    """Run the kernel for a task; the rest is as `_arguments` takes it."""
    operands, constants = _arguments(task, *arguments, **options)
    x: Tensor = operands[0]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _kernel[(triton.cdiv(x.numel(), BLOCK),)](*operands, **constants, **OPTIONS)


def _arguments(
    task: str,
    formula: SigmoidFocal | Sparse,
    x: Tensor,
    t: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
    SCALES: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's arguments: its operands, and its constants by name."""
    sparse = isinstance(formula, Sparse)
    loss: SigmoidFocal = formula.formula if isinstance(formula, Sparse) else formula
    alpha, gamma, smoothing = cast("tuple[Any, ...]", loss)
    t = t.view(torch.uint8) if t.dtype == torch.bool else t
    hard = (sparse or not t.is_floating_point()) and smoothing == 0
    classes = x.shape[-1] if sparse else 0
    rate = gamma / -math.log(2) if hard else gamma
    short = struct.unpack("f", struct.pack("f", rate))[0]  # in float32
    balance = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    operands = (x.contiguous(), t.contiguous(), scale, out, x.numel())
    return (*operands, gamma, short, rate - short, *balance, smoothing / 2), {
        "TASK": task,
        "GAMMA": gamma if gamma in OWN_KERNEL else None,
        "BALANCED": alpha is not None,
        "CLASSES": classes,
        "GROUP": min(classes & -classes, 16 // x.itemsize),  # powers of two
        "HARD": hard,
        "SMOOTHED": smoothing != 0,
        "SCALES": SCALES,
        "EXACT": x.dtype == torch.float32,
        "WIDE": x.numel() > IN_32_BITS,
        "BLOCK": BLOCK,
    }


@triton.jit
def _kernel(
    x,
    t,
    scale,
    out,
    n,
    gamma,
    rate,  # gamma, or -gamma / log(2) if HARD
    rate_rest,  # what is lost of it in float32
    alpha,
    alpha_rest,
    half_smoothing,
    TASK: tl.constexpr,
    GAMMA: tl.constexpr,
    BALANCED: tl.constexpr,
    CLASSES: tl.constexpr,
    GROUP: tl.constexpr,  # logits of a row that a thread has at least
    HARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SCALES: tl.constexpr,
    EXACT: tl.constexpr,  # to a few ULP of float32, not only of a half type
    WIDE: tl.constexpr,  # indices of 64 bits
    BLOCK: tl.constexpr,
):
    at, inside, logits, y, counted = _load(x, t, n, CLASSES, GROUP, HARD, WIDE, BLOCK)
    weight = 1.0
    if TASK == "slope":
        weight = tl.load(scale + at, mask=inside, other=0.0) if SCALES else tl.load(scale)
        weight = weight.to(tl.float32)

    if HARD:
        ce, m, rest, log, log_rest = _hard_parts(logits, y, EXACT)
        power = _power(m, log, log_rest, rate, rate_rest, GAMMA, EXACT)
        if TASK == "slope":
            result = power * (m if GAMMA == 0 else rest * ce * gamma + m)
            weight = tl.where(y, -weight * alpha, weight * alpha_rest)
        else:
            result = ce
            weight = power * tl.where(y, alpha, alpha_rest) if BALANCED else power
    else:
        if SMOOTHED:
            smoothed = y * (1 - 2 * half_smoothing) + half_smoothing
            y = tl.where(counted, smoothed, 0.0)
        sign, s, w, ce, m = _parts(logits, y, EXACT)
        log, log_rest = _log2(m)
        power = _power(m, log, log_rest, rate, rate_rest, GAMMA, EXACT)
        if TASK == "slope":
            result = (w - s) * power
            if GAMMA != 0:
                bend = (s - s * s) * _power_over_m(power, m, GAMMA, EXACT)
                result += bend * gamma * (2 * w - 1) * ce
            weight *= sign
        else:
            result = ce
            weight = power
        if BALANCED:
            weight *= alpha * y + alpha_rest * (1 - y)
    result *= weight
    if TASK == "sum":
        tl.store(out + tl.program_id(0), tl.sum(result))
    else:
        tl.store(out + at, result, mask=inside)


@triton.jit
def _load(
    x,
    t,
    n,
    CLASSES: tl.constexpr,
    GROUP: tl.constexpr,
    HARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Indices of the program's logits, which exist, the logits, their targets, and which count.

    Targets are true or false if HARD, else numbers. Where a logit does not count it is minus
    infinity and its target 0, so that loss and derivative are 0.
    """
    start = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK
    if CLASSES == 0:
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        y = tl.load(t + at, mask=inside, other=0)
        y = y != 0 if HARD else y.to(tl.float32)
        counted = inside
        logits = tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        # Logits in groups of one row, so that what depends on the row is computed once for each.
        first = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP
        one = tl.arange(0, GROUP)[None, :]
        at = start + first + one
        inside = start + first < n
        # Division by a constant and in 32 bits, or it would be slow.
        place = (start % CLASSES).to(tl.int32) + first
        rows = t + start // CLASSES + place // CLASSES
        label = tl.load(rows, mask=inside, other=0).to(tl.int32)
        label = tl.where(inside, label, -2)  # which not every type of labels has
        y = label - place % CLASSES == one
        y = y if HARD else y.to(tl.float32)
        counted = label >= -1
        logits = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(counted, logits, float("-inf"))
    return at, inside, logits, y, counted


@triton.jit
def _parts(x, y, EXACT: tl.constexpr):
    """sign(x), s, w, ce and m, as explained in `focal.core.formulas`.

    With `where`, here and below, because `minimum` and `maximum` drop NaN.
    """
    size = tl.abs(x)
    size = tl.where(size > 3.4028234663852886e38, 3.4028234663852886e38, size)
    e = _exp_of_minus(size, EXACT)
    s = e * _reciprocal(1 + e, EXACT)
    w = tl.where(x >= 0, 1 - y, y)
    ce = w * size + _log1p(e, EXACT)  # log(1 + e) is -log(1 - s)
    m = w + s * (1 - 2 * w)
    m = tl.where(m < 1.1754943508222875e-38, 1.1754943508222875e-38, m)
    return tl.where(x >= 0, 1.0, -1.0), s, w, ce, m


@triton.jit
def _hard_parts(x, positive, EXACT: tl.constexpr):
    """ce, m, 1 - m and -ln(m) in two parts, for a target of 0 or 1.

    With u = x for a negative and -x for a positive, these are softplus(u), sigmoid(u),
    sigmoid(-u) and softplus(-u). The last is cut off where ce is 0.
    """
    u = tl.where(positive, -x, x)
    u = tl.where(u > 3.4028234663852886e38, 3.4028234663852886e38, u)
    e = _exp_of_minus(tl.abs(u), EXACT)
    larger = _reciprocal(1 + e, EXACT)
    smaller = e * larger
    log = _log1p(e, EXACT)
    ce = tl.where(u > 0, u, 0.0) + log
    m, rest = tl.where(u > 0, larger, smaller), tl.where(u > 0, smaller, larger)
    return ce, m, rest, tl.where(u > 0, 0.0, tl.where(u < -127.0, 127.0, -u)), log


@triton.jit
def _power(m, log, log_rest, rate, rate_rest, GAMMA: tl.constexpr, EXACT: tl.constexpr):
    """m^gamma; for an exponent without code of its own it is 2^(rate log), both in two parts."""
    if GAMMA is None:
        if EXACT:
            power = _two_to_product(rate, rate_rest, log, log_rest)
        else:
            power = tl.exp2(rate * (log + log_rest))
    elif GAMMA == 0:
        power = tl.full(m.shape, 1.0, tl.float32)
    elif GAMMA == 0.5:
        power = tl.sqrt(m)
    elif GAMMA == 1:
        power = m
    else:
        tl.static_assert(GAMMA == 2)
        power = m * m
    return power


@triton.jit
def _power_over_m(power, m, GAMMA: tl.constexpr, EXACT: tl.constexpr):
    """m^gamma / m, with a division only where there must be one."""
    if GAMMA == 1:
        quotient = tl.full(m.shape, 1.0, tl.float32)
    elif GAMMA == 2:
        quotient = m
    else:
        quotient = power * _reciprocal(m, EXACT)
    return quotient


@triton.jit
def _log2(m):
    """log2(m) of a normal number m > 0 in two parts: an integer, and a rest of at most 0.5."""
    bits = m.to(tl.int32, bitcast=True)
    whole = (bits - 0x3F3504F3) & -0x800000  # the bits of sqrt(0.5)
    f = (bits - whole).to(tl.float32, bitcast=True) - 1.0
    series = f * 0.12542777 - 0.21028976
    series = series * f + 0.21736577
    series = series * f - 0.23852119
    series = series * f + 0.28765875
    series = series * f - 0.36072114
    series = series * f + 0.48092243
    series = series * f - 0.72134715
    series = series * f + 1.4426949
    return whole.to(tl.float32) * 1.1920928955078125e-07, series * f


@triton.jit
def _two_to_product(a, a_rest, b, b_rest):
    """2^((a + a_rest)(b + b_rest)): an exponent of 100 in one float32 would lose 7 bits.

    With a b in `fma` alone: of a product with a name, a compiler that fuses takes another value in
    one sum than in the next.
    """
    low = a_rest * b + a * b_rest
    both = tl.fma(a, b, low)
    shifted = tl.where(both < -127.0, -127.0, both) + 12582912.0
    r = tl.fma(a, b, 12582912.0 - shifted) + low
    return _exp_near_0(r * 0.6931471805599453) * _two_to(shifted)


@triton.jit
def _exp_of_minus(size, EXACT: tl.constexpr):
    """exp(-size) for size >= 0; 0 where it is less than half a normal number.

    If EXACT it is 2^k exp(k log(2) - size), where log(2) is in two parts, the first of which has so
    few digits that k times it is exact.
    """
    if EXACT:
        near = tl.where(size > 88.0, 88.0, size)  # k is -127, for which 2^k is 0 below
        shifted = near * -1.4426950408889634 + 12582912.0
        k = shifted - 12582912.0
        r = (k * -0.693359375 - near) + k * 2.12194440e-4
        e = _exp_near_0(r) * _two_to(shifted)
    else:
        e = tl.exp2(size * -1.4426950408889634)
    return e


@triton.jit
def _exp_near_0(r):
    """exp(r) for |r| <= 0.35."""
    series = r * 0.00138143206 + 0.00836885069
    series = series * r + 0.0416684002
    series = series * r + 0.166665196
    series = series * r + 0.49999994
    return (series * r + 1.0) * r + 1.0


@triton.jit
def _two_to(shifted):
    """2^k for a whole k >= -126, and 0 for -127, given k + 1.5 * 2^23.

    Adding that number rounds to a whole one, which is then in the last bits.
    """
    return ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal(d, EXACT: tl.constexpr):
    """1 / d for a normal number d > 0."""
    root = tl.rsqrt(d)
    r = root * root
    if EXACT:
        r = tl.fma(tl.fma(-r, d, 1.0), r, r)
    return r


@triton.jit
def _log1p(e, EXACT: tl.constexpr):
    """log(1 + e) for e in [0, 1]: e + e^2 times a minimax polynomial."""
    if EXACT:
        series = e * -0.0036895473 + 0.02190995
        series = series * e - 0.060938265
        series = series * e + 0.11020409
        series = series * e - 0.15561585
        series = series * e + 0.19769031
        series = series * e - 0.24973336
        series = series * e + 0.3333197
        series = series * e - 0.49999982
    else:
        series = e * 0.014588309 - 0.067851178
        series = series * e + 0.15102768
        series = series * e - 0.23611343
        series = series * e + 0.33140427
        series = series * e - 0.49990746
    return (e * e) * series + e
