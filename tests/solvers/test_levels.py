"""Noise levels in either direction, the timestep inputs of the model there, and pickles of both."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels, dpm2_table, euler_table, heun_table

SCHEDULE = NoiseSchedule.from_betas(make_betas("linear", 100))
LEVELS = {
    "sigmas": lambda: NoiseLevels.from_sigmas([9.0, 3.0, 0.0]),
    "timesteps": lambda: NoiseLevels.from_sigmas([9.0, 3.0, 0.0], torch.tensor([7.0, 3.0])),
    "edm": lambda: NoiseLevels.from_edm([9.0, 3.0, 0.0]),
    "flow": lambda: NoiseLevels.from_flow([0.9, 0.3, 0.0], num_train_timesteps=500.0),
    "schedule": lambda: NoiseLevels.from_schedule(SCHEDULE, [90, 30]),
    "rising": lambda: NoiseLevels.from_schedule(SCHEDULE, [30, 90]),
    "labels": lambda: NoiseLevels.from_flow([0.9, 0.3, 0.0], timesteps=[7, 3]),
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_can_be_pickled(name: str) -> None:
    levels = LEVELS[name]()
    again = pickle.loads(pickle.dumps(levels))
    # DPM-Solver-2 asks for levels, and so timesteps, between those of the list.
    expected, found = dpm2_table(levels), dpm2_table(again)
    assert torch.equal(found.coefficients, expected.coefficients)
    assert torch.equal(found.timesteps, expected.timesteps)


# ---- upward --------------------------------------------------------------------------------------


def numbers(levels: NoiseLevels) -> tuple[list[float], ...]:
    return tuple(v.tolist() for v in (levels.alpha, levels.sigma, levels.timesteps))


def test_levels_of_sigmas_rise() -> None:
    levels = NoiseLevels.from_sigmas([0.0, 1.0, 4.0])
    assert numbers(levels) == ([1, 1, 1], [0, 1, 4], [0, 1])
    assert (levels.rising, levels.init_noise_sigma) == (True, 4.0)
    flow = NoiseLevels.from_flow([0.0, 0.25, 1.0], num_train_timesteps=100.0)
    assert numbers(flow) == ([1, 0.75, 0], [0, 0.25, 1], [0, 25])
    assert (flow.rising, flow.init_noise_sigma) == (True, 1.0)
    edm = NoiseLevels.from_edm([1.0, 3.0])
    assert (edm.rising, edm.init_noise_sigma) == (True, math.sqrt(10))
    assert not NoiseLevels.from_sigmas([1.0, 0.0]).rising


def test_rising_timesteps_of_a_schedule_start_at_the_clean_sample() -> None:
    alpha, sigma = SCHEDULE.alpha, SCHEDULE.sigma
    levels = NoiseLevels.from_schedule(SCHEDULE, [10, 40, 90])
    assert numbers(levels) == (
        [1, *alpha[[10, 40, 90]].tolist()],
        [0, *sigma[[10, 40, 90]].tolist()],
        [0, 10, 40],
    )
    assert levels.timesteps.dtype == torch.int64
    # Heun's second call of a step is at its noisier end.
    assert heun_table(levels).timesteps.tolist() == [0, 10, 10, 40, 40, 90]
    assert heun_table(levels).timesteps.dtype == torch.int64
    between = NoiseLevels.from_schedule(SCHEDULE, [10.5, 40.0])
    assert between.timesteps.tolist() == [0, 10.5]
    # From timestep 0 on: a step that would keep its level is left out.
    noisy = NoiseLevels.from_schedule(SCHEDULE, [0, 40, 90], final_sigmas_type="sigma_min")
    assert numbers(noisy) == (
        alpha[[0, 40, 90]].tolist(),
        sigma[[0, 40, 90]].tolist(),
        [0, 40],
    )
    first = NoiseLevels.from_schedule(SCHEDULE, [10, 90], final_sigmas_type="sigma_min")
    assert first.timesteps.tolist() == [0, 10]


def test_rising_ratios_of_a_schedule() -> None:
    ratio = (SCHEDULE.sigma / SCHEDULE.alpha).tolist()
    levels = NoiseLevels.from_schedule(SCHEDULE, sigmas=[0.0, ratio[20], ratio[70]])
    assert levels.timesteps.tolist() == [0, 20]
    levels = NoiseLevels.from_schedule(
        SCHEDULE, sigmas=[ratio[20], ratio[70], ratio[90]], round_timesteps=True
    )
    assert levels.timesteps.tolist() == [20, 70]
    assert heun_table(levels).timesteps.tolist() == [20, 70, 70, 90]


@pytest.mark.parametrize("name", [name for name in LEVELS if name != "edm"])
def test_reversed_twice_is_the_same(name: str) -> None:
    levels = LEVELS[name]()
    up = levels.reversed()
    assert up.rising != levels.rising
    assert up.alpha.tolist() == levels.alpha.tolist()[::-1]
    assert up.sigma.tolist() == levels.sigma.tolist()[::-1]
    assert up.init_noise_sigma == levels.init_noise_sigma
    found, wanted = numbers(up.reversed()), numbers(levels)
    assert found[:2] == wanted[:2]
    assert found[2] == pytest.approx(wanted[2], rel=1e-15)
    assert up.timesteps.dtype == levels.timesteps.dtype


def test_edm_levels_are_reversed_above_zero() -> None:
    assert NoiseLevels.from_edm([9.0, 1.0]).reversed().timesteps.tolist() == [0.0]
    with pytest.raises(ValueError, match="sigma must be above 0 at the last level of what is rev"):
        NoiseLevels.from_edm([9.0, 1.0, 0.0]).reversed()
    with pytest.raises(ValueError, match="levels must hold two different ones to be reversed"):
        NoiseLevels.from_sigmas([1.0, 1.0]).reversed()


def test_parts_and_other_spaces_of_rising_levels() -> None:
    levels = NoiseLevels.from_schedule(SCHEDULE, [10, 40, 90])
    later = levels.skip(1)
    assert later.sigma.tolist() == SCHEDULE.sigma[[10, 40, 90]].tolist()
    assert later.init_noise_sigma == 1
    space = levels.sigma_space()
    ratio = (SCHEDULE.sigma / SCHEDULE.alpha)[[10, 40, 90]].tolist()
    assert space.sigma.tolist() == [0, *ratio]
    assert space.init_noise_sigma == ratio[-1]
    assert euler_table(space).input_scale.tolist()[0] == 1
    assert "sigma / alpha from 0 to" in repr(levels)


# ---- labels --------------------------------------------------------------------------------------

LABELED: dict[str, Callable[[Any], NoiseLevels]] = {
    "sigmas": lambda t: NoiseLevels.from_sigmas([9.0, 3.0, 1.0, 0.0], t),
    "flow": lambda t: NoiseLevels.from_flow([1.0, 0.5, 0.2, 0.0], timesteps=t),
    "schedule": lambda t: NoiseLevels.from_schedule(SCHEDULE, t, sigmas=[3.0, 1.0, 0.2, 0.0]),
    "with": lambda t: NoiseLevels.from_schedule(SCHEDULE, [90, 60, 30]).with_timesteps(t),
    "rising": lambda t: NoiseLevels.from_flow([0.0, 0.5, 0.6, 1.0], timesteps=t),
}


@pytest.mark.parametrize("name", LABELED)
def test_labels_are_apart_from_levels(name: str) -> None:
    make = LABELED[name]
    plain = make([3, 2, 1])
    for labels in (
        [7, 700, 70],
        [7.5, 0.25, -1.0],
        torch.tensor([5, 4, 3], dtype=torch.int32),
        torch.tensor([0.5, 0.25, 0.125]),
    ):
        levels = make(labels)
        wanted = torch.as_tensor(labels)
        exact = torch.float64 if wanted.is_floating_point() else torch.int64
        assert levels.timesteps.dtype == exact
        assert torch.equal(levels.timesteps, wanted.to(exact))
        assert torch.equal(levels.alpha, plain.alpha)
        assert torch.equal(levels.sigma, plain.sigma)
        # The levels make the coefficients, the labels go to the model.
        ours, others = (
            euler_table(levels, prediction_type="v_prediction"),
            euler_table(plain, prediction_type="v_prediction"),
        )
        assert torch.equal(ours.coefficients, others.coefficients)
        assert torch.equal(ours.timesteps, levels.timesteps)
    for wrong in ([1, 2], [1.0, 2.0, 3.0, 4.0]):
        with pytest.raises(ValueError, match=f"of the 3 steps, got {len(wrong)}"):
            make(wrong)
    with pytest.raises(ValueError, match="timesteps must be real numbers"):
        make(torch.ones(3, 1))


def test_labels_between_two_levels_are_interpolated_in_the_logarithm() -> None:
    def middle(levels: NoiseLevels) -> Tensor:
        return dpm2_table(levels, prediction_type="v_prediction").timesteps

    # DPM-Solver-2 calls the model at the geometric middle of two sigmas.
    down = NoiseLevels.from_sigmas([8.0, 2.0, 0.5]).with_timesteps([50, 10])
    assert middle(down).tolist() == pytest.approx([50, 30, 10, 10], rel=1e-14)
    up = NoiseLevels.from_sigmas([0.5, 2.0, 8.0]).with_timesteps([10, 50])
    assert middle(up).tolist() == pytest.approx([10, 30, 50, 50], rel=1e-14)
    # Beyond the first N levels there is no label but the last.
    assert heun_table(up).timesteps.tolist() == [10, 50, 50, 50]
    # An infinite ratio, or 0, has no logarithm to interpolate in.
    ends = NoiseLevels.from_flow([1.0, 0.5, 0.2], timesteps=[9, 4])
    assert ends.time_of(3.0) == 4
    clean = NoiseLevels.from_flow([0.0, 0.5, 0.8], timesteps=[4, 9])
    assert (clean.time_of(0.0), clean.time_of(0.5), clean.time_of(1.0)) == (4, 9, 9)


def test_the_default_labels_are_those_of_the_levels() -> None:
    assert NoiseLevels.from_flow([0.5, 0.0]).timesteps.tolist() == [500]
    assert NoiseLevels.from_sigmas([0.5, 0.0]).timesteps.tolist() == [0.5]
    assert NoiseLevels.from_schedule(SCHEDULE, [7]).timesteps.tolist() == [7]
