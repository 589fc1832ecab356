"""CMStochasticIterativeScheduler, fused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, consistency_table
from support.fused import check_closer, check_philox, check_walk, samples
from support.schedulers import step_errors, walk, within_bound

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"clip_denoised": False},
    {"s_noise": 1.3, "sigma_data": 1.0},
    {"sigma_min": 0.0031, "sigma_max": 20.0, "rho": 5.0, "clip_denoised": False},
    {"num_train_timesteps": 151},
    {"s_noise": 0.0},  # draws noise, and multiplies it by 0
)


def consistency(**config: Any) -> Any:
    return lambda: diffusers.CMStochasticIterativeScheduler(**config)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 40])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_consistency(steps: int, config: Any) -> None:
    within_bound(step_errors(consistency(**config), steps), torch.float32)


@pytest.mark.parametrize("sigma_min", [0.0103, 0.0009])
def test_the_last_step_to_a_sigma_min_that_is_rounded(sigma_min: float) -> None:
    """diffusers multiplies noise by the root of a rounding error there, or nan."""
    unit = torch.finfo(torch.float32).eps
    for step, _ in step_errors(consistency(sigma_min=sigma_min), 40):
        assert step.ours <= 4 * unit * max(step.largest, step.given), step


@pytest.mark.parametrize("clip", [False, True])
def test_a_start_in_the_middle(clip: bool) -> None:
    within_bound(step_errors(consistency(clip_denoised=clip), 10, start=4), torch.float32)


@pytest.mark.parametrize("clip", [False, True])
def test_16_bits(clip: bool) -> None:
    check_closer(consistency(clip_denoised=clip), 10)


@pytest.mark.parametrize(
    "steps", [{"num_inference_steps": 8}, {"timesteps": [39, 30, 17, 3, 0]}], ids=str
)
@pytest.mark.parametrize("where", [{}, {"begin_index": 2, "first": 2}, {"first": 2}], ids=str)
@pytest.mark.parametrize("clip", [False, True])
def test_a_walk(steps: Any, where: Any, clip: bool) -> None:
    check_walk(consistency(clip_denoised=clip), steps, generators=generator, **where)


def test_one_step_draws_no_noise() -> None:
    check_walk(consistency(), 1, generators=generator)


@pytest.mark.parametrize("clip", [False, True])
def test_the_exact_rules_are_those_of_our_table(clip: bool) -> None:
    scheduler = consistency(clip_denoised=clip)()
    scheduler.set_timesteps(7)
    levels = replace(NoiseLevels.from_edm(scheduler.sigmas.double()), init_noise_sigma=80.0)
    wanted = consistency_table(levels, clip_range=1.0 if clip else None)
    found = table_of(scheduler, rules="exact")
    assert torch.equal(found.coefficients, wanted.coefficients)
    # diffusers' last sigma is sigma_min in float32, and its noise there the rounding.
    held = table_of(scheduler)
    torch.testing.assert_close(held.coefficients, wanted.coefficients, rtol=1e-12, atol=1e-6)
    walk(fuse(scheduler, rules="exact"), samples())
    assert not scheduler.fallbacks


def test_noise_of_a_key() -> None:
    check_philox(consistency(), 6)


def test_before_set_timesteps() -> None:
    """The stock scheduler has one sigma for each timestep of the training then, and none after."""
    found = []
    for scheduler in (consistency()(), fuse(consistency()())):
        t = scheduler.timesteps[3]
        x = scheduler.scale_model_input(samples(), t)
        found.append(scheduler.step(x, t, samples(), generator=generator()).prev_sample)
    torch.testing.assert_close(*found)
    assert scheduler.fallbacks == {"a step before set_timesteps": 1}


@pytest.mark.parametrize("begin", [None, 4])
def test_noisy_samples(begin: int | None) -> None:
    x, noise = samples(), samples().flip(0)
    found = []
    for scheduler in (consistency()(), fuse(consistency()())):
        scheduler.set_timesteps(6)
        if begin is not None:
            scheduler.set_begin_index(begin)
        found.append(scheduler.add_noise(x, noise, scheduler.timesteps[[1, 5]]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
