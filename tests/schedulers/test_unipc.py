"""UniPCMultistepScheduler, fused, beside the stock one and float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch

from support.fused import SHAPE, check_closer, check_walk
from support.multistep import check_add_noise, check_steps, check_table
from support.schedulers import LINEAR, walk

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse, table_of  # noqa: E402
from diffcore.diffusers.walk import Unsupported  # noqa: E402
from diffcore.solvers import NoiseLevels, unipc_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

SCHEDULES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0},
    "terminal": {"use_flow_sigmas": True, "shift_terminal": 0.1, "final_sigmas_type": "sigma_min"},
    "karras flow": {
        "use_flow_sigmas": True, "use_karras_sigmas": True, "sigma_min": 0.02, "sigma_max": 50.0,
    },
    "zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {},
}  # fmt: skip
FORMS = [
    (predict_x0, order, solver)
    for predict_x0 in (True, False)
    for order in (1, 2, 3)
    for solver in ("bh1", "bh2")
]


def scheduler(**options: Any) -> Any:
    # Where the step to sigma = 0 is not finite in diffusers, see below.
    if options.get("solver_type") == "bh1" or not options.get("predict_x0", True):
        options["final_sigmas_type"] = "sigma_min"
    return diffusers.UniPCMultistepScheduler(**{**LINEAR, **options})


def cases() -> list[Any]:
    predictions = itertools.cycle(["epsilon", "sample", "v_prediction"])
    counts = itertools.cycle([5, 10, 20, 50, 5, 8, 12])
    disabled = itertools.cycle([[], [0], [0, 1, 3], []])
    found = []
    for (predict_x0, order, solver), name in itertools.product(FORMS, SCHEDULES):
        options = {**SCHEDULES[name], "prediction_type": next(predictions)}
        if options.get("use_flow_sigmas") and predict_x0:
            options["prediction_type"] = "flow_prediction"
        options.update(predict_x0=predict_x0, solver_order=order, solver_type=solver)
        options["disable_corrector"] = next(disabled)
        steps = next(counts)
        form = "x0" if predict_x0 else "noise"
        found.append(pytest.param(options, steps, id=f"{form}-{order}-{solver}-{name}-{steps}"))
    return found


@pytest.mark.parametrize(("options", "steps"), cases())
def test_every_step_is_the_stock_one(options: dict[str, Any], steps: int) -> None:
    check_steps(lambda: scheduler(**options), steps, gathers=not options["predict_x0"])


@pytest.mark.parametrize(
    "options",
    [
        {"thresholding": True, "sample_max_value": 1.5},
        {"thresholding": True, "predict_x0": False},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"prediction_type": "v_prediction", "use_flow_sigmas": True},
        {"prediction_type": "v_prediction", "use_flow_sigmas": True, "predict_x0": False},
        {"prediction_type": "flow_prediction"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_options(options: dict[str, Any], order: int) -> None:
    gathers = not options.get("predict_x0", True)
    check_steps(lambda: scheduler(solver_order=order, **options), 8, gathers=gathers)


def test_custom_sigmas() -> None:
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    check_steps(lambda: scheduler(**options), {"sigmas": numpy.array([1.0, 0.9, 0.7, 0.4, 0.1])})


def test_dynamic_shift() -> None:
    options = {"use_flow_sigmas": True, "use_dynamic_shifting": True}
    check_steps(
        lambda: scheduler(prediction_type="flow_prediction", **options),
        {"num_inference_steps": 8, "mu": 0.8},
    )


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_another_predictor(predict_x0: bool, solver_type: str, order: int) -> None:
    def make() -> Any:
        options = {
            "solver_order": order,
            "prediction_type": "sample" if predict_x0 else "epsilon",
            "final_sigmas_type": "zero" if predict_x0 else "sigma_min",
        }
        predictor = diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++" if predict_x0 else "dpmsolver",
            solver_type=solver_type, **options, **LINEAR,
        )  # fmt: skip
        return scheduler(solver_p=predictor, predict_x0=predict_x0, **options)

    check_walk(make, 12)


@pytest.mark.parametrize(
    ("options", "theirs", "steps", "what"),
    [
        ({}, {}, 8, "has another x_0"),
        ({"prediction_type": "sample"}, {}, 8, "solver_p predicts"),
        ({"prediction_type": "sample"}, {"timestep_spacing": "trailing"}, 8, "other sigmas"),
        ({"prediction_type": "sample"}, {"solver_order": 3}, 8, "another order"),
        ({"prediction_type": "sample"}, {"algorithm_type": "sde-dpmsolver++"}, 8, "algorithm"),
        ({"prediction_type": "sample", "solver_order": 3}, {"solver_order": 3}, 20, "order .* 18"),
    ],
)
def test_another_predictor_is_refused(
    options: dict[str, Any], theirs: dict[str, Any], steps: int, what: str
) -> None:
    if theirs:
        theirs = {"prediction_type": "sample", **theirs}
    predictor = diffusers.DPMSolverMultistepScheduler(**LINEAR, **theirs)
    one = scheduler(solver_p=predictor, **options)
    one.set_timesteps(steps)
    with pytest.raises(Unsupported, match=what):
        table_of(one)


@pytest.mark.parametrize(("predict_x0", "order", "solver"), FORMS)
def test_16_bits_are_closer(predict_x0: bool, order: int, solver: str) -> None:
    options = {"predict_x0": predict_x0, "solver_order": order, "solver_type": solver}
    check_closer(lambda: scheduler(**options), 12)


@pytest.mark.parametrize(("predict_x0", "order", "solver"), FORMS)
def test_walks_are_the_stock_ones(predict_x0: bool, order: int, solver: str) -> None:
    options = {"predict_x0": predict_x0, "solver_order": order, "solver_type": solver}
    check_walk(lambda: scheduler(prediction_type="sample", **options), 12)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("start", [1, 9])
@pytest.mark.parametrize("begin_index", [True, False])
def test_a_start_in_the_middle(order: int, start: int, begin_index: bool) -> None:
    options = {"solver_order": order, "disable_corrector": [2, 10], "prediction_type": "sample"}
    check_walk(
        lambda: scheduler(**options), 15, first=start, begin_index=start if begin_index else None
    )


@pytest.mark.parametrize("flow", [False, True])
def test_add_noise(flow: bool) -> None:
    check_add_noise(lambda: scheduler(use_flow_sigmas=flow), 8)


@pytest.mark.parametrize(("predict_x0", "order", "solver"), FORMS)
def test_our_rules_are_our_table(predict_x0: bool, order: int, solver: str) -> None:
    options = {"solver_type": solver, "predict_x0": predict_x0}
    make = lambda: scheduler(solver_order=order, **options)  # noqa: E731
    theirs = make()
    theirs.set_timesteps(8)
    sigma = theirs.sigmas.double()
    alpha = (sigma * sigma + 1).rsqrt()
    levels = NoiseLevels(alpha, sigma * alpha, theirs.timesteps, "vp", float)
    check_table(make, 8, unipc_table(levels, order=order, **options))


@pytest.mark.parametrize(
    "options",
    [{"solver_type": "bh1"}, {"predict_x0": False}, {"lower_order_final": False}],
    ids=repr,
)
def test_stock_is_not_finite_at_sigma_0(options: dict[str, Any]) -> None:
    results = []
    for change in (lambda s: s, fuse):
        one = change(diffusers.UniPCMultistepScheduler(**options, **LINEAR))
        one.set_timesteps(6)
        results.append(walk(one, torch.ones(SHAPE))[-1].x)
    assert not results[0].isfinite().any()
    assert results[1].isfinite().all()


def test_the_dtype_is_that_of_the_sample() -> None:
    for change in (lambda s: s, fuse):
        one = change(scheduler())
        one.set_timesteps(5)
        for dtype, other in ((torch.float32, torch.bfloat16), (torch.float32, torch.float32)):
            x, output = torch.ones(SHAPE, dtype=dtype), torch.ones(SHAPE, dtype=other)
            one.set_timesteps(5)
            assert one.step(output, one.timesteps[0], x).prev_sample.dtype == dtype


def test_a_flow_prediction_of_the_noise_is_refused() -> None:
    one = scheduler(predict_x0=False, prediction_type="flow_prediction")
    one.set_timesteps(5)
    with pytest.raises(Unsupported, match="predict_x0=False"):
        table_of(one)
