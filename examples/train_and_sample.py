"""Train a DDPM on the points of a ring in ten lines, and sample it with DDIM.

    python examples/train_and_sample.py

Two-dimensional data keep the run to seconds. For images only the network changes.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import diffcore


class Denoiser(nn.Module):
    """Predicts the noise in x_t; the timestep input is encoded in sines and cosines."""

    def __init__(self, num_timesteps: int, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 ** torch.arange(6) * math.pi / num_timesteps)
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 12, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map points [B, 2] and timesteps [B] to noise [B, 2]."""
        angles = t[:, None] * self.frequencies
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], dim=1))


def ring(count: int) -> Tensor:
    """Sample points [count, 2] near a circle of radius 1."""
    angle = 2 * math.pi * torch.rand(count)
    radius = 1 + 0.05 * torch.randn(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def main(steps: int) -> float:
    """Train, sample, and return the mean distance of the samples from the circle."""
    torch.manual_seed(0)
    betas = diffcore.make_betas("linear", 200, scale_to_1000=True)
    diffusion = diffcore.GaussianDiffusion(betas, clip_sample_range=1.5)
    model = Denoiser(diffusion.num_timesteps)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)

    for step in range(steps):
        x = ring(256)
        t = torch.randint(diffusion.num_timesteps, (len(x),))
        loss = diffusion.training_losses(model, x, t)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}")

    samples = diffusion.ddim_sample_loop(model, (2000, 2), num_steps=50)
    distance = (samples.norm(dim=1) - 1).abs().mean().item()
    print(f"mean distance of 2,000 DDIM samples from the circle: {distance:.3f} (data: 0.040)")
    return distance


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    main(parser.parse_args().steps)
