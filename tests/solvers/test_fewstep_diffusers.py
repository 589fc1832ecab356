"""Few-step tables against diffusers' schedulers, in float64 where these can compute in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import solvers, spacings
from diffcore.schedules import NoiseSchedule
from diffcore.solvers import NoiseLevels, SolverTable
from support.walking import walk

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

SHAPE = (2, 3, 4, 4)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SCHEDULE = NoiseSchedule.from_betas(BETAS)
X = torch.randn(SHAPE, dtype=torch.float64, generator=torch.manual_seed(1))


def bent(x: Tensor, t: Any) -> Tensor:
    """Neither linear nor even, so that every coefficient shows."""
    t = float(t)
    return torch.tanh(x) * 0.7 + 0.2 * torch.cos(3 * x) * (abs(t) + 1) / (abs(t) + 300)


def noise_of(dtype: torch.dtype) -> Callable[[int], Tensor]:
    """What their generator makes, in the order of the steps."""
    generator = torch.manual_seed(0)
    known: list[Tensor] = []

    def noise(row: int) -> Tensor:
        while len(known) <= row:
            known.append(torch.randn(SHAPE, generator=generator, dtype=dtype).double())
        return known[row]

    return noise


def theirs_to_the_end(scheduler: Any, x: Tensor, **options: Any) -> Tensor:
    for t in scheduler.timesteps.tolist():  # a tensor of ints times 10.0 would be float32
        x = scheduler.step(bent(scheduler.scale_model_input(x, t), t), t, x, **options)[0]
    return x


def in_float64(scheduler: Any) -> Any:
    scheduler.alphas_cumprod = SCHEDULE.alpha**2
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def check(
    table: SolverTable,
    theirs: Tensor,
    x: Tensor = X,
    dtype: torch.dtype = torch.float64,
    bound: float = 1e-10,
) -> None:
    ours = walk(table, bent, x, noise_of(dtype))
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_lcm(steps: int, prediction_type: str, clip: float | None) -> None:
    theirs = diffusers.LCMScheduler(prediction_type=prediction_type, clip_sample=clip is not None)
    in_float64(theirs).set_timesteps(steps)
    times = spacings.lcm_timesteps(1000, steps)
    assert theirs.timesteps.tolist() == times
    table = solvers.lcm_table(
        NoiseLevels.from_schedule(SCHEDULE, times), prediction_type=prediction_type, clip_range=clip
    )
    check(table, theirs_to_the_end(theirs, X, generator=torch.manual_seed(0)))


@pytest.mark.parametrize("original_steps", [20, 33, 100])
def test_timesteps_of_other_distillations(original_steps: int) -> None:
    for steps in range(1, original_steps + 1):
        theirs = diffusers.LCMScheduler()
        theirs.set_timesteps(steps, original_inference_steps=original_steps)
        ours = spacings.lcm_timesteps(1000, steps, original_steps=original_steps)
        assert ours == theirs.timesteps.tolist()


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_tcd(gamma: float, steps: int, prediction_type: str) -> None:
    theirs = in_float64(diffusers.TCDScheduler(prediction_type=prediction_type))
    theirs.set_timesteps(steps)
    times = spacings.lcm_timesteps(1000, steps)
    levels = NoiseLevels.from_schedule(SCHEDULE, times, final_sigmas_type="sigma_min")
    table = solvers.tcd_table(levels, gamma=gamma, prediction_type=prediction_type)
    out = theirs_to_the_end(theirs, X, eta=gamma, generator=torch.manual_seed(0))
    check(table, out)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.7, 0.9])
def test_tcd_at_multiples_of_ten(gamma: float) -> None:
    theirs, times = in_float64(diffusers.TCDScheduler()), [990, 700, 410, 10]
    theirs.set_timesteps(timesteps=times)
    levels = NoiseLevels.from_schedule(SCHEDULE, times, final_sigmas_type="sigma_min")
    out = theirs_to_the_end(theirs, X, eta=gamma, generator=torch.manual_seed(0))
    check(solvers.tcd_table(levels, gamma=gamma), out)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_consistency_models(steps: int, clip: float | None, sigma_data: float) -> None:
    theirs = diffusers.CMStochasticIterativeScheduler(
        sigma_data=sigma_data, s_noise=1.005, clip_denoised=clip is not None
    )
    theirs.set_timesteps(steps)
    ramp = torch.arange(steps, dtype=torch.float64) * (40 // steps) / 39
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigmas = torch.cat(
        [(high + ramp * (low - high)) ** 7, torch.tensor([0.002], dtype=torch.float64)]
    )
    assert (sigmas - theirs.sigmas).abs().max() <= 1e-5
    theirs.sigmas = sigmas
    theirs.timesteps = 250 * sigmas[:-1].log()
    table = solvers.consistency_table(sigmas, sigma_data=sigma_data, s_noise=1.005, clip_range=clip)
    assert (table.timesteps - theirs.timesteps).abs().max() <= 1e-10
    assert table.init_noise_sigma == pytest.approx(theirs.init_noise_sigma)
    x = X * sigmas[0]
    check(table, theirs_to_the_end(theirs, x, generator=torch.manual_seed(0)), x)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("times", [[1.56, 1.3, 0.0], [1.5, 1.0, 0.5, 0.1, 0.0], [1.2, 0.0]])
def test_trigflow(sigma_data: float, times: list[float]) -> None:
    theirs = diffusers.SCMScheduler(sigma_data=sigma_data)
    theirs.set_timesteps(
        len(times) - 1, timesteps=times, max_timesteps=None, intermediate_timesteps=None
    )
    theirs.timesteps = torch.tensor(times, dtype=torch.float64)
    x, generator = X * sigma_data, torch.manual_seed(0)
    out = x
    for t in theirs.timesteps[:-1]:  # their pipeline scales what the network gets and returns
        out = theirs.step(sigma_data * bent(out / sigma_data, t), t, out, generator=generator)[0]
    table = solvers.trigflow_table(times, sigma_data=sigma_data)
    check(table, out, x, dtype=torch.float32, bound=2e-7)  # their noise is float32


FLOW = [1.0, 0.9, 0.6, 0.25]


def test_lcm_models_of_a_flow() -> None:
    theirs = diffusers.FlowMatchLCMScheduler()
    theirs.set_timesteps(sigmas=FLOW)
    levels = NoiseLevels.from_flow([*FLOW, 0.0])
    table = solvers.renoise_table(levels, prediction_type="flow_prediction")
    x, generator = X.float(), torch.manual_seed(0)
    for t in theirs.timesteps:
        x = theirs.step(bent(x, t), t, x, generator=generator)[0]
    check(table, x.double(), dtype=torch.float32, bound=2e-6)


def test_the_stochastic_sampler_of_flows() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    theirs.set_timesteps(sigmas=FLOW)
    levels = NoiseLevels.from_flow([*FLOW, 0.0])
    table = solvers.renoise_table(levels, prediction_type="flow_prediction")
    x, generator = X.float(), torch.manual_seed(0)
    for t in theirs.timesteps:
        x = theirs.step(bent(x, t), t, x, generator=generator)[0]
    check(table, x.double(), dtype=torch.float32, bound=2e-6)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_flow_maps(shift: float, steps: int) -> None:
    theirs = diffusers.FlowMapEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    sigmas = spacings.shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    table = solvers.flow_map_table(sigmas)
    assert table.target_timesteps is not None
    rs = [*theirs.timesteps[1:], torch.zeros((), dtype=torch.float64)]
    assert (table.target_timesteps - torch.stack(rs)).abs().max() <= 1e-10
    x = X
    for t, r in zip(theirs.timesteps, rs, strict=True):
        x = theirs.step(bent(x, t + math.sqrt(r)), t, x, r_timestep=r)[0]
    ours, targets = X, iter(table.target_timesteps)
    ours = walk(table, lambda x, t: bent(x, t + math.sqrt(next(targets))), X)
    assert (ours - x).abs().max() <= 1e-10
