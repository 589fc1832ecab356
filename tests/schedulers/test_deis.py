"""DEISMultistepScheduler, fused, beside the stock one and float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from support.fused import check_closer, check_walk
from support.multistep import check_add_noise, check_steps, check_table
from support.schedulers import LINEAR

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import table_of  # noqa: E402
from diffcore.diffusers.walk import Unsupported  # noqa: E402
from diffcore.solvers import NoiseLevels, deis_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

SCHEDULES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {},
}
ORDERS = (1, 2, 3)


def scheduler(**options: Any) -> Any:
    return diffusers.DEISMultistepScheduler(**{**LINEAR, **options})


def cases() -> list[Any]:
    predictions = ("epsilon", "sample", "v_prediction", "flow_prediction")
    counts = itertools.cycle([5, 10, 20, 50, 14])
    ends = itertools.cycle([True, False, True])
    found = []
    for order, name, prediction in itertools.product(ORDERS, SCHEDULES, predictions):
        if prediction == "flow_prediction" and name != "flow":
            continue  # refused, below
        options = {**SCHEDULES[name], "prediction_type": prediction, "solver_order": order}
        options["lower_order_final"] = next(ends)
        steps = next(counts)
        found.append(pytest.param(options, steps, id=f"{order}-{name}-{prediction}-{steps}"))
    return found


@pytest.mark.parametrize(("options", "steps"), cases())
def test_every_step_is_the_stock_one(options: dict[str, Any], steps: int) -> None:
    check_steps(lambda: scheduler(**options), steps)


@pytest.mark.parametrize("order", ORDERS)
def test_thresholding(order: int) -> None:
    check_steps(lambda: scheduler(solver_order=order, thresholding=True, sample_max_value=1.5), 8)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_16_bits_are_closer(order: int, prediction: str) -> None:
    check_closer(lambda: scheduler(solver_order=order, prediction_type=prediction), 12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [12, 20])
def test_walks_are_the_stock_ones(order: int, steps: int) -> None:
    check_walk(lambda: scheduler(solver_order=order, prediction_type="sample"), steps)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [12, 20])
@pytest.mark.parametrize("begin_index", [True, False])
def test_a_start_in_the_middle(order: int, steps: int, begin_index: bool) -> None:
    make = lambda: scheduler(solver_order=order, prediction_type="sample")  # noqa: E731
    check_walk(make, steps, first=7, begin_index=7 if begin_index else None)


@pytest.mark.parametrize("flow", [False, True])
def test_add_noise(flow: bool) -> None:
    check_add_noise(lambda: scheduler(use_flow_sigmas=flow), 8)


def test_a_flow_prediction_of_another_path_is_refused() -> None:
    one = scheduler(prediction_type="flow_prediction")
    one.set_timesteps(5)
    with pytest.raises(Unsupported, match="use_flow_sigmas"):
        table_of(one)


@pytest.mark.parametrize("order", ORDERS)
def test_our_rules_are_our_table(order: int) -> None:
    make = lambda: scheduler(solver_order=order)  # noqa: E731
    theirs = make()
    theirs.set_timesteps(8)
    sigma = theirs.sigmas.double()
    alpha = (sigma * sigma + 1).rsqrt()
    levels = NoiseLevels(alpha, sigma * alpha, theirs.timesteps, "vp", float)
    check_table(make, 8, deis_table(levels, order=order))
