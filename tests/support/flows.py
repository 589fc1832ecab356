"""Flow-matching conventions, and the velocity of a Gaussian world in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffcore import FlowMatching

CONVENTIONS: dict[str, Callable[[], FlowMatching]] = {
    "noise at 1, noise - data": FlowMatching,
    "noise at 0, data - noise": lambda: FlowMatching(noise_at=0, target="data_minus_noise"),
    "noise at 1, data - noise": lambda: FlowMatching(noise_at=1, target="data_minus_noise"),
    "noise at 0, noise - data": lambda: FlowMatching(noise_at=0, target="noise_minus_data"),
    "OT-CFM": lambda: FlowMatching.ot_cfm(0.05),
    "OT-CFM, noise at 1": lambda: FlowMatching(sigma_min=0.05, num_train_timesteps=7.0),
}

MEAN = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
STD = torch.tensor([0.7, 1.5, 0.2], dtype=torch.float64)


def path(flow: FlowMatching, t: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of x_0 and of the noise at t."""
    sigma = t if flow.noise_at == 1 else 1 - t
    return 1 - sigma, flow.sigma_min + (1 - flow.sigma_min) * sigma


def target(flow: FlowMatching, x0: Tensor, noise: Tensor) -> Tensor:
    velocity = (1 - flow.sigma_min) * noise - x0
    return velocity if flow.target == "noise_minus_data" else -velocity


def world(flow: FlowMatching) -> Callable[[Tensor, Tensor], Tensor]:
    """The best velocity where each entry of x_0 is N(MEAN, STD^2): E[target | x_t]."""

    def model(x: Tensor, told: Tensor) -> Tensor:
        alpha, beta = path(flow, told.to(x.dtype).unsqueeze(1) / flow.num_train_timesteps)
        surprise = (x - alpha * MEAN) / (alpha**2 * STD**2 + beta**2)
        return target(flow, MEAN + alpha * STD**2 * surprise, beta * surprise)

    return model
