"""Densities at their ends: points, flat Gaussians, log-variances where exp overflows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from diffcore import ops
from diffcore.coefficients.step import ddim_coefficients, epsilon_coefficients, x0_coefficients
from support.cases import without_kernels

INF = math.inf
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d).split(".")[1]
)


def low(dtype: torch.dtype) -> float:
    """A log-variance whose inverse variance overflows."""
    return -800.0 if dtype == torch.float64 else -100.0


def both(op: Any, values: tuple[float, ...], dtype: torch.dtype, **options: Any) -> list[Any]:
    """(value, gradients) of the kernel and of the reference, at 9 equal elements."""
    found = []
    for native in (True, False):
        leaves = [torch.full((3, 3), v, dtype=dtype).requires_grad_() for v in values]
        if native:
            y = op(*leaves, **options)
        else:
            with without_kernels():
                y = op(*leaves, **options)
        grads = torch.autograd.grad(y.sum(), leaves)
        found.append((y.flatten()[0].item(), [g[0, 0].item() for g in grads]))
    return found


def assert_all(found: list[Any], value: float, gradients: list[float], dtype: torch.dtype) -> None:
    """Of each route, with a tolerance of two roundings of the dtype."""
    eps = 2 * torch.finfo(dtype).eps
    for y, grads in found:
        assert y == pytest.approx(value, rel=eps, nan_ok=True)
        assert grads == pytest.approx(gradients, rel=eps, nan_ok=True)


@DTYPES
@pytest.mark.parametrize("reduction", ["none", "sample"])
def test_equal_means_add_nothing(dtype: torch.dtype, reduction: str) -> None:
    least, n = low(dtype), 3 if reduction == "sample" else 1
    # The gradients of the sum of all elements: those of one element are the same.
    found = both(ops.normal_kl, (0.5, least, 0.5, least), dtype, reduction=reduction)
    assert_all(found, 0.0, [0.0, 0.0, 0.0, 0.0], dtype)
    found = both(ops.gaussian_nll, (0.5, 0.5, least), dtype, reduction=reduction)
    assert_all(found, n * 0.5 * (math.log(2 * math.pi) + least), [0.0, 0.0, 0.5], dtype)
    # d = 2: ½ (e² - 1 - 2), and its derivative ½ (e² - 1).
    found = both(ops.normal_kl, (0.0, least, 0.0, least - 2), dtype, reduction=reduction)
    slope = 0.5 * math.expm1(2)
    assert_all(found, n * (slope - 1), [0.0, slope, 0.0, -slope], dtype)


@DTYPES
def test_a_difference_whose_square_vanishes_adds_nothing(dtype: torch.dtype) -> None:
    tiny = 1e-200 if dtype == torch.float64 else 1e-30
    least = low(dtype)
    for y, grads in both(ops.normal_kl, (tiny, least, 0.0, least), dtype):
        assert y == 0
        assert all(abs(g) <= tiny * (1 + torch.finfo(dtype).eps) for g in grads)
    for y, _ in both(ops.gaussian_nll, (tiny, 0.0, least), dtype):
        wanted = 0.5 * (math.log(2 * math.pi) + least)
        assert y == pytest.approx(wanted, rel=2 * torch.finfo(dtype).eps)


@DTYPES
@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_kl_with_a_point_or_a_flat_gaussian_is_infinite(delta: float, dtype: torch.dtype) -> None:
    least = low(dtype)
    to_point, from_point = (0.0, -INF), (-INF, 0.0)
    for logvar1, logvar2 in (to_point, (least, -INF), (INF, -INF), (INF, 0.0), (INF, least)):
        for y, grads in both(ops.normal_kl, (delta, logvar1, 0.0, logvar2), dtype):
            assert y == INF
            assert grads[1] == INF
            assert grads[3] == -INF
            assert grads[0] == (INF if delta and logvar2 < 0 else 0 if delta == 0 else delta)
    for logvar1, logvar2 in (from_point, (0.0, INF), (-INF, INF)):
        for y, grads in both(ops.normal_kl, (delta, logvar1, 0.0, logvar2), dtype):
            assert y == INF
            assert grads[1] == -0.5


@DTYPES
def test_density_of_a_point_and_of_a_flat_gaussian(dtype: torch.dtype) -> None:
    for y, grads in both(ops.gaussian_nll, (0.25, 0.25, -INF), dtype):
        assert (y, grads) == (-INF, [0.0, 0.0, 0.5])
    for y, grads in both(ops.gaussian_nll, (3.0, 0.25, INF), dtype):
        assert (y, grads) == (INF, [0.0, 0.0, 0.5])


@DTYPES
@pytest.mark.parametrize("op", [ops.normal_kl, ops.gaussian_nll])
def test_nan_stays_nan(op: Any, dtype: torch.dtype) -> None:
    count = 4 if op is ops.normal_kl else 3
    for k in range(count):
        for base in (0.0, low(dtype)):
            values = [0.0, base, 0.0, base] if count == 4 else [0.0, 0.0, base]
            values[k] = math.nan
            assert all(math.isnan(y) for y, _ in both(op, tuple(values), dtype))


def test_a_learned_variance_of_a_point_and_a_right_prediction() -> None:
    # e = 0 and d = d_0 - v: with v = -100 the ratio of the variances overflows in float32.
    table = torch.zeros(1, 15, dtype=torch.float64)
    columns = dict(b_0=0, clip_min=6, clip_max=7, factor=9, d_v=13, kl=14)  # noqa: C408
    for name, value in {
        "clip_min": -INF,
        "clip_max": INF,
        "factor": 0.5,
        "d_v": 1,
        "kl": 1,
    }.items():
        table[0, columns[name]] = value
    x = torch.zeros(2, 3)
    for v, wanted in ((-100.0, INF), (-80.0, 3 * 0.5 * (math.expm1(80) - 80)), (-INF, INF)):
        m, variance = x.clone().requires_grad_(), torch.full((2, 3), v, requires_grad=True)
        for native in (True, False):
            if native:
                y = ops.vlb_term(x, m, table, x_t=x, variance_output=variance)
            else:
                with without_kernels():
                    y = ops.vlb_term(x, m, table, x_t=x, variance_output=variance)
            assert y.tolist() == pytest.approx([wanted, wanted], rel=1e-6)
            of_m, of_v = torch.autograd.grad(y.sum(), [m, variance])
            assert not of_m.any()
            assert (of_v < 0).all()


@pytest.mark.parametrize("deviation", [1e-37, 1e-20, 0.3, 1e19, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_any_deviation(deviation: float, dtype: torch.dtype) -> None:
    """The kernels scale by a power of two near c_z: squares of distances neither vanish nor end."""
    eps = torch.finfo(dtype).eps
    z = torch.randn(4, 105, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    after = (z * deviation).to(dtype)
    x, model_output = torch.zeros_like(after), torch.zeros_like(after, requires_grad=True)
    row = (0.0, 1.0, 0.0, deviation, 0.0, 0.0, -INF, INF)  # the mean is m
    given = torch.tensor(deviation, dtype=dtype).double()
    distance = after.double() / given
    found = ops.step_log_prob(x, model_output, after, row)
    terms = Normal(0.0, given).log_prob(after.double())
    size = float(terms.abs().sum(1).max())
    torch.testing.assert_close(found.double(), terms.sum(1), rtol=0, atol=2 * eps * size)
    (slope,) = torch.autograd.grad(found.sum() * deviation, model_output)
    torch.testing.assert_close(slope.double(), distance, rtol=4 * eps, atol=0)
    kl = ops.step_kl(x, model_output, after, row)
    torch.testing.assert_close(kl.double(), 0.5 * (distance**2).sum(1), rtol=4 * eps, atol=0)


# ---- coefficients below float32 ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["number", "0-dim", "vector"])
@pytest.mark.parametrize("least", [0.0, 1e-39, 1e-300, -1e-40])
def test_levels_that_are_zero_in_float32_are_refused(kind: str, least: float) -> None:
    x = torch.ones(2, 3)
    vector = torch.tensor([0.5, least], dtype=torch.float64)
    level: Any = {"number": least, "0-dim": vector[1], "vector": vector}[kind]
    calls = {
        "alpha": [
            lambda: x0_coefficients(level, 1.0, "epsilon"),
            lambda: ops.predict_x0(x, x, level, 1.0),
            lambda: ops.ddpm_step(x, x, level, 1.0, 0.5, 0.5),
        ],
        "sigma": [
            lambda: epsilon_coefficients(1.0, level, "sample"),
            lambda: ops.predict_epsilon(x, x, 1.0, level, prediction_type="sample"),
            lambda: ddim_coefficients(1.0, level, 1.0, 0.5),
        ],
    }
    for name, refused in calls.items():
        for call in refused:
            with pytest.raises(ValueError, match=f"^{name} must not be 0"):
                call()


def test_the_smallest_level_of_float32_is_divided_by() -> None:
    x = torch.full((2, 3), 1e-3)
    alpha = 2.0**-126
    found = ops.predict_x0(0 * x, x, alpha, 1.0)
    torch.testing.assert_close(found.double(), x.double() * 2.0**126, rtol=1e-6, atol=0)
