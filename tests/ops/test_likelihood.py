"""The mass of a Gaussian in the bin of a pixel, against mpmath in 60 digits on the very inputs.

Relative errors, as the tails want: 2e-6 in float32 and 1e-12 in float64, of values and gradients.
Where the gradient of log_scales passes through 0, relative to the two terms of which it is made.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import ops
from diffcore.testing import ulp
from support.cases import without_kernels
from support.subprocess import OTHER_ISAS, run_python

mpmath = pytest.importorskip("mpmath")

LARGEST_ERROR = {torch.float32: 2e-6, torch.float64: 1e-12}
Inputs = tuple[Tensor, Tensor, Tensor]

each_precision = pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=lambda d: str(d)[6:])
each_route = pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "reference"])


def route(kernels: bool) -> AbstractContextManager[None]:
    return nullcontext() if kernels else without_kernels()


def pixels(k: Tensor) -> Tensor:
    return k / 127.5 - 1


def points(dtype: torch.dtype, count: int = 1500) -> Inputs:
    """|x - mean| <= 2 and log scales of [-12, 3]: everywhere, and next to where a form ends."""
    draw = torch.Generator().manual_seed(3)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)

    edges = torch.tensor([0, 1, 254, 255])[torch.randint(4, (count,), generator=draw)]
    k = torch.where(uniform(0, 1) < 0.4, edges, torch.randint(256, (count,), generator=draw))
    x, log_scale = pixels(k.double()), uniform(-12, 3)
    side = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    kinds = [
        uniform(-2, 2),
        0.02 * uniform(-1, 1),
        10 ** uniform(-9, -3) * side,
        (1 + 10 ** uniform(-6, -1) * side) / 255 * side.flip(0),  # an end of the bin at the mean
        torch.zeros(count, dtype=torch.float64),
        # the bin's width, or that times its place, is where it stops being narrow
        255 / 32 * torch.exp(2 * log_scale) * uniform(0.98, 1.02) * side,
    ]
    kind = torch.randint(len(kinds), (count,), generator=draw)
    delta = torch.stack(kinds).gather(0, kind[None])[0].clamp(-2, 2)
    at_width = torch.tensor(math.log(32 / 255), dtype=torch.float64) + 0.02 * uniform(-1, 1)
    log_scale = torch.where(uniform(0, 1) < 0.05, at_width, log_scale)
    return x.to(dtype), (x - delta).to(dtype), log_scale.to(dtype)


def exact(x: float, mean: float, log_scale: float) -> tuple[Any, ...]:
    """log mass, its gradients in mean and log_scale, and what the latter's error is relative to."""
    with mpmath.workdps(60):
        inverse, delta = mpmath.exp(-mpmath.mpf(log_scale)), mpmath.mpf(x) - mpmath.mpf(mean)
        half = mpmath.mpf(1) / 255
        low, high = (delta - half) * inverse, (delta + half) * inverse
        low, high = (-mpmath.inf if x < -0.999 else low), (mpmath.inf if x > 0.999 else high)
        density_low, density_high = mpmath.npdf(low), mpmath.npdf(high)

        def beyond(t: Any) -> Any:
            return mpmath.erfc(t / mpmath.sqrt(2)) / 2

        outside = beyond(high) + beyond(-low)
        mass = 1 - outside
        if mass < 0.5:
            mass = beyond(low) - beyond(high) if low + high > 0 else beyond(-high) - beyond(-low)
        log_mass = mpmath.log1p(-outside) if mass > 0.5 else mpmath.log(mass)
        of_mean = (density_low - density_high) * inverse / mass
        scaled = [
            mpmath.mpf(0) if mpmath.isinf(t) else t * d
            for t, d in ((low, density_low), (high, density_high))
        ]
        of_scale = (scaled[0] - scaled[1]) / mass
        # z (φ(lo) - φ(hi)) and eta (φ(lo) + φ(hi))
        terms = abs(delta * of_mean) + half * inverse * (density_low + density_high) / mass
        return log_mass, of_mean, of_scale, terms


@functools.cache
def truth(dtype: torch.dtype) -> tuple[tuple[Any, ...], ...]:
    columns = (column.double().tolist() for column in points(dtype))
    return tuple(exact(*point) for point in zip(*columns, strict=True))


def values_and_gradients(inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = ops.discretized_gaussian_log_likelihood(leaves[0], means=leaves[1], log_scales=leaves[2])
    return (y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)))


def check_points(dtype: torch.dtype, kernels: bool = True) -> None:
    inputs = points(dtype)
    with route(kernels):
        y, of_x, of_mean, of_scale = values_and_gradients(inputs)
    assert torch.equal(of_x, -of_mean)
    smallest = torch.finfo(dtype).smallest_normal
    allowed = LARGEST_ERROR[dtype]
    for i, (log_mass, mean, scale, terms) in enumerate(truth(dtype)):
        at = [float(column[i]) for column in inputs]
        # The gradient of the reference is left to autograd, and so the two ends of a bin cancel.
        ends = 0 if kernels else 1
        for found, true, relative_to in (
            (y, log_mass, abs(log_mass)),
            (of_mean, mean, abs(mean) + ends * mpmath.exp(-at[2])),
            (of_scale, scale, terms + ends),
        ):
            error = abs(mpmath.mpf(float(found[i])) - true)
            assert error <= allowed * relative_to + smallest, (at, float(found[i]), float(true))


def check_next_to_one() -> None:
    """The exponent lo²/2, up to 85, must be far more accurate than a float32 number."""
    draw, count = torch.Generator().manual_seed(11), 100_000

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)

    k = torch.where(uniform(0, 1) < 0.5, 255, torch.randint(256, (count,), generator=draw))
    log_scales = uniform(-12, -8.2).float()
    means = pixels(k.double()) - 1 / 255 - uniform(-13, -8) * log_scales.double().exp()
    x, means = pixels(k.double()).float(), means.float()
    y, wanted = (
        ops.discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales).double()
        for x, means, log_scales in (
            (x, means, log_scales),
            (x.double(), means.double(), log_scales.double()),
        )
    )
    error = (y - wanted).abs() - torch.finfo(torch.float32).smallest_normal
    assert (error <= LARGEST_ERROR[torch.float32] / 2 * wanted.abs()).all()


@each_precision
@each_route
def test_values_and_gradients(dtype: torch.dtype, kernels: bool) -> None:
    check_points(dtype, kernels)


def test_masses_next_to_one() -> None:
    check_next_to_one()


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_on_every_other_instruction_set(isa: str) -> None:
    run_python(
        "import torch\nfrom ops import test_likelihood as test\n"
        "test.check_points(torch.float32)\n"
        "test.check_points(torch.float64)\n"
        "test.check_next_to_one()",
        DIFFCORE_ISA=isa,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_values_are_exact_ones_rounded(dtype: torch.dtype) -> None:
    x, means, log_scales = points(dtype)
    log_scales = log_scales.clamp(min=-4)  # float16 ends at 65504
    y = ops.discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    columns = (column.double().tolist() for column in (x, means, log_scales))
    wanted = np.array([np.longdouble(float(exact(*p)[0])) for p in zip(*columns, strict=True)])
    error = np.abs(y.double().numpy() - wanted)
    assert (error <= 0.501 * ulp(wanted, dtype) + 1e-7).all()


# ---- what the approximations lack ---------------------------------------------------------------


def test_tails_are_finite_and_their_gradients_live() -> None:
    # The point that the tanh form, clamped at 1e-12, calls -27.6 with gradient 0.
    x, mean, log_scale = 1.0, 0.0, math.log(0.034)
    wanted = exact(x, mean, log_scale)
    found = values_and_gradients(tuple(torch.tensor([v]) for v in (x, mean, log_scale)))
    assert -440 < float(found[0]) < -420
    assert float(found[2]) == pytest.approx(float(wanted[1]), rel=1e-6)
    # ... and the farthest there is.
    far = values_and_gradients(tuple(torch.tensor([v]) for v in (1.0, -1.0, -12.0)))
    assert float(far[0]) == pytest.approx(float(exact(1.0, -1.0, -12.0)[0]), rel=1e-6)
    assert float(far[2]) > 1e10
    assert float(far[3]) > 1e10


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.0, 0.37, 1.0, 2.0])
@pytest.mark.parametrize("log_scale", [-9.0, -5.5, -2.0755, -1.0, 0.0, 3.0])
def test_the_masses_of_all_pixels_sum_to_one(mean: float, log_scale: float) -> None:
    x = pixels(torch.arange(256, dtype=torch.float64))
    means, log_scales = torch.full_like(x, mean), torch.full_like(x, log_scale)
    y = ops.discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    assert (y <= 0).all()
    assert float(y.exp().sum()) == pytest.approx(1, abs=2e-13)


@each_precision
def test_mirror_images(dtype: torch.dtype) -> None:
    x, means, log_scales = points(dtype)
    y, of_x, of_mean, of_scale = values_and_gradients((x, means, log_scales))
    other = values_and_gradients((-x, -means, log_scales))
    for a, b in zip((y, -of_x, -of_mean, of_scale), other, strict=True):
        assert torch.equal(a, b)


@each_precision
@each_route
def test_wide_scales(dtype: torch.dtype, kernels: bool) -> None:
    # The density times the width of the bin, and what it bends, where float64 has lost the bin.
    log_scales = torch.tensor([5.0, 20.0, 40.0, 100.0, 300.0, 1000.0, 1e30], dtype=dtype)
    x, means = torch.full_like(log_scales, 3 / 255), torch.zeros_like(log_scales)
    with route(kernels):
        y, _, of_mean, of_scale = values_and_gradients((x, means, log_scales))
    inverse = torch.exp(-log_scales.double())
    z, eta = x.double() * inverse, inverse / 255
    wanted = math.log(2 / 255 / math.sqrt(2 * math.pi)) - log_scales.double() - 0.5 * z * z
    wanted = wanted + (z * z - 1) * eta * eta / 6
    torch.testing.assert_close(y.double(), wanted, rtol=LARGEST_ERROR[dtype], atol=0)
    torch.testing.assert_close(of_mean[:3].double(), (z * inverse)[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(of_scale.double(), z * z - 1, rtol=1e-5, atol=0)


def test_the_widest_of_narrow_bins() -> None:
    # Where the series has the most to add: all of its terms show in float64.
    z, eta = torch.meshgrid(
        torch.linspace(0, 1, 9, dtype=torch.float64),
        torch.tensor([0.02, 0.025, 0.03, 0.0312], dtype=torch.float64),
        indexing="ij",
    )
    log_scales = -torch.log(255 * eta)
    x = torch.zeros_like(z)
    means = -z * log_scales.exp()
    y = ops.discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    columns = (column.flatten().tolist() for column in (x, means, log_scales))
    wanted = [float(exact(*point)[0]) for point in zip(*columns, strict=True)]
    assert y.flatten().tolist() == pytest.approx(wanted, rel=5e-15, abs=0)


def test_the_gradient_of_the_scale_next_to_its_zero() -> None:
    # Little is left of the two terms of which it is made, and float32 has that to 2e-6 of itself.
    draw = torch.Generator().manual_seed(7)
    log_scales = (1.5 * torch.rand(300, generator=draw, dtype=torch.float64)).float()
    x = pixels(torch.randint(1, 255, (300,), generator=draw).double()).float()
    means = (x.double() - log_scales.double().exp()).float()
    *_, of_scale = values_and_gradients((x, means, log_scales))
    columns = (column.double().tolist() for column in (x, means, log_scales))
    for found, point in zip(of_scale.tolist(), zip(*columns, strict=True), strict=True):
        _, _, true, terms = exact(*point)
        assert abs(true) < 1e-4 * terms
        assert abs(mpmath.mpf(found) - true) <= 2e-6 * abs(true), (point, found, float(true))


# ---- values that have to be defined -------------------------------------------------------------


@each_precision
@each_route
def test_scales_of_zero_and_infinity(dtype: torch.dtype, kernels: bool) -> None:
    inf = math.inf
    rows = [  # x, mean, log_scale, wanted
        (0.0, 0.001, -inf, 0.0),
        (0.0, 0.5, -inf, -inf),
        (0.0, 0.001, -1000.0, 0.0),
        (1.0, 5.0, -inf, 0.0),
        (-1.0, -5.0, -inf, 0.0),
        (1.0, 0.5, -inf, -inf),
        (0.0, 0.5, inf, -inf),
        (1.0, 0.5, inf, -math.log(2)),
        (-1.0, 0.5, inf, -math.log(2)),
        (inf, 0.0, 0.0, -inf),
        (0.0, inf, 0.0, -inf),
        (1.0, inf, 0.0, 0.0),
        (-1.0, inf, 0.0, -inf),
        (-1.0, -inf, 0.0, 0.0),
    ]
    x, mean, log_scale, wanted = torch.tensor(rows, dtype=torch.float64).to(dtype).unbind(1)
    with route(kernels):
        y = ops.discretized_gaussian_log_likelihood(x, means=mean, log_scales=log_scale)
    torch.testing.assert_close(y, wanted)


@each_route
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("x", [-1.0, 0.0, 1.0])
def test_nan_in_nan_out(kernels: bool, where: int, x: float) -> None:
    inputs = [torch.tensor([v, v]) for v in (x, 0.1, -1.0)]
    inputs[where][1] = math.nan
    with route(kernels):
        for found in values_and_gradients((inputs[0], inputs[1], inputs[2])):
            assert found.isnan().tolist() == [False, True]


@each_route
def test_gradients_are_finite_wherever_a_form_is_not_taken(kernels: bool) -> None:
    scales = torch.tensor([-40.0, -12.0, -5.0, 0.0, 3.0, 40.0, 340.0], dtype=torch.float64)
    x = pixels(torch.tensor([0, 1, 128, 254, 255], dtype=torch.float64))
    means = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 1.0, 3.0], dtype=torch.float64)
    inputs = (tensor.flatten() for tensor in torch.meshgrid(x, means, scales, indexing="ij"))
    with route(kernels):
        for found in values_and_gradients(tuple(inputs)):  # type: ignore[arg-type]
            assert found.isfinite().all()


@each_route
def test_derivatives_of_every_form(kernels: bool) -> None:
    #  narrow; narrow, far; tail; tail, wide; astride; open: inside, tail; below: inside, tail
    x = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    d = torch.tensor([0.05, -0.7, 0.4, 0.02, 0.001, -0.3, 0.8, 0.3, -0.7], dtype=torch.float64)
    s = torch.tensor([-1.0, 0.5, -2.0, -5.0, -5.5, -1.5, -1.5, -1.5, -1.5], dtype=torch.float64)
    leaves = tuple(tensor.requires_grad_() for tensor in (x, x - d, s))
    with route(kernels):

        def f(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
            return ops.discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)

        inputs = tuple(tensor.detach().requires_grad_() for tensor in leaves)
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)
