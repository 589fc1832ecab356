"""Solvers where the answer is known: Gaussian data (MATH.md section 9) and digits one by one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffcore.schedules import NoiseSchedule, make_betas, respaced_timesteps
from diffcore.solvers import NoiseLevels, SolverTable
from support.solver_list import (
    ALL,
    CHURNED,
    DETERMINISTIC,
    PATHS,
    STOCHASTIC,
    STOCHASTIC_VARIANTS,
    VARIANTS,
    geometric,
    levels_on,
    steps_for,
)
from support.solver_world import MEAN, STD, best_model, gain, moments, start
from support.walking import walk

EXACT = 1e-15


def run(table: SolverTable, x: Tensor, noise: Tensor) -> Tensor:
    return walk(table, best_model(table), x, lambda row: noise[row + 1])


# ---- every table is an affine map --------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", {**ALL, **CHURNED})
def test_three_calls_recover_the_affine_map(name: str, path: str) -> None:
    if name in CHURNED and path != "ve":
        return
    levels = levels_on(path, geometric(7, 0.05, 20.0, to_zero=True))
    table = {**ALL, **CHURNED}[name](levels, prediction_type="sample")
    rows = len(table) + 1
    zero, one = torch.zeros(rows, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    intercept = run(table, one, zero)
    slope = run(table, one + 1, zero) - intercept
    gains = [
        float(run(table, one, torch.eye(rows, dtype=torch.float64)[r]) - intercept)
        for r in range(rows)
    ]
    assert gains[-1] == 0  # a step to sigma = 0 draws nothing
    assert table.stochastic == any(gains)
    # In a history of PNDM is x by its first step, of a 30th.
    exact = EXACT * (30 if name == "pndm" else 10)
    for mean, std in ((0.0, 1.0), (0.7, 3.0), start(levels)):
        by_maps = moments(table, mean, std)
        by_calls = (
            float(intercept + slope * mean),
            math.hypot(float(slope) * std, *gains),
        )
        for ours, theirs in zip(by_calls, by_maps, strict=True):
            assert abs(ours - theirs) <= exact * max(1.0, abs(mean) + std)
    x = torch.tensor([0.0, 1.0, -3.0, 12.5], dtype=torch.float64)
    noise = torch.randn(rows, 1, dtype=torch.float64)
    expected = intercept + slope * x + sum(g * z for g, z in zip(gains, noise, strict=True))
    assert (run(table, x, noise) - expected).abs().max() <= 3 * exact


@pytest.mark.parametrize("name", ALL)
def test_the_prediction_type_does_not_matter(name: str) -> None:
    levels = levels_on("vp", geometric(5, 0.05, 20.0, to_zero=True))
    alpha_of = {float(r): None for r in levels.timesteps}
    assert len(alpha_of) == len(levels)
    x = torch.tensor([0.4, -1.3], dtype=torch.float64)
    noise = torch.randn(30, 1, dtype=torch.float64)
    results = {}
    for prediction_type in ("sample", "epsilon", "v_prediction", "flow_prediction"):
        table = ALL[name](levels, prediction_type=prediction_type)
        rows = iter(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))

        def model(x, t, kind=prediction_type, rows=rows):
            alpha, sigma = next(rows)
            x0 = torch.tanh(MEAN + gain(alpha, sigma) * (x - alpha * MEAN))
            epsilon = (x - alpha * x0) / sigma
            return {
                "sample": x0,
                "epsilon": epsilon,
                "v_prediction": alpha * epsilon - sigma * x0,
                "flow_prediction": epsilon - x0,
            }[kind]

        results[prediction_type] = walk(table, model, x, lambda row: noise[row])
    for result in results.values():
        assert (result - results["sample"]).abs().max() <= 1e-13


@pytest.mark.parametrize("name", ALL)
def test_variance_preserving_and_exploding_processes_give_the_same_samples(name: str) -> None:
    ratios = geometric(6, 0.05, 20.0, to_zero=True)
    preserving = levels_on("vp", ratios)
    vp = ALL[name](preserving, prediction_type="epsilon")
    ve = ALL[name](preserving.sigma_space(), prediction_type="epsilon")
    assert (vp.alpha - ve.input_scale).abs().max() <= EXACT  # the model is shown the same
    x = torch.tensor([0.4, -1.3], dtype=torch.float64)
    noise = torch.randn(30, 1, dtype=torch.float64)

    def model(x: Tensor, t: float) -> Tensor:
        return torch.tanh(x) * t / (t + 1)

    one = walk(vp, model, x, lambda row: noise[row])
    other = walk(ve, model, x / preserving.alpha[0], lambda row: noise[row])
    assert (one - other).abs().max() <= 1e-12


# ---- convergence -------------------------------------------------------------------------------


def error(make, path: str, steps: int, low: float, high: float) -> float:
    """Distance from the exact probability flow, which keeps (x - alpha MEAN) / std(x)."""
    levels = levels_on(path, geometric(steps, low, high))
    table = make(levels, prediction_type="sample")
    alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
    mean, std = start(levels)
    x = torch.tensor([mean + 1.2 * std], dtype=torch.float64)
    out = float(run(table, x, torch.zeros(len(table) + 1)))
    return abs(out - (alpha * MEAN + 1.2 * math.hypot(alpha * STD, sigma)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", {**DETERMINISTIC, **VARIANTS})
def test_order_of_convergence_is_the_one_claimed(name: str, path: str) -> None:
    make = {**DETERMINISTIC, **VARIANTS}[name]
    errors = [error(make, path, steps, 0.02, 80.0) for steps in steps_for(name)]
    measured = math.log2(errors[0] / errors[1])
    claimed = make([2.0, 1.0, 0.5]).order
    assert measured > claimed - 0.25
    # No claim is too modest. The exact third order gains one here, by the symmetry of a Gaussian.
    assert measured < claimed + (1.4 if "exact" in name or path == "flow" else 0.15)


def test_third_order_as_published_is_second_order() -> None:
    published = DETERMINISTIC["dpmpp-3m"]([2.0, 1.0, 0.5])
    exact = DETERMINISTIC["dpmpp-3m-exact"]([2.0, 1.0, 0.5])
    assert (published.order, exact.order) == (2, 3)
    for steps in (40, 80, 160):
        ratio = [error(DETERMINISTIC[n], "vp", steps, 0.02, 80.0) for n in ("dpmpp-3m", "dpmpp-2m")]
        assert ratio[0] < ratio[1]  # and still the better of the two


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", {**STOCHASTIC, **STOCHASTIC_VARIANTS})
def test_distribution_of_stochastic_solvers_converges(name: str, path: str) -> None:
    errors = []
    for steps in (100, 200, 400):
        levels = levels_on(path, geometric(steps, 0.02, 80.0))
        make = {**STOCHASTIC, **STOCHASTIC_VARIANTS}[name]
        table = make(levels, prediction_type="sample")
        alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
        mean, std = moments(table, *start(levels))
        errors.append(abs(mean - alpha * MEAN) + abs(std - math.hypot(alpha * STD, sigma)))
    assert errors[-1] < 0.01
    for longer, shorter in pairwise(errors):
        assert math.log2(longer / shorter) > 0.85


@pytest.mark.parametrize("name", CHURNED)
def test_churn_keeps_the_distribution(name: str) -> None:
    errors = []
    for steps in (100, 200, 400):
        levels = levels_on("ve", geometric(steps, 0.02, 80.0))
        table = CHURNED[name](levels, prediction_type="sample")
        mean, std = moments(table, *start(levels))
        errors.append(abs(mean - MEAN) + abs(std - math.hypot(STD, 0.02)))
    assert errors[-1] < 0.01
    order = 1 if name.startswith(("euler", "heunpp2")) else 2
    assert math.log2(errors[1] / errors[2]) > order - 0.3


# ---- a world of 1797 images ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp-2m", "unipc-2-bh2", "dpmpp-3m"])
@pytest.mark.parametrize("wrong", [0.0, 0.05])
def test_solvers_end_on_training_images(name: str, wrong: float) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images = torch.tensor(datasets.load_digits().data, dtype=torch.float64) / 8 - 1
    schedule = NoiseSchedule.from_betas(make_betas("linear", 1000))
    times = torch.tensor(respaced_timesteps(1000, 50, "trailing"))
    times[-1] = 0  # the last call where there is next to no noise
    table = ALL[name](NoiseLevels.from_schedule(schedule, times))

    def model(x: Tensor, t: float) -> Tensor:
        alpha, sigma = float(schedule.alpha[int(t)]), float(schedule.sigma[int(t)])
        weights = torch.softmax(-(torch.cdist(x, alpha * images) ** 2) / (2 * sigma**2), dim=1)
        return (1 + wrong) * (x - alpha * (weights @ images)) / sigma

    noise = torch.randn(51, 4, 64, dtype=torch.float64)
    out = walk(table, model, noise[50], lambda row: noise[row])
    distance = (torch.cdist(out, images).min(dim=1).values / 8).max()  # root mean square of 64
    if wrong:
        assert distance > 2e-6
    else:
        assert distance <= 2e-6
