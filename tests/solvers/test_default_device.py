"""Tables are made on the CPU, whatever torch's default device is; "meta" stands in for "cuda"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import coefficients, consistency, schedules, solvers
from diffcore.schedules import NoiseSchedule
from diffcore.solvers import NoiseLevels, SolverTable
from support.solver_list import ALL, CHURNED

SIGMAS = [10.0, 4.0, 1.0, 0.3, 0.0]
BETAS = torch.linspace(1e-3, 0.3, 20, dtype=torch.float64)
SCHEDULE = NoiseSchedule.from_betas(BETAS)
LEVELS = {
    "timesteps": lambda: NoiseLevels.from_schedule(SCHEDULE, [17, 9, 2]),
    "fractions": lambda: NoiseLevels.from_schedule(SCHEDULE, [17.5, 9.0, 2.25]),
    "sigmas": lambda: NoiseLevels.from_schedule(SCHEDULE, sigmas=[2.0, 0.5, 0.0]),
    "sigma-space": lambda: NoiseLevels.from_schedule(SCHEDULE, [17, 9, 2]).sigma_space(),
    "edm": lambda: NoiseLevels.from_edm(SIGMAS),
    "flow": lambda: NoiseLevels.from_flow(schedules.get_sigmas_flow(5, shift=3.0)[1:]),
}
NUMBERS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: schedules.make_betas(name, 50) for name in schedules.BETA_SCHEDULES},
    "alpha-bar": lambda: schedules.betas_for_alpha_bar(lambda t: 1 - t / 2, 9),
    "from-product": lambda: schedules.betas_from_alphas_cumprod(SCHEDULE.alpha**2),
    "terminal": lambda: schedules.rescale_zero_terminal_snr(BETAS),
    "flow-schedule": lambda: NoiseSchedule.rectified_flow(7).table,
    "list-schedule": lambda: NoiseSchedule.from_sigmas([1.0, 2.0]).table,
    "spaced": lambda: schedules.spaced_timesteps(50, 7),
    "to-sigmas": lambda: schedules.timesteps_to_sigmas(SCHEDULE, [3.5, 2.0]),
    "to-timesteps": lambda: schedules.sigmas_to_timesteps(SCHEDULE, [0.5, 0.2]),
    "shift": lambda: schedules.shift_sigmas([0.5, 0.2], 3.0),
    "stretch": lambda: schedules.stretch_to_terminal([0.5, 0.2], 0.1),
    "karras": lambda: schedules.get_sigmas_karras(5, 0.1, 9.0),
    "beta": lambda: schedules.get_sigmas_beta(5, 0.1, 9.0),
    "vp": lambda: schedules.get_sigmas_vp(5),
    "ddpm-row": lambda: coefficients.ddpm_coefficients(0.6, 0.8, 0.8, 0.6),
    "prior": lambda: torch.tensor(coefficients.prior_coefficients(0.1, 0.9), device="cpu"),
    **{
        f"bound-{kind}-{decoder}": lambda kind=kind, decoder=decoder: coefficients.vlb_coefficients(
            SCHEDULE.alpha, SCHEDULE.sigma, variance_type=kind, decoder=decoder
        )
        for kind in coefficients.VARIANCE_TYPES
        for decoder in coefficients.DECODERS
    },
}


def tensors_of(made: Tensor | SolverTable) -> list[Tensor]:
    values = [made] if isinstance(made, Tensor) else vars(made).values()
    return [value for value in values if isinstance(value, Tensor)]


def assert_same_on_the_cpu(make: Callable[[], Tensor | SolverTable]) -> None:
    expected = tensors_of(make())
    with torch.device("meta"):
        found = tensors_of(make())
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    assert_same_on_the_cpu(NUMBERS[name])


@pytest.mark.parametrize("name", {**ALL, **CHURNED})
def test_solvers(name: str) -> None:
    assert_same_on_the_cpu(lambda: {**ALL, **CHURNED}[name](SIGMAS))


def test_tables_that_take_other_levels() -> None:
    for make in (
        lambda: solvers.consistency_table([80.0, 3.0, 0.002]),
        lambda: solvers.trigflow_table([1.5708, 1.0, 0.0]),
        lambda: solvers.trigflow_table([1.0, 0.0], timesteps=[0.5]),
        lambda: solvers.flow_map_table([1.0, 0.5, 0.0]),
        lambda: solvers.flow_map_table([1.0, 0.5, 0.1], target_timesteps=[0.5, 0.1]),
        lambda: solvers.tcd_table(NoiseLevels.from_schedule(SCHEDULE, [17, 9, 2])),
        lambda: consistency.ladder(5),
        lambda: consistency.level_weights(consistency.ladder(5)),
    ):
        assert_same_on_the_cpu(make)


@pytest.mark.parametrize("name", LEVELS)
def test_levels(name: str) -> None:
    assert_same_on_the_cpu(lambda: solvers.dpm2_table(LEVELS[name]()))
    if LEVELS[name]().path == "vp":
        for kind in coefficients.VARIANCE_TYPES:
            assert_same_on_the_cpu(
                lambda kind=kind: solvers.ddpm_table(LEVELS[name](), variance_type=kind)
            )
