"""PNDMScheduler, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffcore.solvers import pndm_table
from support.fused import (
    STEPS,
    check_closer,
    check_exact,
    check_refused,
    check_same_steps,
    check_steps,
    check_walk,
    samples,
)
from support.schedulers import bent, walk

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

SPACINGS = ("leading", "linspace", "trailing")


def pndm(**config: Any) -> Callable[[], Any]:
    return lambda: diffusers.PNDMScheduler(skip_prk_steps=True, **config)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pndm(spacing: str, prediction: str) -> None:
    make = pndm(timestep_spacing=spacing, prediction_type=prediction)
    check_steps(make, (2, *STEPS))
    check_walk(make)


@pytest.mark.parametrize(
    "config",
    [
        {"steps_offset": 1, "beta_schedule": "scaled_linear", "beta_end": 0.012},
        {"set_alpha_to_one": True, "steps_offset": 1},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_options(config: dict[str, Any]) -> None:
    check_steps(pndm(**config), (6, 20))
    check_walk(pndm(**config), 20)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_16_bits(prediction: str) -> None:
    check_closer(pndm(prediction_type=prediction, steps_offset=1))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("at", [1, 2, 5])
def test_from_the_middle(spacing: str, at: int) -> None:
    check_walk(pndm(timestep_spacing=spacing, steps_offset=1), first=at)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_the_table_alone(spacing: str, prediction: str, steps: int) -> None:
    scheduler = pndm(timestep_spacing=spacing, prediction_type=prediction)()
    scheduler.set_timesteps(steps)
    table = table_of(scheduler)
    x = samples().double()
    wanted = walk(scheduler, x)
    history: tuple[torch.Tensor, ...] = ()
    for i, (t, taken) in enumerate(zip(scheduler.timesteps, wanted, strict=True)):
        x, history = table.step(i, x, bent(x, t), history)
        # The stock coefficients are float32.
        torch.testing.assert_close(x, taken.x, rtol=1e-4, atol=1e-4)


def test_the_rules_agree_where_steps_meet() -> None:
    scheduler = pndm(steps_offset=1)()
    scheduler.set_timesteps(8)
    check_same_steps(table_of(scheduler), table_of(scheduler, rules="exact"))


def test_exact_rules() -> None:
    from diffcore.diffusers.families.schedule import levels_of

    make = pndm(timestep_spacing="trailing", prediction_type="v_prediction")
    scheduler = make()
    scheduler.set_timesteps(7)
    times = scheduler.timesteps
    levels = levels_of(
        scheduler,
        end=float(scheduler.final_alpha_cumprod),
        timesteps=torch.cat([times[:1], times[2:]]),
    )
    wanted = pndm_table(levels, prediction_type="v_prediction")
    check_same_steps(table_of(scheduler, rules="exact"), wanted)
    check_exact(make, 7)


def test_the_samples_between_may_be_changed() -> None:
    # As inpainting does: the steps read outputs, and the first sample, not what follows from them.
    stock, fused = pndm(steps_offset=1)(), fuse(pndm(steps_offset=1)())
    found = [samples()] * 2
    for scheduler in (stock, fused):
        scheduler.set_timesteps(8)
    for i, t in enumerate(stock.timesteps):
        m, other = samples(seed=2 * i + 1), samples(seed=2 * i + 2)
        found = [
            s.step(m, t, x + 0.3 * other).prev_sample
            for s, x in zip((stock, fused), found, strict=True)
        ]
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        assert stock.counter == fused.counter
    assert not fused.fallbacks


def test_runge_kutta_goes_to_diffusers() -> None:
    fused = fuse(diffusers.PNDMScheduler())
    fused.set_timesteps(10)
    check_refused(
        fused, "skip_prk_steps=False", lambda s: s.step(samples(), s.timesteps[0], samples())
    )
    with pytest.raises(ValueError, match="skip_prk_steps"):
        table_of(fused)


def test_a_walk_that_began_before() -> None:
    scheduler, stock = pndm()(), pndm()()
    for s in (scheduler, stock):
        s.set_timesteps(6)
    x = [samples()] * 2
    for i, t in enumerate(stock.timesteps):
        if i == 3:
            fuse(scheduler)
        m = samples(seed=i)
        x = [s.step(m, t, y).prev_sample for s, y in zip((scheduler, stock), x, strict=True)]
        assert torch.equal(*x)
    assert list(scheduler.fallbacks) == ["a call in the middle of a walk"]


def test_a_step_before_set_timesteps() -> None:
    fused = fuse(pndm()())
    with pytest.raises(TypeError, match="NoneType"):  # of diffusers
        fused.step(samples(), 1, samples())
    assert list(fused.fallbacks) == ["a step before set_timesteps"]
