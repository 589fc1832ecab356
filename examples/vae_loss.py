"""Train a VAE with a known optimum, with the KL and the sample of z in one fused pass.

    python examples/vae_loss.py

The data are Gaussian, x = W z + noise, and encoder and decoder are linear. The bound is then tight
at the optimum: it equals the mean log-density of the data under their true distribution.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

import diffcore
from diffcore.vae import elbo

DIM, LATENT = 8, 2


def main(steps: int) -> tuple[float, float]:
    """Train; return the bound and its upper limit, the log-density of the data, in nats."""
    torch.manual_seed(0)
    weight = torch.randn(DIM, LATENT)

    encoder, decoder = nn.Linear(DIM, LATENT), nn.Linear(LATENT, DIM)
    logvar = nn.Parameter(torch.zeros(LATENT))  # a linear model's posterior has one variance
    parameters = [*encoder.parameters(), *decoder.parameters(), logvar]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)

    for step in range(steps):
        x = torch.randn(512, LATENT) @ weight.T + torch.randn(512, DIM)
        mean = encoder(x)
        z, kl = diffcore.reparameterize_kl(mean, logvar.expand_as(mean).contiguous())
        loss = (0.5 * (x - decoder(z)).square().sum(1) + kl).mean()  # L1 + L2 of the lecture
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 0:
            print(f"step {step:5d}  L1 + L2 {loss.item():.3f}")

    with torch.no_grad():
        x = torch.randn(100_000, LATENT) @ weight.T + torch.randn(100_000, DIM)
        mean = encoder(x)
        posterior_logvar = logvar.expand_as(mean).contiguous()
        z = diffcore.reparameterize(mean, posterior_logvar)
        bound = elbo(x, decoder(z), mean, posterior_logvar).mean().item()
    bound -= 0.5 * DIM * math.log(2 * math.pi)  # the constant that L1 leaves out
    covariance = weight @ weight.T + torch.eye(DIM)
    truth = torch.distributions.MultivariateNormal(torch.zeros(DIM), covariance)
    density = truth.log_prob(x).mean().item()
    print(f"bound {bound:.3f} nats, log-density of the data {density:.3f} nats")
    return bound, density


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    main(parser.parse_args().steps)
