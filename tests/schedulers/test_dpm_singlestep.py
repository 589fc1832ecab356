"""DPMSolverSinglestepScheduler, fused, beside the stock one and float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from support.fused import SHAPE, check_closer, check_philox, check_walk
from support.multistep import check_add_noise, check_steps, check_table
from support.schedulers import LINEAR, walk

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse, table_of  # noqa: E402
from diffcore.diffusers.walk import Unsupported  # noqa: E402
from diffcore.solvers import NoiseLevels, dpmpp_singlestep_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

SCHEDULES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "linspace": {},
}
# Order 3 of the SDE has no table.
SOLVERS = [
    (algorithm, order, solver)
    for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")
    for order, solver in (
        (1, "midpoint"),
        (2, "midpoint"),
        (2, "heun"),
        (3, "midpoint"),
        (3, "heun"),
    )
    if (algorithm, order) != ("sde-dpmsolver++", 3)
]


def scheduler(algorithm: str = "dpmsolver++", **options: Any) -> Any:
    if algorithm == "dpmsolver":
        options.setdefault("final_sigmas_type", "sigma_min")
    known = {"algorithm_type": algorithm, **LINEAR, **options}
    return diffusers.DPMSolverSinglestepScheduler(**known)


def cases() -> list[Any]:
    predictions = itertools.cycle(["epsilon", "sample", "v_prediction"])
    counts = itertools.cycle([5, 10, 20, 50, 6, 12, 7])
    ends = itertools.cycle(["zero", "sigma_min", "sigma_min", "zero", "zero"])
    found = []
    for (algorithm, order, solver), name in itertools.product(SOLVERS, SCHEDULES):
        options = {**SCHEDULES[name], "prediction_type": next(predictions)}
        if name == "flow" and algorithm != "dpmsolver":
            options["prediction_type"] = "flow_prediction"
        options["final_sigmas_type"] = "sigma_min" if algorithm == "dpmsolver" else next(ends)
        options["lower_order_final"] = options["final_sigmas_type"] == "zero"
        options["solver_order"], options["solver_type"] = order, solver
        steps = next(counts)
        label = f"{algorithm}-{order}-{solver}-{name}-{steps}"
        found.append(pytest.param(algorithm, options, steps, id=label))
    return found


@pytest.mark.parametrize(("algorithm", "options", "steps"), cases())
def test_every_step_is_the_stock_one(algorithm: str, options: dict[str, Any], steps: int) -> None:
    check_steps(lambda: scheduler(algorithm, **options), steps)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2])
def test_thresholding(algorithm: str, order: int) -> None:
    options = {"thresholding": True, "sample_max_value": 1.5, "solver_order": order}
    check_steps(lambda: scheduler(algorithm, **options), 8)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
def test_predictions_of_another_path(algorithm: str, flow: bool, prediction: str) -> None:
    options = {"use_flow_sigmas": flow, "prediction_type": prediction}
    check_steps(lambda: scheduler(algorithm, **options), 8)


def test_custom_timesteps() -> None:
    check_steps(scheduler, {"timesteps": [999, 900, 640, 500, 200, 50, 7]})


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
def test_a_learned_variance_is_not_read(algorithm: str) -> None:
    def six_channels(x: torch.Tensor, t: Any) -> torch.Tensor:
        return torch.cat([torch.tanh(x), x.flip(0)], dim=1)

    check_walk(lambda: scheduler(algorithm, variance_type="learned"), 8, model=six_channels)


@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
def test_16_bits_are_closer(algorithm: str, order: int, solver: str) -> None:
    options = {"solver_order": order, "solver_type": solver}
    check_closer(lambda: scheduler(algorithm, **options), 12)


@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
def test_walks_are_the_stock_ones(algorithm: str, order: int, solver: str) -> None:
    options = {"solver_order": order, "solver_type": solver, "prediction_type": "sample"}
    check_walk(lambda: scheduler(algorithm, **options), 12)


@pytest.mark.parametrize(("algorithm", "order", "solver"), SOLVERS)
@pytest.mark.parametrize("start", [4, 5, 6])
@pytest.mark.parametrize("begin_index", [True, False])
def test_a_start_in_the_middle(
    algorithm: str, order: int, solver: str, start: int, begin_index: bool
) -> None:
    options = {"solver_order": order, "solver_type": solver, "prediction_type": "sample"}
    check_walk(
        lambda: scheduler(algorithm, **options),
        12,
        first=start,
        begin_index=start if begin_index else None,
    )


def test_noise_of_a_key() -> None:
    check_philox(lambda: scheduler("sde-dpmsolver++"), 8)


def test_noise_has_the_dtype_of_what_is_kept() -> None:
    x, states = torch.ones(SHAPE), []
    for change in (lambda s: s, fuse):
        one, generator = change(scheduler("sde-dpmsolver++")), torch.Generator().manual_seed(1)
        one.set_timesteps(4)
        output = torch.zeros(SHAPE, dtype=torch.bfloat16)  # else its product with sigma is rounded
        states.append(one.step(output, one.timesteps[0], x, generator).prev_sample)
    assert states[0].dtype == states[1].dtype == torch.float32
    assert (states[0] - states[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("flow", [False, True])
def test_add_noise(flow: bool) -> None:
    check_add_noise(lambda: scheduler(use_flow_sigmas=flow), 8)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("steps", [8, 9])
def test_our_rules_are_our_table(algorithm: str, order: int, steps: int) -> None:
    make = lambda: scheduler(algorithm, solver_order=order)  # noqa: E731
    theirs = make()
    theirs.set_timesteps(steps)
    sigma = theirs.sigmas.double()
    alpha = (sigma * sigma + 1).rsqrt()
    levels = NoiseLevels(alpha, sigma * alpha, theirs.timesteps, "vp", float)
    check_table(make, steps, dpmpp_singlestep_table(levels, order=order, algorithm_type=algorithm))


@pytest.mark.parametrize(
    ("algorithm", "options", "what"),
    [
        ("sde-dpmsolver++", {"solver_order": 3}, "solver_order=3"),
        ("dpmsolver", {"thresholding": True}, "thresholding"),
        ("dpmsolver", {"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_what_has_no_table_is_refused(algorithm: str, options: dict[str, Any], what: str) -> None:
    theirs = scheduler(algorithm, **options)
    theirs.set_timesteps(6)
    with pytest.raises(Unsupported, match=what):
        table_of(theirs)


def test_the_third_order_of_the_sde_falls_back() -> None:
    results = []
    for change in (lambda s: s, fuse):
        one = change(scheduler("sde-dpmsolver++", solver_order=3))
        one.set_timesteps(6)
        results.append(walk(one, torch.ones(SHAPE), generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(a.x, b.x) for a, b in zip(*results, strict=True))
    assert sum(one.fallbacks.values()) == 6
