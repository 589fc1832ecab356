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
DETERMINISTIC: dict[str, Make] = {
    "euler": solvers.euler_table,
    "ddim": solvers.ddim_table,
    "ddim-as-said": partial(solvers.ddim_table, rederive_epsilon=False),
    "heun": solvers.heun_table,
    "dpm2": solvers.dpm2_table,
    "dpm2_ancestral-0": partial(solvers.dpm2_ancestral_table, eta=0.0),
    "lms-1": partial(solvers.lms_table, order=1),
    "lms-2": partial(solvers.lms_table, order=2),
    "lms-3": partial(solvers.lms_table, order=3),
    "lms-4": solvers.lms_table,
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
    "dpmpp-sde-0": partial(solvers.dpmpp_sde_table, eta=0.0),
    **{
        f"unipc-{order}-{kind}": partial(
            solvers.unipc_table, order=order, solver_type=kind, lower_order_final=False
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
    },
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
    "dpmpp-2m-sde": solvers.dpmpp_2m_sde_table,
    "dpmpp-2m-sde-heun": partial(solvers.dpmpp_2m_sde_table, eta=0.5, solver_type="heun"),
    "dpmpp-3m-sde": solvers.dpmpp_3m_sde_table,
}
CHURNED: dict[str, Make] = {  # alpha = 1 only
    "euler-churn": partial(solvers.euler_table, s_churn=8.0),
    "heun-churn": partial(solvers.heun_table, s_churn=8.0),
    "dpm2-churn": partial(solvers.dpm2_table, s_churn=8.0),
}
ALL = {**DETERMINISTIC, **STOCHASTIC}
PATHS = ("ve", "vp", "flow")


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
