"""A diffusion, a model and pixels, small enough to count every bit."""

from __future__ import annotations

import dataclasses
import math

import torch

from diffcore import BitsPerDim, GaussianDiffusion, PhiloxNoise, make_betas

T, N = 25, 12
DIFFUSION = GaussianDiffusion(make_betas("linear", T, scale_to_1000=True))
KEY = PhiloxNoise(5, sample_ids=100, stream=7)


def data(count=N, dtype=torch.float32):
    k = torch.randint(256, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1))
    return (k.double() / 127.5 - 1).to(dtype)


def model(x, t):
    time = (t.to(x) / T).reshape(-1, 1, 1, 1)
    return 0.8 * x + 0.3 * torch.sin(3 * x + time)


def same_bits(left, right, but=()):
    """The same results, in all numbers that users read (``but`` for those named)."""
    for field in dataclasses.fields(BitsPerDim):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), field.name
        elif field.name not in ("sums", *but):
            assert a == b or (math.isnan(a) and math.isnan(b)), field.name
