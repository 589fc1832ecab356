"""Schedulers of one model call a step, fused, beside the stock ones and float64."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from support.fused import samples
from support.schedulers import LINEAR, step_errors, within_bound

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

STEPS = (5, 10, 20, 50)
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm(steps: int, spacing: str, prediction: str, variance: str) -> None:
    def make() -> Any:
        return diffusers.DDPMScheduler(
            timestep_spacing=spacing, prediction_type=prediction, variance_type=variance, **LINEAR
        )

    within_bound(step_errors(make, steps), torch.float32)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
def test_ddim(steps: int, spacing: str, prediction: str, eta: float, clipped: bool) -> None:
    def make() -> Any:
        return diffusers.DDIMScheduler(
            timestep_spacing=spacing, prediction_type=prediction, **LINEAR
        )

    errors = step_errors(make, steps, eta=eta, use_clipped_model_output=clipped)
    within_bound(errors, torch.float32)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDPMParallelScheduler"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_with_the_coefficients_of_float32(kind: str, variance: str) -> None:
    """They are those of the stock step, whose 1 - a_t / a_s cancels; float64's are another 1e-4."""
    x, output = samples(), samples(seed=2)
    if variance == "learned_range":
        output = torch.cat([output, samples(seed=3)], dim=1)
    results: list[list[Any]] = []
    for change in (
        lambda scheduler: scheduler,
        lambda scheduler: fuse(scheduler, coefficients="diffusers"),
        fuse,
    ):
        scheduler = change(getattr(diffusers, kind)(variance_type=variance, **LINEAR))
        scheduler.set_timesteps(1000)
        found = []
        for t in scheduler.timesteps[[0, 500, 900, 990, 998]]:
            generator = torch.Generator().manual_seed(1)
            found.append(scheduler.step(output, t, x, generator=generator).prev_sample)
        results.append(found)
        assert not getattr(scheduler, "fallbacks", None)
    off, far = (
        max(float((a - b).abs().max()) for a, b in zip(results[0], other, strict=True))
        for other in results[1:]
    )
    assert off <= 4e-6
    assert far > 4 * off


def test_a_copy_has_the_same_coefficients() -> None:
    def step(scheduler: Any) -> torch.Tensor:
        scheduler.set_timesteps(1000)
        generator = torch.Generator().manual_seed(1)
        x: torch.Tensor = scheduler.step(
            samples(seed=2), scheduler.timesteps[990], samples(), generator=generator
        ).prev_sample
        return x

    made = fuse(diffusers.DDPMScheduler(), coefficients="diffusers")
    wanted = step(made)
    assert not torch.equal(step(fuse(diffusers.DDPMScheduler())), wanted)
    for other in (pickle.loads(pickle.dumps(made)), type(made).from_config(made.config)):
        assert torch.equal(step(other), wanted)


def test_coefficients_that_a_scheduler_does_not_have() -> None:
    words = "coefficients must be 'float64' for DDIMScheduler, got 'diffusers'"
    for call in (fuse, table_of):
        with pytest.raises(ValueError, match=words):
            call(diffusers.DDIMScheduler(), coefficients="diffusers")
        with pytest.raises(ValueError, match="coefficients must be 'float64' with rules='exact'"):
            call(diffusers.DDPMScheduler(), rules="exact", coefficients="diffusers")
        with pytest.raises(ValueError, match=r"coefficients must be .*, got 'float32'"):
            call(diffusers.DDPMScheduler(), coefficients="float32")
