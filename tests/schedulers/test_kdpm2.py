"""KDPM2DiscreteScheduler and KDPM2AncestralDiscreteScheduler, fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, dpm2_ancestral_table, dpm2_table
from support.fused import (
    KARRAS,
    SHORT,
    check_closer,
    check_philox,
    check_walk,
    made_once,
    samples,
)
from support.schedulers import bent, step_errors, within_bound

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

PREDICTIONS = ("epsilon", "v_prediction")


def kdpm2(**config: Any) -> Any:
    return made_once(diffusers.KDPM2DiscreteScheduler, **{**SHORT, **config})


def ancestral(**config: Any) -> Any:
    return made_once(diffusers.KDPM2AncestralDiscreteScheduler, **{**SHORT, **config})


each = pytest.mark.parametrize("make", [kdpm2, ancestral])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@each
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("sigmas", KARRAS, ids=str)
def test_steps(make: Any, steps: int, spacing: str, sigmas: Any) -> None:
    for prediction in PREDICTIONS if steps < 50 else PREDICTIONS[:1]:
        scheduler = make(timestep_spacing=spacing, prediction_type=prediction, **sigmas)
        within_bound(step_errors(scheduler, steps), torch.float32)


@each
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_start_in_the_middle(make: Any, prediction: str) -> None:
    scheduler = make(prediction_type=prediction, use_karras_sigmas=True)
    within_bound(step_errors(scheduler, 10, start=6), torch.float32)


@each
@pytest.mark.parametrize("steps", [5, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_16_bits(make: Any, steps: int, prediction: str) -> None:
    check_closer(make(prediction_type=prediction), steps)


@pytest.mark.parametrize("where", [{}, {"begin_index": 6, "first": 6}, {"first": 4}], ids=str)
@pytest.mark.parametrize("config", [{}, {"beta_schedule": "scaled_linear"}], ids=str)
def test_a_walk(where: Any, config: Any) -> None:
    check_walk(kdpm2(**config), 8, **where)
    check_walk(ancestral(**config), 8, generators=generator, **where)


def test_a_generator_for_each_sample() -> None:
    check_walk(ancestral(), 6, generators=lambda: [generator(), generator()])


def test_noise_of_a_key() -> None:
    check_philox(ancestral(), 6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_rules_are_those_of_our_tables(prediction: str) -> None:
    for make, function in ((kdpm2, dpm2_table), (ancestral, dpm2_ancestral_table)):
        scheduler = make(prediction_type=prediction)()
        scheduler.set_timesteps(6)
        sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])[:7].double()
        times = scheduler.timesteps[::2].double()
        levels = NoiseLevels(torch.ones_like(sigmas), sigmas, times, "ve", float, 1.0)
        wanted = function(levels, prediction_type=prediction)
        found = table_of(scheduler, rules="exact")
        assert torch.equal(found.coefficients, wanted.coefficients)
        # diffusers' sigmas on the way are rounded to float32, and that is the difference. The
        # two forms of a row agree in what a model that is linear in x makes of it.
        held = table_of(scheduler)
        assert torch.equal(held.timesteps, scheduler.timesteps.double())
        ends = []
        for table in (wanted, held):
            x, history = samples().double(), ()
            for i in range(len(table)):
                x, history = table.step(i, x, 0.3 * x, history, noise=x.flip(0))
            ends.append(x)
        torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6 * float(ends[0].abs().max()))


@each
def test_the_state_between_two_calls(make: Any) -> None:
    stock, fused = make()(), fuse(make()())
    draws = [generator(), generator()]
    for scheduler in (stock, fused):
        scheduler.set_timesteps(4)
    x = samples()
    for t in stock.timesteps:
        assert fused.state_in_first_order == stock.state_in_first_order
        results = []
        for scheduler, drawn in zip((stock, fused), draws, strict=True):
            seen = scheduler.scale_model_input(x, t)
            given = {} if make is kdpm2 else {"generator": drawn}
            step = scheduler.step(bent(seen, t), t, x, return_dict=False, **given)
            results.append((seen, *step))
        for ours, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        x = results[0][1] + 0.1  # what a pipeline changes on the way is not in the step's end
    assert not fused.fallbacks


@each
def test_what_the_stock_scheduler_begins_it_ends(make: Any) -> None:
    found = []
    for scheduler in (make()(), fuse(make()())):
        scheduler.set_timesteps(4)
        t, integers = scheduler.timesteps, samples().round().long()
        x = scheduler.step(samples(), t[0], integers).prev_sample
        given = {} if make is kdpm2 else {"generator": generator()}
        scaled = scheduler.scale_model_input(x, t[1])
        found.append(scheduler.step(scaled, t[1], x, **given).prev_sample)
    torch.testing.assert_close(*found)
    assert sum(scheduler.fallbacks.values()) == 3


@each
def test_no_sample_prediction(make: Any) -> None:
    scheduler = fuse(make(prediction_type="sample")())
    scheduler.set_timesteps(4)
    with pytest.raises(NotImplementedError):
        scheduler.step(samples(), scheduler.timesteps[0], samples())
    assert scheduler.fallbacks == {"prediction_type='sample'": 1}
