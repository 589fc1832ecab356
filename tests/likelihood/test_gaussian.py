"""The bound in a world with known answers: data N(m, s²), whose best model is linear.

All terms are then quadratic in (x_0, noise), so that three nodes of Gauss-Hermite for each, passed
as samples with weights, give the expectation and no estimate. The truth is in 40 digits.
"""

from __future__ import annotations

import functools
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch

from diffcore import GaussianDiffusion
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.likelihood import vdm_bound
from support.worlds import DIGITS, World, column

MEAN, T = 0.3, 1000


def nodes(std):
    """Samples of x_0 and noise ``[9, 1]``, and their weights."""
    at, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(3))
    weight = weight / weight.sum()
    x, noise = torch.meshgrid(MEAN + std * at, at, indexing="ij")
    return x.reshape(-1, 1), noise.reshape(-1, 1), torch.outer(weight, weight).flatten()


BETAS = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
# float64 betas are the schedule; the library and the truth start from the same numbers.
WORLDS = {std: World(MEAN, std, BETAS) for std in (0.25, 0.5)}
stds = pytest.mark.parametrize("std", sorted(WORLDS))


@functools.cache
def measured(std, kind, prediction_type="epsilon", dtype=torch.float64):
    """calc_bpd_loop in nats, its expectation over the nodes."""
    world = WORLDS[std]
    variance_type, logvar = kind, None
    if kind == "optimal":
        variance_type = "learned"
        logvar = column([mpmath.log(v) for v in world.variance(kind)])
    diffusion = GaussianDiffusion(BETAS, prediction_type, variance_type)
    x, noise, weights = nodes(std)
    found = diffusion.calc_bpd_loop(
        world.model(prediction_type, logvar),
        x.to(dtype),
        noise=noise.to(dtype),
        decoder="gaussian",
        clip_denoised=False,
    )
    assert all(value.dtype == dtype for value in found.values())
    bits = ("total_bpd", "prior_bpd", "vb")
    return {
        name: torch.tensordot(weights, value.double(), 1) * (math.log(2) if name in bits else 1)
        for name, value in found.items()
    }


@stds
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "optimal"])
def test_every_term_and_the_total_are_the_closed_form(std, kind):
    world, found = WORLDS[std], measured(std, kind)
    terms, prior = column(world.terms(kind)), float(world.prior())
    assert found["vb"].shape == (T,)
    assert (found["vb"] - terms).abs().max() <= 1e-12
    assert (found["vb"] - terms).abs().div(terms.abs()).max() <= 1e-10
    assert abs(found["prior_bpd"].item() - prior) <= 1e-12
    with mpmath.workdps(DIGITS):
        total = float(sum(world.terms(kind)) + world.prior())
    assert abs(found["total_bpd"].item() - total) <= 1e-12
    with mpmath.workdps(DIGITS):
        snr = column([b / (1 - b) for b in world.bar])
    errors = column(world.r)
    torch.testing.assert_close(found["xstart_mse"], errors, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["mse"], errors * snr, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_any_prediction_gives_the_same_bound(prediction_type):
    terms = column(WORLDS[0.25].terms("fixed_small"))
    found = measured(0.25, "fixed_small", prediction_type)["vb"]
    assert (found - terms).abs().max() <= 1e-11


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_float32_is_right_at_every_timestep(kind):
    terms = column(WORLDS[0.25].terms(kind))
    # Of x_0, because a rounded epsilon says x_0 to sigma/alpha ulps only.
    found = measured(0.25, kind, "sample", torch.float32)["vb"]
    assert ((found - terms).abs() <= 1e-5 * terms.abs()).all()


@stds
def test_entropy_nll_bound(std):
    world = WORLDS[std]
    entropy = float(world.entropy())
    with mpmath.workdps(DIGITS):
        ideal = float(world.entropy() + world.kl_of_the_end())
    assert abs(measured(std, "optimal")["total_bpd"].item() - ideal) <= 1e-12
    for kind in ("fixed_small", "fixed_large", "optimal"):
        nll = float(world.nll(kind))
        assert entropy <= nll <= measured(std, kind)["total_bpd"].item() + 1e-13
        assert nll > entropy


# ---- continuous time ----------------------------------------------------------------------------

LOW, HIGH = -6.0, 4.0


def vdm_model(std):
    def predict(z, gamma):
        alpha = torch.sigmoid(-gamma).sqrt().reshape(-1, 1)
        sigma = torch.sigmoid(gamma).sqrt().reshape(-1, 1)
        return sigma / (alpha**2 * std**2 + sigma**2) * (z - alpha * MEAN)

    return predict


def continuous(std):
    """Prior, diffusion and reconstruction of the continuous bound, nats."""
    alpha2, sigma2 = 1 / (1 + math.exp(HIGH)), 1 / (1 + math.exp(-HIGH))
    prior = 0.5 * (alpha2 * (MEAN**2 + std**2) + sigma2 - 1 - math.log(sigma2))
    ratio = (1 + std**2 * math.exp(-LOW)) / (1 + std**2 * math.exp(-HIGH))
    return prior, 0.5 * math.log(ratio), 0.5 * (math.log(2 * math.pi) + LOW + 1)


def expected_vdm(std, times, time_weights, **options):
    x, noise, weights = nodes(std)
    many = [v.repeat(len(times), 1) for v in (x, noise)]
    found = vdm_bound(
        vdm_model(std),
        many[0],
        noise=many[1],
        t=times.repeat_interleave(len(x)),
        gamma_min=LOW,
        gamma_max=HIGH,
        decoder="gaussian",
        **options,
    )
    weights = torch.outer(time_weights, weights).flatten()
    parts = found.prior_nats, found.diffusion_nats, found.reconstruction_nats
    return [torch.dot(weights, part).item() for part in parts]


def gauss_legendre(count):
    at, weight = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(count))
    return (at + 1) / 2, weight / 2


@stds
def test_continuous_bound_is_its_closed_form(std):
    for found, truth in zip(expected_vdm(std, *gauss_legendre(60)), continuous(std), strict=True):
        assert abs(found - truth) <= 1e-12


def test_continuous_bound_is_the_limit_of_finite_steps():
    prior, diffusion, reconstruction = continuous(0.25)
    gaps = []
    for count in (50, 100, 200, 400):
        times = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # one in each step
        even = torch.full((count,), 1 / count, dtype=torch.float64)
        found = expected_vdm(0.25, times, even, num_timesteps=count)
        assert abs(found[0] - prior) + abs(found[2] - reconstruction) <= 1e-12
        gaps.append(found[1] - diffusion)
    # More steps are a better bound (Kingma et al. section 4.2), and the gap is of first order.
    for wide, narrow in itertools.pairwise(gaps):
        assert narrow > 0
        assert 1.9 < wide / narrow < 2.1


def test_the_discrete_bound_nears_the_continuous_one():
    """GaussianDiffusion with the same gammas: its L_t are 1/2 expm1(gamma_t - gamma_s) |error|²."""
    count = 400
    gamma = torch.linspace(LOW, HIGH, count, dtype=torch.float64)
    bar = torch.sigmoid(-gamma)
    betas = 1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    diffusion = GaussianDiffusion(betas)
    x, noise, weights = nodes(0.25)
    model = vdm_model(0.25)
    found = diffusion.calc_bpd_loop(
        lambda x, t: model(x, gamma[t]), x, noise=noise, decoder="gaussian", clip_denoised=False
    )
    steps = torch.tensordot(weights, found["vb"], 1)[1:].sum().item() * math.log(2)
    s, t = gamma[:-1], gamma[1:]
    error = 1 / (1 + torch.exp(t) / 0.25**2)
    exact = 0.5 * (torch.expm1(t - s) * error).sum().item()
    assert abs(steps - exact) <= 1e-11
    assert abs(steps - continuous(0.25)[1]) < 0.02 * steps
