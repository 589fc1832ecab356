"""DDIM's relatives, fused: its parallel form and DDPM's, its inversion, CogVideoX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, ddim_table
from diffcore.solvers.paths import TimeOf
from support.fused import (
    STEPS,
    check_closer,
    check_exact,
    check_philox,
    check_refused,
    check_same_steps,
    check_starts,
    check_steps,
    check_walk,
    samples,
)
from support.schedulers import LINEAR

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def maker(name: str, **config: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**config)


# ---- parallel ----------------------------------------------------------------------------------

PARALLEL = ("DDIMParallelScheduler", "DDPMParallelScheduler")


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_parallel(name: str, prediction: str) -> None:
    make = maker(name, prediction_type=prediction, timestep_spacing="trailing", **LINEAR)
    check_steps(make, (5, 20))
    check_walk(make)


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        ("DDPMParallelScheduler", {}, {"timesteps": [900, 500, 3]}),
        ("DDPMParallelScheduler", {"variance_type": "fixed_large"}, 7),
        ("DDPMParallelScheduler", {"thresholding": True, "sample_max_value": 1.4}, 7),
        ("DDIMParallelScheduler", {"thresholding": True, "sample_max_value": 1.4}, 7),
        ("DDIMParallelScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, 7),
    ],
)
def test_parallel_options(name: str, config: dict[str, Any], steps: Any) -> None:
    check_steps(maker(name, **LINEAR, **config), [steps])
    check_walk(maker(name, **LINEAR, **config), steps)


@pytest.mark.parametrize("name", [*PARALLEL, "DDIMScheduler", "DDPMScheduler"])
def test_from_the_middle(name: str) -> None:
    check_starts(maker(name, **LINEAR))


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_otherwise(name: str) -> None:
    make = maker(name, **LINEAR)
    check_closer(make)
    check_philox(make, **({"eta": 0.5} if "DDIM" in name else {}))
    stock, fused = make(), fuse(make())
    for scheduler in (stock, fused):
        scheduler.set_timesteps(5)
    x, m = samples((5, 3, 8, 8)), samples((5, 3, 8, 8), seed=1)
    wanted, came = (s.batch_step_no_noise(m, s.timesteps, x) for s in (stock, fused))
    assert torch.equal(wanted, came)
    results = [s.step(m, stock.timesteps[0], x) for s in (stock, fused)]
    assert type(results[0]) is type(results[1])


def test_steps_back_and_again() -> None:
    # As RePaint and the parallel pipelines take them: in any order.
    stock, fused = (s(maker("DDIMParallelScheduler", **LINEAR)()) for s in (lambda s: s, fuse))
    for scheduler in (stock, fused):
        scheduler.set_timesteps(6)
    for i in (4, 2, 3, 0, 5, 5):
        x, m = samples(seed=i), samples(seed=i + 9)
        wanted, came = (s.step(m, s.timesteps[i], x).prev_sample for s in (stock, fused))
        torch.testing.assert_close(came, wanted, rtol=1e-5, atol=1e-5)
    assert not fused.fallbacks


# ---- inversion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_inverse(spacing: str, prediction: str, clip: bool) -> None:
    # From a clean sample x_0 does not determine the noise: diffusers divides by 0.
    to_one = prediction != "sample"
    make = maker(
        "DDIMInverseScheduler",
        timestep_spacing=spacing,
        prediction_type=prediction,
        clip_sample=clip,
        set_alpha_to_one=to_one,
        **LINEAR,
    )
    check_steps(make, STEPS if to_one and not clip else (7, 30))
    if to_one:  # else every walk divides its rounding by sigma = 0.01 in the first step
        check_walk(make, 7)
        check_starts(make)


@pytest.mark.parametrize(
    "config",
    [
        {"set_alpha_to_one": False},
        {"steps_offset": 1, "clip_sample_range": 0.7},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"beta_schedule": "scaled_linear"},
    ],
)
def test_inverse_options(config: dict[str, Any]) -> None:
    check_steps(maker("DDIMInverseScheduler", **config), (10,))


def test_inverse_in_16_bits() -> None:
    check_closer(maker("DDIMInverseScheduler", clip_sample=False, **LINEAR))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inverse_by_exact_rules(spacing: str) -> None:
    make = maker("DDIMInverseScheduler", timestep_spacing=spacing, clip_sample=False, **LINEAR)
    scheduler = make()
    scheduler.set_timesteps(6)  # T // n is not the distance of "trailing"
    signal = scheduler.alphas_cumprod.double()
    visited = torch.cat([torch.ones(1).double(), signal[scheduler.timesteps]])
    levels = NoiseLevels(
        visited.sqrt(),
        (1 - visited).sqrt(),
        scheduler.timesteps,
        "vp",
        TimeOf((1 / signal - 1).sqrt(), torch.arange(1000)),
    )
    assert levels.rising
    wanted = ddim_table(levels, rederive_epsilon=False)
    check_same_steps(table_of(scheduler, rules="exact"), wanted)
    check_exact(make)
    if spacing == "leading":
        check_same_steps(table_of(scheduler), wanted)


def test_inverse_that_diffusers_cannot_take_either() -> None:
    fused = fuse(maker("DDIMInverseScheduler", prediction_type="sample", **LINEAR)())
    fused.set_timesteps(5)
    check_refused(fused, "does not determine epsilon", lambda s: s.step(samples(), 0, samples()))
    assert not hasattr(fused, "add_noise")


# ---- CogVideoX ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_cogvideox(spacing: str, prediction: str) -> None:
    make = maker("CogVideoXDDIMScheduler", timestep_spacing=spacing, prediction_type=prediction)
    check_steps(make, (5, 20))
    check_walk(make, eta=0.5)
    check_starts(make)


@pytest.mark.parametrize(
    "config",
    [
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"set_alpha_to_one": False, "snr_shift_scale": 1.0, "steps_offset": 1},
        {"beta_schedule": "linear", "clip_sample": True},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_cogvideox_options(config: dict[str, Any]) -> None:
    make = maker("CogVideoXDDIMScheduler", **{"timestep_spacing": "trailing", **config})
    check_steps(make, (10, 50))


def test_cogvideox_otherwise() -> None:
    make = maker("CogVideoXDDIMScheduler", prediction_type="v_prediction")
    check_closer(make)
    scheduler = make()
    scheduler.set_timesteps(8)
    from diffcore.diffusers.families.schedule import levels_of

    wanted = ddim_table(levels_of(scheduler), prediction_type="v_prediction")
    check_same_steps(table_of(scheduler, rules="exact"), wanted)
    check_same_steps(table_of(scheduler), wanted)
    check_exact(make)
    fused = fuse(make())
    x, noise, t = samples(), samples(seed=1), torch.tensor([3, 700])
    for name in ("add_noise", "get_velocity"):
        came, expected = (getattr(s, name)(x, noise, t) for s in (fused, make()))
        torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-5)
