"""The result of ``bits_per_dim``, and how results of parts of the data combine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffcore.likelihood.tally import Tally, merged


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The variational bound of a data set, in bits per dimension. ``str`` gives one line.

    Attributes:
        total: Mean over the samples of ``prior`` plus all T terms.
        standard_error: Standard error of ``total``, from the variance between samples, which
            includes that of their noise and timesteps; nan for one sample.
        prior: Mean of L_T, which does not depend on the model.
        terms: ``[T]``, mean of L_t at the timesteps visited, L_0 first; nan elsewhere.
        visits: ``[T]``, number of visits of each timestep, over all samples.
        xstart_mse: ``[T]``, mean squared error of the predicted x_0; nan where not visited.
        mse: ``[T]``, mean squared error of the implied noise; nan where not visited.
        estimator_variance: The part of ``standard_error``² that is due to sampling noise and
            timesteps, for these data: from the variance between the draws of a sample. With
            ``draws=1`` it is an upper bound, which includes the variance between samples (nan for
            one sample; ``standard_error``² if the noise was a tensor, shared by all timesteps).
        samples: Number of samples.
        dimensions: Number of dimensions of a sample.
        timesteps: ``None`` if every timestep was visited, else the number of strata.
        draws: Draws of each stratum, per sample.
        model_calls: Total number of model calls: ``draws`` (1 + strata) per batch.
        decoder: "discretized" or "gaussian". The second gives a density: compare it only with
            other densities.
        sums: The exact sums that the numbers come from, and the ids of the samples, for
            ``combine``.
        bits: Depth of the pixels, with "discretized".
    """

    total: float
    standard_error: float
    prior: float
    terms: Tensor
    visits: Tensor
    xstart_mse: Tensor
    mse: Tensor
    estimator_variance: float
    samples: int
    dimensions: int
    timesteps: int | None
    draws: int
    model_calls: int
    decoder: str
    sums: Tally = field(repr=False)
    shared_noise: bool = field(default=False, repr=False)
    bits: int = 8

    @classmethod
    def combine(cls, results: Sequence[BitsPerDim]) -> BitsPerDim:
        """The result of all data, from the results of its parts.

        The sums are exact, so that the parts, their number and their order do not matter: if the
        model gives a sample the same bits in every batch, the combined result has the bits of one
        run over all data.

        Args:
            results: At least one result. Each sample id may be in one of them only: parts of the
                data are evaluated with their own ids (``sample_ids=``, or a noise key of the part's
                first sample).

        Returns:
            A ``BitsPerDim``.

        Raises:
            TypeError: An entry is no ``BitsPerDim``.
            ValueError: No results, results of other timesteps, draws, decoder, schedules or shapes,
                or with samples in common.
        """
        if not results:
            raise ValueError("results must have at least one entry, got none")
        for result in results:
            if not isinstance(result, BitsPerDim):
                raise TypeError(f"results must be BitsPerDim, got {type(result).__name__}")
        first = results[0]
        for result in results[1:]:
            _check_settings(first, result)
        sums = merged([result.sums for result in results])
        _check_ids(sums.ids)
        settings = (first.timesteps, first.draws, first.decoder, first.shared_noise, first.bits)
        return result_of(sums, *settings)

    @property
    def nats_per_sample(self) -> float:
        """``total`` in nats, summed over a sample."""
        return self.total * self.dimensions * math.log(2)

    def __str__(self) -> str:
        return (
            f"{self.total:.4f} ± {self.standard_error:.4f} bits/dim "
            f"({self.samples} samples, {self.model_calls} model calls)"
        )


def result_of(
    tally: Tally,
    timesteps: int | None,
    draws: int,
    decoder: str,
    shared: bool,
    bits: int = 8,
) -> BitsPerDim:
    """The result of sums.

    Args:
        tally: The sums of at least one sample.
        timesteps: As for ``bits_per_dim``.
        draws: As for ``bits_per_dim``.
        decoder: As for ``bits_per_dim``.
        shared: All timesteps used one noise, so the terms of a sample are correlated.
        bits: As for ``bits_per_dim``.
    """
    total, prior = tally.totals.mean.tolist()
    square = tally.totals.variance_of_mean()[0].item()
    if shared:
        variance = square
    elif draws > 1:
        variance = tally.within.means([tally.samples**2]).item()
    else:
        # Exact sums of rounded numbers: the last rounding is that of their sum.
        variance = math.fsum(tally.parts.variance_of_mean().tolist())
    visits = tally.visits.long()
    terms, xstart_mse, mse = (
        sums.means(visits.tolist()) for sums in (tally.terms, tally.xstart_mse, tally.mse)
    )
    return BitsPerDim(
        total=total,
        standard_error=math.sqrt(square),
        prior=prior,
        terms=terms,
        visits=visits,
        xstart_mse=xstart_mse,
        mse=mse,
        estimator_variance=variance,
        samples=tally.samples,
        dimensions=math.prod(tally.kind[0]),
        timesteps=timesteps,
        draws=draws,
        model_calls=tally.calls,
        decoder=decoder,
        sums=tally,
        shared_noise=shared,
        bits=bits,
    )


def _check_settings(first: BitsPerDim, other: BitsPerDim) -> None:
    for name in ("timesteps", "draws", "decoder", "shared_noise", "bits"):
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            raise ValueError(f"results must have one {name}, {mine!r}, got {theirs!r}")
    mine, theirs = first.sums, other.sums
    if mine.num_timesteps != theirs.num_timesteps or not torch.equal(
        mine.strata.starts, theirs.strata.starts
    ):
        raise ValueError("results must have one schedule, got several")


def _check_ids(ids: Sequence[Tensor]) -> None:
    found, counts = torch.cat(list(ids)).unique(return_counts=True)
    twice = found[counts > 1].tolist()
    if twice:
        shown = ", ".join(map(str, twice[:3])) + (", ..." if len(twice) > 3 else "")
        raise ValueError(
            f"results must have no sample in common, got sample ids {shown} more than once; give "
            "each part its own ids by sample_ids=, or a noise key of its first sample"
        )
