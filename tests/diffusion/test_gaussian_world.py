"""A world with known answers: data N(m, s^2), whose best model is linear and whose samplers affine.

A sampler's output is P x_T + Q + sum_i R_i z_i. One loop over a basis (nothing, x_T = 1, each z_i =
1) gives them all, hence the exact mean and variance of what the sampler draws, to be compared with
the recursion in 40 digits.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.diffusion import GaussianDiffusion
from diffcore.schedules import make_betas, rescale_zero_terminal_snr, respaced_timesteps
from support.worlds import DIGITS, World

# What the library promises: in float64 a loop is exact to this of the formulas.
PROMISE = 1e-10

MEAN, STD = 0.7, 0.5


def sampled_moments(loop, steps):
    """Mean and variance of what a loop draws, from its response to a basis of x_T and z."""
    x_T = torch.zeros(steps + 1, 1, dtype=torch.float64)
    x_T[1] = 1

    def unit(i, x):
        z = torch.zeros_like(x)
        z[2 + i] = 1
        return z

    out = loop(x_T, unit).squeeze(1)
    assert out.dtype == torch.float64
    responses = out[1:] - out[0]
    return out[0].item(), responses.square().sum().item()


def assert_moments(sampled, exact):
    for value, truth in zip(sampled, exact, strict=True):
        assert abs(value - truth) <= PROMISE


BETAS = make_betas("linear", 100, scale_to_1000=True)
CHOICES = [(None, "leading"), (7, "leading"), (7, "trailing"), (9, "linspace"), (1, "trailing")]
choices = pytest.mark.parametrize(("num_steps", "spacing"), CHOICES)
predictions = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def visited(num_steps, spacing):
    return respaced_timesteps(len(BETAS), num_steps or len(BETAS), spacing)


@pytest.fixture(scope="module")
def world():
    return World(MEAN, STD, BETAS)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_all_markov_steps_compose_to_q_sample(name):
    betas = make_betas(name, 1000)
    diffusion = GaussianDiffusion(betas)
    signal, t = torch.ones(1000, 1, dtype=torch.float64), torch.arange(1000)
    zero = torch.zeros_like(signal)
    alpha = diffusion.q_sample(signal, t, noise=zero).squeeze(1)
    sigma = diffusion.q_sample(zero, t, noise=signal).squeeze(1)
    mean, variance, log_variance = (v.squeeze(1) for v in diffusion.q_mean_variance(signal, t))
    # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z_t, one step after the other
    with mpmath.workdps(DIGITS):
        coefficient, spread = mpmath.mpf(1), mpmath.mpf(0)
        for t, beta in enumerate(map(mpmath.mpf, betas.tolist())):
            coefficient *= mpmath.sqrt(1 - beta)
            spread = (1 - beta) * spread + beta
            assert abs(alpha[t].item() - coefficient) <= PROMISE * coefficient
            assert abs(sigma[t].item() ** 2 - spread) <= PROMISE * spread
            assert abs(mean[t].item() - coefficient) <= PROMISE * coefficient
            assert abs(variance[t].item() - spread) <= PROMISE * spread
            assert abs(log_variance[t].item() - mpmath.log(spread)) <= PROMISE


def test_posterior_is_bayes_rule(world):
    diffusion = GaussianDiffusion(BETAS)
    t = torch.arange(len(BETAS))
    x_start, x_t = torch.randn(2, len(BETAS), 3, dtype=torch.float64, generator=_seeded())
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    with mpmath.workdps(DIGITS):
        for i in range(1, len(BETAS)):
            beta, prev = world.betas[i], world.bar[i - 1]
            precision = (1 - beta) / beta + 1 / (1 - prev)
            for j in range(3):
                likelihood = mpmath.sqrt(1 - beta) / beta * x_t[i, j].item()
                prior = mpmath.sqrt(prev) / (1 - prev) * x_start[i, j].item()
                assert abs(mean[i, j].item() - (likelihood + prior) / precision) <= PROMISE
                assert abs(variance[i, j].item() * precision - 1) <= PROMISE
                assert abs(log_variance[i, j].item() + mpmath.log(precision)) <= PROMISE
    # At t = 0 the posterior is x_start itself; its clipped logarithm is the next step's.
    assert torch.equal(mean[0], x_start[0])
    assert torch.equal(variance[0], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(log_variance[0], log_variance[1])


@predictions
@choices
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_samples_follow_the_recursion(
    world, prediction_type, num_steps, spacing, variance_type
):
    diffusion = GaussianDiffusion(BETAS, prediction_type, variance_type, clip_sample=False)
    timesteps = visited(num_steps, spacing)

    def loop(x_T, unit):
        return diffusion.p_sample_loop(
            world.model(prediction_type),
            x_T.shape,
            num_steps=num_steps,
            timestep_spacing=spacing,
            noise=x_T,
            step_noise=unit,
        )

    with mpmath.workdps(DIGITS):
        exact = world.ddpm_moments(timesteps, variance_type)
        assert_moments(sampled_moments(loop, len(timesteps)), exact)
        # The test would notice the other variance: they are further apart than what it allows.
        other = "fixed_large" if variance_type == "fixed_small" else "fixed_small"
        if len(timesteps) > 1:
            assert abs(world.ddpm_moments(timesteps, other)[1] - exact[1]) > 1e4 * PROMISE


@predictions
@choices
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rederive_epsilon", [True, False])
def test_ddim_samples_follow_the_recursion(
    world, prediction_type, num_steps, spacing, eta, rederive_epsilon
):
    diffusion = GaussianDiffusion(BETAS, prediction_type, clip_sample=False)
    timesteps = visited(num_steps, spacing)

    def loop(x_T, unit):
        return diffusion.ddim_sample_loop(
            world.model(prediction_type),
            x_T.shape,
            num_steps=num_steps,
            eta=eta,
            timestep_spacing=spacing,
            rederive_epsilon=rederive_epsilon,
            noise=x_T,
            step_noise=unit,
        )

    with mpmath.workdps(DIGITS):
        exact = world.ddim_moments(timesteps, eta)
        assert_moments(sampled_moments(loop, len(timesteps)), exact)
        if eta == 1:
            assert_moments(exact, world.ddpm_moments(timesteps, "fixed_small"))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_samplers_start_from_pure_noise_under_zero_terminal_snr(prediction_type):
    betas = rescale_zero_terminal_snr(BETAS)
    world = World(MEAN, STD, betas)
    diffusion = GaussianDiffusion(betas, prediction_type, clip_sample=False)
    timesteps = respaced_timesteps(len(betas), 7, "trailing")
    assert timesteps[0] == len(betas) - 1
    model = world.model(prediction_type)
    how = {"num_steps": 7, "timestep_spacing": "trailing"}

    def ddpm(x_T, unit):
        return diffusion.p_sample_loop(model, x_T.shape, noise=x_T, step_noise=unit, **how)

    def ddim(x_T, unit):
        return diffusion.ddim_sample_loop(model, x_T.shape, noise=x_T, step_noise=unit, **how)

    with mpmath.workdps(DIGITS):
        assert_moments(sampled_moments(ddpm, 7), world.ddpm_moments(timesteps, "fixed_small"))
        assert_moments(sampled_moments(ddim, 7), world.ddim_moments(timesteps, 0))


def test_flow_of_a_whole_schedule_carries_the_data_distribution(world):
    # Probability flow is exact in this world in the limit: a hundred steps must do better than ten.
    with mpmath.workdps(DIGITS):
        errors = [
            abs(world.ddim_moments(visited(n, "linspace"), 0)[1] - mpmath.mpf(STD) ** 2)
            for n in (10, 20, 50, 100)
        ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_two_epsilon_rules_where_clipping_bites(world, eta):
    bound, timesteps = 0.4, visited(9, "linspace")
    diffusion = GaussianDiffusion(BETAS, clip_sample_range=bound)
    generator = _seeded()
    x_T = torch.randn(5, 1, dtype=torch.float64, generator=generator)
    z = torch.randn(len(timesteps), 5, 1, dtype=torch.float64, generator=generator)

    def by_hand(x, draws, rederive):
        clipped = False
        for step, (t, bar, prev) in enumerate(world.previous(timesteps)):
            alpha, sigma = world.alpha[t], world.sigma[t]
            eps = sigma / world.total[t] * (x - alpha * MEAN)
            x0 = (x - sigma * eps) / alpha
            clipped |= abs(x0) > bound
            x0 = max(-bound, min(bound, x0))
            if rederive:
                eps = (x - alpha * x0) / sigma
            noise = eta**2 * (1 - prev) / (1 - bar) * (1 - bar / prev)
            x = mpmath.sqrt(prev) * x0 + mpmath.sqrt(1 - prev - noise) * eps
            x += mpmath.sqrt(noise) * draws[step]
        assert clipped
        return x

    results = {}
    for rederive in (True, False):
        out = diffusion.ddim_sample_loop(
            world.model("epsilon"),
            x_T.shape,
            num_steps=9,
            eta=eta,
            timestep_spacing="linspace",
            rederive_epsilon=rederive,
            noise=x_T,
            step_noise=lambda i, x: z[i],
        )
        with mpmath.workdps(DIGITS):
            for row in range(5):
                truth = by_hand(mpmath.mpf(x_T[row].item()), z[:, row, 0].tolist(), rederive)
                assert abs(out[row].item() - truth) <= PROMISE
        results[rederive] = out
    # With a step to alpha_prev = 1 both end at the clipped x0, wherever that is inside the bounds.
    assert results[True].abs().max() <= bound
    one = {
        rule: diffusion.ddim_sample(
            world.model("epsilon"), x_T, len(BETAS) // 2, rederive_epsilon=rule
        )["sample"]
        for rule in (True, False)
    }
    assert (one[True] - one[False]).abs().max() > 1e6 * PROMISE


@predictions
def test_one_step_methods_agree_with_the_moments(world, prediction_type):
    diffusion = GaussianDiffusion(BETAS, prediction_type, clip_sample=False)
    t = torch.arange(len(BETAS))
    x, z = torch.randn(2, len(BETAS), 4, dtype=torch.float64, generator=_seeded())
    model = world.model(prediction_type)
    moments = diffusion.p_mean_variance(model, x, t)
    alpha, _, total = (table.unsqueeze(1) for table in world.tables)
    x0 = MEAN + alpha * STD**2 / total * (x - alpha * MEAN)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x0, x, t)
    close = {"rtol": 0, "atol": PROMISE}
    torch.testing.assert_close(moments["pred_xstart"], x0, **close)
    torch.testing.assert_close(moments["mean"], mean, **close)
    assert torch.equal(moments["variance"], variance)
    assert torch.equal(moments["log_variance"], log_variance)
    step = diffusion.p_sample(model, x, t, noise=z)
    torch.testing.assert_close(step["sample"], mean + variance.sqrt() * z, **close)
    ddim = diffusion.ddim_sample(model, x, t, eta=1.0, noise=z)
    torch.testing.assert_close(ddim["sample"], step["sample"], **close)
    assert torch.equal(ddim["pred_xstart"], moments["pred_xstart"])


@predictions
def test_the_best_model_has_the_smallest_loss_there_is(world, prediction_type):
    # x0 = m + s u: the model's error is linear in (u, noise), so its mean square is a sum of two.
    diffusion = GaussianDiffusion(BETAS, prediction_type)
    t = torch.arange(len(BETAS))
    ones = torch.ones(len(BETAS), 1, dtype=torch.float64)
    model = world.model(prediction_type)
    of_u = diffusion.training_losses(model, (MEAN + STD) * ones, t, noise=0 * ones)["loss"]
    of_noise = diffusion.training_losses(model, MEAN * ones, t, noise=ones)["loss"]
    alpha, sigma, total = world.tables
    on_x0 = STD**2 * sigma**2 / total  # the variance of x0 given x_t
    per_unit = {  # (d prediction / d x0)^2 at fixed x_t
        "epsilon": (alpha / sigma) ** 2,
        "sample": torch.ones_like(alpha),
        "v_prediction": 1 / sigma**2,
        "flow_prediction": ((alpha + sigma) / sigma) ** 2,
    }[prediction_type]
    torch.testing.assert_close(of_u + of_noise, on_x0 * per_unit, rtol=PROMISE, atol=0)


def test_respacing_is_the_same_process_seen_less_often(world):
    diffusion = GaussianDiffusion(BETAS, clip_sample=False)
    spaced = diffusion.respace(7, "trailing")
    x_T = torch.randn(6, 2, dtype=torch.float64, generator=_seeded())
    z = torch.randn(7, 6, 2, dtype=torch.float64, generator=_seeded(1))
    model = world.model("epsilon")

    def draw(i, x):
        return z[i]

    whole = diffusion.p_sample_loop(
        model, x_T.shape, num_steps=7, timestep_spacing="trailing", noise=x_T, step_noise=draw
    )
    part = spaced.p_sample_loop(model, x_T.shape, noise=x_T, step_noise=draw)
    torch.testing.assert_close(part, whole, rtol=0, atol=PROMISE)
    x = x_T
    for i in range(7):
        t = torch.full((6,), 6 - i)
        x = spaced.p_sample(model, x, t, noise=z[i])["sample"]
    torch.testing.assert_close(x, whole, rtol=0, atol=PROMISE)
    assert math.isclose(spaced.alphas_cumprod[-1], diffusion.alphas_cumprod[-1], rel_tol=PROMISE)


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)
