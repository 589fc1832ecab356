"""The data of ``bits_per_dim`` as batches of x_0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffcore._checks import as_int
from diffcore._engine.dtensor import is_dtensor
from diffcore.likelihood.checkpoint import digest
from diffcore.likelihood.identity import Part
from diffcore.likelihood.tally import Tally
from diffcore.noise import Noise, PhiloxNoise

DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True)
class Batches:
    """Batches of data, iterated once.

    Attributes:
        parts: The batches as they come: tensors, or tuples and lists that begin with x_0.
        description: What a checkpoint records of the data.
    """

    parts: Iterable[Any]
    description: dict[str, Any]

    @classmethod
    def of(cls, data: Tensor | Iterable[Any], batch_size: int | None) -> Batches:
        """Split a tensor, or take batches as they are.

        Args:
            data: ``[N, ...]``, or an iterable of batches.
            batch_size: For a tensor only; ``None`` for 64.

        Raises:
            TypeError: ``data`` is neither.
            ValueError: ``data`` is 0-dim, or ``batch_size`` does not apply.
        """
        if isinstance(data, Tensor):
            if data.ndim == 0:
                raise ValueError("data must have shape [N, ...], got []")
            size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
            size = as_int("batch_size", size, 1)
            return cls(data.split(size), {"data": list(data.shape), "batch_size": size})
        if batch_size is not None:
            raise ValueError(
                f"batch_size must be None if data is an iterable of batches, got {batch_size}"
            )
        if not isinstance(data, Iterable):
            raise TypeError(
                f"data must be a tensor or an iterable of batches, got {type(data).__name__}"
            )
        return cls(data, {"data": "batches", "batch_size": None})

    @property
    def number(self) -> int | None:
        """The number of batches if it is known in advance."""
        return len(self.parts) if isinstance(self.parts, Sized) else None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """(batch, its x_0) for every batch that is not empty."""
        for batch in self.parts:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"data must yield tensors, got {type(x).__name__}")
            if is_dtensor(x):
                raise TypeError(
                    "data must be plain tensors, got DTensor; give each process its samples, and "
                    "pass process_group"
                )
            if len(x):
                yield batch, x


def skip_counted(source: Iterator[Part], tally: Tally) -> None:
    """Skip the batches that a resumed run has counted already.

    Args:
        source: The iterator, at its start.
        tally: The restored tally.

    Raises:
        ValueError: The batches are not those of the interrupted run.
    """
    samples, chain = 0, ""
    for _, part in zip(range(tally.batches), source, strict=False):
        tally.check_kind([list(part.x.shape[1:]), str(part.x.dtype)])
        samples += len(part.counted_ids)
        tally.ids.append(part.counted_ids)
        chain = digest(part.x, chain)
    if (samples, chain) == (tally.samples, tally.digest):
        return
    got = "other values" if samples == tally.samples else f"{samples} samples"
    raise ValueError(
        "data must be the data that the checkpoint was made with, in the same order: its first "
        f"{tally.batches} batches had {tally.samples} samples, got {got}"
    )


def noise_of_batch(noise: Noise, part: Part) -> Noise:
    """The noise of a batch.

    Args:
        noise: The noise of all samples.
        part: The batch.

    Raises:
        ValueError: A noise tensor has another shape than the data.
    """
    x, first = part.x, part.position
    if isinstance(noise, PhiloxNoise):
        ids = part.ids
        return noise.for_samples(ids.to(x.device) if isinstance(ids, Tensor) else ids)
    rows = noise[first : first + len(x)]
    if rows.shape != x.shape:
        raise ValueError(
            f"noise must have the shape of the data, {list(x.shape)} for samples {first} to "
            f"{first + len(x) - 1}, got {list(rows.shape)}"
        )
    return rows.to(x)
