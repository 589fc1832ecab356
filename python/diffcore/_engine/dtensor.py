"""Plain tensors beside DTensors: torch's ops take no mixture, so the plain ones are converted.

A plain tensor counts as replicated: every rank has the same values. Each function returns its
argument where no DTensor is involved, and loads ``torch.distributed.tensor`` only where one is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a DTensor."""
    kind = type(x)
    if kind is Tensor or kind is Parameter or not isinstance(x, Tensor):
        return False
    return hasattr(x, "device_mesh")


def replicated(x: Tensor, beside: Any) -> Tensor:
    """``x`` for plain torch operations with another tensor: replicated on its mesh."""
    if not is_dtensor(beside) or is_dtensor(x):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = beside.device_mesh
    found: Tensor = DTensor.from_local(x, mesh, (Replicate(),) * mesh.ndim, run_check=False)
    return found


def per_sample(x: Tensor, samples: Any) -> Tensor:
    """One value per sample, ``[B]``, for plain torch operations with ``samples``: sharded alike."""
    if not is_dtensor(samples) or is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate, Shard

    placements = [Shard(0) if p.is_shard(0) else Replicate() for p in samples.placements]
    everywhere: Any = replicated(x, samples)
    found: Tensor = everywhere.redistribute(placements=placements)
    return found


def shard_of(x: Any) -> Tensor:
    """What this rank has of ``x``."""
    found: Tensor = x.to_local() if is_dtensor(x) else x
    return found


def all_of(x: Any) -> Any:
    """All elements of ``x``, on every rank; anything but a DTensor as it is."""
    return x.full_tensor() if is_dtensor(x) else x


def of_first_rank(x: Tensor, beside: Any) -> Tensor:
    """``x`` ``[1]`` as the first rank of the mesh of ``beside`` has it, on every rank."""
    if not is_dtensor(beside):
        return x
    from torch.distributed.tensor import DTensor, Shard

    mesh = beside.device_mesh
    each = DTensor.from_local(x, mesh, (Shard(0),) * mesh.ndim, run_check=False)
    first: Tensor = each.full_tensor()[:1]
    return first
