"""Solvers at alpha = 1 against the published update rules, and k-diffusion itself if it is here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffcore import solvers
from support.sigma_cases import (
    CASES,
    PROMISE,
    WALKS,
    X0,
    denoiser,
)
from support.walking import walk


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
