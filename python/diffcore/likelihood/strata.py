"""Strata of timesteps: the ranges from which the estimator of the bound samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore._kernels.noise import pairs
from diffcore.noise import PhiloxNoise
from diffcore.reference import philox


@dataclass(frozen=True)
class Strata:
    """Ranges of consecutive timesteps; each draw visits one timestep of each. The first is t = 0.

    Attributes:
        starts: The first timestep of each stratum, int64 ``[S]``.
        sizes: The number of timesteps of each stratum, int64 ``[S]``.
    """

    starts: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, log_snr: Tensor, count: int) -> Strata:
        """Timestep 0, and ``count`` strata of the others with about equal shares of the bound.

        The share of a timestep is the weight 1/2 expm1(log snr_{t-1} - log snr_t) of the squared
        noise error in its term.

        Args:
            log_snr: ``[T]``, decreasing.
            count: Number of strata besides timestep 0, at most T - 1.

        Returns:
            ``count + 1`` strata.

        Source:
            Kingma et al. 2021 (arXiv 2107.00630) eq. 13.
        """
        weights = torch.expm1(log_snr[:-1] - log_snr[1:])
        finite = weights[weights.isfinite()]
        # With no signal at the last timestep its weight is infinite; its term is finite.
        weights = weights.clamp(max=finite.max() if len(finite) else 1.0)
        starts, last = [0], len(log_snr)
        t, left = 1, weights.sum().item()
        for k in range(count, 0, -1):
            starts.append(t)
            share, taken = left / k, 0.0
            while True:
                weight = weights[t - 1].item()
                taken, t = taken + weight, t + 1
                # Each of the k - 1 strata that follow needs a timestep; the last takes the rest.
                if k == 1:
                    t = last
                    break
                if last - t <= k - 1 or taken + 0.5 * weights[t - 1].item() > share:
                    break
            left -= taken
        edges = torch.tensor([*starts, last], device=log_snr.device)
        return cls(edges[:-1], edges.diff())

    def timesteps(self, noise: PhiloxNoise, shape: tuple[int, int]) -> Tensor:
        """Sample timesteps of each stratum, uniformly and independently.

        Args:
            noise: A noise key, which gives them as it gives ``PhiloxNoise.timesteps``.
            shape: (samples, draws).

        Returns:
            int64 ``[B, S, draws]``, on the CPU.
        """
        batch, draws = shape
        if bool((self.sizes == 1).all()):
            return self.starts.reshape(1, -1, 1).repeat(batch, 1, draws)
        bounds = self.sizes.repeat_interleave(draws)
        words = pairs(noise._parts, 0, len(bounds), batch, philox.INTEGER_SALT, bounds.device)
        index = philox.integers(words, bounds).reshape(batch, -1, draws)
        return self.starts.unsqueeze(1) + index
