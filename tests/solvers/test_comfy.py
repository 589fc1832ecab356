"""Solvers under ComfyUI's names against loops of their formulas, and what their docstrings say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import solvers
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.sigmas import get_sigmas_flow, get_sigmas_karras
from diffcore.solvers import NoiseLevels, SolverTable
from support import comfy_rules as rules
from support.solver_list import PATHS, geometric, levels_on
from support.solver_world import MEAN, STD, moments, start
from support.walking import walk

PROMISE = 1e-10
NOISY = {"eta": 0.7, "s_noise": 1.1}
Make = Callable[..., SolverTable]

CASES: dict[str, tuple[Callable[..., Tensor], Make, dict[str, Any]]] = {
    # name: (the rule, the table, options of both)
    "res_multistep": (rules.res_multistep, solvers.res_multistep_table, {}),
    "res_multistep_ancestral": (
        rules.res_multistep, solvers.res_multistep_table, {"eta": 1.0}),
    "res_multistep-noisy": (rules.res_multistep, solvers.res_multistep_table, NOISY),
    "gradient_estimation": (rules.gradient_estimation, solvers.gradient_estimation_table, {}),
    "gradient_estimation-1.4": (
        rules.gradient_estimation, solvers.gradient_estimation_table, {"gamma": 1.4}),
    "er_sde-1": (rules.er_sde, solvers.er_sde_table, {"order": 1}),
    "er_sde-2": (rules.er_sde, solvers.er_sde_table, {"order": 2, "s_noise": 0.9}),
    "er_sde-3": (rules.er_sde, solvers.er_sde_table, {}),
    "er_sde-ode": (
        rules.er_sde, solvers.er_sde_table,
        {"noise_scaler": lambda u: u, "num_integration_points": 50}),
    "er_sde-reverse": (rules.er_sde, solvers.er_sde_table, {"noise_scaler": lambda u: u**2}),
    "seeds_2": (rules.seeds_2, solvers.seeds_2_table, {}),
    "seeds_2-noisy": (rules.seeds_2, solvers.seeds_2_table, {**NOISY, "r": 0.3}),
    "seeds_2-phi_2": (rules.seeds_2, solvers.seeds_2_table, {**NOISY, "solver_type": "phi_2"}),
    "exp_heun_2_x0": (
        rules.seeds_2, solvers.seeds_2_table, {"eta": 0.0, "r": 1.0, "solver_type": "phi_2"}),
    "exp_heun_2_x0_sde": (
        rules.seeds_2, solvers.seeds_2_table, {"eta": 1.0, "r": 1.0, "solver_type": "phi_2"}),
    "seeds_3": (rules.seeds_3, solvers.seeds_3_table, {}),
    "seeds_3-noisy": (rules.seeds_3, solvers.seeds_3_table, {**NOISY, "r_1": 0.2, "r_2": 0.9}),
    "seeds_3-0": (rules.seeds_3, solvers.seeds_3_table, {"eta": 0.0}),
}  # fmt: skip
FLOWS: dict[str, tuple[Callable[..., Tensor], Make, dict[str, Any]]] = {
    f"{name}-{eta}": (rule, make, {"eta": eta, "s_noise": 1.1})
    for name, rule, make in (
        ("euler", rules.euler_ancestral_rf, solvers.flow_euler_ancestral_table),
        ("dpmpp_2s", rules.dpmpp_2s_ancestral_rf, solvers.flow_dpmpp_2s_ancestral_table),
    )
    for eta in (0.0, 0.6, 1.0, 1.2)
}


def denoiser(x: Tensor, r: float) -> Tensor:
    r = min(r, 1e6)
    return torch.tanh(x / (1 + 0.1 * r)) + 0.1 * math.cos(math.log(r)) * torch.cos(3 * x)


def compared(rule: Any, table: SolverTable, levels: NoiseLevels, options: dict[str, Any]) -> float:
    """How far a table and a loop with the same noise end from each other."""
    pairs = list(zip(levels.alpha.tolist(), levels.sigma.tolist(), strict=True))
    x = torch.randn(3, 4, dtype=torch.float64) * levels.init_noise_sigma
    draws = torch.randn(80, 3, 4, dtype=torch.float64)
    order, rows = iter(draws), iter(table.rows)

    def model(x: Tensor, t: float) -> Tensor:
        row = next(rows)
        return denoiser(x, row.sigma / row.alpha if row.alpha else math.inf)

    ours = walk(table, model, x, lambda row: next(order))
    order = iter(draws)
    theirs = rule(denoiser, x, pairs, lambda: next(order), **options)
    return float((ours - theirs).abs().max())


RATIOS = {
    "karras": get_sigmas_karras(8, 0.03, 14.6),
    "two": get_sigmas_karras(2, 1.0, 14.6),
    "one": torch.tensor([5.0, 0.0], dtype=torch.float64),
    "unfinished": get_sigmas_karras(9, 0.1, 14.6)[:-1],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_tables_are_the_published_rules(name: str, path: str) -> None:
    rule, make, options = CASES[name]
    if path == "vp" and rule is rules.gradient_estimation:
        return  # the rule is in sigma; vp and ve give the same samples, see test_gaussian
    for ratios in RATIOS.values():
        levels = levels_on(path, ratios)
        table = make(levels, **options, prediction_type="sample")
        assert compared(rule, table, levels, options) <= PROMISE


@pytest.mark.parametrize("name", FLOWS)
def test_ancestral_steps_of_flows_are_the_published_rules(name: str) -> None:
    rule, make, options = FLOWS[name]
    for sigmas in (get_sigmas_flow(7), get_sigmas_flow(12, shift=3.0), [0.9, 0.6, 0.35, 0.2]):
        levels = NoiseLevels.from_flow(sigmas)
        table = make(levels, **options, prediction_type="sample")
        assert compared(rule, table, levels, options) <= PROMISE
        again = make(sigmas, **options, prediction_type="sample")
        assert torch.equal(again.coefficients, table.coefficients)


def test_comfys_res_multistep_of_a_flow_steps_in_the_logarithm_of_sigma() -> None:
    # Sigmas alone mean alpha = 1, and dx / dsigma = (x - x0) / sigma is that of a flow too.
    sigmas = get_sigmas_flow(9, shift=3.0)
    table = solvers.res_multistep_table(sigmas, prediction_type="sample")
    pairs = [(1.0, s) for s in sigmas.tolist()]
    x = torch.randn(5, dtype=torch.float64)
    wanted = rules.res_multistep(denoiser, x, pairs, lambda: torch.zeros(()))
    found = walk(table, denoiser, x)
    assert (found - wanted).abs().max() <= PROMISE


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ancestral_steps_of_flows_are_those_of_diffusers(eta: float) -> None:
    ltx = pytest.importorskip("diffusers.schedulers.scheduling_ltx_euler_ancestral_rf")
    sigmas = get_sigmas_flow(6, shift=3.0)
    scheduler = ltx.LTXEulerAncestralRFScheduler(eta=eta, s_noise=1.1)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    table = solvers.flow_euler_ancestral_table(sigmas, eta=eta, s_noise=1.1)
    x, draws = torch.randn(2, 3, 4), torch.randn(6, 2, 3, 4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + t.reshape(-1, 1, 1) / 1000

    found = diffcore.sample(model, x, table, noise=lambda r, x: draws[r])
    order, theirs = iter(draws), x
    original, ltx.randn_tensor = ltx.randn_tensor, lambda *a, **k: next(order)
    try:
        for t in scheduler.timesteps[:-1]:
            theirs = scheduler.step(model(theirs, t.expand(2)), t, theirs).prev_sample
    finally:
        ltx.randn_tensor = original
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


# ---- relations -----------------------------------------------------------------------------------


def same(one: SolverTable, other: SolverTable, atol: float = 1e-13) -> None:
    for name in ("c_x", "c_0", "c_1", "c_2", "c_z", "a_x", "a_m"):
        torch.testing.assert_close(one.column(name), other.column(name), rtol=1e-12, atol=atol)


@pytest.mark.parametrize("path", PATHS)
def test_what_the_docstrings_call_the_same(path: str) -> None:
    levels = levels_on(path, geometric(7, 0.05, 20.0, to_zero=True))
    heun = partial(solvers.dpmpp_table, lower_order_final=False, solver_type="heun")
    same(solvers.res_multistep_table(levels), heun(levels))
    euler = solvers.euler_table(levels)
    same(solvers.gradient_estimation_table(levels, gamma=1.0), euler)
    ddpm = solvers.ddpm_table(levels)
    reverse = solvers.er_sde_table(levels, order=1, noise_scaler=lambda u: u**2)
    same(reverse, ddpm)
    flow = solvers.er_sde_table(levels, order=1, noise_scaler=lambda u: u)
    same(flow, solvers.ddim_table(levels))
    assert not flow.stochastic
    for eta in (0.0, 1.0):
        # The last rows differ by the noise of the first part, which is kept; the means do not.
        seeds = solvers.seeds_2_table(levels, eta=eta, prediction_type="sample")
        sde = solvers.dpmpp_sde_table(levels, eta=eta, prediction_type="sample")
        mean, std = start(levels)
        if eta == 0:
            assert moments(seeds, mean, std) == pytest.approx(moments(sde, mean, std), rel=1e-12)
        else:
            assert moments(seeds, mean, std)[0] == pytest.approx(moments(sde, mean, std)[0], 1e-3)


def test_gradient_estimation_with_one_and_a_half_is_adams_bashforth() -> None:
    sigmas = torch.linspace(5.0, 0.5, 10, dtype=torch.float64)
    found = solvers.gradient_estimation_table(sigmas, gamma=1.5)
    same(found, solvers.lms_table(sigmas, order=2), 1e-12)


def test_a_flow_without_noise_is_the_table_without_noise() -> None:
    sigmas = get_sigmas_flow(6, shift=3.0)
    same(solvers.flow_euler_ancestral_table(sigmas, eta=0.0), solvers.flow_euler_table(sigmas))
    below = sigmas[1:]
    two = solvers.flow_dpmpp_2s_ancestral_table(below, eta=0.0)
    levels = NoiseLevels.from_flow(below)
    wanted = solvers.dpmpp_2s_table(levels, prediction_type="flow_prediction")
    same(two, wanted)
    assert two.order == 2
    up = NoiseLevels.from_flow([0.0, 0.2, 0.5, 0.8])
    same(
        solvers.flow_euler_ancestral_table(up, eta=0.0),
        solvers.euler_table(up, prediction_type="flow_prediction"),
    )
    assert len(solvers.flow_dpmpp_2s_ancestral_table(up, eta=0.0)) == 5


@pytest.mark.parametrize("make", [v[1] for k, v in FLOWS.items() if k.endswith("-1.0")])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_flows_converge_to_the_marginals(make: Make, eta: float) -> None:
    errors = []
    for steps in (50, 100, 200):
        levels = levels_on("flow", geometric(steps, 0.02, 80.0))
        table = make(levels, eta=eta, prediction_type="sample")
        alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
        mean, std = moments(table, *start(levels))
        errors.append(abs(mean - alpha * MEAN) + abs(std - math.hypot(alpha * STD, sigma)))
    assert errors[-1] < 0.02
    assert math.log2(errors[0] / errors[1]) > 0.8
    assert math.log2(errors[1] / errors[2]) > 0.85


@pytest.mark.parametrize("kind", ["phi_1", "phi_2"])
def test_seeds_2_up_the_levels_and_from_a_clean_sample(kind: str) -> None:
    levels = levels_on("flow", torch.tensor([0.0, 0.1, 0.6, 2.0], dtype=torch.float64))
    table = solvers.seeds_2_table(
        levels, eta=0.0, solver_type=kind, prediction_type="flow_prediction"
    )
    x0, noise = torch.randn(2, 5, dtype=torch.float64)
    found = diffcore.sample(lambda x, t: noise - x0, x0, table)
    wanted = levels.alpha[-1] * x0 + levels.sigma[-1] * noise
    assert (found - wanted).abs().max() < 1e-13


@pytest.mark.parametrize(("r", "kind"), [(0.3, "phi_1"), (0.5, "phi_2"), (1.0, "phi_2")])
def test_order_and_marginals_of_seeds_2_of_both_types(r: float, kind: str) -> None:
    errors = []
    for eta in (0.0, 0.6):
        for steps in (40, 80):
            levels = levels_on("flow", geometric(steps, 0.05, 20.0))
            table = solvers.seeds_2_table(
                levels, eta=eta, r=r, solver_type=kind, prediction_type="sample"
            )
            mean, std = start(levels)
            alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
            found = moments(table, mean, std)
            exact = alpha * MEAN, math.hypot(alpha * STD, sigma)
            errors.append(math.dist(found, exact))
    assert math.log2(errors[0] / errors[1]) > 1.8
    assert math.log2(errors[2] / errors[3]) > 0.8
    assert errors[3] < 0.02


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_er_sde_for_the_probability_flow(order: int) -> None:
    errors = []
    for steps in (20, 40, 80):
        levels = levels_on("ve", geometric(steps, 0.05, 20.0))
        table = solvers.er_sde_table(
            levels, order=order, noise_scaler=lambda u: u, prediction_type="sample",
            num_integration_points=1000,
        )  # fmt: skip
        mean, std = start(levels)
        exact = math.hypot(STD, 0.05) / std
        one, two = (moments(table, mean + d, 1.0)[0] for d in (0.0, 1.0))
        errors.append(abs(two - one - exact))
    measured = math.log2(errors[1] / errors[2])
    assert table.order == min(order, 2)
    assert table.order - 0.2 < measured < table.order + 0.5


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", FLOWS)
def test_flows_of_every_prediction_type_and_in_the_loop(name: str, kind: str) -> None:
    _, make, options = FLOWS[name]
    sigmas = get_sigmas_flow(5)[1:]  # epsilon determines nothing at sigma = 1
    x, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(9, 2, 3, dtype=torch.float64)
    wanted = None
    for prediction in ("sample", kind):
        table = make(sigmas, **options, prediction_type=prediction, clip_range=0.8)

        def model(x: Tensor, t: Tensor, prediction: str = prediction) -> Tensor:
            sigma = t[0] / 1000
            alpha = 1 - sigma
            clean = torch.tanh(x + sigma)
            eps = (x - alpha * clean) / sigma
            return {"sample": clean, "epsilon": eps, "v_prediction": alpha * eps - sigma * clean,
                    "flow_prediction": eps - clean}[prediction]  # fmt: skip

        found = diffcore.sample(model, x, table, noise=lambda r, x: noise[r])
        wanted = found if wanted is None else wanted
    assert (found - wanted).abs().max() < 1e-12
    assert table.init_noise_sigma == 1.0


# ---- refusals ------------------------------------------------------------------------------------

SIGMAS = [10.0, 4.0, 1.0, 0.3, 0.0]
REFUSALS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "gamma": (
        lambda: solvers.gradient_estimation_table(SIGMAS, gamma=math.inf),
        ValueError, "gamma must be finite, got inf"),
    "gamma-type": (
        lambda: solvers.gradient_estimation_table(SIGMAS, gamma="2"),
        TypeError, "gamma must be a number, got str"),
    "res-eta": (
        lambda: solvers.res_multistep_table(SIGMAS, eta=-1.0),
        ValueError, "eta must be at least 0 and finite, got -1.0"),
    "order": (lambda: solvers.er_sde_table(SIGMAS, order=4), ValueError, "order must be in 1 .. 3"),
    "scaler": (
        lambda: solvers.er_sde_table(SIGMAS, noise_scaler=2.0),
        TypeError, "noise_scaler must be a function, got float"),
    "scaler-zero": (
        lambda: solvers.er_sde_table(SIGMAS, noise_scaler=lambda u: 0.0),
        ValueError, "noise_scaler must return a number above 0, got 0.0 at sigma / alpha = 4"),
    "scaler-falls": (
        lambda: solvers.er_sde_table(SIGMAS, noise_scaler=lambda u: u**0.5),
        ValueError, "noise_scaler must be a function f with f(u) / u that does not fall"),
    "scaler-flow": (
        lambda: solvers.er_sde_table(
            NoiseLevels.from_flow([1.0, 0.5, 0.0]), noise_scaler=lambda u: u),
        ValueError, "levels must start at alpha > 0 for er_sde_table with a noise_scaler"),
    "points": (
        lambda: solvers.er_sde_table(SIGMAS, num_integration_points=0),
        ValueError, "num_integration_points must be at least 1, got 0"),
    "r": (lambda: solvers.seeds_2_table(SIGMAS, r=0.0), ValueError, "r must lie in (0, 1], got 0"),
    "r_1": (
        lambda: solvers.seeds_3_table(SIGMAS, r_1=0.7),
        ValueError, "r_1 must be above 0 and below r_2 <= 1, got 0.7 and r_2=0.666"),
    "type": (
        lambda: solvers.seeds_2_table(SIGMAS, solver_type="phi"),
        ValueError, "solver_type must be one of 'phi_1', 'phi_2', got 'phi'"),
    "flow-path": (
        lambda: solvers.flow_euler_ancestral_table(NoiseLevels.from_sigmas(SIGMAS)),
        ValueError, "sigmas must be on the path 'flow', got NoiseLevels on 've'"),
    "flow-rising": (
        lambda: solvers.flow_euler_ancestral_table([0.1, 0.5]),
        ValueError, "sigmas must fall for flow_euler_ancestral_table with eta > 0"),
    "flow-2s-rising": (
        lambda: solvers.flow_dpmpp_2s_ancestral_table([0.1, 0.5]),
        ValueError, "sigmas must fall for flow_dpmpp_2s_ancestral_table with eta > 0"),
    "flow-2s-to-noise": (
        lambda: solvers.flow_dpmpp_2s_ancestral_table([0.1, 1.0], eta=0.0),
        ValueError, "levels must end at alpha > 0 for flow_dpmpp_2s_ancestral_table"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str) -> None:
    call, error, message = REFUSALS[name]
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
