"""Bits per dimension of a model with a known optimum, from all timesteps and from a few.

    python examples/bits_per_dim.py

The data are Gaussian, so the best network is linear, the best variance is one number per timestep,
and the entropy of the data has a formula. No model can need fewer bits than the entropy. The bound
of this model is the entropy plus KL(q(x_T) || N(0, I)).
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import diffcore

MEAN, STD = 0.3, 0.25


def main(samples: int, strata: int) -> tuple[float, diffcore.BitsPerDim, diffcore.BitsPerDim]:
    """Return the entropy in bits per dimension, the bound, and its estimate."""
    diffusion = diffcore.GaussianDiffusion(
        diffcore.make_betas("linear", 100, scale_to_1000=True), variance_type="learned"
    )
    bar = diffusion.alphas_cumprod
    total = bar * STD**2 + 1 - bar
    variance = STD**2 * (1 - bar) / total  # of x_0 given x_t
    best = diffusion.posterior_variance + diffusion.posterior_mean_coef1**2 * variance
    root, gain, logvar = (c.float() for c in (bar.sqrt(), (1 - bar).sqrt() / total, best.log()))

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, g, v = (c[t].reshape(-1, 1) for c in (root, gain, logvar))
        return torch.cat([g * (x - alpha * MEAN), v.expand_as(x)], dim=1)

    x = MEAN + STD * diffcore.randn((samples, 16), diffcore.PhiloxNoise(1))
    options = {"noise": diffcore.PhiloxNoise(0), "batch_size": samples, "decoder": "gaussian"}
    options["clip_denoised"] = False
    every = diffcore.bits_per_dim(diffusion, model, x, **options)
    few = diffcore.bits_per_dim(diffusion, model, x, timesteps=strata, draws=2, **options)

    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2)
    print(f"entropy of the data      {entropy:.4f} bits/dim")
    print(f"bound, all timesteps     {every}")
    print(f"bound, few timesteps     {few}")
    print(f"  part due to sampling   ± {math.sqrt(few.estimator_variance):.4f}")
    print(f"L_0 {every.terms[0]:.3f}, L_1 {every.terms[1]:.3f}, L_T {every.prior:.2g} bits/dim")
    return entropy, every, few


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--strata", type=int, default=10)
    arguments = parser.parse_args()
    main(arguments.samples, arguments.strata)
