"""Calls on DTensors: each rank runs the kernel on its shard, and the results are DTensors again.

Kernels are elementwise, or sum over samples. So a call needs no rule of its own: the shards of all
inputs are brought to one layout, coefficients and noise are cut to the shard, and the outputs have
that layout. A sum over a sharded dimension is ``Partial``. Nothing is communicated unless the
layouts of the inputs differ, an input is ``Partial``, or a kernel needs complete samples.

Imported when the first DTensor comes, because ``torch.distributed.tensor`` takes a second to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from diffcore._engine import messages
from diffcore._engine.dtensor import all_of
from diffcore._engine.execute import Noise
from diffcore._engine.kernel import Kernel
from diffcore._engine.messages import Arguments
from diffcore._engine.window import Window
from diffcore._types import Coef, Coefs, NoiseParts, Step, Tensors

Run = Callable[..., Any]
Placements = tuple[Placement, ...]

_RANDN = Kernel(
    "randn",
    ("out",),
    reference=lambda like, noise: noise,
    reads_inputs=False,
    generates_noise=True,
)


class Layout(NamedTuple):
    """Where a call runs: the shard of ``[B, ...]`` that this rank computes."""

    mesh: DeviceMesh
    placements: Placements
    shape: tuple[int, ...]
    starts: tuple[int, ...]  # of the shard, in each dimension
    sizes: tuple[int, ...]

    def of_samples(self, per_sample: bool = True) -> Placements:
        """The placements of one value per sample, or of a value that all samples share."""
        return tuple(
            Shard(0) if per_sample and p.is_shard(0) else Replicate() for p in self.placements
        )

    def of_sums(self, reduce_all: bool) -> Placements:
        """The placements of a sum over each sample, or over everything."""
        return tuple(
            Replicate()
            if p.is_replicate()
            else Shard(0)
            if p.is_shard(0) and not reduce_all
            else Partial("sum")
            for p in self.placements
        )

    def window(self) -> Window:
        """The shard of each sample."""
        return Window(self.shape[1:], self.starts[1:], self.sizes[1:])


def run_sharded(
    run: Run,
    kernel: Kernel,
    inputs: Tensors,
    coefs: Coefs,
    step: Step,
    reduce_all: bool,
    out: Tensor | None,
    noise: Noise,
) -> Any:
    """The outputs of a kernel as DTensors: see ``dispatch.run``, with which shards are computed.

    Plain tensors count as replicated: every rank holds all of them.
    """
    messages.explain(Arguments(kernel, inputs, coefs, step, out, noise))
    layout = _layout(kernel, inputs, coefs, step, noise)
    shards = tuple([_shard(x, layout, layout.placements) for x in inputs])
    local = tuple([_coef(c, layout, step) for c in coefs])
    at = _of_samples(step, layout) if isinstance(step, Tensor) else step
    if noise is None:
        found = run(kernel, shards, local, at, reduce_all)
    else:
        parts, window = _noise(noise, layout), layout.window()
        first = parts[3] + window.start
        if window.is_run and first % 4 == 0:
            found = run(kernel, shards, local, at, reduce_all, None, (*parts[:3], first))
        else:
            z = _generated(run, parts, window, shards[0])
            found = z
            if kernel.reads_inputs:
                found = run(kernel.reading(), (*shards, z), local, at, reduce_all)
    result = _gathered(kernel, found, layout, inputs[0], reduce_all)
    if out is None:
        return result
    if result.requires_grad:
        raise ValueError(
            "out must be None where an argument requires grad, got a tensor; call under "
            "torch.no_grad()"
        )
    return out.copy_(result)


# ---- layout --------------------------------------------------------------------------------------


def _layout(kernel: Kernel, inputs: Tensors, coefs: Coefs, step: Step, noise: Noise) -> Layout:
    """The layout of a call: on each dimension of the mesh the first shard among its tensors."""
    shape = tuple(inputs[0].shape)
    rest = [*coefs, step, *(noise or ())]
    every = [x for x in (*inputs, *rest) if isinstance(x, DTensor)]
    mesh = every[0].device_mesh
    for x in every:
        if x.device_mesh != mesh:
            raise ValueError(
                f"{kernel.inputs[0]} and the other DTensors of a call must be on one DeviceMesh, "
                f"got {mesh} and {x.device_mesh}"
            )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"{kernel.inputs[0]} must be on a DeviceMesh of this rank, got {mesh}")
    deciding = [x for x in inputs if isinstance(x, DTensor)]
    deciding += [x for x in rest if isinstance(x, DTensor) and _is_per_sample(x, shape, step)]
    starts, sizes = [0] * len(shape), list(shape)
    placements: list[Placement] = []
    for i in range(mesh.ndim):
        found = [_sharded_dim(x.placements[i], len(shape)) for x in deciding]
        dims = [d for d in found if d is not None and not (d and kernel.reads_samples)]
        placements.append(Shard(dims[0]) if dims else Replicate())
        if dims:
            chunk = -(-sizes[dims[0]] // mesh.size(i))  # as torch.chunk cuts
            begin = min(chunk * coordinate[i], sizes[dims[0]])
            starts[dims[0]] += begin
            sizes[dims[0]] = min(chunk, sizes[dims[0]] - begin)
    return Layout(mesh, tuple(placements), shape, tuple(starts), tuple(sizes))


def _sharded_dim(placement: Placement, ndim: int) -> int | None:
    """The dimension of a shard of consecutive entries; others are gathered first."""
    if type(placement) is not Shard:
        return None
    for d in range(ndim):  # Dynamo takes ``placement.dim`` for a number that may change
        if placement.is_shard(d):
            return d
    return None


def _is_per_sample(x: Tensor, shape: tuple[int, ...], step: Step = None) -> bool:
    """Whether a coefficient, the step or a part of a noise key has an entry for each sample."""
    is_table = x.ndim == 2 and step is not None
    return len(shape) > 0 and x.ndim > 0 and not is_table and len(x) == shape[0]


# ---- to this rank --------------------------------------------------------------------------------


def _shard(x: Any, layout: Layout, placements: Placements) -> Tensor:
    """This rank's shard of an input."""
    if not isinstance(x, DTensor):
        x = _everywhere(x, layout.mesh)
    if x.placements != placements:
        x = x.redistribute(placements=placements)
    return _to_local(x, placements)


def _coef(c: Coef, layout: Layout, step: Step) -> Coef:
    return _of_samples(c, layout, step) if isinstance(c, Tensor) else c


def _of_samples(x: Any, layout: Layout, step: Step = None) -> Tensor:
    """This rank's part of what is no input: a coefficient, the step, a part of a noise key.

    Its gradient is ``Partial`` where the input is sharded: a rank computes what its shard adds.
    """
    per_sample = _is_per_sample(x, layout.shape, step)
    part: Tensor = x
    if not isinstance(x, DTensor) and not x.requires_grad:
        return part.narrow(0, layout.starts[0], layout.sizes[0]) if per_sample else part
    if not isinstance(x, DTensor):
        x = _everywhere(x, layout.mesh)
    placements = layout.of_samples(per_sample)
    if x.placements != placements:
        x = x.redistribute(placements=placements)
    grads = tuple(
        Partial() if there.is_shard() and here.is_replicate() else here
        for here, there in zip(placements, layout.placements, strict=True)
    )
    return _to_local(x, grads)


def _noise(noise: NoiseParts, layout: Layout) -> NoiseParts:
    """The noise of this rank's samples."""
    seed, ids, stream, first_element = noise
    seed, stream = all_of(seed), all_of(stream)
    begin = layout.starts[0] if len(layout.starts) else 0
    if not isinstance(ids, Tensor):
        ids = (ids + begin + 2**63) % 2**64 - 2**63
    elif ids.ndim:
        ids = _of_samples(ids, layout)
    else:
        ids = all_of(ids) + begin
    return seed, ids, stream, first_element


def _generated(run: Run, parts: NoiseParts, window: Window, like: Tensor) -> Tensor:
    """The noise of a shard whose elements do not follow each other in their sample."""
    if not like.numel():
        return like.new_empty(like.shape)

    def piece(first: int, count: int) -> Tensor:
        out = like.new_empty((like.shape[0], count))
        z: Tensor = run(_RANDN, (out,), (), None, False, None, (*parts[:3], first))
        return z

    return window.generate(parts[3], piece)


# ---- from this rank ------------------------------------------------------------------------------


def _gathered(kernel: Kernel, found: Any, layout: Layout, like: Tensor, reduce_all: bool) -> Any:
    """What the ranks computed, as one DTensor for each output."""
    outs = found if isinstance(found, tuple) else (found,)
    stride, placements = _dense_stride(like), layout.placements
    results = [
        _from_local(x, layout.mesh, placements, like.shape, stride) for x in outs[: kernel.outputs]
    ]
    whole = reduce_all or like.ndim == 0
    shape, stride = (like.shape[:0], ()) if whole else (like.shape[:1], (1,))
    placements = layout.of_sums(whole)
    results += [
        _from_local(x, layout.mesh, placements, shape, stride) for x in outs[kernel.outputs :]
    ]
    return results[0] if len(results) == 1 else tuple(results)


def _dense_stride(x: Tensor) -> tuple[int, ...]:
    """The strides of ``torch.empty_like``: the order of dimensions in memory, without gaps."""
    dims: list[int] = []
    for d in range(x.ndim):  # no sorted(): the strides of a compiler may be symbols
        at = d
        while at and 0 < x.stride(dims[at - 1]) < x.stride(d):
            at -= 1
        dims.insert(at, d)
    strides, size = [0] * x.ndim, 1
    for d in reversed(dims):
        strides[d] = size
        size *= max(x.shape[d], 1)
    return tuple(strides)


# ---- autograd ------------------------------------------------------------------------------------


def _to_local(x: DTensor, grads: Placements) -> Tensor:
    """This rank's part of a DTensor, whose gradient will be placed so."""
    compiling = torch.compiler.is_compiling()
    part: Tensor = x.to_local(grad_placements=grads) if compiling else _apply(_ToLocal, x, grads)
    return part


def _from_local(
    x: Tensor, mesh: DeviceMesh, placements: Placements, shape: torch.Size, stride: tuple[int, ...]
) -> DTensor:
    """The DTensor of which this rank has a part."""
    if torch.compiler.is_compiling():
        return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)
    found: DTensor = _apply(_FromLocal, x, mesh, placements, shape, stride)
    return found


def _everywhere(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """A plain tensor, which every rank has, as a DTensor."""
    return _from_local(x, mesh, (Replicate(),) * mesh.ndim, x.shape, x.stride())


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class _ToLocal(torch.autograd.Function):
    """``DTensor.to_local``, which in torch 2.10 gives wrong second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: DTensor, grads: Placements) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = x.device_mesh, grads, x.shape, x.stride()
        part = x.to_local()
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        return None if g is None else _apply(_FromLocal, g, *ctx.gradient), None


class _FromLocal(torch.autograd.Function):
    """``DTensor.from_local``; each is the backward pass of the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mesh: DeviceMesh,
        placements: Placements,
        shape: torch.Size,
        stride: tuple[int, ...],
    ) -> DTensor:
        ctx.set_materialize_grads(False)
        # Each rank's term of a sum has the gradient of the sum.
        ctx.grads = tuple([Replicate() if p.is_partial() else p for p in placements])
        return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx: Any, g: DTensor | None) -> Any:
        if g is not None and g.placements != ctx.grads:
            g = g.redistribute(placements=ctx.grads)
        part = None if g is None else _apply(_ToLocal, g, ctx.grads)
        return part, None, None, None, None
