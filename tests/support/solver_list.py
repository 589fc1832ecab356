"""Every solver once or more, as a function of the levels, for the tests that hold for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from diffcore import solvers
from diffcore.sigmas import get_sigmas_exponential
from diffcore.solvers import NoiseLevels, SolverTable

Make = Callable[..., SolverTable]

FLOW = partial(solvers.dpmpp_table, lower_order_final=False)
BLOCKS = partial(solvers.dpmpp_singlestep_table, algorithm_type="dpmsolver")
NOISE = partial(solvers.unipc_table, predict_x0=False, lower_order_final=False)
SA = partial(solvers.sa_solver_table, lower_order_final=False)
DETERMINISTIC: dict[str, Make] = {
    "euler": solvers.euler_table,
    "ddim": solvers.ddim_table,
    "ddim-as-said": partial(solvers.ddim_table, rederive_epsilon=False),
    "heun": solvers.heun_table,
    "heunpp2": solvers.heunpp2_table,
    "dpm2": solvers.dpm2_table,
    "dpm2_ancestral-0": partial(solvers.dpm2_ancestral_table, eta=0.0),
    "lms-1": partial(solvers.lms_table, order=1),
    "lms-2": partial(solvers.lms_table, order=2),
    "lms-3": partial(solvers.lms_table, order=3),
    "lms-4": solvers.lms_table,
    "ipndm-4": solvers.ipndm_table,
    "pndm": solvers.pndm_table,
    "deis-4": partial(solvers.deis_table, order=4),
    "dpm-2m": partial(FLOW, algorithm_type="dpmsolver"),
    "dpmpp-1": partial(FLOW, order=1),
    "dpmpp-2m": solvers.dpmpp_2m_table,
    "dpmpp-2m-heun": partial(FLOW, solver_type="heun"),
    "dpmpp-3m": partial(FLOW, order=3),
    "dpmpp-3m-heun": partial(FLOW, order=3, solver_type="heun"),
    "dpmpp-3m-exact": partial(FLOW, order=3, exact_third_order=True, solver_type="heun"),
    "dpmpp-2s": solvers.dpmpp_2s_table,
    **{
        f"dpmpp-{order}s-{kind}": partial(
            solvers.dpmpp_singlestep_table, order=order, solver_type=kind
        )
        for order in (2, 3)
        for kind in ("midpoint", "heun")
    },
    "dpm-3s-heun": partial(BLOCKS, order=3, solver_type="heun"),
    "dpmpp-sde-0": partial(solvers.dpmpp_sde_table, eta=0.0),
    **{
        f"unipc-{order}-{kind}": partial(
            solvers.unipc_table, order=order, solver_type=kind, lower_order_final=False
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
    },
    "unipc-2-noise": partial(NOISE, solver_p="midpoint"),
    "sa-0-pece": partial(SA, tau=0.0, corrector_order=3, mode="pece"),
    "gradient_estimation": solvers.gradient_estimation_table,
    "res_multistep": solvers.res_multistep_table,
    "seeds_3-0": partial(solvers.seeds_3_table, eta=0.0),
}
STOCHASTIC: dict[str, Make] = {
    "ddpm": solvers.ddpm_table,
    "ddim-half": partial(solvers.ddim_table, eta=0.5),
    "ddim-one": partial(solvers.ddim_table, eta=1.0),
    "euler_ancestral": solvers.euler_ancestral_table,
    "dpm2_ancestral": solvers.dpm2_ancestral_table,
    "dpmpp-2s-ancestral": partial(solvers.dpmpp_2s_table, eta=1.0),
    "dpmpp-sde": solvers.dpmpp_sde_table,
    "dpmpp-sde-r": partial(solvers.dpmpp_sde_table, eta=0.6, r=0.4),
    "dpmpp-sde-1m": partial(FLOW, order=1, algorithm_type="sde-dpmsolver++"),
    "dpm-sde-2m": partial(FLOW, algorithm_type="sde-dpmsolver", eta=0.5),
    "dpmpp-2m-sde": solvers.dpmpp_2m_sde_table,
    "dpmpp-2m-sde-heun": partial(solvers.dpmpp_2m_sde_table, eta=0.5, solver_type="heun"),
    "dpmpp-3m-sde": solvers.dpmpp_3m_sde_table,
    "sa-pece": partial(SA, mode="pece"),
    "res_multistep_ancestral": partial(solvers.res_multistep_table, eta=1.0),
    "er_sde": solvers.er_sde_table,
    "seeds_3": solvers.seeds_3_table,
}
CHURNED: dict[str, Make] = {  # alpha = 1 only
    "euler-churn": partial(solvers.euler_table, s_churn=8.0),
    "heun-churn": partial(solvers.heun_table, s_churn=8.0),
    "heunpp2-churn": partial(solvers.heunpp2_table, s_churn=8.0),
    "dpm2-churn": partial(solvers.dpm2_table, s_churn=8.0),
}
FEW_STEP: dict[str, Make] = {  # the model has to predict x_0 itself, not its mean
    "renoise": solvers.renoise_table,
    "lcm": solvers.lcm_table,
    "tcd": partial(solvers.tcd_table, gamma=0.3),
}
# Options of solvers above: for the tests of orders and of marginals alone.
VARIANTS: dict[str, Make] = {
    "ipndm-2": partial(solvers.ipndm_table, order=2),
    "ipndm_v-3": partial(solvers.ipndm_table, order=3, steps="variable"),
    "deis-2": partial(solvers.deis_table, order=2),
    "deis-3-rho": partial(solvers.deis_table, variable="rho"),
    "deis-3-t": partial(solvers.deis_table, variable="t"),
    "dpm-1": partial(FLOW, order=1, algorithm_type="dpmsolver"),
    "dpm-3m": partial(FLOW, order=3, algorithm_type="dpmsolver"),
    "dpm-3m-exact": partial(
        FLOW, order=3, algorithm_type="dpmsolver", exact_third_order=True, solver_type="heun"
    ),
    "dpm-2s-midpoint": BLOCKS,
    "dpm-3s-midpoint": partial(BLOCKS, order=3),
    "unipc-1-noise": partial(NOISE, order=1),
    "unipc-3-noise": partial(NOISE, order=3),
    "unipc-3-heun": partial(solvers.unipc_table, order=3, solver_p="heun", lower_order_final=False),
    "sa-0-3": partial(SA, tau=0.0, predictor_order=3, corrector_order=4),
    "sa-0-noise": partial(SA, tau=0.0, predict_x0=False),
}
STOCHASTIC_VARIANTS: dict[str, Make] = {
    "dpm-sde-1m": partial(FLOW, order=1, algorithm_type="sde-dpmsolver"),
    "sa": solvers.sa_solver_table,
    "sa-3": partial(SA, predictor_order=3, corrector_order=4, tau=0.6, simple_order_2=True),
    "sa-noise": partial(SA, predict_x0=False, tau=0.3),
}
# Of these the order shows with that many times the steps.
LATE = {"ipndm-2": 2, "ipndm_v-3": 2, "deis-4": 2, "sa-0-noise": 4}
ALL = {**DETERMINISTIC, **STOCHASTIC, **FEW_STEP}
PATHS = ("ve", "vp", "flow")


def steps_for(name: str) -> tuple[int, int]:
    """Two numbers of steps between which the order of a solver is measured."""
    steps = 84 * LATE.get(name, 1)
    return steps, 2 * steps


def levels_on(path: str, ratios: torch.Tensor) -> NoiseLevels:
    """Levels with these sigma / alpha on a path; the model is told sigma / alpha, or flow's t."""
    if path == "ve":
        return NoiseLevels.from_sigmas(ratios)
    if path == "flow":
        return NoiseLevels.from_flow(ratios / (1 + ratios))
    size = torch.hypot(ratios, torch.ones_like(ratios))
    return NoiseLevels(1 / size, ratios / size, ratios[:-1], "vp", float)


def geometric(steps: int, low: float, high: float, *, to_zero: bool = False) -> torch.Tensor:
    """Ratios from high to low in ``steps`` steps, and one more to 0 if asked for."""
    ratios = get_sigmas_exponential(steps + 1, low, high)
    return ratios if to_zero else ratios[:-1]
