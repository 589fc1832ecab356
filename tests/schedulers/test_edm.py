"""EDMEulerScheduler, fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, edm_euler_table
from support.fused import check_closer, check_philox, check_walk, samples
from support.schedulers import step_errors, walk, within_bound

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

PREDICTIONS = ("epsilon", "v_prediction")
RAMP = torch.linspace(0, 1, 9) ** 1.2  # diffusers takes sigmas for that from sigma_max to sigma_min


def edm(**config: Any) -> Any:
    return lambda: diffusers.EDMEulerScheduler(**config)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_edm(steps: int, schedule: str, final: str, prediction: str, churn: float) -> None:
    make = edm(sigma_schedule=schedule, final_sigmas_type=final, prediction_type=prediction)
    within_bound(step_errors(make, steps, s_churn=churn), torch.float32)


@pytest.mark.parametrize(
    "config", [{"sigma_data": 1.0}, {"sigma_min": 0.03, "sigma_max": 9.0, "rho": 5.0}], ids=str
)
@pytest.mark.parametrize(
    "churn", [{}, {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.01}], ids=str
)
@pytest.mark.parametrize("start", [0, 4])
def test_options(config: Any, churn: Any, start: int) -> None:
    within_bound(step_errors(edm(**config), 10, start=start, **churn), torch.float32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_16_bits(prediction: str, churn: float) -> None:
    check_closer(edm(prediction_type=prediction), 10, x0=False, s_churn=churn)


@pytest.mark.parametrize("where", [{}, {"begin_index": 3, "first": 3}, {"first": 3}], ids=str)
@pytest.mark.parametrize(
    "steps", [{"num_inference_steps": 10}, {"sigmas": RAMP}], ids=["10", "ramp"]
)
@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_a_walk(where: Any, steps: Any, churn: float) -> None:
    check_walk(edm(), steps, generators=generator, s_churn=churn, **where)


@pytest.mark.parametrize("churn", [0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_x0(churn: float, dtype: torch.dtype) -> None:
    """Cosmos computes x0 itself."""
    stock, fused = edm()(), fuse(edm()())
    draws = [generator(), generator()]
    for scheduler in (stock, fused):
        scheduler.set_timesteps(6)
    x = (stock.init_noise_sigma * samples()).to(dtype)
    for t in stock.timesteps:
        results, x0 = [], torch.tanh(x)
        for scheduler, drawn in zip((stock, fused), draws, strict=True):
            scheduler.scale_model_input(x, t)
            result, returned = scheduler.step(
                x0, t, x, churn, generator=drawn, return_dict=False, pred_original_sample=x0
            )
            assert torch.equal(returned, x0)
            results.append(result)
        # Both round once to the dtype, after float32.
        unit = torch.finfo(dtype).eps if dtype != torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(*results, rtol=0, atol=unit * float(x.abs().max()))
        x = results[0]
    assert not fused.fallbacks


def test_a_given_x0_of_another_dtype() -> None:
    found = []
    for scheduler in (edm()(), fuse(edm()())):
        scheduler.set_timesteps(6)
        t = scheduler.timesteps[0]
        x = scheduler.scale_model_input(samples(), t).half()
        step = scheduler.step(x, t, samples(), pred_original_sample=samples())
        found.append(step.prev_sample)
    assert torch.equal(*found)
    assert scheduler.fallbacks == {"pred_original_sample of another dtype or shape": 1}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_rules_are_those_of_our_table(prediction: str) -> None:
    scheduler = edm(prediction_type=prediction)()
    scheduler.set_timesteps(7)
    levels = NoiseLevels.from_edm(scheduler.sigmas.double())
    for churn in ({}, {"s_churn": 2.0, "s_noise": 1.1}):
        found = table_of(scheduler, rules="exact", **churn)
        wanted = edm_euler_table(levels, prediction_type=prediction, **churn)
        assert torch.equal(found.coefficients, wanted.coefficients)
    torch.testing.assert_close(
        table_of(scheduler).coefficients,
        edm_euler_table(levels, prediction_type=prediction).coefficients,
        rtol=1e-13,
        atol=1e-13,
    )
    walk(fuse(scheduler, rules="exact"), samples())
    assert not scheduler.fallbacks


def test_noise_of_a_key() -> None:
    check_philox(edm(), 6, s_churn=3.0)


@pytest.mark.parametrize("begin", [None, 4])
def test_noisy_samples(begin: int | None) -> None:
    x, noise = samples(), samples().flip(0)
    found = []
    for scheduler in (edm()(), fuse(edm()())):
        scheduler.set_timesteps(6)
        if begin is not None:
            scheduler.set_begin_index(begin)
        found.append(scheduler.add_noise(x, noise, scheduler.timesteps[[1, 5]]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
