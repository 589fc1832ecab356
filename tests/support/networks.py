"""A small network, and the tables to sample from it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffcore import make_betas, solvers
from diffcore.schedules import NoiseSchedule
from diffcore.sigmas import get_sigmas_karras

SHAPE = (3, 2, 8, 8)
SCHEDULE = NoiseSchedule.from_betas(make_betas("linear", 1000))
LEVELS = solvers.NoiseLevels.from_schedule(SCHEDULE, list(range(951, 0, -100)))
TABLES = {
    "ddpm": solvers.ddpm_table(LEVELS, clip_range=1.0),
    "dpmpp_2m": solvers.dpmpp_2m_table(LEVELS),
    "unipc": solvers.unipc_table(LEVELS, order=3),
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde_table(LEVELS),
    "heun with churn": solvers.heun_table(get_sigmas_karras(6, 0.1, 10.0), s_churn=2.0),
}


class Network(nn.Module):
    """Of x, t and a class."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.classes = nn.Embedding(4, 2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told = torch.cos(t.to(x.dtype) / 300) + self.classes(y).sum(1).to(x.dtype)
        return torch.tanh(self.conv(x)) * told.reshape(-1, 1, 1, 1)


def options(device: str) -> dict[str, Any]:
    return {
        "guidance_scale": 3.0,
        "model_kwargs": {"y": torch.tensor([0, 1, 2], device=device)},
        "uncond_kwargs": {"y": torch.full((3,), 3, device=device)},
    }
