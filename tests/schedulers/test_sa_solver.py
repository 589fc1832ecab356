"""SASolverScheduler, fused, beside the stock one and float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from support.fused import check_closer, check_philox, check_walk
from support.multistep import check_add_noise, check_steps, check_table
from support.schedulers import LINEAR

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import table_of  # noqa: E402
from diffcore.diffusers.walk import Unsupported  # noqa: E402
from diffcore.solvers import NoiseLevels, sa_solver_table  # noqa: E402

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
ORDERS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 3), (3, 4)]
FORMS = ("data_prediction", "noise_prediction")


def everywhere(t: Any) -> float:
    return 0.6 if t >= 500 else 1.0


def scheduler(
    form: str = "data_prediction", orders: tuple[int, int] = (2, 2), **options: Any
) -> Any:
    return diffusers.SASolverScheduler(
        algorithm_type=form, predictor_order=orders[0], corrector_order=orders[1],
        **{**LINEAR, **options},
    )  # fmt: skip


def cases() -> list[Any]:
    predictions = itertools.cycle(["epsilon", "sample", "v_prediction"])
    counts = itertools.cycle([5, 10, 20, 50, 8])
    ends = itertools.cycle([True, False, True])
    taus = itertools.cycle([None, everywhere])
    found = []
    for form, orders, name in itertools.product(FORMS, ORDERS, SCHEDULES):
        options = {**SCHEDULES[name], "prediction_type": next(predictions)}
        if name == "flow" and form == "data_prediction":
            options["prediction_type"] = "flow_prediction"
        options["lower_order_final"], options["tau_func"] = next(ends), next(taus)
        steps = next(counts)
        label = f"{form}-{orders[0]}-{orders[1]}-{name}-{steps}"
        found.append(pytest.param(form, orders, options, steps, id=label))
    return found


@pytest.mark.parametrize(("form", "orders", "options", "steps"), cases())
def test_every_step_is_the_stock_one(
    form: str, orders: tuple[int, int], options: dict[str, Any], steps: int
) -> None:
    check_steps(lambda: scheduler(form, orders, **options), steps, gathers=True)


@pytest.mark.parametrize(
    "options",
    [
        {"thresholding": True, "sample_max_value": 1.5},
        {"prediction_type": "v_prediction", "use_flow_sigmas": True},
        {"prediction_type": "flow_prediction"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("orders", [(1, 1), (2, 2), (3, 4)])
def test_options(options: dict[str, Any], orders: tuple[int, int]) -> None:
    check_steps(lambda: scheduler(orders=orders, **options), 8, gathers=True)


def test_a_velocity_of_another_path_in_the_noise_form() -> None:
    options = {"prediction_type": "v_prediction", "use_flow_sigmas": True}
    check_steps(lambda: scheduler("noise_prediction", **options), 8, gathers=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orders", [(1, 1), (2, 2), (3, 4)])
def test_16_bits_are_closer(form: str, orders: tuple[int, int]) -> None:
    check_closer(lambda: scheduler(form, orders), 12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orders", ORDERS)
def test_walks_are_the_stock_ones(form: str, orders: tuple[int, int]) -> None:
    check_walk(lambda: scheduler(form, orders, prediction_type="sample"), 12)


@pytest.mark.parametrize("orders", [(2, 2), (3, 4)])
@pytest.mark.parametrize("begin_index", [True, False])
def test_a_start_in_the_middle(orders: tuple[int, int], begin_index: bool) -> None:
    make = lambda: scheduler(orders=orders, prediction_type="sample")  # noqa: E731
    check_walk(make, 15, first=4, begin_index=4 if begin_index else None)


def test_noise_of_a_key() -> None:
    check_philox(scheduler, 8)


def test_add_noise() -> None:
    check_add_noise(scheduler, 8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orders", ORDERS)
def test_our_rules_are_our_table(form: str, orders: tuple[int, int]) -> None:
    make = lambda: scheduler(form, orders)  # noqa: E731
    theirs = make()
    theirs.set_timesteps(8)
    sigma = theirs.sigmas.double()
    alpha = (sigma * sigma + 1).rsqrt()
    levels = NoiseLevels(alpha, sigma * alpha, theirs.timesteps, "vp", float)
    table = sa_solver_table(
        levels, predictor_order=orders[0], corrector_order=orders[1], simple_order_2=True,
        tau=[float(200 <= t <= 800) for t in theirs.timesteps.tolist()],
        predict_x0=form == "data_prediction",
    )  # fmt: skip
    check_table(make, 8, table)


@pytest.mark.parametrize(
    ("form", "options", "what"),
    [
        ("data_prediction", {"corrector_order": 0}, "corrector_order=0"),
        ("data_prediction", {"predictor_order": 4}, "predictor_order"),
        ("data_prediction", {"variance_type": "learned"}, "variance_type"),
        ("noise_prediction", {"thresholding": True}, "thresholding"),
        ("noise_prediction", {"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_what_has_no_table_is_refused(form: str, options: dict[str, Any], what: str) -> None:
    one = diffusers.SASolverScheduler(algorithm_type=form, **options)
    one.set_timesteps(6)
    with pytest.raises(ValueError, match=what) as caught:
        table_of(one)
    assert isinstance(caught.value, Unsupported) or "predictor_order" in options
