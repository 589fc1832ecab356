"""DTensors of values that every rank has, and comparisons with unsharded results.

An unsharded result is the truth: its bits, where no sum crosses ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo  # the first operation of a DTensor would import it, in every rank
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

SHAPE = (5, 3, 6, 4)  # 5 samples and 3 channels on 2 and 4 ranks: uneven, and ranks without any

Placements = tuple[Placement, ...]

PLACEMENTS: dict[int, list[Placements]] = {
    2: [(Replicate(),), (Shard(0),), (Shard(1),), (Shard(3),)],
    4: [(Shard(0), Shard(1)), (Shard(2), Shard(0))],
}


@functools.cache
def mesh_of(world: int) -> DeviceMesh:
    """All ranks, in one dimension or in two."""
    return init_device_mesh("cpu", (world,) if world < 4 else (2, world // 2))


def distribute(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of values that every rank has, without communication."""
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def distributed(x: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """The same, as a leaf, if it needs a gradient."""
    return distribute(x.detach(), mesh, placements).requires_grad_(x.requires_grad)


def rows_of(placements: Placements) -> Placements:
    """Where one value per sample is, beside samples that are placed so."""
    return tuple(Shard(0) if p.is_shard(0) else Replicate() for p in placements)


def expect_same(name: str, found: Any, wanted: Tensor) -> None:
    """The unsharded values: the same bits, or close where a sum crosses ranks."""
    assert isinstance(found, DTensor), f"{name}: a {type(found).__name__}"
    assert found.shape == wanted.shape, f"{name}: {found.shape}, wanted {wanted.shape}"
    assert found.dtype == wanted.dtype, f"{name}: {found.dtype}, wanted {wanted.dtype}"
    if any(p.is_partial() for p in found.placements):
        expect_close(name, found.full_tensor(), wanted)
        return
    shard = found.to_local()
    there = distribute(wanted.detach(), found.device_mesh, found.placements).to_local()
    assert shard.shape == there.shape, f"{name}: {shard.shape}, wanted {there.shape}"
    same = torch.equal(shard.nan_to_num(7.0), there.nan_to_num(7.0))
    assert same, f"{name}: {(shard - there).abs().max()} off"


def expect_close(name: str, found: Tensor, wanted: Tensor) -> None:
    """The same up to the order of a sum of float32 terms, as large as the largest entry."""
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(
        found, wanted, rtol=1e-6, atol=1e-6 * scale, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def upstream(y: Tensor) -> Tensor:
    """A gradient of an output, the same on every rank."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)


def backward(outputs: tuple[Any, ...]) -> None:
    """The backward pass of all outputs that need one, from the same gradients on every rank."""
    pairs = []
    for y in outputs:
        if y.requires_grad:
            g = upstream(y)
            if isinstance(y, DTensor):
                placements = [Replicate() if p.is_partial() else p for p in y.placements]
                g = distribute(g, y.device_mesh, placements)
            pairs.append((y, g))
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
