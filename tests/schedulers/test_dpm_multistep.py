"""DPMSolverMultistepScheduler, fused, beside the stock one and float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from support.fused import SHAPE, check_closer, check_philox, check_walk
from support.multistep import check_add_noise, check_steps, check_table
from support.schedulers import LINEAR, walk

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse, table_of  # noqa: E402
from diffcore.diffusers.walk import Unsupported  # noqa: E402
from diffcore.solvers import NoiseLevels, dpmpp_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
SCHEDULES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0},
    "zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {},
}
# The order, and the form where the order is 2. diffusers lacks the last for "sde-dpmsolver".
ORDERS = ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
NOISE = {"drawn_in": torch.float32}  # whatever the dtype of the samples


def scheduler(algorithm: str = "dpmsolver++", **options: Any) -> Any:
    if not algorithm.endswith("++"):
        options.setdefault("final_sigmas_type", "sigma_min")
    known = {"algorithm_type": algorithm, **LINEAR, **options}
    return diffusers.DPMSolverMultistepScheduler(**known)


def cases() -> list[Any]:
    """Each algorithm and order with each schedule; the rest goes around."""
    predictions = itertools.cycle(["epsilon", "sample", "v_prediction"])
    counts = itertools.cycle([5, 10, 20, 50, 5])
    ends = itertools.cycle([True, False, True, True, False, False, True])
    found = []
    for algorithm, order, name in itertools.product(ALGORITHMS, ORDERS, SCHEDULES):
        options = dict(SCHEDULES[name])
        options["prediction_type"] = next(predictions)
        if name == "flow" and algorithm.endswith("++"):
            options["prediction_type"] = "flow_prediction"
        options["solver_order"], options["solver_type"] = order
        options["lower_order_final"] = next(ends)
        # A last level that repeats makes steps of order 2 to it nan in diffusers, see below.
        options["euler_at_final"] = not algorithm.endswith("++")
        steps = next(counts)
        if (algorithm, order[0]) != ("sde-dpmsolver", 3):
            label = f"{algorithm}-{order[0]}-{order[1]}-{name}-{steps}"
            found.append(pytest.param(algorithm, options, steps, id=label))
    return found


@pytest.mark.parametrize(("algorithm", "options", "steps"), cases())
def test_every_step_is_the_stock_one(algorithm: str, options: dict[str, Any], steps: int) -> None:
    check_steps(lambda: scheduler(algorithm, **options), steps, **NOISE)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_predictions_of_another_path(algorithm: str, flow: bool, prediction: str) -> None:
    if prediction == "flow_prediction" and not algorithm.endswith("++"):
        return  # refused, below
    options = {"use_flow_sigmas": flow, "prediction_type": prediction}
    check_steps(lambda: scheduler(algorithm, **options), 8, **NOISE)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "options",
    [
        {"thresholding": True, "sample_max_value": 1.5},
        {"thresholding": True, "sample_max_value": 0.5},
        {"euler_at_final": True},
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    ],
    ids=lambda options: next(iter(options)) if isinstance(options, dict) else options,
)
@pytest.mark.parametrize("steps", [6, 15])
def test_options(algorithm: str, options: dict[str, Any], steps: int) -> None:
    check_steps(lambda: scheduler(algorithm, **options), steps, **NOISE)


@pytest.mark.parametrize("algorithm", ALGORITHMS[:2])
def test_custom_timesteps(algorithm: str) -> None:
    steps = {"timesteps": [999, 900, 640, 500, 200, 50, 7]}
    check_steps(lambda: scheduler(algorithm), steps, **NOISE)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_is_not_read(algorithm: str, variance: str) -> None:
    def six_channels(x: torch.Tensor, t: Any) -> torch.Tensor:
        return torch.cat([torch.tanh(x), x.flip(0)], dim=1)

    check_walk(lambda: scheduler(algorithm, variance_type=variance), 8, model=six_channels)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_16_bits_are_closer(algorithm: str, prediction: str) -> None:
    make = lambda: scheduler(algorithm, prediction_type=prediction)  # noqa: E731
    check_closer(make, 12, **NOISE)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", [2, 3])
def test_walks_are_the_stock_ones(algorithm: str, order: int) -> None:
    if (algorithm, order) != ("sde-dpmsolver", 3):
        make = lambda: scheduler(algorithm, solver_order=order, prediction_type="sample")  # noqa: E731
        check_walk(make, 12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("steps", [12, 20])
@pytest.mark.parametrize("begin_index", [True, False])
def test_a_start_in_the_middle(algorithm: str, steps: int, begin_index: bool) -> None:
    make = lambda: scheduler(algorithm, prediction_type="sample")  # noqa: E731
    check_walk(make, steps, first=9, begin_index=9 if begin_index else None)


def test_noise_may_be_given() -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    check_walk(lambda: scheduler("sde-dpmsolver++"), 6, variance_noise=noise)


def test_noise_of_a_key() -> None:
    check_philox(lambda: scheduler("sde-dpmsolver++", solver_order=3), 8)


@pytest.mark.parametrize("flow", [False, True])
def test_add_noise(flow: bool) -> None:
    check_add_noise(lambda: scheduler(use_flow_sigmas=flow), 8)


def test_add_noise_of_an_unknown_timestep_is_the_stock_one() -> None:
    stock, ours = scheduler(), fuse(scheduler())
    x = torch.ones(1, 3, 2, 2)
    for one in (stock, ours):
        one.set_timesteps(5)
    t = torch.tensor([3])
    assert torch.equal(ours.add_noise(x, x, t), stock.add_noise(x, x, t))
    assert sum(ours.fallbacks.values()) == 1


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_our_rules_are_our_table(algorithm: str, order: int) -> None:
    make = lambda: scheduler(algorithm, solver_order=order)  # noqa: E731
    theirs = make()
    theirs.set_timesteps(8)
    sigma = theirs.sigmas.double()
    alpha = (sigma * sigma + 1).rsqrt()
    levels = NoiseLevels(alpha, sigma * alpha, theirs.timesteps, "vp", float)
    check_table(make, 8, dpmpp_table(levels, order=order, algorithm_type=algorithm))


def test_the_two_rules_differ_in_a_sign() -> None:
    theirs = scheduler("sde-dpmsolver++", solver_order=3)
    theirs.set_timesteps(8)
    columns = [
        torch.stack([table_of(theirs, rules=rules).column(f"c_{k}") for k in range(3)], dim=1)
        for rules in ("diffusers", "exact")
    ]
    gap = columns[0] - columns[1]
    rows = gap.abs().amax(dim=1) > 0
    assert rows.tolist() == [False] * 2 + [True] * 4 + [False] * 2
    # The other sign weighs a difference: a constant x_0 does not notice.
    assert gap.sum(dim=1).abs().max() <= 1e-12


def test_stock_is_nan_where_the_last_level_repeats() -> None:
    results = []
    for change in (lambda s: s, fuse):
        one = change(
            scheduler(solver_type="heun", use_karras_sigmas=True, final_sigmas_type="sigma_min")
        )
        one.set_timesteps(20)
        results.append(walk(one, torch.ones(SHAPE))[-1].x)
    assert results[0].isnan().all()
    assert results[1].isfinite().all()


@pytest.mark.parametrize(
    ("algorithm", "options", "what"),
    [
        ("sde-dpmsolver", {"solver_order": 3}, "solver_order=3"),
        ("dpmsolver", {"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_what_diffusers_lacks_is_refused(
    algorithm: str, options: dict[str, Any], what: str
) -> None:
    theirs = scheduler(algorithm, **options)
    theirs.set_timesteps(6)
    with pytest.raises(Unsupported, match=what):
        table_of(theirs)
    ours = fuse(theirs)
    with pytest.raises((UnboundLocalError, ValueError)):
        walk(ours, torch.ones(SHAPE), generator=torch.Generator())
    assert what in next(iter(ours.fallbacks))


def test_a_step_before_set_timesteps_is_refused_by_diffusers() -> None:
    ours = fuse(scheduler())
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(torch.ones(1), ours.timesteps[0], torch.ones(1))


@pytest.mark.parametrize(
    ("prediction", "model", "wanted"),
    [
        ("epsilon", torch.bfloat16, torch.float32),
        ("sample", torch.bfloat16, torch.bfloat16),
        ("epsilon", torch.float32, torch.float32),
    ],
)
def test_the_dtype_is_the_stock_one(
    prediction: str, model: torch.dtype, wanted: torch.dtype
) -> None:
    for change in (lambda s: s, fuse):
        one = change(scheduler(prediction_type=prediction))
        one.set_timesteps(5)
        x = torch.ones(SHAPE)
        for t in one.timesteps[:2]:
            x = one.step(torch.ones(SHAPE, dtype=model), t, x.float(), return_dict=False)[0]
            assert x.dtype == wanted
            assert math.isfinite(float(x.sum()))
