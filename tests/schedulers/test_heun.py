"""HeunDiscreteScheduler, fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, heun_table
from support.fused import KARRAS, SHORT, check_closer, check_walk, made_once, samples
from support.schedulers import bent, step_errors, walk, within_bound

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def heun(**config: Any) -> Any:
    return made_once(diffusers.HeunDiscreteScheduler, **{**SHORT, **config})


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("sigmas", KARRAS, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_heun(steps: int, spacing: str, sigmas: Any, prediction: str) -> None:
    make = heun(timestep_spacing=spacing, prediction_type=prediction, **sigmas)
    within_bound(step_errors(make, steps), torch.float32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.4, "use_karras_sigmas": True},
        {"beta_schedule": "exp"},
        {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1},
    ],
    ids=str,
)
def test_options(prediction: str, config: Any) -> None:
    make = heun(prediction_type=prediction, **config)
    within_bound(step_errors(make, 10), torch.float32)
    within_bound(step_errors(make, 10, start=6), torch.float32)


@pytest.mark.parametrize("steps", [5, 50])
@pytest.mark.parametrize("config", [*({"prediction_type": p} for p in PREDICTIONS)], ids=str)
def test_16_bits(steps: int, config: Any) -> None:
    check_closer(heun(**config), steps)


@pytest.mark.parametrize(
    "steps", [{"num_inference_steps": 8}, {"timesteps": [199, 120, 60, 4]}], ids=str
)
@pytest.mark.parametrize("where", [{}, {"begin_index": 4, "first": 4}, {"first": 4}], ids=str)
@pytest.mark.parametrize("config", [{}, {"clip_sample": True}], ids=str)
def test_a_walk(steps: Any, where: Any, config: Any) -> None:
    # A timestep that is there twice begins a walk at the second, an even step.
    check_walk(heun(**config), steps, **where)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_our_table(clip: float | None, prediction: str) -> None:
    scheduler = heun(clip_sample=clip is not None, prediction_type=prediction)()
    scheduler.set_timesteps(6)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    times = scheduler.timesteps[::2].double()
    levels = NoiseLevels(torch.ones_like(sigmas), sigmas, times, "ve", float, 1.0)
    exact = table_of(scheduler, rules="exact")
    wanted = heun_table(levels, clip_range=clip, prediction_type=prediction)
    assert torch.equal(exact.coefficients, wanted.coefficients)
    ends = []
    for table in (table_of(scheduler), exact):  # of one form with a clip, of two without
        assert torch.equal(table.timesteps, scheduler.timesteps.double())
        x, history = samples().double(), ()
        for i in range(len(table)):
            x, history = table.step(i, x, torch.cos(x), history)
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_the_state_between_two_calls() -> None:
    stock, fused = heun()(), fuse(heun()())
    for scheduler in (stock, fused):
        scheduler.set_timesteps(4)
    x = samples()
    for t in stock.timesteps:
        assert fused.state_in_first_order == stock.state_in_first_order
        results = []
        for scheduler in (stock, fused):
            seen = scheduler.scale_model_input(x, t)
            results.append(scheduler.step(bent(seen, t), t, x, return_dict=False)[0])
        x = results[0] + 0.1  # what a pipeline changes between two calls is not in the step's end
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert fused.state_in_first_order == stock.state_in_first_order
    fused.set_timesteps(4)
    assert fused.state_in_first_order


def test_a_start_at_the_second_of_two_calls() -> None:
    found = []
    for scheduler in (heun()(), fuse(heun()())):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(3)
        found.append(walk(scheduler, samples(), timesteps=scheduler.timesteps[3:])[-1].x)
    torch.testing.assert_close(*found)
    assert scheduler.fallbacks["a walk from step 3, the second of two"] == 2  # its input, and it


def test_what_the_stock_scheduler_begins_it_ends() -> None:
    found = []
    for scheduler in (heun()(), fuse(heun()())):
        scheduler.set_timesteps(4)
        t, integers = scheduler.timesteps, samples().round().long()
        x = scheduler.step(samples(), t[0], integers).prev_sample
        scaled = scheduler.scale_model_input(x, t[1])
        found.append(scheduler.step(scaled, t[1], x).prev_sample)
    torch.testing.assert_close(*found)
    assert sum(scheduler.fallbacks.values()) == 3
    assert scheduler.fallbacks["sample of torch.int64"] == 1
    scheduler.fallbacks.clear()
    scheduler.set_timesteps(4)
    walk(scheduler, samples())
    assert not scheduler.fallbacks


def test_a_fused_one_from_a_configuration() -> None:
    first = fuse(heun(clip_sample=True)())
    again = type(first).from_config(first.config)
    assert type(again) is type(first)
    again.set_timesteps(4)
    walk(again, samples())
    assert not again.fallbacks


def test_what_the_stock_scheduler_refuses() -> None:
    scheduler = fuse(heun(prediction_type="flow")())
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="prediction_type given as flow"):
        scheduler.step(samples(), scheduler.timesteps[0], samples())
    assert scheduler.fallbacks == {"prediction_type='flow'": 1}


@pytest.mark.parametrize("begin", [None, 4])
def test_noisy_samples(begin: int | None) -> None:
    x, noise = samples(), samples().flip(0)
    found = []
    for scheduler in (heun()(), fuse(heun()())):
        scheduler.set_timesteps(6)
        if begin is not None:
            scheduler.set_begin_index(begin)
        found.append(scheduler.add_noise(x, noise, scheduler.timesteps[[1, 6]]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
