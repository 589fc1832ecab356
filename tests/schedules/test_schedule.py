"""Schedules against their closed forms, in 50 digits where a difference would lose some."""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcore.losses import min_snr_weights
from diffcore.schedules import (
    BETA_SCHEDULES,
    NoiseSchedule,
    betas_for_alpha_bar,
    betas_from_alphas_cumprod,
    make_betas,
    rescale_zero_terminal_snr,
    respaced_timesteps,
)

EPS = torch.finfo(torch.float64).eps
schedules = pytest.mark.parametrize("name", BETA_SCHEDULES)


def close(actual, expected, ulps):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=ulps * EPS, atol=0)


def test_linear():
    t = torch.arange(1000, dtype=torch.float64) / 999
    close(make_betas("linear", 1000), 1e-4 + (0.02 - 1e-4) * t, 4)
    close(make_betas("linear", 1), [1e-4], 0)
    close(make_betas("linear", 3, beta_start=0.1, beta_end=0.3), [0.1, 0.2, 0.3], 2)


def test_scaled_linear():
    betas = make_betas("scaled_linear", 3, beta_start=0.04, beta_end=0.36)
    close(betas, [0.04, 0.16, 0.36], 8)


def test_sigmoid():
    betas = make_betas("sigmoid", 3, beta_start=0.1, beta_end=0.3)
    low = 1 / (1 + math.exp(6))
    close(betas, [0.1 + 0.2 * low, 0.2, 0.3 - 0.2 * low], 8)


@pytest.mark.parametrize("count", [1, 2, 37, 1000])
def test_squared_cosine_against_50_digits(count):
    with mpmath.workdps(50):

        def bar(t):
            return (
                mpmath.cos(
                    (mpmath.mpf(t) / count + mpmath.mpf(0.008)) / mpmath.mpf(1.008) * mpmath.pi / 2
                )
                ** 2
            )

        truth = [min(1 - bar(t + 1) / bar(t), mpmath.mpf(0.999)) for t in range(count)]
        betas = make_betas("squaredcos_cap_v2", count)
        for t in range(count):
            # cos(angle)^2 near pi/2 magnifies the rounding of the angle by 2 tan(angle) * angle.
            angle = (t / count + 0.008) / 1.008 * math.pi / 2
            condition = 1 + 2 * abs(math.tan(angle)) * angle
            assert abs(betas[t].item() - truth[t]) <= 8 * EPS * condition * truth[t]


def test_betas_for_alpha_bar():
    count = 50
    quarter = math.pi / 2 / 1.008
    betas = betas_for_alpha_bar(lambda t: math.cos((t + 0.008) * quarter) ** 2, count)
    # The quotient is close to 1, so its rounding is an absolute one.
    expected = make_betas("squaredcos_cap_v2", count)
    torch.testing.assert_close(betas, expected, rtol=64 * EPS, atol=16 * EPS)
    assert betas[-1] == 0.999
    halved = betas_for_alpha_bar(lambda t: 0.5 ** (count * t), count)
    close(halved, [0.5] * count, 2 * count)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid"])
def test_scaling_to_1000_steps(name):
    assert torch.equal(make_betas(name, 1000, scale_to_1000=True), make_betas(name, 1000))
    close(make_betas(name, 200, scale_to_1000=True), 5 * make_betas(name, 200), 1)


def test_linear_scaled_to_1000_steps_destroys_as_much_signal():
    # The mean of equally spaced numbers is that of the two ends, so the sum is 1000 times it.
    for count in (100, 200, 500, 1000):
        total = make_betas("linear", count, scale_to_1000=True).sum().item()
        assert total == pytest.approx(1000 * (1e-4 + 0.02) / 2, rel=count * EPS, abs=0)


@schedules
@pytest.mark.parametrize("count", [1, 2, 200, 1000])
def test_from_betas_against_50_digits(name, count):
    betas = make_betas(name, count)
    schedule = NoiseSchedule.from_betas(betas)
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    with mpmath.workdps(50):
        bar = mpmath.mpf(1)
        for t in range(count):
            bar *= 1 - mpmath.mpf(betas[t].item())
            # Each term of the sum of logs and each partial sum is rounded once.
            log_error = (t + 2) * EPS * (1 - mpmath.log(bar))
            alpha, sigma = mpmath.sqrt(bar), mpmath.sqrt(1 - bar)
            assert abs(schedule.alpha[t].item() - alpha) <= alpha * (log_error + 2 * EPS)
            # relative: d sigma / sigma = bar / (2 sigma^2) d log bar, and log bar is small with it
            small = (t + 2) * EPS * -mpmath.log(bar) * bar / (2 * sigma**2)
            assert abs(schedule.sigma[t].item() - sigma) <= sigma * (small + 4 * EPS)


@schedules
def test_first_sigma_keeps_every_digit(name):
    betas = make_betas(name, 1000)
    close(NoiseSchedule.from_betas(betas).sigma[:1], betas[:1].sqrt(), 4)


@schedules
def test_betas_survive_the_product(name):
    betas = make_betas(name, 100)
    schedule = NoiseSchedule.from_betas(betas)
    # A quotient of products is off by the roundings of 100 sums of logs no larger than log_bar.
    bound = 100 * EPS * (1 + schedule.alpha.log().abs().max().item() * 2)
    bar = schedule.alpha**2
    torch.testing.assert_close(betas_from_alphas_cumprod(bar), betas, rtol=0, atol=bound)
    again = NoiseSchedule.from_alphas_cumprod(bar)
    torch.testing.assert_close(again.alpha, schedule.alpha, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(again.sigma**2, schedule.sigma**2, rtol=0, atol=4 * EPS)


@schedules
def test_zero_terminal_snr(name):
    betas = make_betas(name, 1000)
    before, after = NoiseSchedule.from_betas(betas), rescale_zero_terminal_snr(betas)
    schedule = NoiseSchedule.from_betas(after)
    assert after[-1] == 1
    assert schedule.alpha[-1] == 0
    assert schedule.sigma[-1] == 1
    assert schedule.snr[-1] == 0
    assert schedule.log_snr[-1] == -math.inf
    # Algorithm 1 of Lin et al., from the same alphas; the first beta is a difference from 1.
    first, last = before.alpha[0], before.alpha[-1]
    expected = (before.alpha - last) * first / (first - last)
    bound = 1000 * EPS * (1 + before.alpha.log().abs().max().item() * 2)
    torch.testing.assert_close(schedule.alpha, expected, rtol=0, atol=bound)
    assert schedule.alpha[0] == pytest.approx(first.item(), rel=4 * EPS)


def test_each_family_of_schedules_has_its_alpha_and_sigma():
    sigmas = torch.tensor([0.1, 1.0, 80.0], dtype=torch.float64)
    exploding = NoiseSchedule.from_sigmas(sigmas)
    assert torch.equal(exploding.alpha, torch.ones_like(sigmas))
    close(exploding.snr, sigmas**-2, 4)
    close(exploding.log_snr, -2 * sigmas.log(), 4)
    flow = NoiseSchedule.rectified_flow(4)
    assert flow.alpha.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert flow.sigma.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert torch.equal(flow.table, torch.stack([flow.alpha, flow.sigma], 1))
    assert len(flow) == 4
    preserving = NoiseSchedule.from_betas(make_betas("linear", 1000))
    close(preserving.alpha**2 + preserving.sigma**2, torch.ones(1000), 4)
    torch.testing.assert_close(preserving.log_snr, preserving.snr.log(), rtol=8 * EPS, atol=8 * EPS)


def test_a_schedule_keeps_its_own_tables():
    alpha, sigma = torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    schedule = NoiseSchedule(alpha, sigma)
    alpha.zero_()
    assert schedule.alpha.dtype == torch.float64
    assert (schedule.alpha > 0).all()
    with pytest.raises(AttributeError):
        schedule.alpha = sigma


def test_spacings_are_those_of_diffusers():
    assert respaced_timesteps(1000, 10, "leading") == [
        900,
        800,
        700,
        600,
        500,
        400,
        300,
        200,
        100,
        0,
    ]
    assert respaced_timesteps(1000, 10, "leading", steps_offset=1)[::9] == [901, 1]
    assert respaced_timesteps(1000, 10, "trailing") == [
        999,
        899,
        799,
        699,
        599,
        499,
        399,
        299,
        199,
        99,
    ]
    assert respaced_timesteps(1000, 10, "linspace") == [
        999,
        888,
        777,
        666,
        555,
        444,
        333,
        222,
        111,
        0,
    ]
    # What T // n would get wrong: 1000 is no multiple of 7.
    assert respaced_timesteps(1000, 7, "trailing") == [999, 856, 713, 570, 428, 285, 142]
    assert respaced_timesteps(1000, 7, "leading") == [852, 710, 568, 426, 284, 142, 0]
    assert respaced_timesteps(10, 1, "leading") == respaced_timesteps(10, 1, "linspace") == [0]
    assert respaced_timesteps(10, 1, "trailing") == [9]


@settings(deadline=None, derandomize=True)  # the same examples everywhere, at any speed
@given(data=st.data(), spacing=st.sampled_from(["leading", "trailing", "linspace"]))
def test_spacings_fall_and_stay_in_the_schedule(data, spacing):
    total = data.draw(st.integers(1, 4000))
    steps = data.draw(st.integers(1, total))
    chosen = respaced_timesteps(total, steps, spacing)
    assert len(chosen) == steps
    assert all(a > b for a, b in pairwise(chosen))
    assert 0 <= chosen[-1] <= chosen[0] < total
    if spacing == "trailing" or (spacing == "linspace" and steps > 1):
        assert chosen[0] == total - 1
    if steps == total:
        assert chosen == list(range(total))[::-1]


def test_min_snr_weights_are_one_weight_on_the_error_of_x0():
    # A model that is wrong by d is wrong about x0 by a_m d: the weight on d^2 is w_x0 * a_m^2.
    schedule = NoiseSchedule.from_betas(make_betas("linear", 1000))
    alpha, sigma = schedule.alpha, schedule.sigma
    on_x0 = schedule.snr.clamp(max=5.0)
    for prediction_type, a_m in {
        "epsilon": sigma / alpha,
        "sample": torch.ones_like(sigma),
        "v_prediction": sigma,
        "flow_prediction": sigma / (alpha + sigma),
    }.items():
        weights = min_snr_weights(schedule.snr, prediction_type=prediction_type)
        torch.testing.assert_close(weights, on_x0 * a_m**2, rtol=16 * EPS, atol=0)


def test_min_snr_weights_at_the_ends():
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    assert min_snr_weights(ends).tolist() == [1.0, 0.0]
    assert min_snr_weights(ends, prediction_type="sample").tolist() == [0.0, 5.0]
    assert min_snr_weights(ends, prediction_type="v_prediction").tolist() == [0.0, 0.0]
    assert min_snr_weights(ends, prediction_type="flow_prediction").tolist() == [0.0, 0.0]
    some = torch.tensor([0.0, 2.0, 100.0], dtype=torch.float64)
    assert min_snr_weights(some, gamma=math.inf).tolist() == [1.0, 1.0, 1.0]
    assert min_snr_weights(some, gamma=math.inf, prediction_type="sample").tolist() == [0, 2, 100]


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make_betas("cosine", 10), ValueError, "name must be one of"),
        (lambda: make_betas(3, 10), TypeError, "name"),
        (lambda: make_betas("linear", 0), ValueError, "num_timesteps"),
        (lambda: make_betas("linear", 10.0), TypeError, "num_timesteps"),
        (lambda: make_betas("linear", True), TypeError, "num_timesteps"),
        (lambda: make_betas("linear", 10, beta_start=0.0), ValueError, "beta_start"),
        (lambda: make_betas("linear", 10, beta_start=0.5, beta_end=0.1), ValueError, "beta_start"),
        (
            lambda: make_betas("linear", 10, scale_to_1000=True),
            ValueError,
            "more than 10 timesteps",
        ),
        (lambda: make_betas("squaredcos_cap_v2", 9, scale_to_1000=True), ValueError, "scale_to"),
        (lambda: betas_for_alpha_bar(math.cos, -1), ValueError, "num_timesteps"),
        (lambda: betas_from_alphas_cumprod(ONES), ValueError, "alphas_cumprod"),
        (lambda: betas_from_alphas_cumprod(ONES * 2), ValueError, "alphas_cumprod"),
        (lambda: betas_from_alphas_cumprod(-ONES), ValueError, "alphas_cumprod"),
        (lambda: rescale_zero_terminal_snr(torch.tensor([0.1])), ValueError, "two"),
        (lambda: NoiseSchedule.from_betas(torch.tensor([0.1, 0.0])), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas(torch.tensor([0.1, 1.1])), ValueError, "betas"),
        (
            lambda: NoiseSchedule.from_betas(torch.tensor([1.0, 0.1])),
            ValueError,
            "betas must be below 1 before the last",
        ),
        (lambda: NoiseSchedule.from_betas(torch.tensor([math.nan])), ValueError, "finite"),
        (lambda: NoiseSchedule.from_betas(torch.empty(0)), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas(torch.full((2, 2), 0.1)), ValueError, "shape"),
        (lambda: NoiseSchedule.from_betas("linear"), TypeError, "betas"),
        (lambda: NoiseSchedule.from_betas(ONES * 1j), TypeError, "betas"),
        (lambda: NoiseSchedule.from_alphas_cumprod(ONES * 1.5), ValueError, "alphas_cumprod"),
        (lambda: NoiseSchedule(ONES, ONES[:2]), ValueError, "sigma must have the length of alpha"),
        (lambda: NoiseSchedule(-ONES, ONES), ValueError, "alpha"),
        (lambda: NoiseSchedule(ONES * 0, ONES * 0), ValueError, "sigma must be above 0"),
        (lambda: NoiseSchedule.rectified_flow(0), ValueError, "num_timesteps"),
        (lambda: respaced_timesteps(10, 11), ValueError, "num_steps"),
        (lambda: respaced_timesteps(10, 0), ValueError, "num_steps"),
        (lambda: respaced_timesteps(10, 2.0), TypeError, "num_steps"),
        (lambda: respaced_timesteps(10, 2, "karras"), ValueError, "^spacing must be one of"),
        (lambda: respaced_timesteps(10, 10, steps_offset=1), ValueError, "steps_offset"),
        (lambda: min_snr_weights(ONES, gamma=0.0), ValueError, "gamma"),
        (lambda: min_snr_weights(1.0), TypeError, "snr"),
        (lambda: min_snr_weights(ONES, prediction_type="x0"), ValueError, "prediction_type"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
