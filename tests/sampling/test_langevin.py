"""The Langevin corrector against its formula, diffusers' and the Gaussian world."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, solvers
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.sampling import LangevinCorrector
from diffcore.solvers import NoiseLevels
from support.bounds import assert_same_bits
from support.solver_list import PATHS, geometric, levels_on
from support.solver_world import MEAN, STD, gain

KEY = PhiloxNoise(9)


def clean(x: Tensor, alpha: float, sigma: float) -> Tensor:
    return torch.tanh(MEAN + gain(alpha, sigma) * (x - alpha * MEAN))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("norms", ["sample", "batch"])
def test_the_formula(path: str, kind: str, norms: Any) -> None:
    levels = levels_on(path, geometric(4, 0.1, 8.0, to_zero=True))
    table = solvers.heun_table(levels, prediction_type=kind)  # two calls a step
    levels_of_calls = {float(r.timestep): (r.alpha, r.sigma) for r in levels.levels()[:-1]}
    calls = []

    def model(x: Tensor, t: Tensor, shift: float) -> Tensor:
        calls.append(float(t[0]))
        alpha, sigma = levels_of_calls[float(t[0])]
        x0 = clean(x, alpha, sigma) + shift
        eps = (x - alpha * x0) / sigma
        return {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0,
                "flow_prediction": eps - x0}[kind]  # fmt: skip

    corrector = LangevinCorrector(
        model, table, snr=0.2, num_steps=2, noise=KEY, model_kwargs={"shift": 0.1}, norms=norms
    )
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    points = levels.levels()
    for step in (0, 2):
        here, after = points[step], points[step + 1]
        state = {"x": x, "i": step, "t": torch.full((3,), here.timestep, dtype=torch.float64)}
        found, wanted = corrector(state), x
        for j in range(2):
            x0 = clean(wanted, here.alpha, here.sigma) + 0.1
            score = (here.alpha * x0 - wanted) / here.sigma**2
            z = KEY.at(2 + len(table) + 2 * step + j).tensor(x.shape, dtype=x.dtype)
            sizes = [y.flatten(1).norm(dim=1) for y in (z, score)]
            if norms == "batch":
                sizes = [size.mean() for size in sizes]
            a = 1.0 if path == "ve" else (here.alpha / after.alpha) ** 2
            e = 2 * a * (0.2 * sizes[0] / sizes[1]) ** 2
            e = e.reshape(-1, 1, 1)
            wanted = wanted + e * score + (2 * e).sqrt() * z
        assert (found - wanted).abs().max() < 1e-11
    assert len(calls) == 4


def test_the_step_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.ScoreSdeVeScheduler(snr=0.15)
    scheduler.set_timesteps(10)
    levels = NoiseLevels.from_sigmas([50.0, 10.0, 1.0])
    table = solvers.ddpm_table(levels, prediction_type="sample")
    x = 10 * torch.randn(4, 3, 8, 8)
    key = KEY.at(2 + len(table) + 1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return clean(x, 1.0, float(t[0]))

    corrector = LangevinCorrector(model, table, snr=0.15, noise=KEY, norms="batch")
    found = corrector({"x": x, "i": 1, "t": torch.full((4,), 10.0)})
    score = (clean(x, 1.0, 10.0) - x) / 100
    z = key.tensor(x.shape)
    sde = __import__("diffusers.schedulers.scheduling_sde_ve", fromlist=["randn_tensor"])
    original, sde.randn_tensor = sde.randn_tensor, lambda *a, **k: z
    try:
        wanted = scheduler.step_correct(score, x).prev_sample
    finally:
        sde.randn_tensor = original
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_it_brings_wrong_samples_to_the_marginal(path: str) -> None:
    levels = levels_on(path, geometric(40, 0.05, 2.0))
    table = solvers.euler_table(levels, prediction_type="sample")
    alpha, sigma = float(levels.alpha[0]), float(levels.sigma[0])
    std = math.hypot(alpha * STD, sigma)

    def best(x: Tensor, t: Tensor) -> Tensor:
        return MEAN + gain(alpha, sigma) * (x - alpha * MEAN)

    corrector = LangevinCorrector(best, table, snr=0.1, num_steps=400, noise=KEY)
    x = alpha * MEAN + std * (1.5 + 0.1 * torch.randn(4, 4000, dtype=torch.float64))
    t = torch.zeros(4, dtype=torch.float64)
    found = corrector({"x": x, "i": 0, "t": t})
    assert abs(float(found.mean()) - alpha * MEAN) < 0.03 * std
    # A step of finite length e adds e / (2 std^2) of the variance, here about snr^2 = 1 % of it.
    assert abs(float(found.std()) / std - 1) < 0.03


def test_in_the_loop() -> None:
    levels = levels_on("vp", geometric(6, 0.05, 20.0, to_zero=True))
    levels = levels.sigma_space()  # the model input is scaled
    table = solvers.ddpm_table(levels)
    calls = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x)
        return 0.3 * torch.tanh(x)

    x = 20 * torch.randn(2, 6)
    runs = []
    for _ in range(2):
        corrector = LangevinCorrector(model, table, noise=KEY)
        runs.append(diffcore.sample(model, x, table, noise=KEY, before_model=corrector))
    assert_same_bits(*runs)
    assert len(calls) == 4 * len(table)
    assert torch.equal(calls[0], x * table.rows[0].input_scale)
    plain = diffcore.sample(model, x, table, noise=KEY)
    assert not torch.equal(plain, runs[0])
    # Without a key, one of torch's generator for each run.
    found = []
    corrector = LangevinCorrector(model, table)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(diffcore.sample(model, x, table, noise=KEY, before_model=corrector))
    assert_same_bits(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_pure_noise_is_left_alone() -> None:
    table = solvers.flow_euler_table([1.0, 0.5, 0.0])
    corrector = LangevinCorrector(lambda x, t: x, table, noise=KEY)
    x = torch.randn(2, 3)
    assert corrector({"x": x, "i": 0, "t": torch.zeros(2)}) is x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"snr": 0.0}, ValueError, "^snr must be above 0"),
        ({"num_steps": 0}, ValueError, "^num_steps must be at least 1, got 0"),
        ({"norms": "all"}, ValueError, "^norms must be one of 'sample', 'batch', got 'all'"),
        ({"model": 3}, TypeError, "^model must be a function, got int"),
        ({"table": [1.0, 0.0]}, TypeError, "^table must be a SolverTable, got list"),
        ({"noise": 3}, TypeError, "^noise must be a PhiloxNoise or None, got int"),
        ({"model_kwargs": 3}, TypeError, "^model_kwargs must be a mapping or None, got int"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    known = {"model": lambda x, t: x, "table": solvers.ddpm_table([2.0, 1.0, 0.0])}
    with pytest.raises(error, match=message):
        LangevinCorrector(**{**known, **arguments})
