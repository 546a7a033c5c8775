"""The Triton kernels against the core in float64: random logits, and every half number."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ALPHA, CLASSES
from benchmarks.gpu.results import Job, LeftOut, Plan
from focal.core.formulas import SigmoidFocal, Sparse
from focal.testing.ulp import LIMITS, allowed_ulp
from focal.torch import xp

NO_CODE_OF_ITS_OWN = 3.7
GAMMAS = (2.0, 0.5, 0.0, 1.0, NO_CODE_OF_ITS_OWN)
KINDS = ("hard", "soft", "sparse")
LOGITS, BLOCK = 10**8, 10**7
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TARGETS = (0.0, 1.0, 0.3)


def plan(job: Job) -> Plan:
    halves = {f"every {name}": partial(every_half, job, name) for name in HALVES}
    random = {
        f"float32, {kind}, gamma {gamma:g}": partial(random_logits, job, kind, gamma)
        for gamma in GAMMAS
        for kind in KINDS
    }
    return {**halves, **random}


def random_logits(job: Job, kind: str, gamma: float) -> dict[str, Any]:
    """Worst errors over 10^8 logits, block by block."""
    if job.dry and gamma == NO_CODE_OF_ITS_OWN:
        raise LeftOut("Triton's interpreter rounds a fused multiply-add twice")
    block, blocks = (1_600, 1) if job.dry else (BLOCK, LOGITS // BLOCK)
    generator = torch.Generator(job.device).manual_seed(0)
    worst = Worst()
    for _ in range(blocks):
        options: Any = {"generator": generator, "device": job.device}
        # Half of them where logits are usually, half from one end of float32's exp to the other.
        x = torch.randn(block, **options) * 6
        x[: block // 2] = torch.rand(block // 2, **options) * 220 - 110
        x = x[torch.randperm(block, **options)]
        if kind == "sparse":
            x = x.view(-1, CLASSES)
            t = torch.randint(-2, CLASSES, (len(x),), **options)
        else:
            t = torch.rand(block, **options)
            t = t if kind == "soft" else (t > 0.5).float()
        worst.add(gamma, x, t)
    bound = allowed_ulp("float32", gamma)
    return checked(job, f"float32, {kind}, gamma {gamma:g}", worst, bound, block * blocks)


def every_half(job: Job, name: str) -> dict[str, Any]:
    """Worst errors over all numbers of a half type, and whether the result is NaN for NaN alone."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16)[:: 64 if job.dry else 1]
    every = numbers.view(HALVES[name]).to(job.device)
    x = every[every.isfinite()]
    found: dict[str, Any] = {}
    for gamma in GAMMAS:
        worst = Worst(name)
        for target in TARGETS:
            worst.add(gamma, x, torch.full_like(x, target))
        # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
        bound = 1.01 if job.dry else 0.51
        found[f"gamma {gamma:g}"] = checked(
            job, f"every {name}, gamma {gamma:g}", worst, bound, len(TARGETS) * len(x)
        )
        value, slope = kernels(SigmoidFocal(ALPHA, gamma), every, torch.ones_like(every))
        for kind, got in (("loss", value), ("gradient", slope)):
            if not torch.equal(got.isnan(), every.isnan()):
                job.report.fail(f"NaN, {name}, gamma {gamma:g}", f"the {kind} is NaN elsewhere")
    return found


class Worst:
    """The worst errors so far, in ULP, and where they are."""

    def __init__(self, dtype: str = "float32") -> None:
        self.limits = LIMITS[dtype]
        self.found: dict[str, dict[str, float]] = {}

    def add(self, gamma: float, x: Tensor, t: Tensor) -> None:
        """Errors of loss and gradient at these logits."""
        plain = SigmoidFocal(ALPHA, gamma)
        sparse = x.ndim == 2
        formula = Sparse(plain) if sparse else plain
        wide = x.double()
        expected = formula.value_and_grad(xp, wide, t if sparse else t.double())
        # Where terms cancel, the gradient is as exact as its terms. For hard targets all of them
        # have one sign, so that their sum is the gradient itself.
        sizes = (expected[0].abs(), expected[1].abs() if sparse else terms(wide, t.double(), gamma))
        got = kernels(formula, x, t)
        for name, a, b, size in zip(("loss", "gradient"), got, expected, sizes, strict=True):
            errors = self.ulps(a, b, size).flatten()
            at = int(errors.argmax())
            ulp = float(errors[at])
            if ulp > self.found.get(name, {"ulp": -1.0})["ulp"]:
                target = t[at // x.shape[-1]] if sparse else t[at]
                self.found[name] = {"ulp": ulp, "x": float(x.flatten()[at]), "t": float(target)}

    def ulps(self, got: Tensor, expected: Tensor, size: Tensor) -> Tensor:
        """Errors in units in the last place of `size`.

        Below the smallest normal number, which may be flushed to zero, an error as large as that
        number is none.
        """
        epsilon, tiny, _ = self.limits
        _, exponent = torch.frexp(size.clamp(min=tiny))
        error = (got.double() - expected).abs()
        ulps = error / (epsilon * torch.exp2(exponent.double() - 1))
        below = torch.where(error <= tiny, 0.0, torch.inf)
        ulps = torch.where(size >= tiny, ulps, below)
        return torch.where(got.isfinite(), ulps, torch.inf)


def terms(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """The sum of the absolute terms of dFL/dx, in float64."""
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    m = y * q + (1 - y) * p
    zero = torch.zeros_like(x)
    ce = y * torch.logaddexp(zero, -x) + (1 - y) * torch.logaddexp(zero, x)
    k = torch.where(m > 0, (1 - 2 * y).abs() * p * q / m, 0.0)
    alpha = ALPHA * y + (1 - ALPHA) * (1 - y)
    return alpha * m**gamma * (gamma * k * ce + (1 - y) * p + y * q)


def kernels(formula: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the kernels."""
    if importlib.util.find_spec("triton") is None:
        raise LeftOut("Triton is not installed")
    from focal.kernels import torch_triton

    one = torch.ones((), device=x.device)
    return torch_triton.value(formula, x, t), torch_triton.slope(formula, x, t, one)


def checked(job: Job, name: str, worst: Worst, bound: float, count: int) -> dict[str, Any]:
    """The errors; beyond the bound they are a failure, too."""
    beyond = {kind: at for kind, at in worst.found.items() if not at["ulp"] <= bound}
    if beyond:
        job.report.fail(f"{name}: at most {bound:g} ULP", str(beyond))
    return {"logits": count, "bound_ulp": bound, **worst.found}
