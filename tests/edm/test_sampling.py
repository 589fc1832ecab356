"""EDM's sampler: algorithm 2 of the paper, written out here, and Gaussian data."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import EDM, PhiloxNoise, guidance, sample, solvers

KEY = PhiloxNoise(5, stream=2)
F64 = {"dtype": torch.float64}
SHAPE = (3, 2, 4, 4)


def toy(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
    """A network that is not linear, F."""
    return torch.tanh(1.3 * x + t.reshape(-1, 1, 1, 1)) - 0.2 * x + shift


def denoiser(x: Tensor, sigma: float, d: float) -> Tensor:
    """Table 1 of the paper."""
    c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / math.sqrt(sigma**2 + d**2)
    t = torch.full(x.shape[:1], math.log(sigma) / 4, **F64)
    return c_skip * x + c_out * toy(x / math.sqrt(sigma**2 + d**2), t)


def algorithm_2(edm: EDM, z: Tensor, steps: int, noise: dict[int, Tensor], **c: float) -> Tensor:
    """The stochastic sampler; ``noise[i]`` is that of step i."""
    n, rho = steps, edm.rho
    high, low = edm.sigma_max ** (1 / rho), edm.sigma_min ** (1 / rho)
    t = [(high + i / (n - 1) * (low - high)) ** rho for i in range(n)] + [0.0]
    x = z * t[0]
    for i in range(n):
        churned = c["s_tmin"] <= t[i] <= c["s_tmax"]
        gamma = min(c["s_churn"] / n, math.sqrt(2) - 1) if churned else 0.0
        t_hat = t[i] + gamma * t[i]
        x = x + math.sqrt(t_hat**2 - t[i] ** 2) * c["s_noise"] * noise[i]
        slope = (x - denoiser(x, t_hat, edm.sigma_data)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * slope
        if t[i + 1] != 0:
            again = (x_next - denoiser(x_next, t[i + 1], edm.sigma_data)) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (slope / 2 + again / 2)
        x = x_next
    return x


@pytest.mark.parametrize("sigma_data", [0.5, 16.0])
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0},
        {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
        {"s_churn": 80.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 0.9},
    ],
    ids=["none", "some", "most"],
)
def test_heun_is_algorithm_2(sigma_data: float, churn: dict[str, float]) -> None:
    edm, steps = EDM(sigma_data, sigma_max=60.0, sigma_min=0.01, rho=5.0), 7
    z, *each = torch.randn(2 * steps + 1, *SHAPE, generator=torch.Generator().manual_seed(1), **F64)
    # The noise of step i is added after the last row of the step before: two rows a step.
    rows = {i: each[2 * i - 1 if i else -1] for i in range(steps)}
    found = edm.sample(toy, SHAPE, steps, noise=z, step_noise=torch.stack(each), **churn)
    wanted = algorithm_2(edm, z, steps, rows, **churn)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_defaults_are_the_papers() -> None:
    edm = EDM()
    levels = edm.levels()
    assert len(levels) == 18
    ramp = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(levels.sigma, torch.tensor([*ramp, 0.0], **F64), rtol=1e-13, atol=0)
    assert levels.init_noise_sigma == 80
    calls: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return 0.1 * x

    found = edm.sample(model, SHAPE, noise=KEY, **F64)
    assert len(calls) == 35
    torch.testing.assert_close(calls[0], torch.full((3,), math.log(80) / 4, **F64))
    table = solvers.edm_heun_table(levels)
    assert torch.equal(found, sample(model, 80 * KEY.tensor(SHAPE, **F64), table, noise=KEY))


def test_gaussian_data_to_second_order() -> None:
    """The ODE of Gaussian data moves x - mean in proportion to the deviation at its level."""
    mean, std, edm = 0.4, 0.8, EDM(0.5)

    def best(x: Tensor, t: Tensor) -> Tensor:
        sigma = torch.exp(4 * t).reshape(-1, 1)
        r = (sigma**2 + 0.25).sqrt()
        noised = x * r
        denoised = (std**2 * noised + sigma**2 * mean) / (std**2 + sigma**2)
        return (denoised - 0.25 / r**2 * noised) / (sigma * 0.5 / r)

    z = torch.randn(5, 1, generator=torch.Generator().manual_seed(2), **F64)
    wanted = mean + std / math.hypot(std, 80) * (80 * z - mean)
    errors = []
    for steps in (64, 128):
        found = edm.sample(best, (5, 1), steps, noise=z)
        errors.append(float((found - wanted).abs().max()))
    assert errors[1] < 2e-3
    assert 3.6 < errors[0] / errors[1] < 4.6


def test_denoise_is_what_the_sampler_predicts() -> None:
    edm, seen = EDM(2.0), []
    sigmas = edm.levels(5).sigma
    before = [KEY.tensor(SHAPE, **F64) * 80]

    def keep(state: dict[str, Any]) -> None:
        seen.append((before[-1], state["sigma"], state["denoised"]))
        before.append(state["x"])

    edm.sample(toy, SHAPE, 5, noise=KEY, callback=keep, **F64)
    for (x, sigma, denoised), level in zip(seen, sigmas, strict=False):
        assert sigma == float(level)
        torch.testing.assert_close(edm.denoise(toy, x, sigma), denoised, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(denoised, denoiser(x, sigma, 2.0), rtol=1e-12, atol=1e-12)


def test_arguments_reach_the_model() -> None:
    edm = EDM()
    plain = edm.sample(toy, SHAPE, 4, noise=KEY)
    kwargs = {"model_kwargs": {"shift": 0.5}}
    cond = edm.sample(toy, SHAPE, 4, noise=KEY, **kwargs)
    assert not torch.equal(plain, cond)
    both = {**kwargs, "uncond_kwargs": {"shift": 0.0}, "noise": KEY}
    assert torch.equal(edm.sample(toy, SHAPE, 4, guidance_scale=1.0, **both), cond)
    one = edm.sample(toy, SHAPE, 4, guidance_scale=3.0, **both)
    rule = edm.sample(toy, SHAPE, 4, guidance=guidance.CFG(3.0), **both)
    assert torch.equal(one, rule)
    assert not torch.equal(one, cond)
    x = KEY.tensor(SHAPE)
    found = edm.denoise(toy, x, 0.7, {"shift": 0.5})
    torch.testing.assert_close(
        found - edm.denoise(toy, x, 0.7), torch.full_like(x, 0.5 * 0.35 / 0.74**0.5)
    )


def test_other_solvers_and_clipping() -> None:
    edm = EDM()
    table = solvers.dpmpp_2m_table(edm.levels(6), clip_range=(-1.0, 0.5))
    wanted = sample(toy, 80.0 * KEY.tensor(SHAPE), table)
    found = edm.sample(
        toy, SHAPE, 6, solver=solvers.dpmpp_2m_table, clip_range=[-1.0, 0.5], noise=KEY
    )
    assert torch.equal(found, wanted)
    assert found.max() <= 0.5
    churned = edm.sample(toy, SHAPE, 6, solver=solvers.euler_table, s_churn=9.0, noise=KEY)
    part = functools.partial(solvers.euler_table, s_churn=9.0)
    assert torch.equal(churned, edm.sample(toy, SHAPE, 6, solver=part, noise=KEY))


def test_noise_in_place_of_a_shape_and_options_of_sample() -> None:
    edm, z = EDM(), KEY.tensor(SHAPE)
    wanted = edm.sample(toy, SHAPE, 3, z)
    assert torch.equal(edm.sample(toy, z, 3), wanted)
    found = edm.sample(toy, z, 3, return_trajectory=True)
    assert torch.equal(found.samples, wanted)
    assert torch.equal(found.states[0], 80 * z)
    assert len(found.states) == 6


def test_copies_and_pickles() -> None:
    edm = EDM(0.7, rho=3)
    wanted = edm.sample(
        toy, SHAPE, 3, solver=lambda *a, **k: solvers.euler_table(*a, **k), noise=KEY
    )
    for other in (copy.deepcopy(edm), pickle.loads(pickle.dumps(edm))):
        assert repr(other) == repr(edm)
        assert torch.equal(
            other.sample(toy, SHAPE, 3, solver=solvers.euler_table, noise=KEY), wanted
        )
    assert repr(edm).startswith("EDM(sigma_data=0.7, p_mean=-1.2,")


def test_compiled() -> None:
    """In one graph, with the bits of the eager calls."""
    edm = EDM()
    x0 = KEY.tensor(SHAPE)

    def both(x0: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        loss = edm.training_losses(toy, x0, noise=KEY, logvar=u)["loss"]
        return loss, edm.sample(toy, SHAPE, 2, s_churn=2.0, noise=KEY)

    u = torch.tensor([0.1, 0.2, 0.3])
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="eager")
    for found, wanted in zip(compiled(x0, u), both(x0, u), strict=True):
        assert torch.equal(found, wanted)
