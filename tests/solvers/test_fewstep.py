"""Few-step tables: the papers' formulas, and models whose distillation was perfect.

Of Gaussian data the solution of the probability flow is known. A model that returns it makes every
marginal exact, however few the steps: the mean and the deviation are compared in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import solvers
from diffcore.coefficients import consistency_coefficients, lcm_coefficients
from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels, SolverTable
from diffcore.solvers.paths import ratio_at
from support.solver_list import PATHS, geometric, levels_on
from support.solver_world import MEAN, STD
from support.walking import walk

LINEAR = NoiseSchedule.from_betas(make_betas("linear", 1000))
TIMES = [999, 740, 421, 100]
X = torch.tensor([0.4, -1.3, 2.0], dtype=torch.float64)
NOISE = torch.randn(12, 3, dtype=torch.float64, generator=torch.manual_seed(0))

Pair = tuple[float, float]


def std_at(alpha: float, sigma: float) -> float:
    return math.hypot(alpha * STD, sigma)


def flowed(x: Tensor, here: Pair, after: Pair) -> Tensor:
    """The probability flow from one level to another: x keeps its quantile."""
    return after[0] * MEAN + std_at(*after) / std_at(*here) * (x - here[0] * MEAN)


def levels_of(table: SolverTable) -> Iterator[tuple[Pair, Pair]]:
    """(alpha, sigma) before and after each row."""
    for row in table.rows:
        yield (row.alpha, row.sigma), (row.next_alpha, row.next_sigma)


def moments(table: SolverTable, model: Callable[[], Any], start: Pair) -> Pair:
    """The exact mean and deviation that a table makes with a model that is affine in x."""
    zero = torch.zeros(len(table), 1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)

    def run(x: Tensor, noise: Tensor) -> float:
        return float(walk(table, model(), x, lambda row: noise[row]))

    rest = run(0 * one, zero)
    slope = run(one, zero) - rest
    gains = [
        run(0 * one, torch.eye(len(table), dtype=torch.float64)[:, r, None]) - rest
        for r in range(len(table))
    ]
    return rest + slope * start[0], math.hypot(slope * start[1], *gains)


def same(found: Pair, exact: Pair, bound: float = 1e-12) -> None:
    assert all(abs(a - b) <= bound for a, b in zip(found, exact, strict=True)), (found, exact)


# ---- the solution of the probability flow ----------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("low", [0.0, 0.3])
def test_a_perfect_consistency_model_has_every_marginal(path: str, steps: int, low: float) -> None:
    ratios = torch.cat([geometric(steps, 0.5, 20.0)[:steps], torch.tensor([low]).double()])
    levels = levels_on(path, ratios)
    table = solvers.renoise_table(levels, prediction_type="sample")

    def model() -> Callable[[Tensor, float], Tensor]:
        rows = levels_of(table)
        return lambda x, t: flowed(x, next(rows)[0], (1.0, 0.0))

    here, end = ((float(levels.alpha[i]), float(levels.sigma[i])) for i in (0, -1))
    start = here[0] * MEAN, std_at(*here)
    same(moments(table, model, start), (end[0] * MEAN, std_at(*end)))


@pytest.mark.parametrize("sigmas", [[80.0, 0.002], [80.0, 9.0, 1.0, 0.1, 0.002]])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_consistency_model_that_starts_at_sigma_min(
    sigmas: list[float], prediction_type: str
) -> None:
    data, low = 0.9, 0.002
    table = solvers.consistency_table(
        sigmas, sigma_data=data, sigma_min=low, prediction_type=prediction_type
    )
    assert table.init_noise_sigma == 80

    def model() -> Callable[[Tensor, float], Tensor]:
        rows = iter(table.sigma.tolist())

        def network(scaled: Tensor, t: float) -> Tensor:
            sigma = next(rows)
            assert t == pytest.approx(1000 * math.log(sigma) / 4)
            x = scaled * math.hypot(sigma, data)
            f = flowed(x, (1.0, sigma), (1.0, low))
            if prediction_type == "sample":
                return f
            skip = data**2 / ((sigma - low) ** 2 + data**2)
            out = data * (sigma - low) / math.sqrt(sigma**2 + data**2)
            return (f - skip * x) / (out if prediction_type == "epsilon" else -out)

        return network

    found = moments(table, model, (MEAN, std_at(1.0, 80.0)))
    same(found, (MEAN, std_at(1.0, low)))
    assert not table.rows[-1].noisy


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("family", ["schedule", "flow", "sigmas"])
def test_a_perfect_trajectory_model_has_every_marginal(gamma: float, family: str) -> None:
    levels = {
        "schedule": NoiseLevels.from_schedule(LINEAR, TIMES, final_sigmas_type="sigma_min"),
        "flow": NoiseLevels.from_flow([0.99, 0.7, 0.3, 0.05]),
        "sigmas": NoiseLevels.from_sigmas([9.0, 3.0, 1.0, 0.2]),
    }[family]
    table = solvers.tcd_table(levels, gamma=gamma, prediction_type="sample")
    pairs = list(zip(levels.alpha.tolist(), levels.sigma.tolist(), strict=True))
    if family == "schedule":
        at = [math.floor((1 - gamma) * t + 1e-9) for t in [*TIMES[1:], 0]]
        lower = [(float(LINEAR.alpha[s]), float(LINEAR.sigma[s])) for s in at]
    else:
        lower = [(1 - (1 - gamma) * s, (1 - gamma) * s) for _, s in pairs[1:]]
        if family == "sigmas":
            lower = [(1.0, (1 - gamma) * s) for _, s in pairs[1:]]

    def model() -> Callable[[Tensor, float], Tensor]:
        rows = iter(zip(pairs[:-1], lower, strict=True))

        def x0_that_leads_there(x: Tensor, t: float) -> Tensor:
            here, s = next(rows)
            keep = s[1] / here[1]  # x_s = alpha_s x0 + sigma_s (x - alpha x0) / sigma
            return (flowed(x, here, s) - keep * x) / (s[0] - here[0] * keep)

        return x0_that_leads_there

    start = pairs[0][0] * MEAN, std_at(*pairs[0])
    same(moments(table, model, start), (pairs[-1][0] * MEAN, std_at(*pairs[-1])), 1e-11)
    assert table.stochastic == (gamma > 0)


# ---- the formulas ------------------------------------------------------------------------------


def bent(x: Tensor, t: float) -> Tensor:
    return torch.tanh(x) + 0.1 * torch.cos(3 * x) * t / (abs(t) + 100)


def levels_to_zero(family: str) -> NoiseLevels:
    return {
        "vp": NoiseLevels.from_schedule(LINEAR, TIMES),
        "ve": NoiseLevels.from_sigmas([30.0, 5.0, 1.0, 0.2, 0.0]),
        "flow": NoiseLevels.from_flow([0.98, 0.7, 0.3, 0.1, 0.0]),
        "edm": NoiseLevels.from_edm([30.0, 5.0, 1.0, 0.2, 0.0], sigma_data=0.8),
    }[family]


def predicted(
    family: str, prediction_type: str, x: Tensor, alpha: float, sigma: float, t: float
) -> Tensor:
    """x_0, from the definitions of the prediction types."""
    if family == "edm":
        data = 0.8
        c_in = 1 / math.sqrt(sigma**2 + data**2)
        return (data * c_in) ** 2 * x + sigma * data * c_in * bent(c_in * x, t)
    m = bent(x, t)
    if prediction_type == "epsilon":
        return (x - sigma * m) / alpha
    if prediction_type == "sample":
        return m
    if prediction_type == "v_prediction":
        return (alpha * x - sigma * m) / (alpha**2 + sigma**2)
    return (x - sigma * m) / (alpha + sigma)


@pytest.mark.parametrize("family", ["vp", "ve", "flow", "edm"])
@pytest.mark.parametrize(
    "prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"]
)
@pytest.mark.parametrize("clip", [None, (-0.5, 0.9)])
def test_renoising_and_lcm_are_their_formulas(
    family: str, prediction_type: str, clip: Pair | None
) -> None:
    if family == "edm" and prediction_type != "epsilon":
        return
    levels = levels_to_zero(family)
    pairs = list(zip(levels.alpha.tolist(), levels.sigma.tolist(), strict=True))
    for name in ("renoise", "lcm"):
        if (name, family) == ("lcm", "edm"):
            continue
        make = solvers.renoise_table if name == "renoise" else solvers.lcm_table
        table = make(levels, prediction_type=prediction_type, clip_range=clip)
        x = X
        for i, ((alpha, sigma), (after, noise)) in enumerate(pairwise(pairs)):
            t = float(levels.timesteps[i])
            f = predicted(family, prediction_type, x, alpha, sigma, t)
            f = f if clip is None else f.clamp(*clip)
            if name == "lcm":
                s = 10.0 * t
                f = 0.25 / (s**2 + 0.25) * x + s / math.sqrt(s**2 + 0.25) * f
            x = after * f + noise * NOISE[i]
        assert (walk(table, bent, X, lambda row: NOISE[row]) - x).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"]
)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_is_its_formula(prediction_type: str, gamma: float) -> None:
    levels = NoiseLevels.from_schedule(LINEAR, TIMES, final_sigmas_type="sigma_min")
    table = solvers.tcd_table(levels, gamma=gamma, prediction_type=prediction_type)
    x = X
    for i, (t, after) in enumerate(pairwise([*TIMES, 0])):
        alpha, sigma = float(LINEAR.alpha[t]), float(LINEAR.sigma[t])
        x0 = predicted("vp", prediction_type, x, alpha, sigma, t)
        epsilon = (x - alpha * x0) / sigma
        s = math.floor((1 - gamma) * after)
        x_s = LINEAR.alpha[s] * x0 + LINEAR.sigma[s] * epsilon
        r = LINEAR.alpha[after] / LINEAR.alpha[s]
        x = r * x_s + (1 - r**2).clamp_min(0).sqrt() * NOISE[i]
    assert (walk(table, bent, X, lambda row: NOISE[row]) - x).abs().max() <= 1e-12


def test_the_boundary_is_that_of_the_scaled_input() -> None:
    levels = NoiseLevels.from_schedule(LINEAR, [700, 300, 3, 1])  # c_skip is 2.5e-3 at t = 1
    one = walk(solvers.lcm_table(levels), bent, X, lambda row: NOISE[row])
    space = solvers.lcm_table(levels.sigma_space())
    other = walk(space, bent, X / levels.alpha[0], lambda row: NOISE[row])
    assert (one - other).abs().max() <= 1e-13


def test_timesteps_of_tcd_are_rounded_as_numbers_not_as_floats() -> None:
    levels = NoiseLevels.from_schedule(LINEAR, [999, 10], final_sigmas_type="sigma_min")
    assert (1 - 0.9) * 10 < 1
    table = solvers.tcd_table(levels, gamma=0.9)
    r = LINEAR.alpha[10] / LINEAR.alpha[1]  # s is 1
    assert float(table.column("c_z")[0]) == pytest.approx(float((1 - r * r).sqrt()), rel=1e-12)


@pytest.mark.parametrize(
    "levels",
    [
        NoiseLevels.from_schedule(LINEAR, [999, 500, 20]),
        NoiseLevels.from_flow([0.9, 0.5, 0.0], num_train_timesteps=300.0),
        NoiseLevels.from_sigmas([5.0, 1.0, 0.0]),
        NoiseLevels.from_schedule(LINEAR, [999, 500, 20]).with_timesteps([90.0, 40.0, 2.0]),
    ],
    ids=["schedule", "flow", "sigmas", "labels"],
)
def test_a_level_by_its_timestep(levels: NoiseLevels) -> None:
    low, high = float(levels.timesteps[-1]), float(levels.timesteps[0])
    for share in (0.0, 0.123, 0.5, 0.9, 1.0):
        time = low + share * (high - low)
        assert levels.time_of(ratio_at(levels.time_of, time)) == pytest.approx(time, rel=1e-12)


def test_tcd_without_noise_is_ddim_and_rises() -> None:
    for path in PATHS:
        falling = levels_on(path, geometric(5, 0.05, 20.0, to_zero=True))
        for levels in (falling, falling.reversed()):
            ours, ddim = solvers.tcd_table(levels, gamma=0), solvers.ddim_table(levels, eta=0)
            assert (walk(ours, bent, X) - walk(ddim, bent, X)).abs().max() <= 1e-13


@pytest.mark.parametrize(
    "prediction_type", ["v_prediction", "sample", "epsilon", "flow_prediction"]
)
@pytest.mark.parametrize("data", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_trigflow_is_its_formula(prediction_type: str, data: float, clip: float | None) -> None:
    times = [1.5, 1.1, 0.4, 0.1]
    table = solvers.trigflow_table(
        times, sigma_data=data, prediction_type=prediction_type, clip_range=clip
    )
    x = X
    for i, (t, after) in enumerate(pairwise(times)):
        c, s, m = math.cos(t), math.sin(t), bent(x / data, t)
        f = {
            "v_prediction": c * x - s * data * m,
            "sample": data * m,
            "epsilon": (x - s * data * m) / c,
            "flow_prediction": (x - s * data * m) / (c + s),
        }[prediction_type]
        f = f if clip is None else f.clamp(-clip, clip)
        x = math.cos(after) * f + math.sin(after) * data * NOISE[i]
    assert (walk(table, bent, X, lambda row: NOISE[row]) - x).abs().max() <= 1e-12
    assert (table.final_alpha, table.final_sigma) == (math.cos(0.1), data * math.sin(0.1))
    assert table.init_noise_sigma == data


@pytest.mark.parametrize("data", [0.5, 1.7])
def test_trigflow_is_edm_in_other_terms(data: float) -> None:
    times = torch.tensor([1.55, 1.2, 0.7, 0.2, 0.0], dtype=torch.float64)
    trig = solvers.trigflow_table(times, sigma_data=data)
    levels = NoiseLevels.from_edm(data * times.tan(), sigma_data=data).with_timesteps(times[:-1])
    edm = solvers.renoise_table(levels, prediction_type="v_prediction")
    ours = walk(trig, bent, X, lambda row: NOISE[row])
    theirs = walk(edm, bent, X / math.cos(1.55), lambda row: NOISE[row])
    assert (ours - theirs).abs().max() <= 1e-13
    assert torch.equal(trig.timesteps, edm.timesteps)


def test_trigflow_starts_at_pure_noise() -> None:
    for first in (math.pi / 2, 1.5708, 1.57080):
        table = solvers.trigflow_table([first, 1.3, 0.0])
        assert table.rows[0].alpha == 0
        found = walk(table, bent, X, lambda row: NOISE[row])
        x0 = -0.5 * bent(X / 0.5, first)
        x = math.cos(1.3) * x0 + math.sin(1.3) * 0.5 * NOISE[0]
        x = math.cos(1.3) * x - math.sin(1.3) * 0.5 * bent(x / 0.5, 1.3)
        assert (found - x).abs().max() <= 1e-14
    labels = solvers.trigflow_table([1.5, 0.5, 0.0], timesteps=[0.9, 0.3]).timesteps
    assert labels.tolist() == [0.9, 0.3]


def test_the_two_boundaries_are_not_the_same() -> None:
    """diffusers' issue 8547: at t = 999 with sigma_data = 0.5 the factors are 0.5 and 1."""
    skip, out = lcm_coefficients(999)
    assert skip == pytest.approx(2.505e-9, rel=1e-3)
    assert out == pytest.approx(1.0, abs=1e-8)
    skip, out = consistency_coefficients(9990.0)
    assert out == pytest.approx(0.5, abs=1e-6)
    for sigma_min in (0.0, 0.002, 0.3):
        assert consistency_coefficients(sigma_min, sigma_min=sigma_min) == (1, 0)
    assert lcm_coefficients(0) == (1, 0)
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float32)
    skip, out = consistency_coefficients(sigma, sigma_data=0.7)
    assert isinstance(skip, Tensor)
    assert isinstance(out, Tensor)
    assert skip.dtype == out.dtype == torch.float64
    for i, s in enumerate(sigma.tolist()):
        assert float(skip[i]) == pytest.approx(0.49 / ((s - 0.002) ** 2 + 0.49), rel=1e-15)
        exact = 0.7 * (s - 0.002) / math.sqrt(s * s + 0.49)
        assert float(out[i]) == pytest.approx(exact, rel=1e-14, abs=1e-17)
    skip, out = lcm_coefficients(torch.tensor([0, 19]), timestep_scaling=2.0)
    assert skip.tolist() == [1, 0.25 / (38**2 + 0.25)]


def test_a_pair_without_a_lower_bound_is_edms() -> None:
    levels = NoiseLevels.from_edm([3.0, 1.0, 0.0], sigma_data=0.6)
    for sigma in (0.1, 3.0):
        pair = consistency_coefficients(sigma, sigma_data=0.6, sigma_min=0)
        assert pair == pytest.approx(levels.x0(levels.at(sigma), "epsilon"), rel=1e-14)


def test_levels_with_labels_of_their_own() -> None:
    levels = NoiseLevels.from_edm([3.0, 1.0, 0.0], sigma_data=0.7).with_timesteps([5.0, 2.0])
    table = solvers.consistency_table(levels)
    assert table.timesteps.tolist() == [5, 2]
    assert table.column("a_x")[1] == pytest.approx(0.49 / (0.998**2 + 0.49))
