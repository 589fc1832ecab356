"""FlowMatchHeunDiscreteScheduler and FlowMatchLCMScheduler, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, flow_heun_table, renoise_table
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

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

CHURN = {
    "none": {},
    "all": {"s_churn": 3.0},
    "some": {"s_churn": 40.0, "s_tmin": 0.3, "s_tmax": 0.9, "s_noise": 1.1},
    "quiet": {"s_churn": 3.0, "s_noise": 0.0},
}


def heun(shift: float = 1.0) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)


@pytest.mark.parametrize(
    ("churn", "shift"), [("none", 1.0), ("none", 3.0), ("all", 3.0), ("some", 1.0), ("quiet", 1.0)]
)
def test_heun(churn: str, shift: float) -> None:
    check_steps(heun(shift), STEPS if shift == 3.0 else (5, 20), **CHURN[churn])
    check_walk(heun(shift), **CHURN[churn])


@pytest.mark.parametrize("churn", ["none", "all"])
def test_heun_in_16_bits(churn: str) -> None:
    check_closer(heun(3.0), **CHURN[churn])


@pytest.mark.parametrize("at", [4, 6])
def test_heun_from_the_middle(at: int) -> None:
    check_starts(heun(), at=at)
    check_walk(heun(), first=at, begin_index=at, s_churn=2.0)


def test_heun_from_a_second_call() -> None:
    # diffusers then takes every second call for a first one.
    check_walk(heun(), first=3, begin_index=3)


def test_the_second_call_does_not_read_its_sample() -> None:
    stock, fused = heun()(), fuse(heun()())
    for scheduler in (stock, fused):
        scheduler.set_timesteps(5)
    x, found = [samples()] * 2, []
    for i, t in enumerate(stock.timesteps):
        m = samples(seed=i + 10)
        x = [s.step(m, t, y + 0.5).prev_sample for s, y in zip((stock, fused), x, strict=True)]
        torch.testing.assert_close(x[1], x[0], atol=1e-5, rtol=1e-5)
        assert stock.step_index == fused.step_index
        found.append((stock.state_in_first_order, fused.state_in_first_order))
    assert all(a == b for a, b in found[:-1])


def test_exact_heun() -> None:
    for churn in ("none", "all", "some"):
        scheduler = fuse(heun(3.0)(), rules="exact")
        scheduler.set_timesteps(6)
        sigmas = scheduler.sigmas.double()
        levels = NoiseLevels.from_flow(
            torch.cat([sigmas[:-1:2], sigmas[-1:]]), timesteps=scheduler.timesteps[::2].double()
        )
        wanted = flow_heun_table(levels, **CHURN[churn])
        check_same_steps(table_of(scheduler, rules="exact", **CHURN[churn]), wanted)
        check_exact(heun(3.0), **CHURN[churn])


def test_without_churn_the_rules_agree() -> None:
    scheduler = heun(3.0)()
    scheduler.set_timesteps(6)
    check_same_steps(table_of(scheduler), table_of(scheduler, rules="exact"))


def test_heun_with_a_noise_key() -> None:
    check_philox(heun(), s_churn=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heun_scales_noise(dtype: torch.dtype) -> None:
    stock, fused = heun()(), fuse(heun()())
    x, noise = samples().to(dtype), samples(seed=1).to(dtype)
    for scheduler in (stock, fused):
        scheduler.set_timesteps(5)
    for at in (4, 6):  # the second is told nothing: the count of steps goes on
        wanted, came = (s.scale_noise(x, s.timesteps[at], noise) for s in (stock, fused))
        assert stock.step_index == fused.step_index == 4
        truth = float(stock.sigmas[4]) * noise.double()
        truth += (1 - float(stock.sigmas[4])) * x.double()
        errors = [float((y.double() - truth).abs().max()) for y in (came, wanted)]
        assert errors[0] <= errors[1] + torch.finfo(torch.float32).eps * float(truth.abs().max())


# ---- FlowMatchLCM ------------------------------------------------------------------------------

LCM = {
    "plain": {},
    "shift": {"shift": 3.0},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "mu": {"use_dynamic_shifting": True},
    "terminal": {"shift_terminal": 0.1},
    "inverted": {"invert_sigmas": True},
}


def lcm(name: str = "plain") -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchLCMScheduler(**LCM[name])


def counted(name: str, steps: int) -> dict[str, Any]:
    return {"num_inference_steps": steps, **({"mu": 0.9} if name == "mu" else {})}


@pytest.mark.parametrize("name", LCM)
def test_lcm(name: str) -> None:
    steps = STEPS if name == "plain" else (10,)
    check_steps(lcm(name), [counted(name, n) for n in steps], drawn_in=torch.float32)
    check_walk(lcm(name), counted(name, 10))
    check_starts(lcm(name), steps=counted(name, 10))


def test_lcm_otherwise() -> None:
    check_closer(lcm("shift"), drawn_in=torch.float32)
    check_philox(lcm("shift"))
    check_walk(lcm(), {"sigmas": [1.0, 0.6, 0.3]})
    check_walk(lcm(), {"timesteps": [900.0, 500.0, 20.0]})
    scheduler = lcm("shift")()
    scheduler.set_timesteps(5)
    sigmas, times = scheduler.sigmas.double(), scheduler.timesteps.double()
    wanted = renoise_table(
        NoiseLevels.from_flow(sigmas, timesteps=times), prediction_type="flow_prediction"
    )
    check_same_steps(table_of(scheduler, rules="exact"), wanted)
    check_exact(lcm("shift"))


def test_lcm_draws_in_the_widest_dtype() -> None:
    x = samples().double()
    found = []
    for scheduler in (lcm()(), fuse(lcm()())):
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(1)
        found.append(scheduler.step(x, scheduler.timesteps[0], x, generator).prev_sample)
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)


def test_lcm_that_changes_the_size_goes_to_diffusers() -> None:
    def step(scheduler: Any) -> None:
        x = scheduler.step(samples(), scheduler.timesteps[0], samples()).prev_sample
        assert x.shape[2:] == (16, 16)

    fused = fuse(lcm()())
    fused.set_timesteps(2)
    fused.set_scale_factors([2.0], "bilinear")
    check_refused(fused, "scale_factors=[2.0]", step)
    with pytest.raises(ValueError, match="scale_factors"):
        table_of(fused)
