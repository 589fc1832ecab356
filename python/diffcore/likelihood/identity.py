"""Which samples the batches hold, and which of them are new: each counts once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from diffcore.likelihood.checkpoint import digest
from diffcore.noise import Noise, PhiloxNoise
from diffcore.noise.parts import ids_part, plus

Ids = Tensor | Sequence[int] | Callable[[Any], Tensor | Sequence[int]]
Group = Any  # torch.distributed.ProcessGroup, which builds without distributed lack

_Listed = list[tuple[int, bytes]]  # sample id and digest of its content


@dataclass(frozen=True)
class SampleIds:
    """The ids of the samples, in the order of the data.

    Attributes:
        given: ``[N]``, a function of a batch, or ``None`` for consecutive ids.
        first: The sample id of the noise key, which is added to them.
        from_noise: Whether they are all from the noise key.
    """

    given: Tensor | Callable[[Any], Any] | None
    first: int | Tensor
    from_noise: bool

    @classmethod
    def of(cls, sample_ids: Ids | None, noise: Noise | None) -> SampleIds:
        """The ids of a run.

        Args:
            sample_ids: As for ``bits_per_dim``.
            noise: As for ``bits_per_dim``.

        Raises:
            TypeError: ``sample_ids`` has another type.
            ValueError: Both have ids for each sample, or ids come with a noise tensor.
        """
        first: int | Tensor = noise.sample_ids if isinstance(noise, PhiloxNoise) else 0
        several = first if isinstance(first, Tensor) and first.ndim else None
        if sample_ids is None:
            return cls(None, first, False) if several is None else cls(several.cpu(), 0, True)
        if several is not None:
            raise ValueError("sample_ids must be None where noise has one id for each sample")
        if isinstance(noise, Tensor):
            raise ValueError("noise must be a PhiloxNoise where sample_ids are given, got a tensor")
        if callable(sample_ids):
            return cls(sample_ids, first, False)
        return cls(_vector(sample_ids).cpu(), first, False)

    def describe(self) -> str | None:
        """What a checkpoint records of the ids."""
        if self.given is None or self.from_noise:
            return None
        return digest(self.given) if isinstance(self.given, Tensor) else "function"

    def of_batch(self, batch: Any, position: int, size: int) -> int | Tensor:
        """The ids of a batch: the first of consecutive ones, or int64 ``[B]`` on the CPU.

        Args:
            batch: The batch as the data gave it.
            position: The number of samples before it.
            size: The number of its samples.

        Raises:
            ValueError: There are more or fewer ids than samples.
        """
        if self.given is None:
            return plus(self.first, position)
        if isinstance(self.given, Tensor):
            ids = self.given[position : position + size]
        else:
            ids = _vector(self.given(batch)).cpu()
        if len(ids) != size:
            raise ValueError(
                f"sample_ids must have one id for each sample, got {len(ids)} ids for the {size} "
                f"samples from {position} on"
            )
        return ids + (self.first.cpu() if isinstance(self.first, Tensor) else self.first)


class Part(NamedTuple):
    """A batch of this process.

    Attributes:
        batch: The batch as the data gave it.
        x: Its samples.
        position: The number of this process's samples before it.
        ids: The ids of the samples: the first of consecutive ones, or int64 ``[B]`` on the CPU.
        new: Which samples count, bool ``[B]``; ``None`` for all.
    """

    batch: Any
    x: Tensor
    position: int
    ids: int | Tensor
    new: Tensor | None

    @property
    def counted_ids(self) -> Tensor:
        """The ids of the samples that count, int64 on the CPU."""
        ids = _listed_ids(self.ids, len(self.x))
        return ids if self.new is None else ids[self.new]


def identified(
    batches: Iterable[tuple[Any, Tensor]], ids: SampleIds, group: Group | None
) -> Iterator[Part]:
    """The batches of this process, each with its ids and what counts.

    The processes of a group advance together, also after the last batch of some of them.

    Args:
        batches: (batch, its samples).
        ids: The ids of the run.
        group: The process group, or ``None``.
    """
    register = Register(group) if ids.given is not None or group is not None else None
    position = 0
    for batch, x in batches:
        own = ids.of_batch(batch, position, len(x))
        new = None
        if register is not None:
            new = torch.tensor(register.step(_list_samples(own, x)), device="cpu")
        yield Part(batch, x, position, own, new)
        position += len(x)
    if isinstance(ids.given, Tensor) and len(ids.given) != position:
        raise ValueError(
            f"sample_ids must have one id for each sample, got {len(ids.given)} ids for {position} "
            "samples"
        )
    while register is not None and register.step(None) is not None:
        pass  # another process has batches left


@dataclass
class Register:
    """Decides which samples of each step are new, the same way in every process.

    Attributes:
        group: The process group, or ``None``.
        contents: The ids so far, each with the digest of its sample.
    """

    group: Group | None
    contents: dict[int, bytes] = field(default_factory=dict)

    def step(self, listed: _Listed | None) -> list[bool] | None:
        """Which samples of a batch count; a step of all processes together.

        Args:
            listed: The samples of this process's batch; ``None`` if it has no more batches.

        Returns:
            Whether each sample is new (an empty list without a batch); ``None`` if no process has
            batches left.

        Raises:
            ValueError: One id belongs to two different samples.
        """
        everyone = gather(listed, self.group)
        if all(one is None for one in everyone):
            return None
        new = [[self._is_new(*sample) for sample in one or ()] for one in everyone]
        return new[0 if self.group is None else dist.get_rank(self.group)]

    def _is_new(self, sample_id: int, content: bytes) -> bool:
        before = self.contents.setdefault(sample_id, content)
        if before != content:
            raise ValueError(
                f"sample_ids must identify the samples, got id {sample_id} for two samples that "
                "differ; every process needs the ids of its own samples"
            )
        return before is content


def gather(value: Any, group: Group | None) -> list[Any]:
    """The values of all processes of a group, in the order of their ranks."""
    if group is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def is_first(group: Group | None) -> bool:
    """Whether this is the first process of the group."""
    return group is None or dist.get_rank(group) == 0


def _list_samples(ids: int | Tensor, x: Tensor) -> _Listed:
    """The ids of a batch and the digests of its samples."""
    rows = (
        x.detach().cpu().contiguous().reshape(len(x), x.shape[1:].numel()).view(torch.uint8).numpy()
    )
    contents = (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows)
    return list(zip(_listed_ids(ids, len(x)).tolist(), contents, strict=True))


def _listed_ids(ids: int | Tensor, size: int) -> Tensor:
    if isinstance(ids, Tensor) and ids.ndim:
        return ids
    return torch.arange(size, device="cpu") + int(ids)


def _vector(ids: Any) -> Tensor:
    found = ids_part(ids)
    if not isinstance(found, Tensor) or found.ndim == 0:
        raise TypeError(f"sample_ids must be ids [N], or a function, got {type(ids).__name__}")
    return found
