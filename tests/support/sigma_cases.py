"""The solvers of k-diffusion: the published rule beside the table, and the noise levels to try."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore import sigmas as spacing
from diffcore import solvers
from support import sigma_rules

PROMISE = 1e-10
X0 = {"prediction_type": "sample"}
CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.01}
CHURN_LOW = {**CHURN, "s_tmax": 10.0}
NOISY = {"eta": 0.7, "s_noise": 1.1}


def multistep(**options: Any) -> Any:
    return lambda *a, **k: sigma_rules.dpmpp_multistep(*a, **options, **k)


CASES = {
    # name: (k-diffusion's name, the rule, the table, options of all three)
    "euler": ("euler", sigma_rules.euler, solvers.euler_table, {}),
    "euler-churn": ("euler", sigma_rules.euler, solvers.euler_table, CHURN),
    "euler-churn-low": ("euler", sigma_rules.euler, solvers.euler_table, CHURN_LOW),
    "heun": ("heun", sigma_rules.heun, solvers.heun_table, {}),
    "heun-churn": ("heun", sigma_rules.heun, solvers.heun_table, CHURN),
    "heun-churn-low": ("heun", sigma_rules.heun, solvers.heun_table, CHURN_LOW),
    "dpm_2": ("dpm_2", sigma_rules.dpm_2, solvers.dpm2_table, {}),
    "dpm_2-churn": ("dpm_2", sigma_rules.dpm_2, solvers.dpm2_table, CHURN),
    "lms": ("lms", sigma_rules.lms, solvers.lms_table, {}),
    "lms-1": ("lms", sigma_rules.lms, solvers.lms_table, {"order": 1}),
    "lms-2": ("lms", sigma_rules.lms, solvers.lms_table, {"order": 2}),
    "lms-3": ("lms", sigma_rules.lms, solvers.lms_table, {"order": 3}),
    "euler_ancestral": (
        "euler_ancestral",
        sigma_rules.euler_ancestral,
        solvers.euler_ancestral_table,
        {"eta": 1.0},
    ),
    "euler_ancestral-noisy": (
        "euler_ancestral",
        sigma_rules.euler_ancestral,
        solvers.euler_ancestral_table,
        NOISY,
    ),
    "euler_ancestral-eta-2": (
        "euler_ancestral",
        sigma_rules.euler_ancestral,
        solvers.euler_ancestral_table,
        {"eta": 2.0},
    ),
    "dpm_2_ancestral": (
        "dpm_2_ancestral",
        sigma_rules.dpm_2_ancestral,
        solvers.dpm2_ancestral_table,
        {"eta": 1.0},
    ),
    "dpm_2_ancestral-noisy": (
        "dpm_2_ancestral",
        sigma_rules.dpm_2_ancestral,
        solvers.dpm2_ancestral_table,
        NOISY,
    ),
    "dpmpp_2s_ancestral": (
        "dpmpp_2s_ancestral",
        sigma_rules.dpmpp_2s_ancestral,
        solvers.dpmpp_2s_table,
        {"eta": 1.0},
    ),
    "dpmpp_2s": (
        "dpmpp_2s_ancestral",
        sigma_rules.dpmpp_2s_ancestral,
        solvers.dpmpp_2s_table,
        {"eta": 0.0},
    ),
    "dpmpp_2s_ancestral-noisy": (
        "dpmpp_2s_ancestral",
        sigma_rules.dpmpp_2s_ancestral,
        solvers.dpmpp_2s_table,
        NOISY,
    ),
    "dpmpp_sde": ("dpmpp_sde", sigma_rules.dpmpp_sde, solvers.dpmpp_sde_table, {"eta": 1.0}),
    "dpmpp_sde-noisy": (
        "dpmpp_sde",
        sigma_rules.dpmpp_sde,
        solvers.dpmpp_sde_table,
        {**NOISY, "r": 0.4},
    ),
    "dpmpp_2m": ("dpmpp_2m", multistep(), solvers.dpmpp_2m_table, {}),
    "dpmpp_2m_sde": (
        "dpmpp_2m_sde",
        multistep(),
        solvers.dpmpp_2m_sde_table,
        {"eta": 1.0, "solver_type": "midpoint"},
    ),
    "dpmpp_2m_sde-heun": (
        "dpmpp_2m_sde",
        multistep(),
        solvers.dpmpp_2m_sde_table,
        {**NOISY, "solver_type": "heun"},
    ),
    "dpmpp_3m_sde": (
        "dpmpp_3m_sde",
        multistep(order=3, solver_type="heun"),
        solvers.dpmpp_3m_sde_table,
        {"eta": 1.0},
    ),
    "dpmpp_3m_sde-noisy": (
        "dpmpp_3m_sde",
        multistep(order=3, solver_type="heun"),
        solvers.dpmpp_3m_sde_table,
        NOISY,
    ),
    "dpmpp_3m": (
        "dpmpp_3m_sde",
        multistep(order=3, solver_type="heun"),
        solvers.dpmpp_3m_sde_table,
        {"eta": 0.0},
    ),
}

WALKS = {
    "karras-8": spacing.get_sigmas_karras(8, 0.03, 14.6),
    "karras-2": spacing.get_sigmas_karras(2, 1.0, 14.6),
    "one": torch.tensor([5.0, 0.0], dtype=torch.float64),
    "exponential-20": spacing.get_sigmas_exponential(20, 0.1, 80.0),
    "unfinished": spacing.get_sigmas_karras(9, 0.1, 14.6)[:-1],
}


def denoiser(x: Tensor, sigma: Any) -> Tensor:
    scale = 1 + (sigma if isinstance(sigma, float) else sigma.reshape(-1, 1))
    return torch.tanh(x / scale) + 0.1 * torch.cos(3 * x / scale)
