"""LMSDiscreteScheduler, fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, lms_table
from support.fused import KARRAS, SHORT, check_closer, check_walk, made_once, samples
from support.schedulers import bent, step_errors, walk, within_bound

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers and of scipy

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def lms(**config: Any) -> Any:
    return made_once(diffusers.LMSDiscreteScheduler, **{**SHORT, **config})


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("sigmas", KARRAS, ids=str)
def test_lms(steps: int, spacing: str, sigmas: Any) -> None:
    for prediction in PREDICTIONS if steps < 20 else PREDICTIONS[:1]:
        make = lms(timestep_spacing=spacing, prediction_type=prediction, **sigmas)
        within_bound(step_errors(make, steps), torch.float32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_orders(prediction: str, order: int, start: int) -> None:
    """From the middle with the weights of the full order, whose first steps lack derivatives."""
    make = lms(prediction_type=prediction)
    within_bound(step_errors(make, 10, start=start, order=order), torch.float32)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_16_bits(steps: int, prediction: str) -> None:
    check_closer(lms(prediction_type=prediction), steps)


@pytest.mark.parametrize("where", [{}, {"begin_index": 3, "first": 3}, {"first": 3}], ids=str)
@pytest.mark.parametrize("order", [2, 4])
def test_a_walk(where: Any, order: int) -> None:
    check_walk(lms(), 10, order=order, **where)


@pytest.mark.parametrize("order", [1, 3, 4])
def test_the_exact_rules_are_those_of_our_table(order: int) -> None:
    scheduler = lms()()
    scheduler.set_timesteps(7)
    sigmas, times = scheduler.sigmas.double(), scheduler.timesteps.double()
    levels = NoiseLevels(torch.ones_like(sigmas), sigmas, times, "ve", float, 1.0)
    found = table_of(scheduler, rules="exact", order=order)
    assert torch.equal(found.coefficients, lms_table(levels, order=order).coefficients)
    # From the middle ours begins with a step of the first order, as from the start.
    fused = fuse(scheduler, rules="exact")
    fused.set_begin_index(2)
    last = walk(fused, samples(), timesteps=fused.timesteps[2:], order=order)[-1].x
    table = lms_table(levels.skip(2), order=order)
    x, history = samples() * scheduler.init_noise_sigma, ()
    for i, t in enumerate(scheduler.timesteps[2:]):
        x, history = table.step(i, x, bent(x * table.rows[i].input_scale, t), history)
    torch.testing.assert_close(last, x, rtol=1e-5, atol=1e-5)
    assert not fused.fallbacks


def test_a_higher_order_is_the_stock_scheduler_s() -> None:
    found = []
    for scheduler in (lms()(), fuse(lms()())):
        scheduler.set_timesteps(6)
        x = samples()
        for i, t in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(bent(seen, t), t, x, order=5 if i == 0 else 4).prev_sample
        found.append(x)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert scheduler.fallbacks == {
        "order=5, where a table has 1 to 4": 1,
        "a walk that the stock scheduler began": 5,
    }
    scheduler.fallbacks.clear()
    scheduler.set_timesteps(6)
    walk(scheduler, samples())
    assert not scheduler.fallbacks


def test_a_higher_order_in_the_middle() -> None:
    scheduler = fuse(lms()())
    scheduler.set_timesteps(6)
    walk(scheduler, samples(), timesteps=scheduler.timesteps[:2])
    with pytest.raises(RuntimeError, match="order=5, where a table has 1 to 4"):
        scheduler.step(samples(), scheduler.timesteps[2], samples(), order=5)


def test_a_step_before_the_input_is_scaled() -> None:
    for scheduler in (lms()(), fuse(lms()())):
        scheduler.set_timesteps(6)
        with pytest.warns(UserWarning, match="`scale_model_input` function should be called"):
            scheduler.step(samples(), scheduler.timesteps[0], samples())
    assert scheduler.fallbacks == {"step before scale_model_input": 1}
