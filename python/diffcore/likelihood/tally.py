"""Running moments and sums over the batches of ``bits_per_dim``, float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffcore.likelihood.strata import Strata


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of rows, merged batch by batch (Chan et al.)."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def zero(cls, columns: int) -> Moments:
        """The moments of no rows."""
        zeros = torch.zeros(columns, dtype=torch.float64, device="cpu")
        return cls(0, zeros, zeros.clone())

    def add(self, rows: Tensor) -> None:
        """Add rows, float64 ``[B, columns]``."""
        count = self.count + len(rows)
        mean = rows.mean(dim=0)
        delta = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + delta**2 * (self.count * len(rows) / count)
        self.mean += delta * (len(rows) / count)
        self.count = count

    def variance_of_mean(self) -> Tensor:
        """The unbiased variance over the rows, divided by their number; nan for one row."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return self.squares / (self.count - 1) / self.count


@dataclass
class Tally:
    """Sums over all batches so far, float64.

    Attributes:
        strata: The strata of the estimator.
        num_timesteps: T.
        kind: Shape and dtype of a sample; empty before the first batch.
        batches: Number of batches.
        calls: Number of model calls.
        digest: Digest of the batches; computed only if there is a checkpoint.
        totals: Moments of (total, prior) of a sample, in bits per dimension.
        parts: Moments of each stratum's share of a sample's total.
        within: Sum over the samples of the variance between the draws.
        visits, terms, xstart_mse, mse: Sums for each timestep, ``[T]``.
    """

    strata: Strata
    num_timesteps: int
    kind: list[Any] = field(default_factory=list)
    batches: int = 0
    calls: int = 0
    digest: str = ""

    def __post_init__(self) -> None:
        """Start with empty sums."""
        self.totals = Moments.zero(2)
        self.parts = Moments.zero(len(self.strata.starts))
        zero = torch.zeros(self.num_timesteps, dtype=torch.float64, device="cpu")
        self.within = zero[:1].clone()
        self.visits, self.terms, self.xstart_mse, self.mse = (zero.clone() for _ in range(4))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.totals.count

    def check_kind(self, kind: list[Any]) -> None:
        """Check that all samples have one shape and dtype.

        Args:
            kind: Shape and dtype of the samples of a batch.

        Raises:
            ValueError: They differ from those of the first batch.
        """
        self.kind = self.kind or kind
        if self.kind != kind:
            raise ValueError(
                f"data must have one shape and dtype in all batches, {self.kind}, got {kind}"
            )

    def add(self, prior: Tensor, t: Tensor, terms: Tensor, xstart_mse: Tensor, mse: Tensor) -> None:
        """Add a batch.

        Args:
            prior: L_T in bits per dimension, float64 ``[B]`` on the CPU.
            t: The timesteps visited, int64 ``[B, S, draws]`` on the CPU.
            terms: L_t in bits per dimension, float64 ``[B, S, draws]`` on the CPU.
            xstart_mse: Mean squared error of the predicted x_0, float64 ``[B, S, draws]`` on the
                CPU.
            mse: Mean squared error of the predicted noise, float64 ``[B, S, draws]`` on the CPU.
        """
        draws = t.shape[2]
        sizes = self.strata.sizes.double()
        parts = sizes * terms.mean(dim=2)
        self.totals.add(torch.stack([parts.sum(dim=1) + prior, prior], dim=1))
        self.parts.add(parts)
        if draws > 1:
            self.within += (sizes**2 * terms.var(dim=2)).sum() / draws
        at = t.flatten()
        for sums, values in (
            (self.visits, torch.ones_like(terms)),
            (self.terms, terms),
            (self.xstart_mse, xstart_mse),
            (self.mse, mse),
        ):
            sums.index_add_(0, at, values.flatten())
        self.batches += 1

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, as a checkpoint holds them."""
        moments = {"totals": self.totals, "parts": self.parts}
        named = {f"{k}.{n}": getattr(m, n) for k, m in moments.items() for n in ("mean", "squares")}
        plain = ("within", "visits", "terms", "xstart_mse", "mse")
        return {**named, **{name: getattr(self, name) for name in plain}}
