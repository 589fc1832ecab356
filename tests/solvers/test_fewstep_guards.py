"""What few-step tables refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffcore import solvers
from diffcore.coefficients import consistency_coefficients, lcm_coefficients
from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels

TIMES = [999, 740, 421, 100]
RISING = [0.1, 1.0, 3.0]
VP = NoiseLevels.from_schedule(NoiseSchedule.from_betas(make_betas("linear", 1000)), TIMES)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: solvers.renoise_table(RISING), ValueError, "levels must fall for renoise_table"),
        (lambda: solvers.lcm_table(RISING), ValueError, "levels must fall for lcm_table, got"),
        (
            lambda: solvers.tcd_table(RISING),
            ValueError,
            "levels must fall for tcd_table with gamma > 0, got levels that rise",
        ),
        (
            lambda: solvers.consistency_table(RISING),
            ValueError,
            "sigmas must fall for consistency_table, got levels that rise",
        ),
        (
            lambda: solvers.trigflow_table([0.5, 1.0]),
            ValueError,
            "times must fall at every step, got 1 at index 1",
        ),
        (
            lambda: solvers.trigflow_table([1.6, 1.0]),
            ValueError,
            r"times must lie in \[0, pi / 2\], got 1.6 at index 0",
        ),
        (lambda: solvers.tcd_table(VP, gamma=1.1), ValueError, r"gamma must be in \[0, 1\], got"),
        (lambda: solvers.tcd_table(VP, gamma="a"), TypeError, "gamma must be a number, got str"),
        (
            lambda: solvers.tcd_table(VP.with_timesteps([999, 700, 400, 300])),
            ValueError,
            "levels must include timestep 280, got those from 300 to 999; levels of",
        ),
        (
            lambda: solvers.tcd_table(VP.with_timesteps([1, 2, 3, 4])),
            ValueError,
            "timesteps must rise with the noise level",
        ),
        (
            lambda: solvers.tcd_table(NoiseLevels.from_edm([3.0, 0.5, 0.1])),
            ValueError,
            "timesteps must be at least 0 for tcd_table with gamma > 0, got -0.173287 at index 1",
        ),
        (
            lambda: solvers.tcd_table(
                NoiseLevels([1, 1, 1], [3.0, 2.0, 1.0], [3.0, 2.0], "ve", math.sqrt)
            ),
            ValueError,
            "time_of must be that of NoiseLevels.from_schedule, .*, got sqrt",
        ),
        (
            lambda: solvers.lcm_table(NoiseLevels.from_edm([3.0, 0.5, 0.0])),
            ValueError,
            "timesteps must be at least 0 for lcm_table, got -0.173287 at index 1",
        ),
        (
            lambda: solvers.lcm_table(VP, timestep_scaling=0.0),
            ValueError,
            "timestep_scaling must be above 0",
        ),
        (
            lambda: solvers.consistency_table([3.0, 0.001, 0.0]),
            ValueError,
            "sigmas must be at least sigma_min, 0.002, before the last, got 0.001 at index 1",
        ),
        (
            lambda: solvers.consistency_table([3.0, 0.0], prediction_type="flow_prediction"),
            ValueError,
            "prediction_type must be one of 'epsilon', 'v_prediction', 'sample', got",
        ),
        (
            lambda: solvers.consistency_table(VP),
            ValueError,
            "sigmas must be preconditioned",
        ),
        (
            lambda: solvers.consistency_table(NoiseLevels.from_edm([3.0, 0.0]), time_scale=1.0),
            ValueError,
            "time_scale must be left out with NoiseLevels",
        ),
        (
            lambda: consistency_coefficients(1.0, sigma_min=-1.0),
            ValueError,
            "sigma_min must be at least 0 and finite, got -1.0",
        ),
        (
            lambda: consistency_coefficients(torch.tensor([True])),
            TypeError,
            "sigma must be real, got a tensor of torch.bool",
        ),
        (lambda: lcm_coefficients("a"), TypeError, "timestep must be a number, got str"),
        (
            lambda: solvers.renoise_table([3.0, 0.0], prediction_type="flow_prediction"),
            ValueError,
            "levels must be NoiseLevels with prediction_type='flow_prediction'",
        ),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
