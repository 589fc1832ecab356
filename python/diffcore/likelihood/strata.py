"""Where the estimator of the bound looks, what it has seen so far, and the file that keeps both."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.noise import PhiloxNoise

_FORMAT = 1


@dataclass(frozen=True)
class Strata:
    """Runs of successive timesteps, of which each draw visits one. The first is t = 0 alone.

    Attributes:
        starts: The first timestep of each, int64 ``[S]``.
        sizes: How many it has, int64 ``[S]``.
    """

    starts: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, log_snr: Tensor, count: int) -> Strata:
        """Timestep 0 alone, and ``count`` strata of the others, of like shares of the bound.

        The share of a timestep is the weight 1/2 expm1(log snr_{t-1} - log snr_t) that a squared
        error of the noise has in its term.

        Args:
            log_snr: Falling, ``[T]``.
            count: How many, at most T - 1.

        Returns:
            ``count + 1`` strata.

        Source:
            Kingma et al. 2021 (arXiv 2107.00630) eq. 13.
        """
        weights = torch.expm1(log_snr[:-1] - log_snr[1:])
        finite = weights[weights.isfinite()]
        # Without any signal at the last timestep its weight is infinite; its term is not.
        weights = weights.clamp(max=finite.max() if len(finite) else 1.0)
        starts, last = [0], len(log_snr)
        t, left = 1, weights.sum().item()
        for k in range(count, 0, -1):
            starts.append(t)
            share, taken = left / k, 0.0
            while True:
                weight = weights[t - 1].item()
                taken, t = taken + weight, t + 1
                # Each of the k - 1 others wants one; the last takes what is left.
                if k == 1:
                    t = last
                    break
                if last - t <= k - 1 or taken + 0.5 * weights[t - 1].item() > share:
                    break
            left -= taken
        edges = torch.tensor([*starts, last])
        return cls(edges[:-1], edges.diff())

    def timesteps(self, noise: PhiloxNoise, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Timesteps drawn from each stratum, uniformly and independently.

        Args:
            noise: A recipe, whose normals are turned into uniform numbers.
            shape: (samples, draws).
            device: Where the recipe can be drawn.

        Returns:
            int64 ``[B, S, draws]``, on the CPU.
        """
        batch, draws = shape
        count = len(self.starts)
        if bool((self.sizes == 1).all()):
            return self.starts.reshape(1, -1, 1).repeat(batch, 1, draws)
        z = noise.tensor((batch, count * draws), dtype=torch.float32, device=device).cpu()
        # On the CPU, in float64: where a timestep ends must not depend on the device.
        u = torch.special.ndtr(z.double()).reshape(batch, count, draws)
        sizes = self.sizes.unsqueeze(1)
        index = torch.minimum((u * sizes).long(), sizes - 1)
        return self.starts.unsqueeze(1) + index


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of rows, merged batch by batch (Chan et al.)."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def zero(cls, columns: int) -> Moments:
        """Of nothing yet."""
        nothing = torch.zeros(columns, dtype=torch.float64)
        return cls(0, nothing, nothing.clone())

    def add(self, rows: Tensor) -> None:
        """Take float64 ``[B, columns]`` in."""
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
        strata: Of the bound.
        kind: Shape and dtype of a sample, once one was seen.
        batches: How many.
        calls: Of the model.
        seen: A digest of the batches, where a checkpoint is kept.
        totals: Moments of (total, prior) of a sample, in bits a dimension.
        parts: Moments of each stratum's share of a sample's total.
        within: Sum over the samples of the variance between the draws.
        visits, terms, xstart_mse, mse: Sums for each timestep ``[T]``.
    """

    strata: Strata
    num_timesteps: int
    kind: list[Any] = field(default_factory=list)
    batches: int = 0
    calls: int = 0
    seen: str = ""

    def __post_init__(self) -> None:
        """Start at nothing."""
        self.totals = Moments.zero(2)
        self.parts = Moments.zero(len(self.strata.starts))
        zero = torch.zeros(self.num_timesteps, dtype=torch.float64)
        self.within = zero[:1].clone()
        self.visits, self.terms, self.xstart_mse, self.mse = (zero.clone() for _ in range(4))

    @property
    def samples(self) -> int:
        """How many were counted."""
        return self.totals.count

    def check_kind(self, kind: list[Any]) -> None:
        """Refuse samples unlike those before.

        Args:
            kind: Shape and dtype.

        Raises:
            ValueError: They differ.
        """
        self.kind = self.kind or kind
        if self.kind != kind:
            raise ValueError(f"data must be samples of one kind: {self.kind}, then {kind}")

    def add(self, prior: Tensor, t: Tensor, terms: Tensor, xstart_mse: Tensor, mse: Tensor) -> None:
        """Count a batch.

        Args:
            prior: ``[B]``, float64 on the CPU like the others.
            t: The timesteps visited, int64 ``[B, S, draws]``.
            terms: What was found there, in bits a dimension, like ``t``.
            xstart_mse: Likewise.
            mse: Likewise.
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

    def _tensors(self) -> dict[str, Tensor]:
        moments = {"totals": self.totals, "parts": self.parts}
        named = {f"{k}.{n}": getattr(m, n) for k, m in moments.items() for n in ("mean", "squares")}
        plain = ("within", "visits", "terms", "xstart_mse", "mse")
        return {**named, **{name: getattr(self, name) for name in plain}}

    def save(self, path: Path, settings: dict[str, Any], seed: Any) -> None:
        """Write everything as JSON, which keeps float64 to the bit, in one move.

        Args:
            path: File to write.
            settings: What another run must share to go on from here.
            seed: Of the noise, if it was not given.
        """
        state = {
            "format": _FORMAT,
            "settings": settings,
            "seed": seed,
            "kind": self.kind,
            "batches": self.batches,
            "calls": self.calls,
            "seen": self.seen,
            "samples": self.samples,
            "sums": {name: tensor.tolist() for name, tensor in self._tensors().items()},
        }
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(state))
        os.replace(partial, path)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``save`` wrote and ``read_state`` read."""
        self.kind, self.batches = state["kind"], state["batches"]
        self.calls, self.seen = state["calls"], state["seen"]
        self.totals.count = self.parts.count = state["samples"]
        for name, tensor in self._tensors().items():
            tensor.copy_(torch.tensor(state["sums"][name], dtype=torch.float64))


def read_state(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What ``Tally.save`` left in a file, if there is one.

    Args:
        path: File to read.
        settings: Those of this run.

    Returns:
        The state, or ``None`` where there is no file.

    Raises:
        ValueError: The file is something else, or of a run with other settings.
    """
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        known, version = state["settings"], state["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} was not written by bits_per_dim") from error
    if version != _FORMAT:
        raise ValueError(f"checkpoint {path} has format {version}; wanted {_FORMAT}")
    for name in {**settings, **known}:
        if settings.get(name) != known.get(name):
            raise ValueError(
                f"checkpoint {path} belongs to a run with {name} = {known.get(name)}, not "
                f"{settings.get(name)}; remove it, or name another file"
            )
    found: dict[str, Any] = state
    return found
