"""Solvers at alpha = 1 against the published update rules, and k-diffusion itself if it is here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import sigma_rules
import torch
from torch import Tensor
from walking import walk

from diffcore import sigmas as spacing
from diffcore import solvers

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


def case(name: str, walk_name: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """(x, the normals there are to draw, where the table leads)."""
    _, _, make, options = CASES[name]
    sigmas = WALKS[walk_name]
    x = torch.randn(3, 4, dtype=torch.float64) * sigmas[0]
    draws = list(torch.randn(64, 3, 4, dtype=torch.float64))
    table = make(sigmas, **options, **X0)
    order = iter(draws)

    def noise(row: int) -> Tensor:
        if "s_churn" in options:  # one draw for each step, before it, whether it is used or not
            return draws[0 if row < 0 else int(table.step_index[row]) + 1]
        return next(order)

    return x, draws, walk(table, denoiser, x, noise)


@pytest.mark.parametrize("walk_name", WALKS)
@pytest.mark.parametrize("name", CASES)
def test_tables_are_the_published_rules(name: str, walk_name: str) -> None:
    x, draws, ours = case(name, walk_name)
    _, rule, _, options = CASES[name]
    if "s_churn" in options:
        options = {"churn": tuple(options.values())}
    order = iter(draws)
    theirs = rule(denoiser, x, WALKS[walk_name].tolist(), lambda: next(order), **options)
    assert (ours - theirs).abs().max() <= PROMISE


def test_tables_are_k_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        sampling = importlib.import_module("k_diffusion.sampling")
    except ImportError as error:
        pytest.skip(f"no k-diffusion here: {error}")
    order: Iterator[Tensor] = iter(())
    monkeypatch.setattr(torch, "randn_like", lambda like: next(order))
    for name, (kd_name, _, _, options) in CASES.items():
        for walk_name, sigmas in WALKS.items():
            if kd_name == "dpm_2_ancestral" and options["eta"] == 1 and len(sigmas) < 4:
                continue  # theirs loses ten digits in the sigma_down of so long a step
            if kd_name in ("dpmpp_2m_sde", "dpmpp_3m_sde") and walk_name == "one":
                continue  # theirs needs a step before the one to 0
            x, draws, ours = case(name, walk_name)
            order = draw = iter(draws)
            if "ancestral" in kd_name or "sde" in kd_name:
                options = {**options, "noise_sampler": lambda *levels, draw=draw: next(draw)}
            sample = getattr(sampling, f"sample_{kd_name}")
            theirs = sample(denoiser, x, sigmas, disable=True, **options)
            assert (ours - theirs).abs().max() <= PROMISE, (name, walk_name)


def test_noise_intervals_are_those_a_brownian_path_is_asked_for() -> None:
    sigmas = WALKS["karras-8"]
    s = sigmas.tolist()
    for make in (solvers.euler_ancestral_table, solvers.dpmpp_2m_sde_table):
        assert make(sigmas, **X0).noise_levels.tolist() == [list(p) for p in pairwise(s)]
    table = solvers.dpmpp_sde_table(sigmas, **X0)
    for row, (start, end) in enumerate(table.noise_levels.tolist()):
        step = int(table.step_index[row])
        middle = math.sqrt(s[step] * s[step + 1])
        assert start == s[step]
        first_of_two = row + 1 < len(table) and int(table.step_index[row + 1]) == step
        assert math.isclose(end, middle if first_of_two else s[step + 1], abs_tol=1e-12)


def test_dpmpp_orders_agree_where_they_must() -> None:
    sigmas = WALKS["exponential-20"]
    first = solvers.dpmpp_table(sigmas, order=1, **X0)
    euler = solvers.euler_table(sigmas, **X0)
    ddim = solvers.ddim_table(sigmas, **X0)
    for table in (euler, ddim):
        for column in ("c_x", "c_0"):
            torch.testing.assert_close(
                first.column(column), table.column(column), rtol=0, atol=1e-14
            )
    sde = solvers.dpmpp_table(sigmas, order=1, algorithm_type="sde-dpmsolver++", **X0)
    ancestral = solvers.ddim_table(sigmas, eta=1.0, **X0)
    ddpm = solvers.ddpm_table(sigmas, **X0)
    for table in (ancestral, ddpm):
        for column in ("c_x", "c_0", "c_z"):
            torch.testing.assert_close(
                sde.column(column), table.column(column), rtol=1e-12, atol=1e-14
            )
