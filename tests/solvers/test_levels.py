"""Noise levels can be pickled, whichever process they describe."""

from __future__ import annotations

import pickle

import pytest
import torch

from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels, dpm2_table

SCHEDULE = NoiseSchedule.from_betas(make_betas("linear", 100))
LEVELS = {
    "sigmas": lambda: NoiseLevels.from_sigmas([9.0, 3.0, 0.0]),
    "timesteps": lambda: NoiseLevels.from_sigmas([9.0, 3.0, 0.0], torch.tensor([7.0, 3.0])),
    "edm": lambda: NoiseLevels.from_edm([9.0, 3.0, 0.0]),
    "flow": lambda: NoiseLevels.from_flow([0.9, 0.3, 0.0], num_train_timesteps=500.0),
    "schedule": lambda: NoiseLevels.from_schedule(SCHEDULE, [90, 30]),
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_can_be_pickled(name: str) -> None:
    levels = LEVELS[name]()
    again = pickle.loads(pickle.dumps(levels))
    # DPM-Solver-2 asks for levels, and so timesteps, between those of the list.
    expected, found = dpm2_table(levels), dpm2_table(again)
    assert torch.equal(found.coefficients, expected.coefficients)
    assert torch.equal(found.timesteps, expected.timesteps)
