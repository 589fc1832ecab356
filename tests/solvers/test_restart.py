"""Restart sampling against a loop of its algorithm, and in the Gaussian world."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import solvers
from diffcore.sigmas import get_sigmas_karras
from diffcore.solvers import NoiseLevels, SolverTable
from support.solver_list import PATHS, geometric, levels_on
from support.solver_world import MEAN, STD, moments, start


class Restart(NamedTuple):
    """Names for the four numbers."""

    sigma_min: float
    sigma_max: float
    num_steps: int
    num_repeats: int = 1


SIGMAS = get_sigmas_karras(12, 0.03, 14.6)


def denoiser(x: Tensor, r: Any) -> Tensor:
    return torch.tanh(x / (1 + 0.1 * r)) + 0.1 * torch.cos(3 * x)


def restarted(x: Tensor, sigmas: list[float], restarts: list[Restart], z: Any) -> Tensor:
    """Algorithm 1 at alpha = 1: the jump when its level is reached, Heun's steps from there."""

    def heun(x: Tensor, sigma: float, after: float) -> Tensor:
        slope = (x - denoiser(x, sigma)) / sigma
        end = x + (after - sigma) * slope
        if after == 0:
            return end
        return x + (after - sigma) / 2 * (slope + (end - denoiser(end, after)) / after)

    def nearest(value: float) -> int:
        return min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - value))

    at = {nearest(r.sigma_min): r for r in restarts}
    for i, (sigma, after) in enumerate(pairwise(sigmas), 1):
        x = heun(x, sigma, after)
        if i in at:
            top = sigmas[nearest(at[i].sigma_max)]
            inner = get_sigmas_karras(at[i].num_steps + 1, after, top).tolist()[:-1]
            for _ in range(at[i].num_repeats):
                x = x + math.sqrt(top**2 - after**2) * 1.1 * z()
                for one, two in pairwise(inner):
                    x = heun(x, one, two)
    return x


RESTARTS = {
    "one": [Restart(0.1, 2.0, 4)],
    "repeats": [Restart(0.1, 2.0, 3, 3)],
    "two": [Restart(1.0, 10.0, 2, 2), Restart(0.05, 0.3, 1)],
    "none": [],
}


def ratios(table: SolverTable) -> list[float]:
    return [row.sigma / row.alpha for row in table.rows]


@pytest.mark.parametrize("path", ["ve", "vp"])
@pytest.mark.parametrize("name", RESTARTS)
def test_the_table_is_the_algorithm(name: str, path: str) -> None:
    restarts = RESTARTS[name]
    levels = levels_on(path, SIGMAS)
    table = solvers.restart_table(levels, restarts=restarts, s_noise=1.1, prediction_type="sample")
    x = torch.randn(3, 4, dtype=torch.float64) * 14.6
    draws = torch.randn(9, 3, 4, dtype=torch.float64)
    order, rows = iter(draws), iter(table.rows)

    def model(x: Tensor, t: Tensor) -> Tensor:
        row = next(rows)
        return denoiser(x / row.alpha, row.sigma / row.alpha)

    found = diffcore.sample(model, levels.alpha[0] * x, table, noise=lambda r, x: next(order))
    order = iter(draws)
    wanted = restarted(x, SIGMAS.tolist(), restarts, lambda: next(order))
    assert (found - wanted).abs().max() <= 1e-10
    assert len(table) == 23 + sum(2 * r.num_steps * r.num_repeats for r in restarts)
    assert table.num_steps == 12 + sum(r.num_steps * r.num_repeats for r in restarts)
    assert (table.order, table.stochastic) == ((1, True) if restarts else (2, False))
    noisy = [i for i, row in enumerate(table.rows) if row.noisy]
    assert len(noisy) == sum(r.num_repeats for r in restarts)
    for i in noisy:  # the noise leads to where the next row begins
        assert table.noise_levels[i, 1] == pytest.approx(ratios(table)[i + 1], rel=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("to_zero", [False, True])
def test_no_restart_is_heun(path: str, to_zero: bool) -> None:
    levels = levels_on(path, geometric(6, 0.05, 20.0, to_zero=to_zero))
    found = solvers.restart_table(levels, restarts=(), clip_range=1.0)
    wanted = solvers.heun_table(levels, clip_range=1.0)
    torch.testing.assert_close(found.coefficients, wanted.coefficients, rtol=1e-13, atol=1e-14)
    assert torch.equal(found.timesteps, wanted.timesteps)
    assert torch.equal(found.step_index, wanted.step_index)


@pytest.mark.parametrize("path", PATHS)
def test_jumps_keep_the_marginals(path: str) -> None:
    errors = []
    for steps in (40, 80, 160):
        levels = levels_on(path, geometric(steps, 0.05, 20.0))
        table = solvers.restart_table(
            levels, restarts=[(0.2, 2.0, steps // 4, 3)], prediction_type="sample"
        )
        alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
        mean, std = moments(table, *start(levels))
        errors.append(abs(mean - alpha * MEAN) + abs(std - math.hypot(alpha * STD, sigma)))
    assert errors[-1] < 0.001
    for longer, shorter in pairwise(errors):
        assert math.log2(longer / shorter) > 1.7


def test_restarts_contract_an_error_that_the_start_has() -> None:
    # Of the wrong standard deviation at the start, less is left at the end.
    left = []
    for repeats in (0, 1, 4):
        restarts = [(0.5, 3.0, 100, repeats)] if repeats else []
        table = solvers.restart_table(
            geometric(300, 0.05, 20.0), restarts=restarts, prediction_type="sample"
        )
        left.append(abs(moments(table, MEAN, 15.0)[1] - math.hypot(STD, 0.05)))
    assert left[0] > 3 * left[1] > 9 * left[2]


def test_a_flow_from_pure_noise_and_timesteps_between() -> None:
    levels = NoiseLevels.from_flow([1.0, 0.8, 0.5, 0.2, 0.0])
    table = solvers.restart_table(
        levels, restarts=[(0.25, 4.0, 2, 1)], prediction_type="flow_prediction"
    )
    assert len(table) == 7 + 4
    called = [t / 1000 for t in table.timesteps.tolist()]
    assert called == pytest.approx([row.sigma for row in table.rows])
    assert table.rows[6].sigma == pytest.approx(0.8)
    assert table.rows[5].next_sigma == pytest.approx(0.8)


LINEAR = NoiseLevels.from_flow([1.0, 0.8, 0.5, 0.2, 0.0])
REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "type": ({0.1: 2}, TypeError, "restarts must be a sequence, got dict"),
    "entry": ([(0.1, 2.0)], TypeError, "restarts[0] must be (sigma_min, sigma_max, num_steps, num"),
    "number": ([("a", 2.0, 1, 1)], TypeError, "restarts[0]: sigma_min must be a number, got str"),
    "zero": ([(0.25, 4.0, 0, 1)], ValueError, "restarts[0]: num_steps must be at least 1, got 0"),
    "repeats": (
        [(0.25, 4.0, 1, 1.5)], TypeError, "restarts[0]: num_repeats must be an int, got float"),
    "order": (
        [(4.0, 0.25, 2, 1)], ValueError,
        "restarts[0] must have a level of sigma_max above that of sigma_min, got (4.0, 0.25, 2"),
    "clean": (
        [(0.01, 4.0, 2, 1)], ValueError,
        "restarts[0] must lie between levels with alpha and sigma above 0, got (0.01"),
    "twice": (
        [(0.25, 1.0, 2, 1), (0.26, 4.0, 2, 1)], ValueError,
        "restarts[1] must not start at the level of another restart, got (0.26"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str) -> None:
    restarts, error, message = REFUSALS[name]
    with pytest.raises(error, match="^" + re.escape(message)):
        solvers.restart_table(LINEAR, restarts=restarts)


def test_levels_that_rise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^levels must fall for restart_table"):
        solvers.restart_table([0.1, 1.0, 2.0], restarts=[])
