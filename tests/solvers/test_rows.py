"""The columns of a table that no closed form and no peer reads: intervals, steps, last rows."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from diffcore import solvers
from diffcore.sampling import sample
from diffcore.solvers import NoiseLevels, SolverTable
from support.solver_list import ALL, PATHS, STOCHASTIC, geometric, levels_on


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_noise_interval_of_a_step_is_its_sigma_over_alpha(name: str, path: str) -> None:
    ratios = geometric(6, 0.05, 20.0, to_zero=True)
    table = STOCHASTIC[name](levels_on(path, ratios))
    last_row = {int(step): row for row, step in enumerate(table.step_index)}
    assert list(last_row) == list(range(len(ratios) - 1))
    found = table.noise_levels[list(last_row.values())]
    if name.startswith("seeds"):  # the parts of a step get the parts of its noise
        first_row = [list(table.step_index).index(step) for step in last_row]
        found = torch.stack([table.noise_levels[first_row, 0], found[:, 1]], 1)
        inner = table.step_index[1:] == table.step_index[:-1]
        assert torch.equal(table.noise_levels[:-1, 1][inner], table.noise_levels[1:, 0][inner])
    torch.testing.assert_close(found, torch.stack([ratios[:-1], ratios[1:]], 1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_lambda_rises_from_minus_to_plus_infinity(path: str) -> None:
    ratios = geometric(6, 0.05, 20.0, to_zero=True)
    levels = levels_on(path, ratios)
    if path != "ve":  # whose alpha is never 0
        alpha, sigma = levels.alpha.clone(), levels.sigma.clone()
        alpha[0], sigma[0] = 0, 1
        levels = replace(levels, alpha=alpha, sigma=sigma)
    lambdas = [level.lam for level in levels.levels()]
    assert lambdas == sorted(lambdas)
    assert lambdas[-1] == math.inf
    assert lambdas[0] == -(math.log(20.0) if path == "ve" else math.inf)


# With lower_order_final nothing else would make the last step one of order 1.
LONG = {
    f"{kind}-{order}": partial(
        solvers.dpmpp_table, order=order, algorithm_type=kind, lower_order_final=False
    )
    for kind in ("dpmsolver++", "sde-dpmsolver++")
    for order in (1, 2, 3)
}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", LONG)
def test_a_last_step_that_stays_in_place_is_the_identity(name: str, steps: int) -> None:
    ratios = geometric(steps - 1, 0.5, 4.0) if steps > 1 else torch.tensor([4.0])
    table = LONG[name](levels_on("vp", torch.cat([ratios, ratios[-1:]]).double()))
    c = {n: table.column(n)[-1].item() for n in solvers.COLUMNS}
    assert c["c_x"] == 1
    assert [c[n] for n in ("c_m", "c_0", "c_1", "c_2", "c_3", "c_z")] == [0.0] * 6


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2_ancestral"])
def test_steps_may_be_counted_from_any_number(name: str) -> None:
    # The end of a longer walk, as image-to-image takes it, begins with a step of its own too.
    table = ALL[name](NoiseLevels.from_sigmas(geometric(4, 0.1, 2.0, to_zero=True)))
    parts = {f.name: getattr(table, f.name) for f in fields(SolverTable) if f.init}
    parts.pop("rows", None)
    later = SolverTable(**{**parts, "step_index": table.step_index + 1})
    steps = []
    x = torch.ones(1, 2)
    sample(lambda x, t: x, x, later, noise=lambda i, x: x, callback=lambda s: steps.append(s["i"]))
    assert steps == [1 + i for i in range(table.num_steps)]
