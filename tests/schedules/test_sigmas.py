"""Sequences of noise levels, timestep spacings, and shifts."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch

from diffcore import sigmas, spacings
from diffcore.schedules import NoiseSchedule, make_betas, respaced_timesteps

LOW, HIGH = 0.03, 14.6


def digits(expected: list[mpmath.mpf], got: torch.Tensor) -> None:
    assert got.dtype == torch.float64
    assert got[-1] == 0
    assert len(got) == len(expected) + 1
    for truth, value in zip(expected, got.tolist(), strict=False):
        assert abs(value - truth) <= 4e-15 * abs(truth)


@pytest.fixture(autouse=True)
def _precise():
    with mpmath.workdps(40):
        yield


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("rho", [1.0, 3.5, 7.0])
def test_karras(n, rho):
    ends = mpmath.mpf(HIGH) ** (1 / mpmath.mpf(rho)), mpmath.mpf(LOW) ** (1 / mpmath.mpf(rho))
    ramp = [mpmath.mpf(i) / max(n - 1, 1) for i in range(n)]
    expected = [(ends[0] + r * (ends[1] - ends[0])) ** rho for r in ramp]
    digits(expected, sigmas.get_sigmas_karras(n, LOW, HIGH, rho))


def test_karras_of_any_rho():
    geometric = sigmas.get_sigmas_exponential(7, LOW, HIGH)
    assert torch.equal(sigmas.get_sigmas_karras(7, LOW, HIGH, math.inf), geometric)
    near = sigmas.get_sigmas_karras(7, LOW, HIGH, 1e12)
    torch.testing.assert_close(near, geometric, rtol=1e-9, atol=0)
    # sigma_max^(1 / rho) is not a number that float64 can hold.
    steep = sigmas.get_sigmas_karras(3, 0.1, 10.0, 1e-3)
    torch.testing.assert_close(steep[1], torch.tensor(10 * 0.5**1e-3, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("rho", [1.0, 2.0, 0.5])
def test_polyexponential_and_its_case_exponential(n, rho):
    low, high = mpmath.log(LOW), mpmath.log(HIGH)
    ramp = [(1 - mpmath.mpf(i) / max(n - 1, 1)) ** rho for i in range(n)]
    expected = [mpmath.exp(low + r * (high - low)) for r in ramp]
    digits(expected, sigmas.get_sigmas_polyexponential(n, LOW, HIGH, rho))
    if rho == 1:
        digits(expected, sigmas.get_sigmas_exponential(n, LOW, HIGH))
        digits(expected, sigmas.get_sigmas_lu(n, LOW, HIGH))


def test_vp():
    times = [1 + mpmath.mpf(i) / 9 * (mpmath.mpf(1e-3) - 1) for i in range(10)]
    beta_d, beta_min = mpmath.mpf(19.9), mpmath.mpf(0.1)
    expected = [mpmath.sqrt(mpmath.exp(beta_d * t * t / 2 + beta_min * t) - 1) for t in times]
    got = sigmas.get_sigmas_vp(10)
    assert abs(got[0] / float(expected[0]) - 1) < 1e-14
    digits(expected[-1:], got[-2:])


_BETAS = [(0.6, 0.6), (0.5, 0.9), (2, 3), (1, 1), (0.3, 5), (30, 30), (2, 150), (1000, 900)]


@pytest.mark.parametrize(("a", "b"), _BETAS)
def test_beta(a, b):
    stats = pytest.importorskip("scipy.stats")
    got = sigmas.get_sigmas_beta(12, LOW, HIGH, a, b)
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, 12), a, b)
    expected = LOW + quantiles * (HIGH - LOW)
    assert np.abs(got[:-1].numpy() - expected).max() <= 1e-12
    assert got[0] == HIGH
    assert got[-2] == LOW


@pytest.mark.parametrize("n", [3, 11])
@pytest.mark.parametrize("shape", [0.6, 0.35, 1.0, 4.0])
def test_beta_of_an_odd_number_has_the_mean_in_the_middle(n, shape):
    # A symmetric distribution: p = 1/2, where rounding decides on which side the search is.
    middle = sigmas.get_sigmas_beta(n, LOW, HIGH, shape, shape)[n // 2]
    assert math.isclose(middle, (LOW + HIGH) / 2, rel_tol=1e-14)


def test_the_ends_are_those_asked_for_and_the_rest_falls():
    for make in (
        sigmas.get_sigmas_karras,
        sigmas.get_sigmas_exponential,
        sigmas.get_sigmas_polyexponential,
        sigmas.get_sigmas_lu,
        sigmas.get_sigmas_beta,
    ):
        for n in (1, 2, 30):
            got = make(n, LOW, HIGH)
            assert got[0] == HIGH
            assert n == 1 or got[-2] == LOW
            assert bool((got[1:] < got[:-1]).all())
            assert got.device == torch.device("cpu")


@pytest.mark.parametrize("n", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow(n, shift):
    plain = [1 - mpmath.mpf(i) / n for i in range(n)]
    digits(
        [shift * s / (1 + (shift - 1) * s) for s in plain], sigmas.get_sigmas_flow(n, shift=shift)
    )


def test_shifting_twice_is_shifting_by_the_square():
    levels = sigmas.get_sigmas_flow(9)
    once = spacings.shift_sigmas(levels, 3.0)
    torch.testing.assert_close(
        spacings.shift_sigmas(once, 3.0), spacings.shift_sigmas(levels, 9.0), rtol=1e-15, atol=0
    )
    assert once[0] == 1
    assert once[-1] == 0
    torch.testing.assert_close(spacings.time_shift(levels, math.log(3.0)), once, rtol=1e-15, atol=0)
    torch.testing.assert_close(spacings.time_shift(levels, 3.0, "linear"), once, rtol=1e-15, atol=0)


def test_dynamic_shift_is_a_line_through_two_sizes():
    assert spacings.dynamic_shift_mu(256) == 0.5
    assert math.isclose(spacings.dynamic_shift_mu(4096), 1.15)
    assert math.isclose(spacings.dynamic_shift_mu(2176), 0.825)


def test_stretching_ends_at_the_terminal():
    levels = sigmas.get_sigmas_flow(9, shift=2.0)[:-1]
    stretched = spacings.stretch_to_terminal(levels, 0.1)
    assert math.isclose(stretched[-1], 0.1, rel_tol=1e-14)
    assert stretched[0] == 1


@pytest.mark.parametrize("total", [1000, 1100, 37])
@pytest.mark.parametrize("steps", [1, 2, 10, 16, 30])
def test_spacings_are_those_of_diffusers(total, steps):
    def spaced(spacing, **options):
        return spacings.spaced_timesteps(total, steps, spacing, **options)

    if steps > 1:
        linspace = np.linspace(0, total - 1, steps)[::-1]
        assert np.abs(spaced("linspace").numpy() - linspace).max() <= 1e-12 * total
    dropped = np.linspace(0, total - 1, steps + 1).round()[::-1][:-1]
    assert spaced("linspace", drop_last=True).round().tolist() == dropped.tolist()
    leading = (np.arange(steps) * (total // steps))[::-1] + 1
    assert spaced("leading", steps_offset=1).tolist() == leading.tolist()
    dropped = (np.arange(steps + 1) * (total // (steps + 1)))[::-1][:-1]
    assert spaced("leading", drop_last=True).tolist() == dropped.tolist()
    trailing = np.array([total - i * total / steps for i in range(steps)]).round() - 1
    assert spaced("trailing").tolist() == trailing.tolist()
    assert spaced("trailing", drop_last=True).tolist() == trailing.tolist()
    for spacing in ("leading", "linspace"):  # trailing rounds ties from the other side
        assert spaced(spacing).round().tolist() == respaced_timesteps(total, steps, spacing)


def test_a_clipped_schedule_starts_where_lambda_allows():
    cosine = NoiseSchedule.from_betas(make_betas("squaredcos_cap_v2", 1000))
    last = spacings.clipped_length(cosine, -5.1)
    assert 900 < last < 1000
    assert cosine.log_snr[last - 1] / 2 >= -5.1 > cosine.log_snr[last] / 2
    visited = spacings.spaced_timesteps(1000, 10, drop_last=True, last_timestep=last)
    assert visited[0] == last - 1
    assert spacings.clipped_length(cosine, -math.inf) == 1000


def test_timesteps_and_sigmas_of_a_schedule_invert_each_other():
    schedule = NoiseSchedule.from_betas(make_betas("linear", 1000))
    ratio = schedule.sigma / schedule.alpha
    visited = torch.tensor([0.0, 0.25, 17.0, 500.5, 999.0], dtype=torch.float64)
    between = spacings.timesteps_to_sigmas(schedule, visited)
    assert between[0] == ratio[0]
    assert between[2] == ratio[17]
    assert between[4] == ratio[999]
    torch.testing.assert_close(between[3], (ratio[500] + ratio[501]) / 2, rtol=1e-15, atol=0)
    assert spacings.sigmas_to_timesteps(schedule, ratio).tolist() == list(range(1000))
    middle = (ratio[7] * ratio[8]).sqrt().reshape(1)
    torch.testing.assert_close(
        spacings.sigmas_to_timesteps(schedule, middle), torch.tensor([7.5]).double()
    )
    beyond = torch.tensor([1e-9, 1e9])
    assert spacings.sigmas_to_timesteps(schedule, beyond).tolist() == [0, 999]


def test_timesteps_of_a_schedule_of_one():
    schedule = NoiseSchedule.from_betas(torch.tensor([0.5]))
    assert spacings.sigmas_to_timesteps(schedule, torch.tensor([0.1, 5.0])).tolist() == [0, 0]
    assert len(spacings.timesteps_to_sigmas(schedule, torch.tensor([0.0]))) == 1


def test_terminal_noise_without_signal():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.6, 0.0]), torch.tensor([0.1, 0.8, 1.0]))
    assert spacings.timesteps_to_sigmas(schedule, torch.tensor([2.0]))[0] == math.inf
    assert spacings.sigmas_to_timesteps(schedule, torch.tensor([math.inf]))[0] == 2
    with pytest.raises(ValueError, match="alpha"):
        spacings.timesteps_to_sigmas(schedule, torch.tensor([1.5]))


# ---- refusals ----------------------------------------------------------------------------------

REFUSED = {
    "n-0": (lambda: sigmas.get_sigmas_karras(0, LOW, HIGH), ValueError, "n must be at least 1"),
    "n-float": (lambda: sigmas.get_sigmas_vp(2.0), TypeError, "n must be an int"),
    "sigma_min-0": (lambda: sigmas.get_sigmas_karras(5, 0.0, 1.0), ValueError, "sigma_min=0"),
    "sigma_min-large": (lambda: sigmas.get_sigmas_beta(5, 2.0, 1.0), ValueError, "sigma_max=1"),
    "sigma_max-inf": (
        lambda: sigmas.get_sigmas_exponential(5, 1.0, math.inf),
        ValueError,
        "sigma_max=inf",
    ),
    "rho": (lambda: sigmas.get_sigmas_karras(5, LOW, HIGH, 0.0), ValueError, "rho"),
    "rho-poly": (lambda: sigmas.get_sigmas_polyexponential(5, LOW, HIGH, -1), ValueError, "rho"),
    "beta": (
        lambda: sigmas.get_sigmas_beta(5, LOW, HIGH, 0.0),
        ValueError,
        "alpha must be above",
    ),
    "eps_s": (lambda: sigmas.get_sigmas_vp(5, eps_s=0.0), ValueError, "eps_s"),
    "flow-min": (lambda: sigmas.get_sigmas_flow(5, sigma_min=0.0), ValueError, "sigma_min"),
    "shift": (lambda: sigmas.get_sigmas_flow(5, shift=0.0), ValueError, "shift"),
    "shift-type": (
        lambda: spacings.time_shift(torch.ones(1), 1.0, "cubic"),
        ValueError,
        "time_shift_type",
    ),
    "mu": (lambda: spacings.dynamic_shift_mu(1, 5, 5), ValueError, "base_image_seq_len"),
    "terminal": (
        lambda: spacings.stretch_to_terminal(torch.ones(2), 1.0),
        ValueError,
        "shift_terminal",
    ),
    "terminal-1": (
        lambda: spacings.stretch_to_terminal(torch.ones(2), 0.5),
        ValueError,
        "sigmas must end below 1",
    ),
    "spacing": (
        lambda: spacings.spaced_timesteps(10, 2, "odd"),
        ValueError,
        "^spacing must be one of",
    ),
    "steps": (
        lambda: spacings.spaced_timesteps(10, 11),
        ValueError,
        "num_steps must be at most",
    ),
    "steps-drop": (
        lambda: spacings.spaced_timesteps(10, 10, drop_last=True),
        ValueError,
        "num_steps must be at most 9",
    ),
    "offset": (
        lambda: spacings.spaced_timesteps(10, 10, "leading", steps_offset=1),
        ValueError,
        "steps_offset must keep .* 0 .. 9, got 1",
    ),
    "lambda": (
        lambda: spacings.clipped_length(NoiseSchedule.rectified_flow(4), math.inf),
        ValueError,
        "lambda_min_clipped",
    ),
    "timestep": (
        lambda: spacings.timesteps_to_sigmas(NoiseSchedule.rectified_flow(4), torch.tensor([3.5])),
        ValueError,
        "timesteps must lie in 0 .. 3",
    ),
    "sigma": (
        lambda: spacings.sigmas_to_timesteps(NoiseSchedule.rectified_flow(4), torch.zeros(1)),
        ValueError,
        "sigmas must be above 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
