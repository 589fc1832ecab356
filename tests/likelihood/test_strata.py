"""The strata of timesteps against a search over every place where one could end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffcore.likelihood.strata import Strata


def best_ends(weights: list[float], count: int) -> list[int]:
    """Where each stratum ends if its weight is to be next to an even share of what is left."""
    ends, start, total = [], 0, sum(weights)
    for k in range(count, 0, -1):
        allowed = range(start + 1, len(weights) - k + 2)  # at least one for each of the others
        off = {end: abs(sum(weights[start:end]) - total / k) for end in allowed}
        ends.append(len(weights) if k == 1 else min(off, key=off.__getitem__))
        total -= sum(weights[start : ends[-1]])
        start = ends[-1]
    return ends


def falling(weights: Tensor) -> Tensor:
    """The log signal-to-noise ratios whose terms have these weights."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), -torch.log1p(weights).cumsum(0)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 3, 8, 30])
def test_each_stratum_is_next_to_an_even_share(seed: int, size: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for spread in (0.3, 3.0):  # of the logarithms of the weights
        weights = (spread * torch.randn(size, generator=random, dtype=torch.float64)).exp()
        for count in range(1, size + 1):
            strata = Strata.of(falling(weights), count)
            ends = [1 + end for end in best_ends(weights.tolist(), count)]
            assert strata.starts.tolist() == [0, 1, *ends[:-1]]
            assert (strata.starts + strata.sizes).tolist() == [1, *ends]


def test_weight_at_one_end_leaves_a_timestep_for_every_other_stratum() -> None:
    heavy_last = torch.tensor([1e-6, 1e-6, 1e-6, 1e-6, 10.0], dtype=torch.float64)
    assert Strata.of(falling(heavy_last), 3).sizes.tolist() == [1, 3, 1, 1]
    assert Strata.of(falling(heavy_last.flip(0)), 3).sizes.tolist() == [1, 1, 2, 2]
    no_signal = torch.tensor([0.0, -1.0, -2.0, -math.inf], dtype=torch.float64)
    assert Strata.of(no_signal, 3).sizes.tolist() == [1, 1, 1, 1]
