"""The float64 scalars: algebraic identities that hold for every schedule, and 50-digit truth."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from diffcore.coefficients.step import (
    FIXED_VARIANCE_TYPES,
    PREDICTION_TYPES,
    ddim_coefficients,
    ddpm_coefficients,
    epsilon_coefficients,
    parse_clip_range,
    posterior_coefficients,
    target_coefficients,
    x0_coefficients,
)

EPS = torch.finfo(torch.float64).eps


def vp(log_snr):
    return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))


# (alpha, sigma, alpha_prev, sigma_prev), from nearly clean to nearly pure noise, in three families.
PAIRS = {
    "vp-late": (*vp(-9.0), *vp(-8.9)),
    "vp-middle": (*vp(-0.3), *vp(0.4)),
    "vp-early": (*vp(8.3), *vp(9.2)),
    "vp-last": (*vp(9.2), 1.0, 0.0),
    "ve": (1.0, 14.6, 1.0, 9.1),
    "flow": (0.375, 0.625, 0.5, 0.5),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
predictions = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


@pairs
@predictions
def test_conversions_invert_the_target(pair, prediction_type):
    alpha, sigma = pair[:2]
    k_x0, k_noise = target_coefficients(alpha, sigma, prediction_type)
    a_x, a_m = x0_coefficients(alpha, sigma, prediction_type)
    e_x, e_m = epsilon_coefficients(alpha, sigma, prediction_type)
    # x = alpha x0 + sigma noise and m = k_x0 x0 + k_noise noise, so the products must be identity.
    for (c_x, c_m), wanted in (((a_x, a_m), (1, 0)), ((e_x, e_m), (0, 1))):
        for of_x, of_m, value in ((alpha, k_x0, wanted[0]), (sigma, k_noise, wanted[1])):
            error = abs(c_x * of_x + c_m * of_m - value)
            # At most four roundings in a coefficient, two here.
            assert error <= 6 * EPS * (abs(c_x * of_x) + abs(c_m * of_m))


@pairs
def test_posterior_against_50_digits(pair):
    computed = posterior_coefficients(*pair)
    with mpmath.workdps(50):
        a, s, ap, sp = map(mpmath.mpf, pair)
        beta = s**2 - (a / ap) ** 2 * sp**2
        truth = (ap * beta / s**2, a / ap * sp**2 / s**2, beta * sp**2 / s**2, beta)
        # beta / sigma^2 = 1 - kept is off by the roundings of kept <= 1: eight halves of an eps.
        scale = (ap, truth[1], sp**2, s**2)
        for value, exact, unit in zip(computed, truth, scale, strict=True):
            assert abs(value - exact) <= 8 * EPS * unit


@pairs
def test_posterior_undoes_the_markov_step(pair):
    # Bayes: the product of N(x_t; r x_prev, beta) and N(x_prev; alpha_prev x_0, sigma_prev^2).
    alpha, sigma, alpha_prev, sigma_prev = pair
    a, b, beta_tilde, beta = posterior_coefficients(*pair)
    if sigma_prev == 0:
        assert (a, b, beta_tilde) == (1.0, 0.0, 0.0)
        return
    ratio = alpha / alpha_prev
    precision = ratio**2 / beta + 1 / sigma_prev**2
    condition = sigma**2 / beta  # beta is a difference of numbers as large as sigma^2
    assert beta_tilde == pytest.approx(1 / precision, rel=16 * EPS * condition, abs=0)
    assert a == pytest.approx(alpha_prev / sigma_prev**2 / precision, rel=16 * EPS * condition)
    assert b == pytest.approx(ratio / beta / precision, rel=16 * EPS * condition, abs=0)


def composed(row):
    """The affine map (coefficient of x, of m, of z) of a step that does not clip."""
    c_x, c_m, c_0, c_z, a_x, a_m, low, high = row.tolist()
    assert (low, high) == (-math.inf, math.inf)
    sizes = (abs(c_x) + abs(c_0 * a_x), abs(c_m) + abs(c_0 * a_m), abs(c_z))
    return (c_x + c_0 * a_x, c_m + c_0 * a_m, c_z), sizes


def assert_same_map(one, other, pair):
    alpha, sigma, alpha_prev, sigma_prev = pair
    (left, left_sizes), (right, right_sizes) = composed(one), composed(other)
    # beta / sigma^2 = 1 - kept is a difference: what is made of it loses as many digits.
    condition = sigma**2 / (sigma**2 - (alpha / alpha_prev * sigma_prev) ** 2)
    for x, y, *sizes in zip(left, right, left_sizes, right_sizes, strict=True):
        assert abs(x - y) <= 16 * EPS * condition * max(sizes)


@pairs
@predictions
def test_ddim_with_eta_1_is_ddpm(pair, prediction_type):
    ddpm = ddpm_coefficients(*pair, prediction_type=prediction_type)
    ddim = ddim_coefficients(*pair, eta=1.0, prediction_type=prediction_type)
    assert_same_map(ddpm, ddim, pair)


@pairs
@predictions
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_both_epsilon_rules_are_one_map_without_clipping(pair, prediction_type, eta):
    one, other = (
        ddim_coefficients(*pair, eta=eta, prediction_type=prediction_type, rederive_epsilon=rule)
        for rule in (True, False)
    )
    assert_same_map(one, other, pair)


@pairs
@predictions
@pytest.mark.parametrize("rule", [True, False])
def test_ddim_moves_a_perfect_prediction_along_the_marginals(pair, prediction_type, rule):
    alpha, sigma, alpha_prev, sigma_prev = pair
    row = ddim_coefficients(*pair, prediction_type=prediction_type, rederive_epsilon=rule)
    (of_x, of_m, of_z), (size_x, size_m, _) = composed(row)
    k_x0, k_noise = target_coefficients(alpha, sigma, prediction_type)
    # x0 and noise go in as (alpha, sigma); they must come out as (alpha_prev, sigma_prev).
    assert of_z == 0
    for signal, target, wanted in ((alpha, k_x0, alpha_prev), (sigma, k_noise, sigma_prev)):
        error = abs(of_x * signal + of_m * target - wanted)
        assert error <= 16 * EPS * (size_x * abs(signal) + size_m * abs(target) + wanted)


@pairs
@pytest.mark.parametrize("eta", [0.25, 1.0])
def test_ddim_keeps_the_variance_of_the_marginal(pair, eta):
    # With m = noise exactly, x0 known: direction^2 + c_z^2 = sigma_prev^2.
    row = ddim_coefficients(*pair, eta=eta, rederive_epsilon=False)
    direction, c_z = row[1].item(), row[3].item()
    assert direction**2 + c_z**2 == pytest.approx(pair[3] ** 2, rel=8 * EPS, abs=0)


@pairs
def test_epsilon_form_is_line_4_of_algorithm_2(pair):
    alpha, sigma, alpha_prev, sigma_prev = pair
    (of_x, of_m, of_z), sizes = composed(ddpm_coefficients(*pair))
    ratio = alpha / alpha_prev  # sqrt(alpha_t) of the paper
    beta = sigma**2 - ratio**2 * sigma_prev**2
    condition = sigma**2 / beta
    assert abs(of_x - 1 / ratio) <= 16 * EPS * sizes[0]
    assert abs(of_m + beta / (ratio * sigma)) <= 16 * EPS * condition * sizes[1]
    assert of_z == pytest.approx(sigma_prev / sigma * math.sqrt(beta), rel=16 * EPS * condition)


@pytest.mark.parametrize("variance_type", FIXED_VARIANCE_TYPES)
def test_no_noise_in_a_step_to_the_clean_sample(variance_type):
    row = ddpm_coefficients(*PAIRS["vp-last"], variance_type=variance_type)
    assert row[:4].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert ddim_coefficients(*PAIRS["vp-last"], eta=1.0)[:4].tolist() == [0.0, 0.0, 1.0, 0.0]


def test_fixed_large_takes_beta():
    alpha, sigma, alpha_prev, sigma_prev = pair = PAIRS["vp-middle"]
    beta = 1 - (alpha / alpha_prev) ** 2  # what it is for a variance preserving schedule
    large = ddpm_coefficients(*pair, variance_type="fixed_large")
    small = ddpm_coefficients(*pair, variance_type="fixed_small")
    assert large[3].item() ** 2 == pytest.approx(beta, rel=16 * EPS / beta)
    ratio = (small[3] / large[3]).item() ** 2
    assert ratio == pytest.approx(sigma_prev**2 / sigma**2, rel=16 * EPS / beta)
    assert torch.equal(large[[0, 1, 2, 4, 5]], small[[0, 1, 2, 4, 5]])


def test_inversion_is_deterministic_only():
    alpha, sigma, alpha_prev, sigma_prev = PAIRS["vp-middle"]
    there = ddim_coefficients(alpha_prev, sigma_prev, alpha, sigma)
    (of_x, _, of_z), _ = composed(there)
    assert of_x == pytest.approx(alpha / alpha_prev, rel=8 * EPS)
    assert of_z == 0
    with pytest.raises(ValueError, match="less noisy"):
        ddim_coefficients(alpha_prev, sigma_prev, alpha, sigma, eta=1.0)
    with pytest.raises(ValueError, match="less noisy"):
        ddpm_coefficients(alpha_prev, sigma_prev, alpha, sigma)


def test_zero_terminal_snr():
    pair = (0.0, 1.0, *vp(-5.0))
    for make in (ddpm_coefficients, ddim_coefficients):
        with pytest.raises(ValueError, match="alpha must not be 0"):
            make(*pair, prediction_type="epsilon")
        for prediction_type in ("sample", "v_prediction", "flow_prediction"):
            assert make(*pair, prediction_type=prediction_type)[:6].isfinite().all()
    with pytest.raises(ValueError, match="alpha must not be 0"):
        x0_coefficients(torch.tensor([0.5, 0.0]), torch.tensor([0.5, 1.0]), "epsilon")
    # m = v = noise where alpha = 0: the posterior mean is then alpha_prev x0 + 0 x, x0 = -m.
    v = ddpm_coefficients(*pair, prediction_type="v_prediction")
    assert v[[0, 2, 4, 5]].tolist() == [0.0, pair[2], 0.0, -1.0]


def test_floats_give_floats_and_tensors_give_float64_tensors():
    assert all(type(c) is float for c in posterior_coefficients(*PAIRS["flow"]))
    for prediction_type in PREDICTION_TYPES:
        for make in (x0_coefficients, epsilon_coefficients, target_coefficients):
            assert all(type(c) is float for c in make(0.5, 0.5, prediction_type))
            columns = make(torch.full((3, 1), 0.5), torch.full((2,), 0.5), prediction_type)
            assert all(c.dtype == torch.float64 and c.shape == (3, 2) for c in columns)


def test_tables_hold_the_rows_that_floats_give():
    family = [PAIRS[name] for name in ("vp-late", "vp-middle", "vp-early", "vp-last")]
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*family, strict=True)]
    for make, options in (
        (ddpm_coefficients, {"variance_type": "fixed_large", "clip_range": (-1, 2)}),
        (ddim_coefficients, {"eta": 0.5, "rederive_epsilon": False}),
        (ddim_coefficients, {"eta": 0.0, "clip_range": 1.0}),
    ):
        for prediction_type in PREDICTION_TYPES:
            table = make(*columns, prediction_type=prediction_type, **options)
            rows = [make(*pair, prediction_type=prediction_type, **options) for pair in family]
            assert table.shape == (4, 8)
            # libm's and torch's square roots are both correctly rounded, powers may differ by one.
            torch.testing.assert_close(table, torch.stack(rows), rtol=8 * EPS, atol=8 * EPS)


def test_clip_range():
    assert parse_clip_range(None) == (-math.inf, math.inf)
    assert parse_clip_range(2) == (-2.0, 2.0)
    assert parse_clip_range((0, 1)) == (0.0, 1.0)
    assert ddpm_coefficients(*PAIRS["flow"], clip_range=(0, 1))[6:].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, (1, 1), (2, 1), (math.nan, 1)])
def test_empty_clip_range(value):
    with pytest.raises(ValueError, match="clip_range"):
        parse_clip_range(value)


@pytest.mark.parametrize("value", ["1", True, (1, 2, 3), torch.ones(2)])
def test_clip_range_of_the_wrong_type(value):
    with pytest.raises(TypeError, match="clip_range"):
        parse_clip_range(value)


GOOD = PAIRS["vp-middle"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ddpm_coefficients(*GOOD, prediction_type="eps"), ValueError, "prediction_type"),
        (lambda: ddpm_coefficients(*GOOD, prediction_type=None), TypeError, "prediction_type"),
        (lambda: ddpm_coefficients(*GOOD, variance_type="learned"), ValueError, "variance_type"),
        (lambda: ddim_coefficients(*GOOD, eta=1.5), ValueError, "eta"),
        (lambda: ddim_coefficients(*GOOD, eta=-0.1), ValueError, "eta"),
        (lambda: ddim_coefficients(*GOOD, eta=math.nan), ValueError, "eta"),
        (lambda: ddim_coefficients(*GOOD, eta="0"), TypeError, "eta"),
        (lambda: posterior_coefficients(0.5, 0.0, 1.0, 0.0), ValueError, "sigma must not be 0"),
        (
            lambda: posterior_coefficients(0.0, 1.0, 0.0, 1.0),
            ValueError,
            "alpha_prev must not be 0",
        ),
        (lambda: ddim_coefficients(1.0, 0.0, 1.0, 0.0), ValueError, "sigma must not be 0"),
        (lambda: epsilon_coefficients(1.0, 0.0, "sample"), ValueError, "sigma must not be 0"),
        (lambda: x0_coefficients(0.0, 0.0, "v_prediction"), ValueError, "both"),
        (lambda: epsilon_coefficients(0.0, 0.0, "flow_prediction"), ValueError, "both"),
        (lambda: x0_coefficients("1", 1.0, "sample"), TypeError, "alpha"),
        (lambda: x0_coefficients(1.0, True, "sample"), TypeError, "sigma"),
        (lambda: x0_coefficients(torch.ones(2) * 1j, 1.0, "sample"), TypeError, "alpha"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_fake_tensors_and_vmap_pass_the_checks_they_cannot_take():
    alpha, sigma = torch.tensor([0.5, 0.6]), torch.tensor([0.8, 0.7])
    batched = torch.vmap(lambda a, s: x0_coefficients(a, s, "epsilon")[0])(alpha, sigma)
    assert torch.equal(batched, 1 / alpha.double())
