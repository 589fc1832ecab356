"""Bounds of a linear Gaussian VAE, whose log p(x) is known, constants included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffcore import ops
from diffcore.vae import elbo, elbo_terms, importance_weighted_bound, vae_loss

DIM, LATENT, STD = 3, 2, 0.7


def world(count=5, seed=0):
    """x of p(z) = N(0, I), p(x | z) = N(W z, s² I), its exact posterior and log-density."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(DIM, LATENT, dtype=torch.float64, generator=generator)
    x = torch.randn(count, DIM, dtype=torch.float64, generator=generator)
    eye = torch.eye(LATENT, dtype=torch.float64)
    covariance = torch.linalg.inv(eye + w.T @ w / STD**2)
    mean = x @ w @ covariance / STD**2
    marginal = w @ w.T + STD**2 * torch.eye(DIM, dtype=torch.float64)
    zero = torch.zeros(DIM, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(zero, marginal).log_prob(x)
    return w, x, mean, covariance, density


def test_elbo_terms_are_the_elbo_with_its_constant():
    w, x, mean, _, _ = world()
    logvar = torch.full_like(mean, -1.0)
    recon = mean @ w.T
    kl = ops.standard_normal_kl(mean, logvar, reduction="sample")
    found = elbo_terms(x, recon, kl, decoder_std=STD)
    likelihood = torch.distributions.Normal(recon, STD).log_prob(x).sum(1)
    torch.testing.assert_close(found["log_likelihood"], likelihood, rtol=1e-13, atol=0)
    torch.testing.assert_close(found["elbo"], likelihood - kl, rtol=1e-13, atol=0)
    assert torch.equal(found["kl"], kl)
    bits = -(likelihood - kl) / (DIM * math.log(2))
    torch.testing.assert_close(found["bpd"], bits, rtol=1e-13, atol=0)
    constant = DIM * math.log(STD * math.sqrt(2 * math.pi))
    plain = elbo(x, recon, mean, logvar, decoder_std=STD)
    torch.testing.assert_close(found["elbo"], plain - constant, rtol=1e-13, atol=0)


def test_the_exact_posterior_gives_log_p_with_any_number_of_samples():
    # A diagonal posterior is exact where W has orthogonal columns.
    generator = torch.Generator().manual_seed(2)
    q, _ = torch.linalg.qr(torch.randn(DIM, LATENT, dtype=torch.float64, generator=generator))
    w = q * torch.tensor([1.5, 0.4], dtype=torch.float64)
    x = torch.randn(6, DIM, dtype=torch.float64, generator=generator)
    variance = 1 / (1 + w.square().sum(0) / STD**2)
    mean, logvar = x @ w * variance / STD**2, variance.log().expand(6, LATENT)
    marginal = w @ w.T + STD**2 * torch.eye(DIM, dtype=torch.float64)
    zero = torch.zeros(DIM, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(zero, marginal).log_prob(x)
    for k in (1, 4):
        noise = torch.randn(k, *mean.shape, dtype=torch.float64, generator=generator)
        z = mean + (0.5 * logvar).exp() * noise
        found = importance_weighted_bound(x, z @ w.T, z, mean, logvar, decoder_std=STD)
        torch.testing.assert_close(found, density, rtol=0, atol=1e-12)


def grid(count):
    """Nodes ``[count², 2]`` of two standard normals, and their weights."""
    at, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(count))
    weight = weight / weight.sum()
    nodes = torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1).reshape(-1, 2)
    return nodes, torch.outer(weight, weight).flatten()


def test_one_sample_is_an_elbo_in_expectation():
    w, x, mean, covariance, density = world()
    mean, logvar = mean + 0.2, covariance.diagonal().log().expand_as(mean) + 0.3
    nodes, weights = grid(3)  # quadratic in the noise
    bounds, terms = 0, 0
    for node, weight in zip(nodes, weights, strict=True):
        z = mean + (0.5 * logvar).exp() * node
        kl = ops.standard_normal_kl(mean, logvar.contiguous(), reduction="sample")
        bounds = bounds + weight * importance_weighted_bound(
            x, (z @ w.T)[None], z[None], mean, logvar, decoder_std=STD
        )
        terms = terms + weight * elbo_terms(x, z @ w.T, kl, decoder_std=STD)["elbo"]
    torch.testing.assert_close(bounds, terms, rtol=1e-12, atol=0)
    assert (bounds < density).all()


def test_it_tightens_with_the_number_of_samples_and_is_unbiased_for_p():
    w, x, mean, covariance, density = world(count=3)
    mean, logvar = mean + 0.2, covariance.diagonal().log().expand_as(mean) + 0.3
    repeats, most = 4000, 64
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(most, repeats, 3, LATENT, dtype=torch.float64, generator=generator)
    z = (mean + (0.5 * logvar).exp() * noise).flatten(1, 2)
    many = [v.expand(repeats, *v.shape).flatten(0, 1) for v in (x, mean, logvar)]

    def bound(k):
        found = importance_weighted_bound(
            many[0], z[:k] @ w.T, z[:k], many[1], many[2], decoder_std=STD
        )
        return found.reshape(repeats, 3)

    means = torch.stack([bound(k).mean(0) for k in (1, 2, 8, 64)])
    assert (means.diff(dim=0) > 0).all()
    assert (means < density).all()
    assert ((density - means)[3] < 0.05 * (density - means)[0]).all()
    ratio = (bound(64) - density).exp()  # E of the mean weight is p(x)
    error = ratio.std(0) / math.sqrt(repeats)
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()


def test_it_has_gradients():
    w, x, mean, covariance, _ = world()
    mean = mean.clone().requires_grad_()
    logvar = covariance.diagonal().log().expand_as(mean).clone().requires_grad_()
    noise = torch.randn(3, *mean.shape, dtype=torch.float64)

    def bound(mean, logvar):
        z = mean + (0.5 * logvar).exp() * noise
        return importance_weighted_bound(x, z @ w.T, z, mean, logvar, decoder_std=STD)

    assert torch.autograd.gradcheck(bound, (mean, logvar))


def test_the_deviation_of_the_decoder_may_be_trained():
    torch.manual_seed(2)
    x, z, mean = (torch.randn(*s, dtype=torch.float64) for s in ((4, 3), (2, 4, 5), (4, 5)))
    recon = torch.randn(2, 4, 3, dtype=torch.float64)
    kl = torch.rand(4, dtype=torch.float64)

    def terms(std):
        return elbo_terms(x, recon[0], kl, decoder_std=std)["elbo"]

    def weighted(std):
        return importance_weighted_bound(x, recon, z, mean, mean, decoder_std=std)

    for f in (terms, weighted):
        torch.testing.assert_close(f(torch.tensor(0.6, dtype=torch.float64)), f(0.6))
        for shape in ((), (1,), (1, 1)):
            std = torch.full(shape, 0.6, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(f, std)
        with pytest.raises(ValueError, match=r"decoder_std must be .* got torch.float32 \(2,\)"):
            f(torch.ones(2))


def test_errors_name_the_argument():
    x, z, mean = torch.zeros(4, 3), torch.zeros(2, 4, 5), torch.zeros(4, 5)
    good = {"x": x, "x_recon": torch.zeros(2, 4, 3), "z": z, "mean": mean, "logvar": mean}
    importance_weighted_bound(**good)
    for name, value in (
        ("x_recon", x),
        ("z", z[..., :4]),
        ("logvar", torch.zeros(5)),
        ("x_recon", torch.zeros(3, 4, 3)),
        ("z", torch.zeros(0, 4, 5)),
    ):
        with pytest.raises(ValueError, match=name):
            importance_weighted_bound(**{**good, name: value})
    one = {"x": x[:1], "x_recon": torch.zeros(1, 1, 3), "z": z[:1], "mean": mean, "logvar": mean}
    with pytest.raises(ValueError, match="x must have the batch of mean, 4, got shape"):
        importance_weighted_bound(**one)
    with pytest.raises(TypeError, match=r"mean must be a torch\.Tensor"):
        importance_weighted_bound(**{**good, "mean": 0.0})
    with pytest.raises(ValueError, match="decoder_std"):
        importance_weighted_bound(**good, decoder_std=0)
    with pytest.raises(ValueError, match=r"kl must be a tensor of shape \(4,\)"):
        elbo_terms(x, x, torch.zeros(3))
    assert vae_loss(x, x, torch.zeros(4))["loss"].sum() == 0
