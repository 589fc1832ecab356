"""RePaint's table: its visits, its marginals, and what it makes of a known part."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, solvers
from diffcore.solvers import NoiseLevels, SolverTable
from support.solver_list import geometric, levels_on

SCHEDULE = diffcore.NoiseSchedule.from_betas(diffcore.make_betas("linear", 1000))


def schedule_levels(steps: int) -> NoiseLevels:
    return NoiseLevels.from_schedule(SCHEDULE, diffcore.respaced_timesteps(1000, steps, "trailing"))


def numbered(steps: int) -> NoiseLevels:
    """Levels whose timesteps are RePaint's t: steps - 1 .. 0."""
    levels = schedule_levels(steps)
    times = torch.arange(steps - 1, -1, -1)
    return NoiseLevels(levels.alpha, levels.sigma, times, "vp", float)


@pytest.mark.parametrize(
    ("steps", "jump", "resamples", "calls"),
    [
        # RePaint's schedule (t_T = 6, jump_length = 2, jump_n_sample = 3) visits 5 4 3 2 3 4 3 2 3
        # 4 3 2 1 0 1 2 1 0 1 2 1 0 -1; the model is called before every step down.
        (6, 2, 3, [5, 4, 3, 4, 3, 4, 3, 2, 1, 2, 1, 2, 1, 0]),
        # t_T = 5, jump_length = 1, jump_n_sample = 2: 4 3 4 3 2 3 2 1 2 1 0 1 0 -1.
        (5, 1, 2, [4, 4, 3, 3, 2, 2, 1, 1, 0]),
        (7, 3, 2, [6, 5, 4, 6, 5, 4, 3, 2, 1, 3, 2, 1, 0]),
        (4, 2, 1, [3, 2, 1, 0]),
        (4, 4, 9, [3, 2, 1, 0]),
        (1, 10, 10, [0]),
    ],
)
def test_visits(steps: int, jump: int, resamples: int, calls: list[int]) -> None:
    table = solvers.repaint_table(numbered(steps), jump_length=jump, num_resamples=resamples)
    assert table.timesteps.tolist() == calls
    assert table.num_steps == len(table) == len(calls)
    assert len(solvers.repaint_table(numbered(250))) == 250 + 24 * 9 * 10


def test_one_resample_is_ddpm() -> None:
    for kind in ("fixed_small", "fixed_large"):
        levels = schedule_levels(12)
        found = solvers.repaint_table(
            levels, num_resamples=1, variance_type=kind, clip_range=1.0, jump_length=3
        )
        wanted = solvers.ddpm_table(levels, variance_type=kind, clip_range=1.0)
        torch.testing.assert_close(found.coefficients, wanted.coefficients, rtol=1e-14, atol=0)
        assert torch.equal(found.noise_levels, wanted.noise_levels)


def levels_after(table: SolverTable, levels: NoiseLevels) -> list[tuple[float, float]]:
    """The level that each row ends at."""
    rows = [(row.alpha, row.sigma) for row in table.rows]
    return [*rows[1:], (float(levels.alpha[-1]), float(levels.sigma[-1]))]


def moments(table: SolverTable, mean: float, s2: float) -> list[tuple[float, float]]:
    """Of x after each row, with the best model of N(mean, s2), from the exact start."""
    first = table.rows[0]
    m, v = first.alpha * mean, first.alpha**2 * s2 + first.sigma**2
    found = []
    for row, c in zip(table.rows, table.coefficients.tolist(), strict=True):
        slope = row.alpha * s2 / (row.alpha**2 * s2 + row.sigma**2)
        gain = c[0] + c[2] * slope
        m = gain * m + c[2] * (1 - slope * row.alpha) * mean
        v = gain**2 * v + c[3] ** 2
        found.append((m, v))
    return found


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("path", ["vp", "ve", "flow"])
def test_every_row_keeps_the_marginals_where_ancestral_steps_are_exact(
    path: str, to_zero: bool
) -> None:
    """Of data at one point with "fixed_small", and of N(0, 1) with "fixed_large"."""
    levels = levels_on(path, geometric(12, 0.05, 30.0, to_zero=to_zero))
    worlds = [("fixed_small", 0.7, 0.0)]
    if path == "vp" and not to_zero:  # the last step to sigma = 0 has no noise
        worlds.append(("fixed_large", 0.0, 1.0))
    for kind, mean, s2 in worlds:
        table = solvers.repaint_table(
            levels, jump_length=3, num_resamples=4, variance_type=kind, prediction_type="sample"
        )
        assert len(table) > 12
        for (m, v), (alpha, sigma) in zip(
            moments(table, mean, s2), levels_after(table, levels), strict=True
        ):
            assert m == pytest.approx(alpha * mean, rel=1e-11, abs=1e-11)
            assert v == pytest.approx(alpha**2 * s2 + sigma**2, rel=1e-11, abs=1e-11)


def test_a_row_with_a_jump_is_the_step_and_then_the_jump() -> None:
    steps = 12
    d = diffcore.GaussianDiffusion(
        diffcore.make_betas("linear", 1000), prediction_type="v_prediction", clip_sample_range=0.6
    ).respace(steps, "trailing")
    table = solvers.repaint_table(
        numbered(steps), jump_length=3, num_resamples=2, prediction_type="v_prediction",
        clip_range=0.6,
    )  # fmt: skip
    x, m = torch.randn(2, 4, 5, dtype=torch.float64)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    times = [*table.timesteps.tolist(), -1]
    jumps = 0
    for i, (t, end) in enumerate(pairwise(times)):

        def step(x: Tensor, z: Tensor, t: int = t) -> Tensor:
            return d.p_sample(lambda x, t: m, x, t, noise=z)["sample"]

        plain = step(x, zero)
        first, second = step(x, one) - plain, zero
        if end >= t:
            jumps += 1
            plain = d.q_sample_jump(plain, t - 1, end, zero)
            first = d.q_sample_jump(first, t - 1, end, zero)
            second = d.q_sample_jump(zero, t - 1, end, one)
        found, _ = table.step(i, x, m, noise=zero)
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)
        c_z = table.step(i, x, m, noise=one)[0] - found
        torch.testing.assert_close(c_z, (first**2 + second**2).sqrt(), rtol=1e-10, atol=1e-10)
    assert jumps == 3


# ---- the known part of a Gaussian ----------------------------------------------------------------

RHO, KNOWN = 0.8, 1.3  # x_0 ~ N(0, [[1, RHO], [RHO, 1]]); the second number is known
CONDITIONAL = (RHO * KNOWN, 1 - RHO**2)


def inpainted(table: SolverTable) -> tuple[float, float]:
    """Mean and variance of the unknown number, from the loop's values: it is affine."""
    rows = len(table)
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)
    each = iter(table.rows)

    def model(x: Tensor, t: Tensor) -> Tensor:
        row = next(each)
        total = row.alpha**2 * covariance + row.sigma**2 * torch.eye(2, dtype=torch.float64)
        return x @ (row.alpha * torch.linalg.inv(total) @ covariance)

    # Sample 0 has no noise, each other sample one of the noises: x_T, steps, known.
    batch = 1 + 2 + 3 * rows
    start = torch.zeros(batch, 2, dtype=torch.float64)
    start[1, 0] = start[2, 1] = table.rows[0].sigma

    def noise(r: int, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z[3 + 2 * r, 0] = z[4 + 2 * r, 1] = 1
        return z

    def put_in(state: dict[str, Any]) -> Tensor:
        x = state["x"].clone()
        x[:, 1] = state["alpha"] * KNOWN
        x[3 + 2 * rows + state["i"], 1] += state["sigma"]
        return x

    found = diffcore.sample(model, start, table, noise=noise, before_model=put_in)[:, 0]
    return float(found[0]), float((found[1:] - found[0]).square().sum())


def test_resampling_brings_the_exact_conditional() -> None:
    levels = schedule_levels(50)
    options: dict[str, Any] = {"variance_type": "fixed_small", "prediction_type": "sample"}
    plain = inpainted(solvers.ddpm_table(levels, **options))
    errors = [math.dist(plain, CONDITIONAL)]
    for resamples in (3, 10):
        table = solvers.repaint_table(levels, jump_length=5, num_resamples=resamples, **options)
        errors.append(math.dist(inpainted(table), CONDITIONAL))
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


# ---- in a loop, and what is refused --------------------------------------------------------------


def test_it_samples_and_pickles() -> None:
    table = solvers.repaint_table(schedule_levels(20), jump_length=4, num_resamples=3)
    assert "stochastic" in repr(table)
    noise = PhiloxNoise(3)
    x = noise.tensor((2, 3, 4, 4))
    found = diffcore.sample(lambda x, t: 0.5 * x, x, table, noise=noise)
    again = pickle.loads(pickle.dumps(table))
    assert torch.equal(found, diffcore.sample(lambda x, t: 0.5 * x, x, again, noise=noise))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"jump_length": 0}, ValueError, "jump_length must be at least 1, got 0"),
        ({"num_resamples": 0}, ValueError, "num_resamples must be at least 1, got 0"),
        ({"jump_length": 2.5}, TypeError, "jump_length must be an int, got float"),
        (
            {"variance_type": "learned"},
            ValueError,
            "variance_type must be one of 'fixed_small', 'fixed_large' in a table with jumps, got",
        ),
        ({"variance_type": "large"}, ValueError, "variance_type must be one of"),
    ],
)
def test_what_is_refused(options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        solvers.repaint_table([3.0, 1.0, 0.0], **options)
