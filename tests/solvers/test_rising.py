"""Solvers up the noise levels: from a clean sample to the noise that leads to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, sampling, solvers
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.guidance import CFG
from diffcore.schedules import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from diffcore.solvers import NoiseLevels, SolverTable
from support.bounds import assert_same_bits
from support.solver_list import (
    CHURNED,
    DETERMINISTIC,
    PATHS,
    STOCHASTIC,
    VARIANTS,
    Make,
    geometric,
    levels_on,
    steps_for,
)
from support.solver_world import MEAN, STD, start
from support.walking import walk

each_solver = pytest.mark.parametrize("name", DETERMINISTIC)
each_path = pytest.mark.parametrize("path", PATHS)
SAME = 1e-11
NOISE = torch.tensor([0.4, -1.3, 2.0], dtype=torch.float64)
CLEAN = torch.tensor([1.1, -0.2, 0.6], dtype=torch.float64)
FROM_CLEAN = torch.tensor([0.0, 0.01, 0.05, 0.3, 1.0, 2.5, 7.0, 20.0], dtype=torch.float64)


def output_of(kind: str, alpha: float, sigma: float, x0: Tensor, noise: Tensor) -> Tensor:
    """What a model of this prediction type returns for x_0 and noise."""
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[kind]


def constant(table: SolverTable, kind: str, noise: Tensor = NOISE) -> Callable[..., Tensor]:
    """A model for which the noise is the same everywhere, so that every path is straight."""
    rows = iter(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))

    def model(x: Tensor, t: object) -> Tensor:
        alpha, sigma = next(rows)
        scale = float(table.input_scale[0])
        assert scale == 1
        return output_of(kind, alpha, sigma, (x - sigma * noise) / alpha, noise).expand_as(x)

    return model


# ---- where the answer is known -------------------------------------------------------------------


@each_path
@each_solver
def test_constant_noise_is_found_and_leads_back(name: str, path: str) -> None:
    for kind in PREDICTION_TYPES:
        # A prediction of x_0 determines the noise where there is some.
        ratios = FROM_CLEAN[1:] if kind == "sample" else FROM_CLEAN
        levels = levels_on(path, ratios)
        x = levels.alpha[0] * CLEAN + levels.sigma[0] * NOISE
        up = DETERMINISTIC[name](levels, prediction_type=kind)
        top = walk(up, constant(up, kind), x)
        exact = levels.alpha[-1] * CLEAN + levels.sigma[-1] * NOISE
        assert (top - exact).abs().max() <= SAME * exact.abs().max()
        down = DETERMINISTIC[name](levels.reversed(), prediction_type=kind)
        assert (walk(down, constant(down, kind), top) - x).abs().max() <= SAME


def error(make: Make, path: str, ratios: Tensor) -> float:
    """Distance from the exact flow of Gaussian data, which keeps (x - alpha MEAN) / std(x)."""
    levels = levels_on(path, ratios)
    table = make(levels, prediction_type="epsilon")
    rows = iter(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))

    def best(x: Tensor, t: object) -> Tensor:
        alpha, sigma = next(rows)
        return sigma / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * MEAN)

    mean, std = start(levels)
    out = walk(table, best, torch.tensor([mean + 1.2 * std], dtype=torch.float64))
    alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
    total = math.hypot(alpha * STD, sigma)
    return abs(float(out) - (alpha * MEAN + 1.2 * total)) / total


def first_step_remains(name: str, path: str) -> bool:
    """Whether the first step, of order 1, is what is left: the error does not decay upward."""
    return name in ("dpm-3m-exact", "deis-4") or (name, path) == ("lms-4", "flow")


def claimed_order(name: str, path: str) -> int:
    if first_step_remains(name, path):
        return 2
    return {**DETERMINISTIC, **VARIANTS}[name]([2.0, 1.0, 0.5]).order


# x / alpha moves on the path "vp" as x on "ve".
@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("name", {**DETERMINISTIC, **VARIANTS})
def test_order_of_convergence_is_the_one_claimed(name: str, path: str) -> None:
    steps_of = (336, 672) if first_step_remains(name, path) else steps_for(name)
    ratios = (geometric(steps, 0.02, 80.0).flip(0) for steps in steps_of)
    longer, shorter = (error({**DETERMINISTIC, **VARIANTS}[name], path, r) for r in ratios)
    assert math.log2(longer / shorter) > claimed_order(name, path) - 0.25


@pytest.mark.parametrize("path", ["ve", "flow"])
@each_solver
def test_a_clean_start_keeps_the_order(name: str, path: str) -> None:
    make = DETERMINISTIC[name]
    # The first step has order 1: here it gets shorter faster than the others.
    ratios = (10 * torch.linspace(0, 1, steps + 1).double() ** 3 for steps in (60, 240))
    longer, shorter = (error(make, path, r) for r in ratios)
    assert math.log2(longer / shorter) / 2 > claimed_order(name, path) - 0.25


# ---- the first step ------------------------------------------------------------------------------


@each_path
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_a_step_from_a_clean_sample_takes_the_models_noise(kind: str, path: str) -> None:
    levels = levels_on(path, torch.tensor([0.0, 0.7], dtype=torch.float64))
    alpha, sigma = float(levels.alpha[1]), float(levels.sigma[1])
    # x' = alpha' x_0 + sigma' epsilon, with epsilon = m, m or m + x_0 at alpha = 1, sigma = 0.
    by_x = alpha + (sigma if kind == "flow_prediction" else 0)
    for name, make in DETERMINISTIC.items():
        row = dict(zip(solvers.COLUMNS, make(levels, prediction_type=kind).rows[0].coefficients,
                       strict=True))  # fmt: skip
        if name == "heun":
            continue  # its second row takes a part
        assert math.isclose(row["c_x"] + row["c_0"] * row["a_x"], by_x, rel_tol=1e-15), name
        assert math.isclose(row["c_m"] + row["c_0"] * row["a_m"], sigma, rel_tol=1e-15), name


def test_float32_does_not_lose_what_the_noise_levels_gain() -> None:
    # With factors like sigma' / sigma and their opposite, the rounding of x would grow 2000 times.
    levels = levels_on("vp", torch.tensor([0.0, 0.01, 0.1, 1.0, 20.0], dtype=torch.float64))
    eps = torch.finfo(torch.float32).eps  # four steps of four roundings or so
    for name in ("euler", "ddim", "heun", "dpm2", "lms-1", "dpmpp-1", "dpmpp-2s", "unipc-1-bh1"):
        for kind in ("epsilon", "v_prediction"):
            table = DETERMINISTIC[name](levels, prediction_type=kind)
            found = diffcore.sample(constant(table, kind, NOISE.float()), CLEAN.float(), table)
            exact = levels.alpha[-1] * CLEAN.float() + levels.sigma[-1] * NOISE.float()
            assert (found - exact).abs().max() <= 16 * eps, (name, kind)


@pytest.mark.parametrize("name", ["euler", "heun", "lms-2", "dpmpp-2m", "unipc-2-bh2"])
def test_up_to_pure_noise_of_a_flow(name: str) -> None:
    levels = NoiseLevels.from_flow([0.0, 0.25, 0.6, 1.0])
    table = DETERMINISTIC[name](levels, prediction_type="flow_prediction")
    top = diffcore.sample(lambda x, t: (NOISE - CLEAN).expand_as(x), CLEAN, table)
    assert (top - NOISE).abs().max() <= 1e-14


def test_up_to_zero_terminal_snr() -> None:
    schedule = NoiseSchedule.from_betas(rescale_zero_terminal_snr(make_betas("linear", 1000)))
    levels = NoiseLevels.from_schedule(schedule, [0, 500, 999])
    assert levels.alpha[-1] == 0
    for make in (solvers.euler_table, solvers.ddim_table, solvers.dpmpp_table, solvers.unipc_table):
        table = make(levels, prediction_type="v_prediction")
        top = walk(table, constant(table, "v_prediction"), CLEAN)
        assert (top - NOISE).abs().max() <= SAME
    for make in (solvers.heun_table, solvers.lms_table, solvers.dpm2_table, solvers.dpmpp_2s_table):
        with pytest.raises(ValueError, match=r"levels must end at alpha > 0 for .*_table, got"):
            make(levels, prediction_type="v_prediction")


def test_edm_networks_from_a_small_sigma_and_from_a_clean_sample() -> None:
    # F = (x_0 - c_skip x) / c_out, where x = x_0 + sigma noise.
    up = NoiseLevels.from_edm([0.002, 0.1, 3.0, 80.0])
    clean = replace(up, sigma=torch.tensor([0.0, 0.1, 3.0, 80.0]), timesteps=torch.zeros(3))
    for levels in (up, clean):
        for kind, sign in (("epsilon", 1.0), ("v_prediction", -1.0)):
            table = solvers.heun_table(levels, prediction_type=kind)
            sigmas = iter(table.sigma.tolist())

            def network(x: Tensor, t: object, sigmas=sigmas, sign=sign) -> Tensor:
                sigma = next(sigmas)
                scale = 1 / math.hypot(sigma, 0.5)
                x0 = x / scale - sigma * NOISE
                # (x_0 - c_skip x) / c_out without a division by sigma
                return sign * (sigma * x0 - 0.25 * NOISE) * scale / 0.5

            x = CLEAN + levels.sigma[0] * NOISE
            top = walk(table, network, x)
            assert (top - (CLEAN + 80 * NOISE)).abs().max() <= 80 * SAME
    with pytest.raises(ValueError, match="prediction_type must not be 'sample' for levels that"):
        solvers.ddim_table(clean, prediction_type="sample")


# ---- clipping and guidance -----------------------------------------------------------------------


def test_the_two_rules_for_epsilon_where_a_clip_bites() -> None:
    levels = levels_on("vp", torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64))
    alpha, sigma = levels.alpha.tolist(), levels.sigma.tolist()
    for rederive in (True, False):
        table = solvers.ddim_table(levels, rederive_epsilon=rederive, clip_range=0.5)
        x = walk(table, lambda x, t: NOISE, CLEAN)
        first = alpha[1] * CLEAN.clamp(-0.5, 0.5) + sigma[1] * NOISE  # epsilon is the model's
        x0 = ((first - sigma[1] * NOISE) / alpha[1]).clamp(-0.5, 0.5)
        noise = (first - alpha[1] * x0) / sigma[1] if rederive else NOISE
        assert (x - (alpha[2] * x0 + sigma[2] * noise)).abs().max() <= 1e-14


def test_rederived_noise_is_of_the_clipped_sample() -> None:
    levels = levels_on("vp", torch.tensor([0.5, 2.0], dtype=torch.float64))
    (alpha, alpha_next), (sigma, sigma_next) = levels.alpha.tolist(), levels.sigma.tolist()
    x = 2 * CLEAN
    x0 = ((x - sigma * NOISE) / alpha).clamp(-0.5, 0.5)
    for make, noise in (
        (solvers.ddim_table, (x - alpha * x0) / sigma),
        (solvers.euler_table, (x - alpha * x0) / sigma),
        (DETERMINISTIC["ddim-as-said"], NOISE),
    ):
        found = walk(make(levels, clip_range=0.5), lambda x, t: NOISE, x)
        assert (found - (alpha_next * x0 + sigma_next * noise)).abs().max() <= 1e-14


def test_guidance_goes_into_the_noise_of_a_clean_sample() -> None:
    levels = levels_on("vp", FROM_CLEAN)
    for name in ("ddim", "heun", "dpmpp-2m"):
        table = DETERMINISTIC[name](levels)
        top = diffcore.sample(
            lambda x, t: torch.cat([torch.zeros_like(x), NOISE / 2 + 0 * x]),
            CLEAN[None],
            table,
            guidance=CFG(2.0),
        )
        assert (top - (levels.alpha[-1] * CLEAN + levels.sigma[-1] * NOISE)).abs().max() <= SAME


@pytest.mark.parametrize("make", [solvers.cfg_pp_table, solvers.dpmpp_2m_cfg_pp_table])
def test_cfg_pp_steps_back_with_the_unconditional_noise(make: Make) -> None:
    # One step from a clean sample: x' = alpha' x_0 + sigma' epsilon_u, whatever m_c is.
    for kind in ("epsilon", "v_prediction", "flow_prediction"):
        levels = levels_on("vp", FROM_CLEAN)
        table = make(levels, prediction_type=kind)
        x, _ = table.step(
            0,
            CLEAN[None],
            output_of(kind, 1.0, 0.0, CLEAN, 3 * NOISE)[None],
            model_output_uncond=output_of(kind, 1.0, 0.0, CLEAN, NOISE)[None],
            guidance_scale=0.6,
        )
        assert (x - (levels.alpha[1] * CLEAN + levels.sigma[1] * NOISE)).abs().max() <= 1e-14
        # And all steps, where both predictions are the same.
        model = constant(table, kind)
        x, history = CLEAN[None], ()
        for i in range(len(table)):
            m = model(x, None)
            x, history = table.step(
                i, x, m, history, model_output_uncond=m, guidance_scale=0.6
            )  # fmt: skip
        assert (x - (levels.alpha[-1] * CLEAN + levels.sigma[-1] * NOISE)).abs().max() <= SAME


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-3m", "unipc-3-bh2", "lms-4"])
def test_routes_give_the_same_bits(name: str) -> None:
    table = DETERMINISTIC[name](levels_on("vp", FROM_CLEAN))
    x = torch.randn(3, 2, 8)
    net = torch.nn.Linear(8, 8)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(net(x) + 1e-3 * t.to(x)[:, None, None])

    wanted = diffcore.sample(model, x, table)
    assert wanted.isfinite().all()
    captured = sampling.capture(model, table, x.shape)
    assert_same_bits(captured(PhiloxNoise(1), x=x), wanted)
    if name == "heun":
        run = torch.compile(
            lambda x: diffcore.sample(model, x, table, noise=PhiloxNoise(1)),
            fullgraph=True,
            backend="aot_eager",
        )
        assert_same_bits(run(x), wanted)


def test_k_diffusions_samplers_go_up() -> None:
    sigmas, x = [0.1, 1.0, 4.0], CLEAN + 0.1 * NOISE
    for sampler in (sampling.sample_euler, sampling.sample_heun, sampling.sample_dpmpp_2m):
        top = sampler(lambda x, sigma: x - sigma[:, None] * NOISE, x[None], sigmas, disable=True)
        assert (top - (CLEAN + 4 * NOISE)).abs().max() <= 1e-14
    with pytest.raises(ValueError, match="levels must fall for euler_ancestral_table"):
        sampling.sample_euler_ancestral(lambda x, sigma: x, x[None], sigmas, disable=True)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", {**STOCHASTIC, **CHURNED})
def test_a_solver_that_adds_noise_does_not_rise(name: str) -> None:
    levels = levels_on("ve", FROM_CLEAN[1:])
    with pytest.raises(ValueError, match=r"^levels must fall for .*, got levels that rise from"):
        {**STOCHASTIC, **CHURNED}[name](levels)


def test_other_solvers_that_add_noise() -> None:
    for make in (solvers.cfg_pp_table, solvers.flow_sde_table):
        levels = levels_on("flow", FROM_CLEAN)
        argument = "sigmas" if make is solvers.flow_sde_table else "levels"
        with pytest.raises(ValueError, match=f"^{argument} must fall for {make.__name__} with eta"):
            make(levels, eta=0.3)
    for kind in ("flow_grpo", "dance_grpo", "cps"):
        quiet = solvers.flow_sde_table(levels, kind=kind, eta=0.0)
        euler = solvers.flow_euler_table(levels)
        assert torch.equal(quiet.coefficients, euler.coefficients)


@each_solver
def test_x0_does_not_determine_the_noise_of_a_clean_sample(name: str) -> None:
    with pytest.raises(ValueError, match=r"prediction_type must not be 'sample' .* levels.skip\(1"):
        DETERMINISTIC[name](levels_on("vp", FROM_CLEAN), prediction_type="sample")


BAD = {
    "mixed": ([0.0, 2.0, 1.0, 3.0], "sigmas must rise at every step, got step 1 from"),
    "equal": ([0.0, 1.0, 1.0, 3.0], "sigmas must rise at every step, got step 1 from"),
    "twice-clean": ([0.0, 0.0, 3.0], "sigma must be above 0 after the first level, got 0 at ind"),
    "negative": ([-1.0, 3.0], "sigma must be at least 0, got -1 at index 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_levels_that_do_not_rise(name: str) -> None:
    sigmas, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        NoiseLevels.from_sigmas(sigmas)


def test_alpha_is_zero_at_the_noisiest_level_only() -> None:
    with pytest.raises(ValueError, match="alpha must be above 0 before the last level, got 0"):
        NoiseLevels([1.0, 0.0, 0.0], [0.0, 0.5, 1.0], [0.0, 1.0], "flow", float)
    with pytest.raises(ValueError, match="sigmas must be above 0 before the last, for the timest"):
        NoiseLevels.from_edm([0.0, 1.0, 80.0])
