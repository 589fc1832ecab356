"""Churn of Heun's method in a rectified flow: a loop of its formula, and the marginals."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import solvers
from diffcore.sigmas import get_sigmas_flow
from support.solver_list import geometric, levels_on
from support.solver_world import MEAN, STD, moments, start

CHURN = {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 0.95, "s_noise": 1.1}


def clean(x: Tensor, sigma: float) -> Tensor:
    return torch.tanh(x) + sigma * torch.cos(2 * x)


def churned(x: Tensor, sigmas: list[float], z: Any, options: dict[str, float]) -> Tensor:
    """EDM's algorithm 2 in a flow, a step at a time."""
    for sigma, after in pairwise(sigmas):
        hat = sigma
        if options["s_tmin"] <= sigma <= options["s_tmax"] and sigma < 1:
            gamma = min(options["s_churn"] / (len(sigmas) - 1), math.sqrt(2) - 1)
            odds = sigma / (1 - sigma) * (1 + gamma)
            hat = odds / (1 + odds)
            scale = (1 - hat) / (1 - sigma)
            new = math.sqrt(hat**2 - (scale * sigma) ** 2)
            x = scale * x + options["s_noise"] * new * z()
        slope = (x - clean(x, hat)) / hat
        end = x + (after - hat) * slope
        if after > 0:
            end = x + (after - hat) / 2 * (slope + (end - clean(end, after)) / after)
        x = end
    return x


@pytest.mark.parametrize("sigmas", [get_sigmas_flow(8), [0.9, 0.6, 0.35, 0.2, 0.1]])
@pytest.mark.parametrize("change", [{}, {"s_churn": 100.0}, {"s_tmin": 0.0, "s_tmax": math.inf}])
def test_the_loop_of_the_formula(sigmas: Any, change: dict[str, float]) -> None:
    options = {**CHURN, **change}
    numbers = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    table = solvers.flow_heun_table(sigmas, **options, prediction_type="sample")
    x = torch.randn(2, 5, dtype=torch.float64)
    draws = torch.randn(12, 2, 5, dtype=torch.float64)
    order = iter(draws)
    rows = iter(table.rows)
    found = diffcore.sample(
        lambda x, t: clean(x, next(rows).sigma), x, table, noise=lambda r, x: next(order)
    )
    order = iter(draws)
    wanted = churned(x, numbers, lambda: next(order), options)
    assert (found - wanted).abs().max() < 1e-11
    assert table.stochastic
    called = [t / 1000 for t in table.timesteps.tolist()]
    assert called == pytest.approx(table.sigma.tolist())


def test_churn_keeps_the_marginals() -> None:
    errors = []
    for steps in (50, 100, 200):
        levels = levels_on("flow", geometric(steps, 0.02, 80.0))
        table = solvers.flow_heun_table(levels, s_churn=8.0, prediction_type="sample")
        mean, std = moments(table, *start(levels))
        alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
        errors.append(abs(mean - alpha * MEAN) + abs(std - math.hypot(alpha * STD, sigma)))
    assert errors[-1] < 0.001
    assert math.log2(errors[1] / errors[2]) > 1.7


def test_without_churn_it_is_heun() -> None:
    sigmas = get_sigmas_flow(5, shift=3.0)
    plain = solvers.flow_heun_table(sigmas)
    assert plain.name == "heun"
    assert torch.equal(
        solvers.flow_heun_table(sigmas, s_churn=0.0).coefficients, plain.coefficients
    )
    outside = solvers.flow_heun_table(sigmas, s_churn=1.0, s_tmin=2.0, s_tmax=3.0)
    torch.testing.assert_close(outside.coefficients, plain.coefficients, rtol=1e-13, atol=1e-14)
    assert not outside.stochastic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_churn": -1.0}, "s_churn must be at least 0"),
        ({"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin must be at most s_tmax, 1.0, got 2.0"),
        ({"s_noise": -1.0}, "s_noise must be at least 0"),
        ({"s_churn": 1.0, "sigmas": [0.1, 0.5]}, "sigmas must fall for s_churn > 0, got"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        solvers.flow_heun_table(**{"sigmas": [0.9, 0.5, 0.0], **options})
