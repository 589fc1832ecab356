"""Schedulers of one model call a step, fused, beside the stock ones and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.schedulers import LINEAR, step_errors, within_bound

diffusers = pytest.importorskip("diffusers")

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
