"""The loop where the answer is known: around a model that is affine in x, all of it is affine."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from diffcore.sampling import sample
from diffcore.solvers import COLUMNS, SolverTable
from support.solver_list import ALL, CHURNED, DETERMINISTIC, PATHS, geometric, levels_on
from support.solver_world import MEAN, STD, best_model, gain, moments, start

EXACT = 1e-15
CASES = [(name, path) for path in PATHS for name in ALL] + [(name, "ve") for name in CHURNED]
Vector = list[
    Fraction
]  # what a tensor is in 1, the first x, and the noise of each row and the start


def lines(table: SolverTable) -> list[tuple[float, float]]:
    """(slope, intercept) of the optimal denoiser at each row."""
    slopes = [gain(a, s) for a, s in zip(table.alpha.tolist(), table.sigma.tolist(), strict=True)]
    return [(g, MEAN * (1 - g * a)) for g, a in zip(slopes, table.alpha.tolist(), strict=True)]


def line_by_line(table: SolverTable) -> Callable[[Tensor, Tensor], Tensor]:
    rows = iter(lines(table))

    def model(x: Tensor, t: Tensor) -> Tensor:
        slope, intercept = next(rows)
        return slope * x + intercept

    return model


def in_exact_arithmetic(table: SolverTable) -> Vector:
    """The sample that the table leads to."""
    size = len(table) + 3

    def unit(k: int) -> Vector:
        return [Fraction(int(j == k)) for j in range(size)]

    def mix(*terms: tuple[float, Vector]) -> Vector:
        terms = tuple((Fraction(factor), vector) for factor, vector in terms if factor)
        return [sum((f * v[j] for f, v in terms), Fraction(0)) for j in range(size)]

    x = mix((table.start_scale, unit(1)), (table.start_noise, unit(size - 1)))
    history = [mix()] * 3
    for row, (slope, intercept) in enumerate(lines(table)):
        c = dict(zip(COLUMNS, table.coefficients[row].tolist(), strict=True))
        m = mix((slope, x), (intercept, unit(0)))
        x0 = mix((c["a_x"], x), (c["a_m"], m))
        earlier = [(c[f"c_{k + 1}"], h) for k, h in enumerate(history)]
        left = mix((c["e_x"], x), (c["e_m"], m), (c["e_0"], x0))
        here = ((c["c_x"], x), (c["c_m"], m), (c["c_0"], x0), (c["c_z"], unit(2 + row)))
        x, history = mix(*here, *earlier), [left, *history[:2]]
    return x


@pytest.mark.parametrize(("name", "path"), CASES)
def test_calls_recover_the_affine_map(name: str, path: str) -> None:
    levels = levels_on(path, geometric(7, 0.05, 20.0, to_zero=True))
    table = {**ALL, **CHURNED}[name](levels, prediction_type="sample")
    rows = len(table) + 1
    # A batch of calls (x, z): (0, 0), (1, 0), and (0, 1 at one row) for each of them.
    x = torch.zeros(2 + rows, 1, dtype=torch.float64)
    x[1] = 1
    noise = torch.zeros(rows, 2 + rows, 1, dtype=torch.float64)
    noise[:, 2:, 0] = torch.eye(rows)
    out = [Fraction(v) for v in sample(line_by_line(table), x, table, noise=noise)[:, 0].tolist()]
    intercept, (slope, *gains) = out[0], [v - out[0] for v in out[1:]]
    wanted = in_exact_arithmetic(table)
    scale = max(1, *map(abs, wanted))
    for ours, exact in zip((intercept, slope, *gains), wanted, strict=True):
        assert abs(ours - exact) <= EXACT * scale
    # A Gaussian that comes in leaves with the mean and deviation that the table's recursion gives.
    for mean, std in ((0.0, 1.0), start(levels)):
        ours = (
            float(intercept + slope * Fraction(mean)),
            math.hypot(slope * Fraction(std), *gains),
        )
        for one, other in zip(ours, moments(table, mean, std), strict=True):
            # Each row rounds once or twice.
            assert abs(one - other) <= EXACT * 2 * len(table) * max(1.0, abs(mean) + std)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp-2m", "dpmpp-3m-exact", "unipc-2-bh2"])
def test_order_of_convergence_is_the_one_claimed(name: str, path: str) -> None:
    errors = []
    for steps in (84, 168):
        levels = levels_on(path, geometric(steps, 0.02, 80.0))
        table = DETERMINISTIC[name](levels, prediction_type="sample")
        alpha, sigma = float(levels.alpha[-1]), float(levels.sigma[-1])
        mean, std = start(levels)
        x = torch.tensor([mean + 1.2 * std], dtype=torch.float64)
        # The exact probability flow keeps (x - alpha MEAN) / std(x).
        flow = alpha * MEAN + 1.2 * math.hypot(alpha * STD, sigma)
        errors.append(abs(float(sample(best_model(table), x, table)) - flow))
    measured = math.log2(errors[0] / errors[1])
    assert measured > table.order - 0.25
    assert measured < table.order + (1.4 if "exact" in name or path == "flow" else 0.15)
