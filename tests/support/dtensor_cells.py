"""Checks of ops on DTensors, for several ranks: the unsharded result is the truth.

Its bits, where no sum crosses ranks; the gradients too, and with the placement of the input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from support.bounds import with_noise
from support.cases import CASES, NOISED, Arguments, OpCase, as_tuple
from support.ranks import Cells

from diffcore import PhiloxNoise

SHAPE = (5, 3, 6, 4)  # 5 samples on 2 and 4 ranks, 3 channels: uneven, and ranks without any

Placements = tuple[Placement, ...]

PLACEMENTS: dict[int, list[Placements]] = {
    2: [(Shard(0),), (Shard(1),), (Shard(2),), (Shard(3),), (Replicate(),)],
    4: [
        (Shard(0), Replicate()),
        (Shard(0), Shard(1)),
        (Shard(0), Shard(0)),
        (Shard(2), Shard(0)),
        (Shard(2), Shard(3)),
        (Shard(1), Shard(2)),
    ],
}


@functools.cache
def mesh_of(world: int) -> DeviceMesh:
    """All ranks, in one dimension or in two."""
    return init_device_mesh("cpu", (world,) if world < 4 else (2, world // 2))


def distributed(x: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """A DTensor of values that every rank has; a leaf, if it needs a gradient."""
    needs = x.requires_grad
    return distribute_tensor(x.detach(), mesh, placements).requires_grad_(needs)


def expect_same(name: str, found: Any, wanted: Tensor) -> None:
    """The unsharded values: the same bits, or close where a sum crosses ranks."""
    assert isinstance(found, DTensor), f"{name}: a {type(found).__name__}"
    assert found.shape == wanted.shape, f"{name}: {found.shape}, wanted {wanted.shape}"
    crosses = any(p.is_partial() for p in found.placements)
    full = found.full_tensor()
    assert full.dtype == wanted.dtype, f"{name}: {full.dtype}, wanted {wanted.dtype}"
    if crosses:
        scale = wanted.abs().max().item()
        torch.testing.assert_close(full, wanted, rtol=1e-6, atol=1e-6 * scale, equal_nan=True)
    else:
        assert torch.equal(full, wanted), f"{name}: {(full - wanted).abs().max()} off"


def upstream(y: Tensor) -> Tensor:
    """A gradient of an output, the same on every rank."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)


def with_gradients(case: OpCase, args: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Outputs, and the gradients of what is differentiable."""
    leaves = {
        n: x.detach().requires_grad_(n in case.differentiable) for n, x in args.tensors.items()
    }
    outputs = as_tuple(case.native(Arguments(leaves, args.options)))
    pairs = [(y, upstream(y)) for y in outputs if y.requires_grad]
    if pairs:
        grads = [
            distributed(g, y.device_mesh, tuple(_unsummed(y))) if isinstance(y, DTensor) else g
            for y, g in pairs
        ]
        torch.autograd.backward([y for y, _ in pairs], grads)
    return outputs, {n: x.grad for n, x in leaves.items() if x.grad is not None}


def _unsummed(y: DTensor) -> list[Placement]:
    return [Replicate() if p.is_partial() else p for p in y.placements]


def check_case(
    case: OpCase, args: Arguments, unsharded: Arguments, placements: Placements, what: str = ""
) -> None:
    """A call on DTensors against the same call on plain tensors."""
    outputs, grads = with_gradients(case, args)
    wanted, wanted_grads = with_gradients(case, unsharded)
    assert len(outputs) == len(wanted)
    for found, y in zip(outputs, wanted, strict=True):
        expect_same(f"{what} {placements} output", found, y.detach())
    assert grads.keys() == wanted_grads.keys()
    for name, g in wanted_grads.items():
        expect_same(f"{what} {placements} gradient of {name}", grads[name], g)
        assert grads[name].placements == placements, f"{name}: {grads[name].placements}"


def expected_placements(y: Tensor, placements: Placements) -> Placements:
    """Where an output is: like the inputs, but sums over sharded dimensions are partial."""
    if y.ndim == len(SHAPE):
        return placements
    return tuple(
        p if p.is_replicate() or (y.ndim and p.is_shard(0)) else Partial() for p in placements
    )


def options_beside(
    options: dict[str, Any], mesh: DeviceMesh, batch: int, placements: Placements
) -> dict[str, Any]:
    """Coefficients, steps and tables as DTensors: per sample like the samples, else replicated."""
    rows = tuple(Shard(0) if p.is_shard(0) else Replicate() for p in placements)
    everywhere = (Replicate(),) * mesh.ndim

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        of_samples = x.ndim == 1 and len(x) == batch
        return distribute_tensor(x, mesh, rows if of_samples else everywhere)

    return {name: move(x) for name, x in options.items()}


def _case_cell(case: OpCase) -> Callable[[int], None]:
    def cell(world: int) -> None:
        mesh = mesh_of(world)
        for placements in PLACEMENTS[world]:
            plain = case.make(SHAPE, torch.float32)
            args = plain.map(lambda x, p=placements: distributed(x, mesh, p))
            check_case(case, args, plain, placements, "plain coefficients,")
            for y, w in zip(
                as_tuple(case.native(args)), as_tuple(case.native(plain)), strict=True
            ):
                if case.op.__name__ != "dynamic_threshold":
                    assert y.placements == expected_placements(w, placements)
                assert y.stride() == w.stride()
            options = options_beside(plain.options, mesh, SHAPE[0], placements)
            if any(isinstance(x, Tensor) for x in options.values()):
                both = Arguments(args.tensors, options)
                check_case(case, both, plain, placements, "DTensor coefficients,")

    return cell


def cells(world: int) -> Cells:
    """The checks for this many ranks, by name."""
    return {case.name: _case_cell(case) for case in CASES}
