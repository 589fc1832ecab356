"""Noise of one Brownian path: its law, its consistency, and what SDE solvers make of it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, sampling, solvers
from diffcore.sampling import BrownianNoise
from diffcore.sigmas import get_sigmas_exponential
from support.bounds import assert_same_bits
from support.solver_list import geometric, levels_on
from support.solver_world import MEAN, gain

KEY = PhiloxNoise(7, sample_ids=3)
LIKE = torch.empty(2, 500, dtype=torch.float64)
TIMES = [0.0, 0.1, 0.125, 1 / 3, 0.5, 0.7071, 1 - 2**-30, 1.0]


def test_increments_are_additive_and_have_no_memory() -> None:
    path = BrownianNoise(KEY)
    whole = path.increment(0.0, 1.0, LIKE)
    parts = [path.increment(a, b, LIKE) for a, b in pairwise(TIMES)]
    assert (sum(parts) - whole).abs().max() < 1e-14
    for a in TIMES:
        for b in TIMES:
            back = path.increment(b, a, LIKE)
            assert (path.increment(a, b, LIKE) + back).abs().max() < 1e-14
    assert_same_bits(BrownianNoise(KEY).increment(0.1, 0.125, LIKE), parts[1])
    assert path.increment(0.3, 0.3, LIKE).abs().max() == 0


def test_the_formula_of_levy() -> None:
    # By halves from the ends inwards, a node at a time: no sum over hats.
    depth = 5
    key = KEY.at(4)
    ends = {0.0: torch.zeros_like(LIKE), 1.0: key.at(5).tensor(LIKE.shape, dtype=torch.float64)}
    for d in range(depth):
        width = 2.0**-d
        for k in range(2**d):
            z = key.at(4 + 1 + 2**d + k).tensor(LIKE.shape, dtype=torch.float64)
            left, right = ends[k * width], ends[(k + 1) * width]
            ends[(k + 0.5) * width] = (left + right) / 2 + math.sqrt(width) / 2 * z
    path = BrownianNoise(key, depth=depth)
    for time, value in ends.items():
        assert (path.increment(0.0, time, LIKE) - value).abs().max() < 1e-14
    step = 2.0**-depth
    line = (ends[3 * step] + ends[4 * step]) / 2
    assert (path.increment(0.0, 3.5 * step, LIKE) - line).abs().max() < 1e-14


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.3, 0.31), (0.0, 0.62), (0.49, 0.52)])
def test_variance_and_independence_of_increments(ends: tuple[float, float]) -> None:
    like = torch.empty(1, 200_000)
    path = BrownianNoise(PhiloxNoise(11))
    a, b = ends
    w = path.increment(a, b, like).double()
    error = 5 * math.sqrt(2 / like.numel())  # five standard deviations of a sample variance
    assert abs(float(w.square().mean()) / (b - a) - 1) < error
    assert abs(float(w.mean())) < 5 * math.sqrt((b - a) / like.numel())
    # Exactly: the weights of two increments that do not overlap are orthogonal.
    for other in ((b, min(b + 0.2, 1.0)), (max(a - 0.2, 0.0), a)):
        both = path._weights(a, b), path._weights(*other)
        inner = sum(v * both[1].get(k, 0.0) for k, v in both[0].items())
        assert abs(inner) < 2 * 2.0**-24
        assert abs(sum(v * v for v in both[0].values()) - (b - a)) < 2 * 2.0**-24


def test_noise_of_an_interval_is_standard_normal_and_of_the_samples() -> None:
    path = BrownianNoise(PhiloxNoise(5))
    for sigma, after in ((80.0, 60.0), (1.0, 0.999), (0.02, 0.0), (math.inf, 700.0)):
        weights = path._weights(1 / (1 + sigma), 1 / (1 + after))
        z = path.between(sigma, after, torch.empty(1, 100_000))
        assert abs(float(z.var()) - 1) < 0.025
        size = math.sqrt(sum(w * w for w in weights.values()))
        wide = torch.empty(1, 100_000, dtype=torch.float64)
        scaled = path.increment(1 / (1 + sigma), 1 / (1 + after), wide) / size
        assert (z - scaled).abs().max() < 1e-5
    half = path.between(3.0, 1.0, torch.empty(2, 4, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    full = path.between(3.0, 1.0, torch.empty(2, 4))
    assert (half.float() - full).abs().max() < 0.02
    # Sample ids and seeds: the path of a sample is its own in any batch.
    like = torch.empty(4, 6)
    every = path.between(3.0, 1.0, like)
    one = BrownianNoise(PhiloxNoise(5, sample_ids=2)).between(3.0, 1.0, like[:1])
    assert_same_bits(one, every[2:3])


def model(table: solvers.SolverTable):
    rows = iter(table.rows)

    def best(x: Tensor, t: Tensor) -> Tensor:
        row = next(rows)
        slope = gain(row.alpha, row.sigma)
        return torch.tanh(MEAN + slope * (x - row.alpha * MEAN))

    return best


SDES = {
    "ddpm": solvers.ddpm_table,
    "euler_ancestral": solvers.euler_ancestral_table,
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde_table,
    "seeds_2": solvers.seeds_2_table,
    "er_sde": solvers.er_sde_table,
}


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize("name", SDES)
def test_samples_converge_pathwise_as_steps_get_shorter(name: str, path: str) -> None:
    found = []
    for steps in (16, 32, 64, 128):
        levels = levels_on(path, geometric(steps, 0.05, 20.0))
        table = SDES[name](levels, prediction_type="sample")
        x = table.init_noise_sigma * KEY.tensor((1, 200), dtype=torch.float64)
        noise = BrownianNoise(KEY).for_table(table)
        found.append(diffcore.sample(model(table), x, table, noise=noise))
    gaps = [float((a - b).square().mean().sqrt()) for a, b in pairwise(found)]
    rates = [math.log2(a / b) for a, b in pairwise(gaps)]
    # The strong order is 1 but for the inner noise of a step, which is of order 1/2 or more.
    assert min(rates) > 0.4
    assert gaps[-1] < 0.2 * float(found[-1].std())


def test_two_orders_of_one_equation_agree_on_one_path() -> None:
    levels = levels_on("ve", geometric(200, 0.05, 20.0))
    ends = []
    for make in (solvers.ddpm_table, solvers.dpmpp_2m_sde_table):
        table = make(levels, prediction_type="sample")
        x = table.init_noise_sigma * KEY.tensor((1, 200), dtype=torch.float64)
        noise = BrownianNoise(KEY).for_table(table)
        ends.append(diffcore.sample(model(table), x, table, noise=noise))
    assert (ends[0] - ends[1]).abs().max() < 0.1
    other = diffcore.sample(model(table), x, table, noise=BrownianNoise(PhiloxNoise(8)).for_table(
        table))  # fmt: skip
    assert (other - ends[1]).abs().max() > 0.5


def test_k_diffusions_samplers_take_it() -> None:
    sigmas = get_sigmas_exponential(9, 0.1, 10.0)
    x = 10 * KEY.tensor((2, 5), dtype=torch.float64)
    path = BrownianNoise(KEY)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x / (1 + sigma[:, None]))

    found = sampling.sample_dpmpp_sde(
        denoiser, x, sigmas, disable=True, noise_sampler=path.sampler(x)
    )
    table = solvers.dpmpp_sde_table(sigmas, prediction_type="sample")
    wanted = diffcore.sample(denoiser, x, table, noise=path.for_table(table))
    assert_same_bits(found, wanted)


def test_what_is_refused() -> None:
    path = BrownianNoise(KEY, depth=3)
    assert repr(path) == f"BrownianNoise({KEY!r}, depth=3)"
    assert (path.key, path.depth) == (KEY, 3)
    sigmas = [4.0, 2.0, 1.0, 0.0]
    for call, error, message in (
        (lambda: BrownianNoise(7), TypeError, "^key must be a PhiloxNoise, got int"),
        (lambda: BrownianNoise(KEY, depth=31), ValueError, "^depth must be at most 30, got 31"),
        (lambda: path.increment(0.0, 1.5, LIKE), ValueError, r"^end must lie in \[0, 1\], got 1.5"),
        (lambda: path.between(1.0, -1.0, LIKE), ValueError, "^sigma_next must be at least 0"),
        (lambda: path.between(1.0, 1.0, LIKE), ValueError, "^sigma_next must differ from sigma"),
        (lambda: path.for_table(sigmas), TypeError, "^table must be a SolverTable, got list"),
        (lambda: path.sampler(3), TypeError, "^x must be a torch.Tensor, got int"),
        (
            lambda: path.for_table(solvers.euler_table(sigmas, s_churn=3.0)),
            ValueError,
            "^table must add noise on steps down only, got euler, whose row 0 goes from",
        ),
        (
            lambda: path.for_table(solvers.euler_table(sigmas, s_churn=3.0, s_tmin=3.0)),
            ValueError,
            "^table must not raise the start by churn, got euler",
        ),
        (
            lambda: path.for_table(solvers.repaint_table(sigmas, jump_length=1)),
            ValueError,
            "^table must add noise on steps down only, got repaint, whose row 0 goes from",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
