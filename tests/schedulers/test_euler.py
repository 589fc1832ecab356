"""EulerDiscreteScheduler and EulerAncestralDiscreteScheduler, fused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, euler_ancestral_table, euler_table
from support.fused import (
    KARRAS,
    check_closer,
    check_philox,
    check_walk,
    samples,
)
from support.schedulers import LINEAR, step_errors, walk, within_bound

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

STEPS = (5, 10, 20, 50)
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
OPTIONS: tuple[dict[str, Any], ...] = (
    {"interpolation_type": "log_linear"},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
    {"timestep_type": "continuous", "use_karras_sigmas": True},
    {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1},
)


def euler(**config: Any) -> Any:
    return lambda: diffusers.EulerDiscreteScheduler(**{**LINEAR, **config})


def ancestral(**config: Any) -> Any:
    return lambda: diffusers.EulerAncestralDiscreteScheduler(**{**LINEAR, **config})


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def levels_of(scheduler: Any) -> NoiseLevels:
    """What a user of our tables would write."""
    sigmas = scheduler.sigmas.double()
    times = scheduler.timesteps.double()
    return NoiseLevels(
        torch.ones_like(sigmas), sigmas, times, "ve", float, 1.0, False, float(sigmas[0])
    )


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", KARRAS, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler(steps: int, spacing: str, sigmas: Any, prediction: str) -> None:
    make = euler(timestep_spacing=spacing, prediction_type=prediction, **sigmas)
    within_bound(step_errors(make, steps), torch.float32)


@pytest.mark.parametrize("config", OPTIONS, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_options_of_euler(config: Any, prediction: str, churn: float) -> None:
    make = euler(prediction_type=prediction, **config)
    within_bound(step_errors(make, 10, s_churn=churn), torch.float32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 100.0},
        {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 5.0, "s_noise": 1.1},
        {"s_churn": 3.0, "s_noise": 0.0},  # draws noise, and multiplies it by 0
    ],
    ids=str,
)
def test_churn(prediction: str, churn: Any) -> None:
    within_bound(step_errors(euler(prediction_type=prediction), 20, **churn), torch.float32)


def test_the_bounds_of_churn_are_compared_in_float32() -> None:
    sigmas = {"sigmas": [2.0, 0.7, 0.3, 0.0]}  # 0.7 is rounded down, so below s_tmin in float64
    check_walk(euler(), sigmas, generators=generator, s_churn=1.0, s_tmin=0.7)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ancestral(steps: int, spacing: str, prediction: str, zero_snr: bool) -> None:
    make = ancestral(
        timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=zero_snr
    )
    within_bound(step_errors(make, steps), torch.float32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_euler_in_16_bits(prediction: str, churn: float) -> None:
    check_closer(euler(prediction_type=prediction), 10, x0=False, s_churn=churn)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ancestral_in_16_bits(prediction: str) -> None:
    check_closer(ancestral(prediction_type=prediction), 10, x0=False)


CUSTOM: tuple[dict[str, Any], ...] = (
    {"num_inference_steps": 12},
    {"timesteps": [999, 700, 400, 350, 100, 20]},
    {"sigmas": [14.0, 6.0, 2.0, 1.0, 0.3, 0.0]},
    {"sigmas": [14.0, 6.0, 2.0, 1.0, 0.3]},
)


@pytest.mark.parametrize("steps", CUSTOM, ids=str)
@pytest.mark.parametrize("where", [{}, {"begin_index": 2, "first": 2}, {"first": 2}], ids=str)
@pytest.mark.parametrize("churn", [0.0, 2.0])
def test_a_walk_of_euler(steps: Any, where: Any, churn: float) -> None:
    check_walk(euler(), steps, generators=generator, s_churn=churn, **where)
    check_walk(euler(prediction_type="v_prediction"), steps, generators=generator, **where)


@pytest.mark.parametrize("where", [{}, {"begin_index": 3, "first": 3}, {"first": 3}], ids=str)
def test_a_walk_of_ancestral(where: Any) -> None:
    check_walk(ancestral(), 12, generators=generator, **where)


def test_a_generator_for_each_sample() -> None:
    def several() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    check_walk(euler(), 8, generators=several, s_churn=2.0)
    check_walk(ancestral(), 8, generators=several)


def test_a_start_in_the_middle() -> None:
    within_bound(step_errors(euler(), 10, start=4, s_churn=2.0), torch.float32)
    within_bound(step_errors(ancestral(), 10, start=4), torch.float32)


def test_the_second_of_two_equal_timesteps_begins_a_walk() -> None:
    # Sigmas above all of the schedule have its last timestep.
    steps = {"sigmas": [900.0, 500.0, 300.0, 2.0, 0.0]}
    scheduler = check_walk(euler(), steps, first=1)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_rules_are_those_of_our_tables(prediction: str) -> None:
    scheduler = euler(prediction_type=prediction)()
    scheduler.set_timesteps(8)
    levels = levels_of(scheduler)
    for churn in ({}, {"s_churn": 2.0, "s_tmin": 0.2, "s_noise": 1.1}):
        found = table_of(scheduler, rules="exact", **churn)
        wanted = euler_table(levels, prediction_type=prediction, **churn)
        assert torch.equal(found.coefficients, wanted.coefficients)
    # Without churn the two rules agree, but for the order in which they are rounded.
    plain = table_of(scheduler)
    torch.testing.assert_close(
        plain.coefficients,
        euler_table(levels, prediction_type=prediction).coefficients,
        rtol=1e-13,
        atol=1e-13,
    )
    walk(fuse(scheduler, rules="exact"), samples())
    assert not scheduler.fallbacks


def test_ancestral_is_our_table() -> None:
    scheduler = ancestral()()
    scheduler.set_timesteps(8)
    wanted = euler_ancestral_table(levels_of(scheduler))
    for rules in ("diffusers", "exact"):
        assert torch.equal(table_of(scheduler, rules=rules).coefficients, wanted.coefficients)


def test_noise_of_a_key() -> None:
    check_philox(euler(), 6, s_churn=3.0)
    check_philox(ancestral(), 6)


@pytest.mark.parametrize("shift", [0, 1])
def test_velocity(shift: int) -> None:
    """By the index of the timestep, also within a walk, where add_noise goes by the step."""
    stock, fused = euler()(), fuse(euler()())
    x, noise = samples(), samples().flip(0)
    found = []
    for scheduler in (stock, fused):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(shift)
        found.append(scheduler.get_velocity(x, noise, scheduler.timesteps[[2, 5]]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    exact = fuse(fused, rules="exact").get_velocity(x, noise, fused.timesteps[[2, 5]])
    sigma = fused.sigmas[[2, 5]].reshape(2, 1, 1, 1)
    torch.testing.assert_close(exact, (noise - sigma * x) / (sigma**2 + 1) ** 0.5)
    with pytest.raises(ValueError, match="integer indices"):
        fused.get_velocity(x, noise, torch.tensor([2, 5]))
    assert fused.fallbacks == {"get_velocity of integer timesteps": 1}


@pytest.mark.parametrize("make", [euler(), ancestral()])
@pytest.mark.parametrize("begin", [None, 3])
def test_noisy_samples(make: Any, begin: int | None) -> None:
    x, noise = samples(), samples().flip(0)
    found = []
    for scheduler in (make(), fuse(make())):
        scheduler.set_timesteps(10)
        if begin is not None:
            scheduler.set_begin_index(begin)
        t = scheduler.timesteps
        first = scheduler.add_noise(x, noise, t[[4, 6]])
        scaled = scheduler.scale_model_input(first, t[begin or 4])
        found.append((first, scaled, scheduler.add_noise(x, noise, t[[5, 7]])))
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [euler(), ancestral()])
def test_a_step_before_the_input_is_scaled(
    make: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock scheduler warns, and takes it."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    found, warned = [], []
    for scheduler in (make(), fuse(make())):
        scheduler.set_timesteps(10)
        args = samples(), scheduler.timesteps[3], samples()
        found.append(scheduler.step(*args, generator=generator(), return_dict=False)[0])
        warned.append(caplog.text.count("`scale_model_input` function should be called"))
        caplog.clear()
    assert torch.equal(*found)
    assert scheduler.fallbacks == {"step before scale_model_input": 1}
    assert warned[0] == warned[1] > 0


@pytest.mark.parametrize("make", [euler(), ancestral()])
def test_what_the_stock_scheduler_refuses(make: Any) -> None:
    scheduler = fuse(make())
    scheduler.set_timesteps(10)
    with pytest.raises(IndexError):
        scheduler.scale_model_input(samples(), 5.5)
    with pytest.raises(IndexError):
        scheduler.add_noise(samples(), samples(), torch.tensor([5.5, 5.5]))
    scheduler.scale_model_input(samples(), scheduler.timesteps[0])
    with pytest.raises(ValueError, match="integer indices"):
        scheduler.step(samples(), 3, samples())
    unknown = "timestep 5.5, which is not one of scheduler.timesteps"
    assert scheduler.fallbacks == {unknown: 2}


def test_ancestral_has_no_sample_prediction() -> None:
    scheduler = ancestral(prediction_type="sample")()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        table_of(scheduler)
    fuse(scheduler).scale_model_input(samples(), scheduler.timesteps[0])
    with pytest.raises(NotImplementedError):
        scheduler.step(samples(), scheduler.timesteps[0], samples())


def test_exact_churn_needs_other_levels_than_the_scheduler_has() -> None:
    stock, fused = euler()(), fuse(euler()(), rules="exact")
    found = []
    for scheduler in (stock, fused):
        scheduler.set_timesteps(6)
        found.append(walk(scheduler, samples(), s_churn=1.0, generator=generator())[-1].x)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-3)
    assert sum(fused.fallbacks.values()) == 6


def test_before_set_timesteps() -> None:
    """The stock schedulers have sigmas for all timesteps of the training from the start."""
    for make in (euler(), ancestral()):
        found = []
        for scheduler in (make(), fuse(make())):
            t = scheduler.timesteps[10]
            x = scheduler.scale_model_input(samples(), t)
            found.append(scheduler.step(x, t, samples(), generator=generator()).prev_sample)
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        assert not scheduler.fallbacks
