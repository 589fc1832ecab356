"""Laplace and Bernoulli decoders, and the weight of the KL, against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore.vae import elbo, elbo_terms, importance_weighted_bound, reconstruction_loss, vae_loss

G = torch.Generator().manual_seed(3)
X, RECON = (torch.rand(4, 3, 5, 6, generator=G, dtype=torch.float64) * 2 - 0.5 for _ in range(2))
BITS = (X > 0).double()
KL = torch.arange(4.0, dtype=torch.float64)
SCALES = [0.3, torch.tensor([0.05, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1)]


def summed(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


@pytest.mark.parametrize("scale", SCALES, ids=["number", "channel"])
def test_a_laplace_decoder(scale: float | Tensor) -> None:
    b = torch.as_tensor(scale, dtype=torch.float64).expand(X.shape[1:])
    right = summed(torch.distributions.Laplace(RECON, b).log_prob(X))
    options = {"decoder": "laplace", "decoder_std": scale}
    found = elbo_terms(X, RECON, KL, **options)
    torch.testing.assert_close(found["log_likelihood"], right, rtol=1e-13, atol=0)
    torch.testing.assert_close(found["elbo"], right - KL, rtol=1e-13, atol=0)
    bits = (KL - right) / (90 * math.log(2))
    torch.testing.assert_close(found["bpd"], bits, rtol=1e-13, atol=0)
    loss = reconstruction_loss(X, RECON, **options)
    torch.testing.assert_close(loss, summed((X - RECON).abs() / b), rtol=1e-13, atol=0)
    mean, logvar = torch.randn(2, 4, 7, generator=G, dtype=torch.float64)
    kl = diffcore.standard_normal_kl(mean, logvar, reduction="sample")
    torch.testing.assert_close(
        elbo(X, RECON, mean, logvar, **options), -loss - kl, rtol=1e-13, atol=0
    )


def test_a_bernoulli_decoder() -> None:
    right = summed(torch.distributions.Bernoulli(logits=3 * RECON).log_prob(BITS))
    found = elbo_terms(BITS, 3 * RECON, KL, decoder="bernoulli")
    torch.testing.assert_close(found["log_likelihood"], right, rtol=1e-13, atol=0)
    torch.testing.assert_close(found["elbo"], right - KL, rtol=1e-13, atol=0)
    # Logits of 200 have log-probabilities, too.
    far = reconstruction_loss(torch.ones(1, 1), torch.tensor([[-200.0]]), decoder="bernoulli")
    assert far.item() == 200


@pytest.mark.parametrize("decoder", ["laplace", "bernoulli"])
def test_16_bits_are_summed_in_float32(decoder: str) -> None:
    x, recon = BITS.bfloat16(), RECON.bfloat16()
    right = reconstruction_loss(x.double(), recon.double(), decoder=decoder)
    found = reconstruction_loss(x, recon, decoder=decoder)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("decoder", "x"), [("laplace", X), ("bernoulli", BITS)])
def test_gradients_and_several_samples(decoder: str, x: Tensor) -> None:
    recon = RECON.clone().requires_grad_()
    loss = vae_loss(x, recon, KL, decoder=decoder)["loss"].sum()
    (slope,) = torch.autograd.grad(loss, recon)
    right = (RECON - X).sign() if decoder == "laplace" else torch.sigmoid(RECON) - BITS
    torch.testing.assert_close(slope, right, rtol=1e-13, atol=1e-15)
    mean, logvar, *z = torch.randn(5, 4, 7, generator=G, dtype=torch.float64)
    z, recons = torch.stack(z), torch.stack([RECON, 2 * RECON, -RECON])
    log_q = torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(z).sum(2)
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(2)
    p = {"laplace": lambda r: torch.distributions.Laplace(r, 1.0)}.get(
        decoder, lambda r: torch.distributions.Bernoulli(logits=r)
    )
    log_p = torch.stack([summed(p(r).log_prob(x)) for r in recons])
    expected = (log_p + log_prior - log_q).logsumexp(0) - math.log(3)
    found = importance_weighted_bound(x, recons, z, mean, logvar, decoder=decoder)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_the_weight_of_the_kl() -> None:
    plain = vae_loss(X, RECON, KL)
    each = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    for beta in (4, 0.25, torch.tensor(4.0), torch.tensor([0.5]), each):
        found = vae_loss(X, RECON, KL, beta=beta)
        right = plain["reconstruction"] + torch.as_tensor(beta) * KL
        torch.testing.assert_close(found["loss"], right, rtol=1e-15, atol=0)
        assert found["kl"] is KL


def test_refusals() -> None:
    one = "decoder_std must be 1 with decoder='bernoulli', got "
    for call, message in (
        (
            lambda: reconstruction_loss(X, RECON, decoder="l1"),
            "decoder must be one of 'gaussian', ",
        ),
        (lambda: reconstruction_loss(BITS, X, decoder="bernoulli", decoder_std=0.5), one + "0.5"),
        (
            lambda: reconstruction_loss(BITS, X, decoder="bernoulli", decoder_std=torch.ones(())),
            one + "a tensor",
        ),
        (
            lambda: reconstruction_loss(2 * BITS - 1, X, decoder="bernoulli"),
            r"x must lie in \[0, 1\] with decoder='bernoulli', got values from -1 to 1; pass x / 2",
        ),
        (
            lambda: reconstruction_loss(BITS, X[:2], decoder="bernoulli"),
            "x_recon must have the sha",
        ),
        (
            lambda: vae_loss(X, RECON, KL, beta=torch.ones(3)),
            r"beta must be a number, .* got \(3,\)",
        ),
        (
            lambda: reconstruction_loss(X, RECON, decoder="laplace", decoder_std=0.0),
            "decoder_std must be above 0, got 0.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="beta must be a number, got str"):
        vae_loss(X, RECON, KL, beta="4")
