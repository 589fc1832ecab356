"""LCMScheduler and TCDScheduler, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, lcm_table, tcd_table
from support.fused import (
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

PREDICTIONS = ("epsilon", "sample", "v_prediction")
FEW = (1, 4, 10, 50)


def lcm(**config: Any) -> Callable[[], Any]:
    return lambda: diffusers.LCMScheduler(**config)


def tcd(**config: Any) -> Callable[[], Any]:
    return lambda: diffusers.TCDScheduler(**config)


def levels(scheduler: Any, end: float) -> NoiseLevels:
    """Those of the timesteps; their own time_of knows all of the schedule."""
    from diffcore.diffusers.families.schedule import levels_of

    return levels_of(scheduler, end=end)


# ---- LCM ---------------------------------------------------------------------------------------


@pytest.fixture
def exact_scalings(monkeypatch: pytest.MonkeyPatch) -> None:
    """c_skip and c_out in float64, where diffusers has float32 whatever the samples are.

    A walk of its scheduler in float64 has their rounding, too, and would not be the truth.
    """
    name = "get_scalings_for_boundary_condition_discrete"
    stock = getattr(diffusers.LCMScheduler, name)
    monkeypatch.setattr(diffusers.LCMScheduler, name, lambda self, t: stock(self, t.double()))


@pytest.mark.usefixtures("exact_scalings")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_lcm(prediction: str, clip: bool) -> None:
    make = lcm(prediction_type=prediction, clip_sample=clip, clip_sample_range=0.8)
    check_steps(make, FEW)
    check_walk(make)


@pytest.mark.usefixtures("exact_scalings")
@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"timestep_scaling": 0.01},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"original_inference_steps": 25, "set_alpha_to_one": False},
        {"thresholding": True, "sample_max_value": 1.3},
    ],
)
def test_lcm_options(config: dict[str, Any]) -> None:
    check_steps(lcm(**config), (4, 10))
    check_walk(lcm(**config), 4)


def test_lcm_otherwise() -> None:
    check_closer(lcm(timestep_scaling=0.01), 8)
    check_starts(lcm(), steps=8)
    check_philox(lcm())
    check_walk(lcm(), {"timesteps": [999, 700, 101]})
    scheduler = lcm()()
    scheduler.set_timesteps(6)
    check_same_steps(table_of(scheduler, rules="exact"), lcm_table(levels(scheduler, 1.0)))
    check_same_steps(table_of(scheduler), lcm_table(levels(scheduler, 1.0)))
    check_exact(lcm(clip_sample=True))


def test_a_list_that_strength_shortens_ends_with_noise() -> None:
    given = {"timesteps": [999, 799, 599, 399, 199], "strength": 0.6}
    check_walk(lcm(), given)
    check_walk(tcd(), given)
    scheduler = lcm()()
    scheduler.set_timesteps(**given)
    assert table_of(scheduler).rows[-1].noisy


def test_lcm_at_another_timestep_goes_to_diffusers() -> None:
    def step(scheduler: Any) -> None:
        scheduler.step(samples(), 99, samples())

    fused = fuse(lcm()())
    fused.set_timesteps(4)
    fused.set_begin_index(0)
    check_refused(fused, "not that of step 0, 999", step)


def test_lcm_of_mixed_dtypes() -> None:
    found = []
    make = lcm(prediction_type="sample")  # with others diffusers rounds a product to 16 bits
    for scheduler in (make(), fuse(make())):
        scheduler.set_timesteps(4)
        generator, t = torch.Generator().manual_seed(1), scheduler.timesteps[0]
        found.append(scheduler.step(samples().bfloat16(), t, samples(), generator).to_tuple())
    for wanted, came in zip(*found, strict=True):
        assert wanted.dtype == came.dtype == torch.float32
        torch.testing.assert_close(came, wanted, atol=1e-5, rtol=1e-5)


# ---- TCD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd(prediction: str, eta: float) -> None:
    make = tcd(prediction_type=prediction)
    check_steps(make, FEW, eta=eta)
    check_walk(make, eta=eta)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"clip_sample": True, "thresholding": True},  # which diffusers ignores
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"set_alpha_to_one": False, "original_inference_steps": 25},
    ],
)
def test_tcd_options(config: dict[str, Any]) -> None:
    check_steps(tcd(**config), (4, 10))
    check_walk(tcd(**config), 4)


def test_tcd_otherwise() -> None:
    check_closer(tcd(), 8)
    check_starts(tcd(), steps=8)
    check_philox(tcd(), eta=0.6)
    check_walk(tcd(), {"timesteps": [999, 700, 101]})
    scheduler = tcd()()
    scheduler.set_timesteps(6)
    for eta in (0.0, 0.3, 1.0):
        wanted = tcd_table(levels(scheduler, float(scheduler.alphas_cumprod[0])), gamma=eta)
        check_same_steps(table_of(scheduler, rules="exact", eta=eta), wanted)
        check_same_steps(table_of(scheduler, eta=eta), wanted)
        check_exact(tcd(), eta=eta)


def test_tcd_outside_of_its_range_goes_to_diffusers() -> None:
    fused = fuse(tcd()())
    fused.set_timesteps(4)
    with pytest.raises(AssertionError, match="gamma"):
        fused.step(samples(), fused.timesteps[0], samples(), eta=1.5)
    assert list(fused.fallbacks) == ["eta=1.5, outside [0, 1]"]


# ---- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lcm(), tcd()])
def test_zero_snr_with_epsilon_goes_to_diffusers(make: Callable[[], Any]) -> None:
    fused = fuse(make().from_config(make().config, rescale_betas_zero_snr=True))
    fused.set_timesteps(4)
    check_refused(
        fused, "zero terminal SNR", lambda s: s.step(samples(), s.timesteps[0], samples())
    )


@pytest.mark.parametrize("make", [lcm(), tcd()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noising(make: Callable[[], Any], dtype: torch.dtype) -> None:
    x, noise = samples((3, 2, 8, 8)).to(dtype), samples((3, 2, 8, 8), seed=1).to(dtype)
    t = torch.tensor([3, 500, 999])
    stock, fused = make(), fuse(make())
    signal = stock.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    for name, truth in (
        ("add_noise", alpha * x.double() + sigma * noise.double()),
        ("get_velocity", alpha * noise.double() - sigma * x.double()),
    ):
        errors = [
            float((getattr(s, name)(x, noise, t).double() - truth).abs().max())
            for s in (fused, stock)
        ]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * float(truth.abs().max())
