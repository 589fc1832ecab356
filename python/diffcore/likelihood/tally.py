"""The sums of ``bits_per_dim``: exact, so that neither batches nor processes change a bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffcore.likelihood.exact import ExactSums, Moments
from diffcore.likelihood.strata import Strata


@dataclass
class Tally:
    """Sums over all samples so far, on the CPU.

    Attributes:
        strata: The strata of the estimator.
        num_timesteps: T.
        kind: Shape and dtype of a sample; empty before the first batch.
        batches: Number of batches.
        calls: Number of model calls.
        digest: Digest of the batches; computed only if there is a checkpoint.
        ids: The sample ids that were counted, int64 tensors.
        totals: Moments of (total, prior) of a sample, in bits per dimension.
        parts: Moments of each stratum's share of a sample's total.
        within: Sum over the samples of the variance between the draws.
        visits: Number of visits of each timestep, float64 ``[T]``.
        terms, xstart_mse, mse: Sums for each timestep.
    """

    strata: Strata
    num_timesteps: int
    kind: list[Any] = field(default_factory=list)
    batches: int = 0
    calls: int = 0
    digest: str = ""
    ids: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with empty sums."""
        self.totals = Moments.zero(2)
        self.parts = Moments.zero(len(self.strata.starts))
        self.within = ExactSums.zero(1)
        self.visits = torch.zeros(self.num_timesteps, dtype=torch.float64, device="cpu")
        self.terms, self.xstart_mse, self.mse = (
            ExactSums.zero(self.num_timesteps) for _ in range(3)
        )

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
        """Add samples.

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
        mean = _row_sum(terms) / draws
        parts = sizes * mean
        self.totals.add(torch.stack([_row_sum(parts) + prior, prior], dim=1))
        self.parts.add(parts)
        if draws > 1:
            variance = _row_sum((terms - mean.unsqueeze(2)).square()) / (draws - 1)
            found = _row_sum(sizes**2 * variance) / draws
            self.within.add(found, torch.zeros_like(found, dtype=torch.int64))
        self.visits.index_add_(0, t.flatten(), torch.ones_like(terms).flatten())
        for sums, values in (
            (self.terms, terms),
            (self.xstart_mse, xstart_mse),
            (self.mse, mse),
        ):
            sums.add(values, t)

    def merge(self, other: Tally) -> None:
        """Add the samples of another tally.

        Args:
            other: A tally of other samples, of the same estimator.

        Raises:
            ValueError: Its samples have another shape or dtype.
        """
        self.check_kind(other.kind or self.kind)
        self.batches += other.batches
        self.calls += other.calls
        self.ids += other.ids
        self.visits += other.visits
        for mine, theirs in ((self.totals, other.totals), (self.parts, other.parts)):
            mine.merge(theirs)
        for name in ("within", "terms", "xstart_mse", "mse"):
            getattr(self, name).merge(getattr(other, name))

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, as a checkpoint holds them."""
        found = {"visits": self.visits}
        for name, moments in (("totals", self.totals), ("parts", self.parts)):
            found[f"{name}.sums"] = moments.sums.digits
            found[f"{name}.squares"] = moments.squares.digits
        for name in ("within", "terms", "xstart_mse", "mse"):
            found[name] = getattr(self, name).digits
        return found


def merged(tallies: Sequence[Tally]) -> Tally:
    """A new tally of the samples of several ones."""
    found = copy.deepcopy(tallies[0])
    for tally in tallies[1:]:
        found.merge(tally)
    return found


def _row_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension, in one order whatever the other dimensions are."""
    return x.cumsum(-1)[..., -1]
