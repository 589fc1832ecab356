"""The functions functors are made of, over their whole range, on every instruction set.

The bound is the usual one, but in units in the last place at every single result: twice what
torch's own function is off by, plus one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import ops, reference
from diffcore._engine import native
from diffcore.testing import ulp
from support.formulas import extended
from support.subprocess import OTHER_ISAS, run_python

mpmath = pytest.importorskip("mpmath")

pytestmark = pytest.mark.skipif(native._C is None, reason="needs the compiled module")

HALF_DTYPES = (torch.float16, torch.bfloat16)


def worst_ulps(y: Tensor, truth: np.ndarray) -> float:
    """The largest error in units of the last place, where both are normal numbers."""
    values = extended(y)
    smallest = torch.finfo(y.dtype).smallest_normal
    with np.errstate(invalid="ignore", over="ignore"):
        regular = np.isfinite(truth) & np.isfinite(values) & (np.abs(truth) >= smallest)
        regular &= np.abs(truth) <= torch.finfo(y.dtype).max
        error = np.abs(values - truth)[regular] / ulp(truth, y.dtype)[regular]
    return float(error.max())


# ---- exp ----------------------------------------------------------------------------------------


def floats_of_every_kind() -> Tensor:
    """Every 4,093rd of the 2^32 bit patterns, and all near where exp over- and underflows."""
    patterns = torch.arange(-(2**31), 2**31, 4093, dtype=torch.int64).to(torch.int32)
    spread = patterns.view(torch.float32)
    edges = [
        88.0,
        88.37,
        88.72,
        88.73,
        89.0,
        87.33,
        87.34,
        103.27,
        103.97,
        104.0,
        0.34657,
        1.0,
        0.5,
    ]
    near = torch.tensor(edges).view(torch.int32)[:, None] + torch.arange(
        -2000, 2000, dtype=torch.int32
    )
    near = near.reshape(-1).view(torch.float32)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45])
    return torch.cat([spread, near, -near, special])


def exp(x: Tensor) -> Tensor:
    """exp through an op: the sample of N(0, e^{2x}) for noise 1."""
    one = torch.ones_like(x)
    return ops.reparameterize(torch.zeros_like(x), 2 * x, one)


def check_exp(x: Tensor) -> None:
    limits = torch.finfo(x.dtype)
    x = x[(x.abs() < limits.max / 2) | x.isinf() | x.isnan()]  # 2 x has to be a number
    y = exp(x)
    with np.errstate(over="ignore"):
        truth = np.exp(extended(x))
    assert worst_ulps(y, truth) <= 2 * worst_ulps(torch.exp(x), truth) + 1
    assert torch.equal(y.isnan(), x.isnan())
    largest, smallest = float(limits.max), float(limits.smallest_normal)
    over = torch.from_numpy(truth > np.longdouble(largest) * (1 + np.longdouble(limits.eps) / 4))
    assert torch.equal(y.isinf(), over)
    under = torch.from_numpy(truth < smallest)  # results that are no normal numbers may be 0
    assert (y[under] >= 0).all()
    assert (y[under] <= smallest).all()
    assert (y[~under & ~x.isnan()] >= smallest).all()


def check_exp_float32() -> None:
    check_exp(floats_of_every_kind())


def check_exp_float64() -> None:
    spread = torch.linspace(-760, 760, 400_003, dtype=torch.float64)
    tiny = torch.logspace(-320, 0, 20_001, dtype=torch.float64)
    edges = [709.782712893384, -708.3964185322641, -745.1332191019412, 0.34657359027997264]
    bits = torch.tensor(edges, dtype=torch.float64).view(torch.int64)
    near = (bits[:, None] + torch.arange(-2000, 2000)).reshape(-1)
    special = torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    check_exp(torch.cat([spread, tiny, -tiny, near.view(torch.float64), special]))


# ---- expm1(d) - d and expm1(d) ------------------------------------------------------------------


def differences(dtype: torch.dtype) -> Tensor:
    small = torch.logspace(-12, 1.8, 1500, dtype=torch.float64)
    near_one = torch.linspace(0.2, 1.2, 500, dtype=torch.float64)
    steps = torch.arange(1, 60) * (math.log(2) / 2)  # where the reduction changes its n
    return torch.cat([small, near_one, steps.double(), steps.double() * (1 + 1e-7)]).to(dtype)


def exact(f: Callable[[Any], Any], d: Tensor) -> np.ndarray:
    """`f` with 60 digits, as longdouble."""
    with mpmath.workdps(60):
        values = [f(mpmath.mpf(float(v))) for v in d]
        return np.array([np.longdouble(mpmath.nstr(v, 25)) for v in values])


def check_expm1(dtype: torch.dtype) -> None:
    d = differences(dtype)
    d = torch.cat([d, -d])
    zero = torch.zeros_like(d)
    kl = ops.standard_normal_kl(zero, d)
    truth = exact(lambda v: (mpmath.expm1(v) - v) / 2, d)
    # Next to 0, where it cancels, against a series; elsewhere against what torch can do.
    near = d.abs() < 0.34
    for region, plain in ((near, reference.expm1_minus(d)), (~near, torch.expm1(d) - d)):
        of_truth, bound = truth[region.numpy()], 0.5 * plain[region]
        assert worst_ulps(kl[region], of_truth) <= 2 * worst_ulps(bound, of_truth) + 1
    assert (kl >= 0).all()

    logvar = d.clone().requires_grad_()
    ops.standard_normal_kl(zero, logvar).backward(torch.ones_like(d))
    assert logvar.grad is not None
    truth = exact(lambda v: mpmath.expm1(v) / 2, d)
    # expm1 of torch may be right to half an ulp everywhere: that is the 1 of the bound
    assert worst_ulps(logvar.grad, truth) <= 2 * worst_ulps(0.5 * torch.expm1(d), truth) + 1


def check_expm1_float32() -> None:
    check_expm1(torch.float32)


def check_expm1_float64() -> None:
    check_expm1(torch.float64)


# ---- halves -------------------------------------------------------------------------------------


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    bits = a.view(torch.int16) == b.view(torch.int16)
    return bool((bits | (a.isnan() & b.isnan())).all())


def check_halves() -> None:
    for dtype in HALF_DTYPES:
        x = every_half(dtype)
        # a round trip: to float, times 1, plus -0, and back
        minus_zero = torch.full_like(x, -0.0)
        assert same(ops.linear_combination(x, minus_zero, (1.0, 1.0)), x)
        # in float32: twice the half is another number of the larger type
        finite = x[x.isfinite()]
        doubled = ops.linear_combination(finite, torch.full_like(finite, -0.0), (2.0, 1.0))
        assert same(doubled, (2 * finite.float()).to(dtype))


def check_rounding() -> None:
    """Floats come to halves as per-sample coefficients of 1, and leave rounded."""
    for dtype in HALF_DTYPES:
        halves = every_half(dtype).float()
        halves = halves[halves.isfinite()]
        above = torch.nextafter(every_half(dtype), torch.tensor(math.inf, dtype=dtype)).float()
        above = above[every_half(dtype).isfinite()]
        middle = ((halves.double() + above.double()) / 2).float()  # exact: ties
        inf = torch.tensor(math.inf)
        ties = torch.cat([middle, torch.nextafter(middle, inf), torch.nextafter(middle, -inf)])
        patterns = torch.arange(-(2**31), 2**31, 16381, dtype=torch.int64).to(torch.int32)
        # where halves end: 65520 is the tie between 65504 and infinity, which is what it becomes
        ends = torch.tensor([65504.0, 65519.996, 65520.0, 65520.004, 65535.996, 65536.0, 3.39e38])
        floats = torch.cat([ties, ends, -ends, patterns.view(torch.float32)])
        floats = torch.nn.functional.pad(floats, (0, -len(floats) % 16))
        for columns in (1, 8, 27):  # vectors of each size, and what is left of a row
            one = torch.ones(len(floats), columns, dtype=dtype)
            y = ops.linear_combination(one, torch.full_like(one, -0.0), (floats, 1.0))
            assert same(y, floats.to(dtype)[:, None].expand(-1, columns).contiguous())


def check_in_place() -> None:
    """What is left of a row behind the last whole vector is computed once, also over its input."""
    for dtype in HALF_DTYPES:
        for columns in (3, 16, 21, 600):
            x, z = torch.randn(2, 5, columns).to(dtype)
            wanted = ops.linear_combination(x, z, (0.5, 2.0))
            for over in (x, z):
                out = over.clone()
                first, second = (out, z) if over is x else (x, out)
                ops.linear_combination(first, second, (0.5, 2.0), out=out)
                assert same(out, wanted)


CHECKS = (
    "exp_float32",
    "exp_float64",
    "expm1_float32",
    "expm1_float64",
    "halves",
    "rounding",
    "in_place",
)


@pytest.mark.parametrize("check", CHECKS)
def test_on_the_best_instruction_set(check: str) -> None:
    globals()[f"check_{check}"]()


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_on_every_other_instruction_set(isa: str) -> None:
    calls = "; ".join(f"test.check_{check}()" for check in CHECKS)
    run_python(f"from native import test_math_core as test; {calls}", DIFFCORE_ISA=isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kl_is_never_negative(dtype: torch.dtype) -> None:
    mean, logvar = torch.randn(2, 50_000).to(dtype)
    for step in (0.0, 1e-4, 1e-3, 1e-2, 0.1):
        other = (logvar.float() + step).to(dtype)
        assert (ops.normal_kl(mean, logvar, mean, other) >= 0).all()
    assert (ops.standard_normal_kl(torch.zeros_like(mean), logvar) >= 0).all()
