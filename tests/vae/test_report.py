"""The report of a VAE's dimensions, and the bound of a VAE with a learned prior."""

from __future__ import annotations

import math

import pytest
import torch

from diffcore.vae import (
    DiagonalGaussianDistribution,
    LatentReport,
    elbo_terms,
    latent_bound,
    latent_report,
)

G = torch.Generator().manual_seed(9)


def test_the_report_of_a_batch_and_of_parts() -> None:
    scale = torch.tensor([[1.0, 0.0, 0.05, 0.3]], dtype=torch.float64)
    mean = scale * torch.randn(30, 3, 4, generator=G, dtype=torch.float64) + 7
    logvar = torch.randn(30, 3, 4, generator=G, dtype=torch.float64)
    found = latent_report(mean, logvar)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    torch.testing.assert_close(found.kl, kl.mean(0), rtol=1e-12, atol=0)
    variance = mean.var(0, correction=0)
    torch.testing.assert_close(found.variance, variance, rtol=1e-12, atol=1e-14)
    assert torch.equal(found.active(), variance > 0.01)
    assert found.num_active() == 6  # the columns of 1 and 0.3
    assert found.num_active(0.0005) == 9
    parts = [latent_report(mean[a:b], logvar[a:b]) for a, b in ((0, 5), (5, 6), (6, 30))]
    both = LatentReport.combine(parts)
    assert both.samples == 30
    for name in ("kl", "mean", "variance"):
        torch.testing.assert_close(
            getattr(both, name), getattr(found, name), rtol=1e-12, atol=1e-12
        )
    assert str(both) == f"KL {kl.mean(0).sum():.4f} nats, 6 of 12 dimensions active (30 samples)"
    half = latent_report(mean.float(), logvar.float())
    assert half.kl.dtype == torch.float64


def test_refusals_of_reports() -> None:
    one, other = (latent_report(*torch.randn(2, 3, n)) for n in (4, 5))
    for call, kind, message in (
        (lambda: LatentReport.combine([]), ValueError, "reports must have at least one entry"),
        (
            lambda: LatentReport.combine([one, other]),
            ValueError,
            "reports must have one shape, got",
        ),
        (
            lambda: LatentReport.combine([one, 3]),
            TypeError,
            "reports must be LatentReport, got int",
        ),
        (
            lambda: latent_report(*torch.randn(2, 0, 4)),
            ValueError,
            "mean must have at least one sa",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()


def normal(mean: float, std: float) -> torch.distributions.Normal:
    return torch.distributions.Normal(*torch.tensor([mean, std], dtype=torch.float64))


def world(factor: float):
    """A linear VAE with the prior N(m, s²) of factor z, its exact posterior, and log p(x)."""
    n, (m, s, std) = 6, (0.4, 1.7, 0.6)
    w = torch.tensor([1.3, -0.8, 2.0], dtype=torch.float64)
    x = torch.randn(n, 3, generator=G, dtype=torch.float64)
    m, s = m / factor, s / factor  # of z
    precision = 1 / s**2 + w**2 / std**2
    mean, logvar = (m / s**2 + w * x / std**2) / precision, -precision.log().expand(n, 3)
    marginal = torch.distributions.Normal(w * m, (w**2 * s**2 + std**2).sqrt())
    return w, x, mean, logvar, std, marginal.log_prob(x).sum(1)


@pytest.mark.parametrize("factor", [1.0, 0.18215])
def test_the_latent_bound_is_log_p_of_the_exact_posterior(factor: float) -> None:
    w, x, mean, logvar, std, log_p = world(factor)
    posterior = DiagonalGaussianDistribution(torch.cat([mean, logvar], 1))
    # Both terms are quadratic in z: two nodes mean ± std in each dimension are exact in the mean.
    found = []
    for sign in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3):
        z = mean + posterior.std * sign
        prior = normal(0.4, 1.7).log_prob(factor * z).sum(1)
        terms = latent_bound(x, w * z, posterior, prior, scaling_factor=factor, decoder_std=std)
        right = torch.distributions.Normal(w * z, std).log_prob(x).sum(1)
        torch.testing.assert_close(terms["log_likelihood"], right, rtol=1e-12, atol=1e-12)
        found.append(terms["elbo"])
    torch.testing.assert_close(torch.stack(found).mean(0), log_p, rtol=0, atol=1e-12)
    bits = -terms["elbo"] / (3 * math.log(2))
    torch.testing.assert_close(terms["bpd"], bits, rtol=1e-14, atol=0)
    entropy = torch.distributions.Normal(mean, posterior.std).entropy().sum(1)
    torch.testing.assert_close(terms["entropy"], entropy, rtol=1e-13, atol=0)


def test_with_the_standard_prior_it_is_the_elbo_with_a_sampled_prior_term() -> None:
    w, x, mean, logvar, _, _ = world(1.0)
    posterior = DiagonalGaussianDistribution(torch.cat([mean, logvar], 1))
    # E_q log N(z; 0, 1) in closed form; KL = -entropy - that.
    prior = (-0.5 * (mean**2 + logvar.exp() + math.log(2 * math.pi))).sum(1)
    for options in ({"decoder": "laplace"}, {"decoder_std": 0.3}):
        found = latent_bound(x, w * mean, posterior, prior, **options)
        right = elbo_terms(x, w * mean, posterior.kl(), **options)
        torch.testing.assert_close(found["elbo"], right["elbo"], rtol=1e-12, atol=1e-12)


def test_refusals_of_the_latent_bound() -> None:
    _, x, mean, logvar, _, log_p = world(1.0)
    parameters = torch.cat([mean, logvar], 1)
    q, point = (DiagonalGaussianDistribution(parameters, deterministic=d) for d in (False, True))
    for call, kind, message in (
        (lambda: latent_bound(x, x, point, log_p), ValueError, "posterior must have a variance, "),
        (
            lambda: latent_bound(x, x, mean, log_p),
            TypeError,
            "posterior must be a DiagonalGaussian",
        ),
        (
            lambda: latent_bound(x, x, q, log_p[:2]),
            ValueError,
            r"log_prior must have the .* \(2,\)",
        ),
        (
            lambda: latent_bound(x, x, q, -1.0),
            TypeError,
            "log_prior must be a floating-point tenso",
        ),
        (
            lambda: latent_bound(x, x, q, log_p, scaling_factor=0.0),
            ValueError,
            "scaling_factor must be above 0, got 0.0",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
