"""Sequences of noise levels under ComfyUI's names, against its formulas and published numbers."""

from __future__ import annotations

import math
import re

import mpmath
import numpy as np
import pytest
import torch

from diffcore import sigmas
from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels

LOW, HIGH = 0.0291671582, 14.6146412293
SD = NoiseSchedule.from_betas(make_betas("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012))
TABLE = (SD.sigma / SD.alpha).tolist()
COUNTS = [1, 2, 7, 20, 33]


def close(found: torch.Tensor, wanted: list[float], rel: float = 1e-13) -> None:
    assert found.dtype == torch.float64
    assert len(found) == len(wanted)
    for ours, theirs in zip(found.tolist(), wanted, strict=True):
        assert abs(ours - theirs) <= rel * abs(theirs)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize(("mu", "beta"), [(0.0, 0.5), (-0.7, 0.3)])
def test_laplace(n: int, mu: float, beta: float) -> None:
    expected = []
    for i in range(n):
        u = mpmath.mpf(i) / max(n - 1, 1)
        tail = mpmath.log(1 - 2 * abs(mpmath.mpf(0.5) - u) + mpmath.mpf(1e-5))
        level = mpmath.exp(mu - beta * mpmath.sign(mpmath.mpf(0.5) - u) * tail)
        expected.append(float(min(max(level, LOW), HIGH)))
    close(sigmas.get_sigmas_laplace(n, LOW, HIGH, mu, beta), [*expected, 0.0])


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize(("low", "high"), [(LOW, HIGH), (1e-4, 1e6)])
def test_kl_optimal(n: int, low: float, high: float) -> None:
    with mpmath.workdps(40):
        ends = mpmath.atan(mpmath.mpf(low)), mpmath.atan(mpmath.mpf(high))
        ramp = [mpmath.mpf(i) / max(n - 1, 1) for i in range(n)]
        expected = [float(mpmath.tan(r * ends[0] + (1 - r) * ends[1])) for r in ramp]
    close(sigmas.get_sigmas_kl_optimal(n, low, high), [*expected, 0.0])


def mochi(steps: int, threshold: float, linear: int) -> list[float]:
    """The coefficients as Mochi's script names them."""
    difference = linear - threshold * steps
    quadratic = steps - linear
    a = difference / (linear * quadratic**2)
    b = threshold / linear - 2 * difference / quadratic**2
    done = [i * threshold / linear for i in range(linear)]
    done += [a * i**2 + b * i + a * linear**2 for i in range(linear, steps)]
    return [1 - d for d in [*done, 1.0]]


@pytest.mark.parametrize(("n", "linear"), [(2, None), (7, None), (20, None), (64, 10), (9, 8)])
@pytest.mark.parametrize("threshold", [0.025, 0.1])
def test_linear_quadratic(n: int, linear: int | None, threshold: float) -> None:
    found = sigmas.get_sigmas_linear_quadratic(n, threshold_noise=threshold, linear_steps=linear)
    expected = mochi(n, threshold, n // 2 if linear is None else linear)
    assert np.abs(np.array(expected) - found.numpy()).max() <= 1e-14
    twice = sigmas.get_sigmas_linear_quadratic(
        n, threshold_noise=threshold, linear_steps=linear, sigma_max=2.0
    )
    assert torch.equal(twice, 2 * found)
    NoiseLevels.from_flow(found)
    assert sigmas.get_sigmas_linear_quadratic(1, sigma_max=3.0).tolist() == [3.0, 0.0]


def test_ays_of_ten_steps_are_the_published_numbers() -> None:
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    for model, name in (("sd15", ""), ("sdxl", "XL"), ("svd", "Video")):
        published = utils.AysSchedules[f"StableDiffusion{name}Sigmas"]
        assert sigmas.get_sigmas_ays(10, model).tolist() == published
    assert sigmas.get_sigmas_ays(10, "deepfloyd").tolist() == [
        *[160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030], 0.0
    ]  # fmt: skip


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("model", ["sd15", "sdxl", "svd", "deepfloyd"])
def test_ays_of_any_number_of_steps_is_interpolated_log_linearly(n: int, model: str) -> None:
    known = sigmas.AYS_SIGMAS[model]
    logs = np.log(np.array(known[::-1]))
    places = np.linspace(0, 1, n + 1)
    expected = np.exp(np.interp(places, np.linspace(0, 1, len(known)), logs))[::-1]
    close(sigmas.get_sigmas_ays(n, model), [*expected[:-1].tolist(), 0.0])


@pytest.mark.parametrize("n", COUNTS)
def test_simple(n: int) -> None:
    expected = [TABLE[-(1 + int(i * (1000 / n)))] for i in range(n)]
    assert sigmas.get_sigmas_simple(SD, n).tolist() == [*expected, 0.0]
    levels = NoiseLevels.from_schedule(SD, sigmas=sigmas.get_sigmas_simple(SD, n))
    times = torch.tensor([999.0 - int(i * (1000 / n)) for i in range(n)], dtype=torch.float64)
    assert (levels.timesteps - times).abs().max() < 1e-9


@pytest.mark.parametrize("n", COUNTS)
def test_ddim_uniform(n: int) -> None:
    expected = [0.0, *TABLE[1 :: 1000 // n]][::-1]
    assert sigmas.get_sigmas_ddim_uniform(SD, n).tolist() == expected
    assert len(expected) == (n if 1000 % n == 0 else math.ceil(999 / (1000 // n))) + 1


@pytest.mark.parametrize("n", COUNTS)
def test_sgm_uniform(n: int) -> None:
    times = np.linspace(999, 0, n + 1)[:-1]
    expected = np.exp(np.interp(times, np.arange(1000), np.log(TABLE)))
    found = sigmas.get_sigmas_sgm_uniform(SD, n)
    close(found, [*expected.tolist(), 0.0], 1e-12)
    levels = NoiseLevels.from_schedule(SD, sigmas=found)
    assert (levels.timesteps - torch.from_numpy(times)).abs().max() < 1e-8


def test_levels_of_a_rectified_flow() -> None:
    flow = NoiseSchedule.rectified_flow(1000)
    assert sigmas.get_sigmas_simple(flow, 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sigmas.get_sigmas_ddim_uniform(flow, 4).tolist() == [0.752, 0.502, 0.252, 0.002, 0.0]
    # ComfyUI: n of n + 1 levels from 1 to sigma_1, then shifted.
    for n, shift in ((1, 1.0), (5, 3.0)):
        low = shift * 0.001 / (1 + (shift - 1) * 0.001)
        plain = np.linspace(1, low, n + 1)[:-1]
        expected = shift * plain / (1 + (shift - 1) * plain)
        found = sigmas.get_sigmas_flow(n, shift=shift, sigma_min=(1 + (n - 1) * low) / n)
        close(found, [*expected.tolist(), 0.0])


def test_one_level_of_each() -> None:
    one = NoiseSchedule(torch.tensor([0.6]), torch.tensor([0.8]))
    for make in (sigmas.get_sigmas_simple, sigmas.get_sigmas_sgm_uniform):
        found = make(one, 1).tolist()
        assert found[0] == pytest.approx(0.8 / 0.6, rel=1e-7)
        assert found[1:] == [0.0]


REFUSALS = {
    "laplace": (lambda: sigmas.get_sigmas_laplace(3, 0.1, 1.0, beta=0.0), "beta must be above 0"),
    "kl": (lambda: sigmas.get_sigmas_kl_optimal(3, 2.0, 1.0), "sigma_min must be above 0"),
    "threshold": (
        lambda: sigmas.get_sigmas_linear_quadratic(4, threshold_noise=1.0),
        "threshold_noise must lie in (0, 1), got 1.0",
    ),
    "linear": (
        lambda: sigmas.get_sigmas_linear_quadratic(4, linear_steps=4),
        "linear_steps must be in 1 .. n - 1 = 3, got 4",
    ),
    "rising": (
        lambda: sigmas.get_sigmas_linear_quadratic(8, threshold_noise=0.9, linear_steps=1),
        "threshold_noise must leave levels that fall, got 0.9 in 1 of 8 steps",
    ),
    "model": (lambda: sigmas.get_sigmas_ays(10, "sd3"), "model must be one of 'sd15', 'sdxl'"),
    "count": (lambda: sigmas.get_sigmas_simple(SD, 1001), "n must be at most T = 1000, got 1001"),
    "flow": (
        lambda: sigmas.get_sigmas_sgm_uniform(NoiseSchedule.rectified_flow(9), 2),
        "schedule must not be a rectified flow for get_sigmas_sgm_uniform",
    ),
    "infinite": (
        lambda: sigmas.get_sigmas_simple(NoiseSchedule([0.6, 0.0], [0.8, 1.2]), 2),
        "schedule must have alpha above 0 at every timestep, got alpha = 0",
    ),
    "short": (
        lambda: sigmas.get_sigmas_ddim_uniform(NoiseSchedule([0.6], [0.8]), 1),
        "schedule must have at least 2 timesteps, got 1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()
    with pytest.raises(TypeError, match=r"^schedule must be a NoiseSchedule, got Tensor"):
        sigmas.get_sigmas_simple(torch.ones(3), 2)
