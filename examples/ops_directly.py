"""Write a sampler with the functional ops: add noise, predict, step.

    python examples/ops_directly.py

The data are N(m, s^2 I), so the best prediction of x_0 from x_t is linear and needs no training.
DDPM then returns the mean and, nearly, the standard deviation of the data.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import diffcore

MEAN, STD = 0.3, 0.2


def best_x0(x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return E[x_0 | x_t] for data N(MEAN, STD^2)."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return (MEAN + gain * (x_t - alpha * MEAN)).float()


def main(count: int) -> tuple[float, float]:
    """Add noise, recover it, sample; return mean and standard deviation of the samples."""
    torch.manual_seed(0)
    schedule = diffcore.NoiseSchedule.from_betas(diffcore.make_betas("linear", 1000))
    alpha, sigma = schedule.alpha, schedule.sigma  # float64 [1000]

    # Forward: one launch adds noise to every sample at its own timestep.
    x0, noise = MEAN + STD * torch.randn(count, 16), torch.randn(count, 16)
    t = torch.randint(1000, (count,))
    x_t = diffcore.q_sample(x0, t, noise, torch.stack([alpha, sigma], dim=1))
    epsilon = diffcore.predict_epsilon(x0, x_t, alpha[t], sigma[t], prediction_type="sample")
    print(f"noise recovered from x_0 and x_t: error {(epsilon - noise).abs().mean():.1e}")

    # Reverse: Algorithm 2 of DDPM, one launch per step; the model predicts x_0.
    x = torch.randn(count, 16)
    for i in range(999, 0, -1):
        x = diffcore.ddpm_step(
            best_x0(x, alpha[i], sigma[i]),
            x,
            alpha[i],
            sigma[i],
            alpha[i - 1],
            sigma[i - 1],
            noise=torch.randn_like(x),
            prediction_type="sample",
        )
    x = best_x0(x, alpha[0], sigma[0])
    mean, std = x.mean().item(), x.std().item()
    print(f"data: mean {MEAN}, std {STD}; samples: mean {mean:.3f}, std {std:.3f}")
    return mean, std


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=4000)
    main(parser.parse_args().count)
