"""A schedule and models small enough to check by hand."""

from __future__ import annotations

import torch

from diffcore.schedules import make_betas

EPS = torch.finfo(torch.float64).eps
BETAS = make_betas("linear", 20, beta_end=0.5)


def half(x, t):
    return 0.5 * x


class Recorder:
    """A model that remembers what it was asked."""

    def __init__(self):
        self.t, self.dtype = [], []

    def __call__(self, x, t, *, scale=0.5):
        self.t.append(t)
        self.dtype.append(x.dtype)
        return scale * x


class Says:
    """A model of two halves: what it predicts, half of x, and a v, for each timestep or for all."""

    def __init__(self, v, scale=0.5):
        self.v, self.scale = torch.as_tensor(v, dtype=torch.float64), scale

    def __call__(self, x, t):
        v = self.v[t].view(-1, *[1] * (x.ndim - 1)) if self.v.ndim == 1 else self.v
        return torch.cat([self.scale * x, v.to(x.dtype).expand(x.shape)], dim=1)
