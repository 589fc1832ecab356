"""DPM-Solver-fast: against k-diffusion's formulas in float64, its order and its marginals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffcore import solvers
from diffcore.solvers import NoiseLevels
from support.solver_list import levels_on
from support.solver_world import MEAN, STD, best_model, moments, start
from support.walking import walk

SIGMA_MAX, SIGMA_MIN = 14.0, 0.2
X = SIGMA_MAX * torch.linspace(-1.2, 1.5, 7, dtype=torch.float64)


def denoiser(x: Tensor, sigma: float) -> Tensor:
    return torch.tanh(x / 3) + 0.3 * torch.cos(x) * sigma / (1 + sigma)


def by_formula(calls: int, eta: float, noise: Tensor) -> Tensor:
    """In t = -log sigma with alpha = 1, a step of order 1, 2 or 3 at a time."""

    def eps(x: Tensor, t: float) -> Tensor:
        return (x - denoiser(x, math.exp(-t))) / math.exp(-t)

    ends = -math.log(SIGMA_MAX), -math.log(SIGMA_MIN)
    count = calls // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if calls % 3 == 0 else [3] * (count - 1) + [calls % 3]
    x = X
    for i, order in enumerate(orders):
        t, after = (ends[0] + (ends[1] - ends[0]) * k / count for k in (i, i + 1))
        big, small = math.exp(-t), math.exp(-after)
        to, up = after, 0.0
        if eta:
            most = eta * math.sqrt(small**2 * (big**2 - small**2) / big**2)
            down = math.sqrt(small**2 - min(small, most) ** 2)
            to = min(ends[1], -math.log(down))
            # In the last step to is the end: what is left of their difference is rounding.
            up = math.sqrt(small**2 - math.exp(-2 * to)) if i + 1 < count else 0.0
        h, e0 = to - t, eps(x, t)
        first = x - math.exp(-to) * math.expm1(h) * e0
        if order == 2:
            e1 = eps(x - math.exp(-t - h / 2) * math.expm1(h / 2) * e0, t + h / 2)
            first = first - math.exp(-to) * math.expm1(h) * (e1 - e0)
        if order == 3:
            e1 = eps(x - math.exp(-t - h / 3) * math.expm1(h / 3) * e0, t + h / 3)
            r, g = 2 * h / 3, math.expm1(2 * h / 3)
            middle = x - math.exp(-t - r) * (g * e0 + 2 * (g / r - 1) * (e1 - e0))
            late = math.exp(-to) * 1.5 * (math.expm1(h) / h - 1)
            first = first - late * (eps(middle, t + r) - e0)
        x = first + up * noise[i]
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 6, 9, 13])
def test_it_is_k_diffusions(calls: int, eta: float) -> None:
    noise = torch.randn(6, 7, dtype=torch.float64)
    table = solvers.dpm_fast_table(
        [SIGMA_MAX, 3.0, SIGMA_MIN], calls, eta=eta, prediction_type="sample"
    )
    assert len(table) == calls
    steps = table.step_index.tolist()
    found = walk(table, denoiser, X, lambda row: noise[steps[row]])
    assert (found - by_formula(calls, eta, noise)).abs().max() <= 1e-11 * SIGMA_MAX


@pytest.mark.parametrize("path", ["ve", "vp", "flow"])
@pytest.mark.parametrize("rising", [False, True])
def test_order(path: str, rising: bool) -> None:
    ends = torch.tensor([0.02, 80.0] if rising else [80.0, 0.02], dtype=torch.float64)
    levels = levels_on(path, ends)
    mean, std = start(levels)
    alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
    total, errors = math.hypot(alpha * STD, sigma), []
    for calls in (240, 480):
        table = solvers.dpm_fast_table(levels, calls, prediction_type="sample")
        x = torch.tensor([mean + 1.2 * std], dtype=torch.float64)
        out = float(walk(table, best_model(table), x))
        errors.append(abs(out - alpha * MEAN - 1.2 * total) / total)
    measured = math.log2(errors[0] / errors[1])
    assert measured > table.order - 0.25


def test_distribution_with_noise() -> None:
    errors = []
    for calls in (150, 300):
        table = solvers.dpm_fast_table([80.0, 0.02], calls, eta=1.0, prediction_type="sample")
        mean, std = moments(table, *start(levels_on("ve", torch.tensor([80.0, 0.02]).double())))
        errors.append(abs(mean - MEAN) + abs(std - math.hypot(STD, 0.02)))
    assert errors[1] < 0.01
    assert math.log2(errors[0] / errors[1]) > 0.85


@pytest.mark.parametrize("path", ["ve", "vp", "flow"])
def test_a_constant_x0_is_followed_exactly(path: str) -> None:
    levels = levels_on(path, torch.tensor([9.0, 0.1], dtype=torch.float64))
    x0, noise = torch.tensor([0.4, -1.3]).double(), torch.tensor([1.1, 0.2]).double()
    first, wanted = (levels.alpha[i] * x0 + levels.sigma[i] * noise for i in (0, -1))
    for calls in (1, 5, 6):
        for clip_range in (None, 3.0):
            table = solvers.dpm_fast_table(
                levels, calls, prediction_type="sample", clip_range=clip_range
            )
            found = walk(table, lambda x, t: x0, first)
            assert (found - wanted).abs().max() <= 1e-12


def test_refusals() -> None:
    with pytest.raises(ValueError, match="levels must end at sigma > 0 for dpm_fast_table, got"):
        solvers.dpm_fast_table([5.0, 0.0], 5)
    with pytest.raises(ValueError, match="levels must start at sigma > 0 for dpm_fast_table, got"):
        solvers.dpm_fast_table([0.0, 5.0], 5)
    with pytest.raises(ValueError, match="levels must start at alpha > 0 for dpm_fast_table"):
        solvers.dpm_fast_table(NoiseLevels.from_flow([1.0, 0.1]), 5, prediction_type="sample")
    with pytest.raises(ValueError, match="levels must fall for dpm_fast_table with eta > 0"):
        solvers.dpm_fast_table([0.1, 5.0], 5, eta=1.0)
    with pytest.raises(ValueError, match="num_calls must be at least 1, got 0"):
        solvers.dpm_fast_table([5.0, 0.1], 0)
    table = solvers.dpm_fast_table([5.0, 5.0], 6, prediction_type="sample")
    assert (walk(table, denoiser, X) - X).abs().max() <= 1e-13 * SIGMA_MAX
