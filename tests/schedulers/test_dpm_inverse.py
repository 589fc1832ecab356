"""DPMSolverMultistepInverseScheduler, fused, beside the stock one and float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from support.fused import SHAPE, check_closer, check_walk
from support.multistep import check_add_noise, check_steps, check_table
from support.schedulers import LINEAR, walk

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse, table_of  # noqa: E402
from diffcore.diffusers.walk import Unsupported  # noqa: E402
from diffcore.solvers import NoiseLevels, dpmpp_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

SCHEDULES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {},
}
ORDERS = ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
ODES = ("dpmsolver++", "dpmsolver")


def scheduler(algorithm: str = "dpmsolver++", **options: Any) -> Any:
    known = {"algorithm_type": algorithm, **LINEAR, **options}
    return diffusers.DPMSolverMultistepInverseScheduler(**known)


def cases() -> list[Any]:
    predictions = itertools.cycle(["epsilon", "sample", "v_prediction"])
    counts, lowers = itertools.cycle([5, 10, 20, 50, 8]), itertools.cycle([True, False, True])
    found = []
    for algorithm, order, name in itertools.product(ODES, ORDERS, SCHEDULES):
        options = {**SCHEDULES[name], "prediction_type": next(predictions)}
        if name == "flow" and algorithm == "dpmsolver++":
            options["prediction_type"] = "flow_prediction"
        options["solver_order"], options["solver_type"] = order
        options["lower_order_final"] = next(lowers)
        # A last level that repeats makes steps of order 2 to it nan in diffusers.
        options["euler_at_final"] = True
        # With more, the truncated timesteps repeat at the start, and diffusers leaves its list.
        steps = min(next(counts), 10) if name in ("exponential", "beta") else next(counts)
        label = f"{algorithm}-{order[0]}-{order[1]}-{name}-{steps}"
        found.append(pytest.param(algorithm, options, steps, id=label))
    return found


@pytest.mark.parametrize(("algorithm", "options", "steps"), cases())
def test_every_step_is_the_stock_one(algorithm: str, options: dict[str, Any], steps: int) -> None:
    check_steps(lambda: scheduler(algorithm, **options), steps)


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
@pytest.mark.parametrize("order", ORDERS[:3])
def test_the_sde_falls_with_flow_sigmas(algorithm: str, order: tuple[int, str]) -> None:
    options = {"solver_order": order[0], "solver_type": order[1], "use_flow_sigmas": True}
    check_steps(lambda: scheduler(algorithm, euler_at_final=True, **options), 8)


@pytest.mark.parametrize("algorithm", ODES)
@pytest.mark.parametrize("order", ORDERS)
def test_thresholding(algorithm: str, order: tuple[int, str]) -> None:
    options = {"solver_order": order[0], "solver_type": order[1], "sample_max_value": 1.5}
    check_steps(lambda: scheduler(algorithm, thresholding=True, **options), 8)


@pytest.mark.parametrize("algorithm", ODES)
@pytest.mark.parametrize("order", ORDERS)
def test_16_bits_are_closer(algorithm: str, order: tuple[int, str]) -> None:
    options = {"solver_order": order[0], "solver_type": order[1]}
    check_closer(lambda: scheduler(algorithm, **options), 12)


@pytest.mark.parametrize("algorithm", ODES)
@pytest.mark.parametrize("order", ORDERS)
def test_walks_are_the_stock_ones(algorithm: str, order: tuple[int, str]) -> None:
    options = {"solver_order": order[0], "solver_type": order[1]}
    check_walk(lambda: scheduler(algorithm, **options), 12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_start_in_the_middle(order: tuple[int, str]) -> None:
    options = {"solver_order": order[0], "solver_type": order[1]}
    check_walk(lambda: scheduler(**options), 16, first=5)


@pytest.mark.parametrize("flow", [False, True])
def test_add_noise(flow: bool) -> None:
    check_add_noise(lambda: scheduler(use_flow_sigmas=flow), 8)


@pytest.mark.parametrize("order", ORDERS)
def test_our_rules_are_our_table(order: tuple[int, str]) -> None:
    make = lambda: scheduler(solver_order=order[0], solver_type=order[1])  # noqa: E731
    theirs = make()
    theirs.set_timesteps(8)
    sigma = theirs.sigmas.double()
    alpha = (sigma * sigma + 1).rsqrt()
    levels = NoiseLevels(alpha, sigma * alpha, theirs.timesteps, "vp", float)
    check_table(make, 8, dpmpp_table(levels, order=order[0], solver_type=order[1]))


@pytest.mark.parametrize(
    ("algorithm", "options", "what"),
    [
        ("sde-dpmsolver++", {}, "rise"),
        ("sde-dpmsolver", {}, "rise"),
        ("sde-dpmsolver++", {"solver_order": 3, "use_flow_sigmas": True}, "solver_order=3"),
        ("dpmsolver++", {"prediction_type": "flow_prediction"}, "rise"),
        ("dpmsolver", {"prediction_type": "flow_prediction"}, "diffusers does not have"),
    ],
)
def test_what_has_no_table_is_refused(algorithm: str, options: dict[str, Any], what: str) -> None:
    one = scheduler(algorithm, **options)
    one.set_timesteps(6)
    with pytest.raises(ValueError, match=what) as caught:
        table_of(one)
    assert isinstance(caught.value, Unsupported) or what == "rise"


@pytest.mark.parametrize(
    ("options", "steps", "taken"),
    [
        ({"prediction_type": "flow_prediction"}, 6, 6),
        (
            {"num_train_timesteps": 50},
            50,
            49,
        ),  # a timestep repeats: it is left out, its level is not
    ],
)
def test_what_has_no_table_falls_back(options: dict[str, Any], steps: int, taken: int) -> None:
    results = []
    for change in (lambda s: s, fuse):
        one = change(scheduler(**options))
        one.set_timesteps(steps)
        results.append(walk(one, torch.ones(SHAPE))[-1].x)
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    assert sum(one.fallbacks.values()) == taken
