"""Steps of a flow with a density: the papers' formulas, marginals, and eta = 0."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, ops, solvers
from diffcore.sigmas import get_sigmas_flow

KINDS = ("flow_grpo", "dance_grpo", "cps")
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)
each_kind = pytest.mark.parametrize("kind", KINDS)


def as_published(kind: str, a: float, x: Tensor, m: Tensor, i: int) -> tuple[Tensor, float]:
    """Mean and deviation of step i, in the papers' own terms."""
    sigma, after = SIGMAS[i].item(), SIGMAS[i + 1].item()
    dt = after - sigma
    if kind == "flow_grpo":
        s = a * math.sqrt(sigma / (1 - (SIGMAS[1].item() if sigma == 1 else sigma)))
        mean = x * (1 + s**2 / (2 * sigma) * dt) + m * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * math.sqrt(-dt)
    x0 = x - sigma * m
    if kind == "dance_grpo":
        score = -(x - (1 - sigma) * x0) / sigma**2
        return x + dt * (m - 0.5 * a**2 * score), a * math.sqrt(-dt)
    noise = x + (1 - sigma) * m
    deviation = after * math.sin(a * math.pi / 2)
    return (1 - after) * x0 + math.sqrt(after**2 - deviation**2) * noise, deviation


@each_kind
@pytest.mark.parametrize("prediction_type", ["flow_prediction", "sample"])
def test_the_rows_are_the_papers(kind: str, prediction_type: str) -> None:
    table = solvers.flow_sde_table(SIGMAS, kind=kind, eta=0.6, prediction_type=prediction_type)
    x, v, z = torch.randn(3, 4, 5, dtype=torch.float64)
    for i in range(5):
        m = v if prediction_type == "flow_prediction" else x - SIGMAS[i] * v
        mean, deviation = as_published(kind, 0.6, x, v, i)
        found, _ = table.step(i, x, m, noise=z if deviation else None)
        torch.testing.assert_close(found, mean + deviation * z)
        scored = ops.step_log_prob(x, m, found, table.rows[i].coefficients)
        if deviation:
            normal = torch.distributions.Normal(mean, deviation)
            torch.testing.assert_close(scored, normal.log_prob(found).sum(1))
        else:
            assert (scored == 0).all()


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_noise_it_is_euler_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    table, euler = (
        solvers.flow_sde_table(SIGMAS, kind=kind, eta=0),
        solvers.flow_euler_table(SIGMAS),
    )
    assert not table.stochastic
    x, m = torch.randn(2, 4, 5).to(dtype)
    for i in range(5):
        assert torch.equal(table.step(i, x, m)[0], euler.step(i, x, m)[0])


@each_kind
def test_marginals_are_those_of_the_flow(kind: str) -> None:
    """The mean is exact; half the step, half the error of the deviation.

    "cps" replaces the same part of the noise in every step, however short: there the part falls
    with the length of a step, as it does in the others.
    """
    mean, std = 0.8, 0.4  # of the data

    def moments(steps: int, stop: float) -> tuple[float, float]:
        """Exact mean and deviation at sigma = stop: every step is linear in x."""
        sigmas = torch.linspace(0.95, stop, steps + 1, dtype=torch.float64)
        eta = {"flow_grpo": 0.7, "dance_grpo": 0.5, "cps": 1.5 / math.sqrt(steps)}[kind]
        table = solvers.flow_sde_table(sigmas, kind=kind, eta=eta, prediction_type="sample")
        found, variance = 0.05 * mean, (0.05 * std) ** 2 + 0.95**2
        for row, sigma in zip(table.rows, sigmas.tolist(), strict=False):
            c_x, _, c_0, c_z = row.coefficients[:4]
            alpha = 1 - sigma
            gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)  # of the best denoiser
            factor = c_x + c_0 * gain
            found = factor * found + c_0 * (mean - gain * alpha * mean)
            variance = factor**2 * variance + c_z**2
        return found, math.sqrt(variance)

    stop = 0.2
    exact = (1 - stop) * mean, math.hypot((1 - stop) * std, stop)
    found = [moments(steps, stop) for steps in (200, 400, 800)]
    assert all(abs(m - exact[0]) < 1e-13 for m, _ in found)
    errors = [abs(s - exact[1]) for _, s in found]
    for before, after in pairwise(errors):
        assert after < 0.55 * before
    assert errors[-1] < 2e-3


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_ratio_of_a_policy_to_itself_is_one(kind: str, dtype: torch.dtype) -> None:
    table = solvers.flow_sde_table(get_sigmas_flow(10), kind=kind)
    x, m = (torch.randn(4, 3, 8, 8).to(dtype) for _ in range(2))
    key = PhiloxNoise(3)
    for i, row in enumerate(table.rows[:-1]):
        after, old = ops.reverse_step(x, m, row.coefficients, noise=key.at(i), return_log_prob=True)
        new = ops.step_log_prob(x, m, after, row.coefficients)
        assert torch.equal((new - old).exp(), torch.ones(4))


def test_a_loop_and_its_log_probabilities() -> None:
    table = solvers.flow_sde_table(SIGMAS, eta=0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    found = diffcore.sample(lambda x, t: 0.3 * x, x, table, noise=PhiloxNoise(1))
    for i in range(5):
        x, _ = table.step(i, x, 0.3 * x, noise=PhiloxNoise(1).at(1 + i))
    assert torch.equal(found, x)
    assert table.timesteps.tolist() == pytest.approx([1000, 900, 700, 400, 100])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "grpo"}, ValueError, "kind must be one of 'flow_grpo', 'dance_grpo', 'cps'"),
        ({"eta": -0.1}, ValueError, "eta must be at least 0 and finite, got -0.1"),
        ({"eta": 1.5, "kind": "cps"}, ValueError, r"eta must be in \[0, 1\] for kind='cps'"),
        ({"eta": "x"}, TypeError, "eta must be a number, got str"),
    ],
)
def test_wrong_arguments(options: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        solvers.flow_sde_table(SIGMAS, **options)  # type: ignore[arg-type]


def test_levels_of_another_path() -> None:
    levels = solvers.NoiseLevels.from_sigmas([3.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="sigmas must be on the path 'flow'"):
        solvers.flow_sde_table(levels)
