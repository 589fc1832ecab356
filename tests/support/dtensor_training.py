"""Checks of training and sampling by several ranks: compiled, FSDP2, shards of a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.pattern_matcher  # what compiling in a rank would import
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import diffcore
from diffcore import FlowMatching, GaussianDiffusion, PhiloxNoise, make_betas, ops, solvers
from support.dtensors import distribute, distributed, expect_close, expect_same, mesh_of
from support.networks import LEVELS
from support.ranks import Cells

SHAPE = (5, 3, 6, 4)
KEY = PhiloxNoise(17, stream=3)
DIFFUSION = GaussianDiffusion(make_betas("linear", 20))
FLOW = FlowMatching.sd3(weighting="cosmap")
T = torch.tensor([0, 3, 19, 7, 0])


# ---- torch.compile -------------------------------------------------------------------------------


def _training_loss(m: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return DIFFUSION.training_losses(lambda x, t: x + m, x, t, noise=KEY)["loss"].mean()


def _compiled(world: int) -> None:
    """In one graph: the values of an eager call, and its gradient."""
    mesh = mesh_of(world)
    m, x = torch.randn(2, *SHAPE)
    results = []
    for run in (_training_loss, torch.compile(_training_loss, fullgraph=True, backend=aot_eager)):
        there = distributed(m.requires_grad_(), mesh, (Shard(3),))
        loss = run(there, distribute(x, mesh, (Shard(3),)), T)
        loss.backward()
        results.append((loss.detach(), there.grad))
    (eager, grad), (compiled, compiled_grad) = results
    assert compiled.placements == eager.placements
    expect_close("loss", compiled.full_tensor(), eager.full_tensor())
    expect_same("gradient", compiled_grad, grad.full_tensor())


def _compiled_for_any_batch(world: int) -> None:
    """One graph for the first batch size, and one for all others."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    mesh = mesh_of(world)
    noised = torch.compile(
        lambda x: ops.add_noise(x, KEY, 0.6, 0.8), fullgraph=True, backend=backend
    )
    for batch in (4, 6, 7, 9):
        x = torch.randn(batch, 3, 4)
        found = noised(distribute(x, mesh, (Shard(0),)))
        expect_same(f"batch {batch}", found, ops.add_noise(x, KEY, 0.6, 0.8))
    assert len(graphs) == 2, f"{len(graphs)} graphs"


# ---- FSDP2 ---------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A diffusion and its network, whose operations are exact or elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion = GaussianDiffusion(make_betas("linear", 20), loss_type="mse")
        self.sampler = solvers.ddim_table(LEVELS)
        self.scale = nn.Parameter(torch.empty(3, 1, 1))
        self.shift = nn.Parameter(torch.empty(3, 1, 1))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for parameter, start in ((self.scale, 0.5), (self.shift, -0.25)):
                values = torch.linspace(start, 1, 3).reshape(3, 1, 1)
                if isinstance(parameter, DTensor):
                    values = distribute(values, parameter.device_mesh, parameter.placements)
                parameter.copy_(values)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x * self.scale) + self.shift * (t.to(x.dtype) / 32).reshape(-1, 1, 1, 1)


def _deferred(world: int, policy: MixedPrecisionPolicy) -> Denoiser:
    """As FSDP2 says: built without memory, sharded, then filled."""
    with torch.device("meta"):
        model = Denoiser()
    assert model.diffusion.betas.device.type == "cpu"
    assert model.diffusion.betas.dtype == torch.float64
    fully_shard(model, mesh=mesh_of(world), mp_policy=policy)
    model.to_empty(device="cpu")
    model.reset_parameters()
    return model


def _own(x: Tensor) -> Tensor:
    """This rank's samples."""
    return x.tensor_split(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def _fsdp(world: int) -> None:
    """Built under ``meta``, trained with and without 16-bit parameters: one process's losses."""
    x, ids = torch.randn(6, *SHAPE[1:]), torch.arange(6) + 100
    t = torch.tensor([0, 3, 19, 7, 0, 5])
    for dtype in (torch.float32, torch.bfloat16):
        alone = Denoiser()
        alone.reset_parameters()
        sharded = _deferred(world, MixedPrecisionPolicy(param_dtype=dtype))

        def output(x: Tensor, t: Tensor, model: Any = alone, dtype: Any = dtype) -> Tensor:
            cast = {n: p.to(dtype) for n, p in model.named_parameters()}
            return torch.func.functional_call(model, cast, (x.to(dtype), t))

        key = KEY.for_samples(ids)
        wanted = alone.diffusion.training_losses(output, x, t, noise=key)["loss"]
        own = KEY.for_samples(_own(ids))
        found = sharded.diffusion.training_losses(sharded, _own(x), _own(t), noise=own)["loss"]
        assert torch.equal(found, _own(wanted)), f"{dtype}: {(found - _own(wanted)).abs().max()}"
        wanted.mean().backward()
        found.mean().backward()
        for name, parameter in sharded.named_parameters():
            grad = alone.get_parameter(name).grad
            tolerance = 1e-6 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(
                parameter.grad.full_tensor(), grad, rtol=tolerance, atol=tolerance
            )


def _fsdp_sampling(world: int) -> None:
    """Each rank samples its own samples with a sharded network."""
    with torch.no_grad():
        alone = Denoiser()
        alone.reset_parameters()
        sharded = _deferred(world, MixedPrecisionPolicy())
        x, ids = torch.randn(6, *SHAPE[1:]), torch.arange(6) + 100
        wanted = diffcore.sample(alone, x, alone.sampler, noise=KEY.for_samples(ids))
        own = KEY.for_samples(_own(ids))
        found = diffcore.sample(sharded, _own(x), sharded.sampler, noise=own)
        assert torch.equal(found, _own(wanted))


# ---- shards of a sample --------------------------------------------------------------------------


def _context_parallel(world: int) -> None:
    """Images sharded by height, videos by time: each rank generates its part of the noise.

    The network is given DTensors; no rank ever holds the noise of a complete sample.
    """
    mesh = mesh_of(world)
    table = solvers.dpmpp_3m_sde_table(LEVELS)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    for shape, d in (((2, 3, 7, 5), 2), ((2, 4, 5, 6, 3), 2), ((2, 4, 5, 6, 3), 4)):
        x = KEY.tensor(shape)
        wanted = diffcore.sample(network, x, table, noise=KEY)
        there = distribute(torch.zeros(shape), mesh, (Shard(d),))
        ops.randn(shape, KEY, out=there)
        expect_same(f"x_T, dimension {d}", there, x)
        found = diffcore.sample(network, there, table, noise=KEY)
        assert found.placements == (Shard(d),)
        expect_same(f"samples, dimension {d}", found, wanted)
        t = torch.tensor([3, 11])
        loss = DIFFUSION.training_losses(network, there, t, noise=KEY)["loss"]
        whole = DIFFUSION.training_losses(network, x, t, noise=KEY)["loss"]
        expect_close(f"loss, dimension {d}", loss.full_tensor(), whole)
        loss = FLOW.training_losses(network, there, noise=KEY)["loss"]
        whole = FLOW.training_losses(network, x, noise=KEY)["loss"]
        expect_close(f"loss of a flow, dimension {d}", loss.full_tensor(), whole)


def cells(world: int) -> Cells:
    """The checks for this many ranks, by name."""
    checks: tuple[Callable[[int], None], ...] = (
        *(_compiled, _compiled_for_any_batch, _fsdp, _fsdp_sampling, _context_parallel),
    )
    return {check.__name__.strip("_").replace("_", " "): check for check in checks}
