"""EDMDPMSolverMultistepScheduler, fused, beside the stock one and float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from support.fused import SHAPE, check_closer, check_philox, check_walk
from support.multistep import check_add_noise, check_steps, check_table
from support.schedulers import walk

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse, table_of  # noqa: E402
from diffcore.diffusers.walk import Unsupported  # noqa: E402
from diffcore.solvers import NoiseLevels, dpmpp_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

ODE, SDE = "dpmsolver++", "sde-dpmsolver++"
SOLVERS = [
    (ODE, 1, "midpoint"),
    (ODE, 2, "midpoint"),
    (ODE, 2, "heun"),
    (ODE, 3, "midpoint"),
    (SDE, 1, "midpoint"),
    (SDE, 2, "midpoint"),
    (SDE, 2, "heun"),
]


def scheduler(
    algorithm: str = ODE, order: int = 2, solver: str = "midpoint", **options: Any
) -> Any:
    return diffusers.EDMDPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=order, solver_type=solver, **options
    )


def cases() -> list[Any]:
    counts, lowers = itertools.cycle([5, 10, 20, 50, 8]), itertools.cycle([True, False, True])
    found = []
    for solver, schedule, prediction, end in itertools.product(
        SOLVERS, ("karras", "exponential"), ("epsilon", "v_prediction"), ("zero", "sigma_min")
    ):
        if solver[0] == SDE and end == "sigma_min":
            continue  # see below
        options = {
            "sigma_schedule": schedule,
            "prediction_type": prediction,
            "final_sigmas_type": end,
            "lower_order_final": next(lowers),
            # A last level that repeats makes steps of order 2 to it nan in diffusers.
            "euler_at_final": end == "sigma_min",
        }
        steps = next(counts)
        label = "-".join([*map(str, solver), schedule, prediction, end, str(steps)])
        found.append(pytest.param(solver, options, steps, id=label))
    return found


@pytest.mark.parametrize(("solver", "options", "steps"), cases())
def test_every_step_is_the_stock_one(solver: Any, options: dict[str, Any], steps: int) -> None:
    check_steps(lambda: scheduler(*solver, **options), steps)


def test_a_last_level_that_rises_by_a_rounding() -> None:
    """Here the SDE's noise is the root of a negative number in float64, and 0 in float32."""
    make = lambda: scheduler(SDE, final_sigmas_type="sigma_min")  # noqa: E731
    one = make()
    one.set_timesteps(10)
    assert one.sigmas[-2] < one.sigmas[-1] < one.sigmas[-2] * (1 + 1e-6)
    check_walk(make, 10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_thresholding(solver: Any) -> None:
    check_steps(lambda: scheduler(*solver, thresholding=True, sample_max_value=1.5), 8)


def test_other_data() -> None:
    check_steps(lambda: scheduler(sigma_data=1.0, sigma_min=0.01, sigma_max=500.0, rho=5.0), 8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_16_bits_are_closer(solver: Any) -> None:
    check_closer(lambda: scheduler(*solver), 12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [12, 20])
def test_walks_are_the_stock_ones(solver: Any, steps: int) -> None:
    check_walk(lambda: scheduler(*solver), steps)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("begin_index", [True, False])
def test_a_start_in_the_middle(solver: Any, begin_index: bool) -> None:
    check_walk(lambda: scheduler(*solver), 16, first=5, begin_index=5 if begin_index else None)


def test_noise_of_a_key() -> None:
    check_philox(lambda: scheduler(SDE), 8)


def test_add_noise() -> None:
    check_add_noise(scheduler, 8)


def test_scale_model_input() -> None:
    stock, ours, x = scheduler(), fuse(scheduler()), torch.ones(SHAPE)
    for one in (stock, ours):
        one.set_timesteps(6)
        one.scaled = one.scale_model_input(x, one.timesteps[2])
        assert one.step_index == 2
        assert one.is_scale_input_called
    assert (ours.scaled - stock.scaled).abs().max() <= 1e-6 * stock.scaled.abs().max()
    for one in (stock, ours):  # a timestep of no row is the last one in diffusers
        one.set_timesteps(6)
        one.scaled = one.scale_model_input(x, torch.tensor(7.0))
    assert torch.equal(ours.scaled, stock.scaled)


@pytest.mark.parametrize("solver", SOLVERS)
def test_our_rules_are_our_table(solver: Any) -> None:
    make = lambda: scheduler(*solver)  # noqa: E731
    theirs = make()
    theirs.set_timesteps(8)
    levels = NoiseLevels.from_edm(theirs.sigmas.double()).with_timesteps(theirs.timesteps)
    algorithm, order, kind = solver
    check_table(
        make, 8, dpmpp_table(levels, order=order, algorithm_type=algorithm, solver_type=kind)
    )
    assert table_of(theirs).init_noise_sigma == theirs.init_noise_sigma


@pytest.mark.parametrize(
    ("options", "what"),
    [({"algorithm": SDE, "order": 3}, "solver_order=3"), ({"prediction_type": "sample"}, "sample")],
)
def test_what_diffusers_lacks_is_refused(options: dict[str, Any], what: str) -> None:
    one = scheduler(**options)
    one.set_timesteps(6)
    with pytest.raises(Unsupported, match=what):
        table_of(one)
    ours = fuse(one)
    with pytest.raises((TypeError, UnboundLocalError, ValueError)):
        walk(ours, torch.ones(SHAPE), generator=torch.Generator())
    assert what in next(iter(ours.fallbacks))
