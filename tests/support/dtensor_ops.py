"""Checks of ops on DTensors: values and gradients, with the placement of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from diffcore import PhiloxNoise, ops
from support.bound_cases import vlb_table
from support.bounds import with_noise
from support.cases import (
    BY_NAME,
    CASES,
    NOISED,
    STEPS,
    Arguments,
    OpCase,
    as_tuple,
    steps_of,
)
from support.dtensors import (
    PLACEMENTS,
    SHAPE,
    Placements,
    backward,
    distribute,
    distributed,
    expect_close,
    expect_same,
    mesh_of,
    rows_of,
)
from support.ranks import Cells


def with_gradients(case: OpCase, args: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Outputs, and the gradients of what is differentiable."""
    leaves = {
        n: x.detach().requires_grad_(n in case.differentiable) if isinstance(x, Tensor) else x
        for n, x in args.tensors.items()
    }
    outputs = as_tuple(case.native(Arguments(leaves, args.options)))
    backward(outputs)
    grads = {n: x.grad for n, x in leaves.items() if isinstance(x, Tensor) and x.grad is not None}
    return outputs, grads


Results = tuple[tuple[Any, ...], dict[str, Any]]


def expect_results(what: str, found: Results, wanted: Results, placements: Placements) -> None:
    """Outputs and gradients of a call on DTensors, against those of the unsharded call."""
    (outputs, grads), (wanted_outputs, wanted_grads) = found, wanted
    for y, w in zip(outputs, wanted_outputs, strict=True):
        expected = expected_placements(w, placements)
        if y.placements != expected and torch.__version__.startswith("2.10."):
            # It adds the numbers of a row to a partial sum only after it has reduced the sum.
            expected = tuple(Replicate() if p.is_partial() else p for p in expected)
            expect_close(f"{what}, {placements}, output", y.full_tensor(), w.detach())
        else:
            expect_same(f"{what}, {placements}, output", y, w.detach())
        assert y.placements == expected, f"{what}: {y.placements}"
        assert y.stride() == w.stride(), f"{what}: strides {y.stride()}"
    assert grads.keys() == wanted_grads.keys()
    for name, g in wanted_grads.items():
        expect_same(f"{what}, {placements}, gradient of {name}", grads[name], g)
        assert grads[name].placements == placements, f"{name}: {grads[name].placements}"


def expected_placements(y: Tensor, placements: Placements) -> Placements:
    """Where an output is: like the inputs, but sums over sharded dimensions are partial."""
    if y.ndim == len(SHAPE):
        return placements
    return tuple(
        p if p.is_replicate() or (y.ndim and p.is_shard(0)) else Partial() for p in placements
    )


def options_beside(options: dict[str, Any], mesh: DeviceMesh, rows: Placements) -> dict[str, Any]:
    """Coefficients, steps and tables as DTensors: per sample like the samples, else replicated."""
    everywhere = (Replicate(),) * mesh.ndim

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return distribute(x, mesh, rows if x.ndim == 1 and len(x) == SHAPE[0] else everywhere)

    return {name: move(x) for name, x in options.items()}


# ---- every op ------------------------------------------------------------------------------------


def _case_cell(case: OpCase) -> Callable[[int], None]:
    """Values and gradients, beside plain coefficients and beside coefficients that are DTensors."""

    def cell(world: int) -> None:
        mesh = mesh_of(world)
        plain = case.make(SHAPE, torch.float32)
        wanted = with_gradients(case, plain)
        for placements in PLACEMENTS[world]:
            args = plain.map(lambda x, p=placements: distributed(x, mesh, p))
            expect_results(case.name, with_gradients(case, args), wanted, placements)
            options = options_beside(plain.options, mesh, rows_of(placements))
            if world == 2 and any(isinstance(x, Tensor) for x in options.values()):
                both = Arguments(args.tensors, options)
                expect_results("DTensors", with_gradients(case, both), wanted, placements)

    return cell


def _noise_cell(case: OpCase) -> Callable[[int], None]:
    """Noise of a key: the bits of the unsharded samples, however they are sharded."""

    def cell(world: int) -> None:
        mesh = mesh_of(world)
        plain = case.make(SHAPE, torch.float32)
        ids = torch.tensor([7, -3, 2**40, 0, 11])
        for placements in PLACEMENTS[world]:
            args = plain.map(lambda x, p=placements: distributed(x, mesh, p))
            kinds = [
                (2**63 - 3, 2**63 - 3),  # successive ids, of which the fourth is the least int64
                (ids, distribute(ids, mesh, rows_of(placements))),
                (torch.tensor(5), torch.tensor(5)),
                (ids, ids),
            ]
            for at, beside in kinds if world == 2 else kinds[:2]:
                key = PhiloxNoise(17, sample_ids=at, stream=3, first_element=8)
                wanted = with_gradients(case, with_noise(plain, key))
                found = with_gradients(case, with_noise(args, key.for_samples(beside)))
                expect_results("key", found, wanted, placements)

    return cell


def _noise_parts(world: int) -> None:
    """Seeds and streams that are tensors, a plain noise tensor, and ``randn(out=)``."""
    mesh, case = mesh_of(world), BY_NAME["add_noise"]
    plain = case.make(SHAPE, torch.bfloat16)
    seed, stream = torch.tensor([9, 4]), torch.tensor(6)
    for placements in PLACEMENTS[world]:
        args = plain.map(lambda x, p=placements: distributed(x, mesh, p))
        wanted = case.native(with_noise(plain, PhiloxNoise(seed, stream=stream)))
        everywhere = (Replicate(),) * mesh.ndim
        for key in (
            PhiloxNoise(seed, stream=stream),
            PhiloxNoise(distribute(seed, mesh, everywhere), stream=stream),
        ):
            expect_same("key of tensors", case.native(with_noise(args, key)), wanted)
        found = case.native(with_noise(args, plain.tensors["noise"]))
        expect_same("plain noise", found, case.native(plain))
        out = distributed(torch.zeros(SHAPE), mesh, placements)
        ops.randn(SHAPE, PhiloxNoise(3, sample_ids=2), out=out)
        expect_same("randn", out, ops.randn(SHAPE, PhiloxNoise(3, sample_ids=2)))


def _default_noise(world: int) -> None:
    """Without noise, every rank takes the seed of the first, whatever its own generator says."""
    mesh = mesh_of(world)
    torch.manual_seed(100)
    wanted = ops.reparameterize(torch.zeros(SHAPE), torch.zeros(SHAPE))
    for placements in PLACEMENTS[world]:
        torch.manual_seed(100 + torch.distributed.get_rank())
        mean = distributed(torch.zeros(SHAPE), mesh, placements)
        expect_same("default noise", ops.reparameterize(mean, mean), wanted)


# ---- sums, outputs, gradients of coefficients ----------------------------------------------------


def _reductions(world: int) -> None:
    """Sums over all elements and means, whose divisor is the size of all shards together."""
    mesh = mesh_of(world)
    plain = BY_NAME["normal_kl"].make(SHAPE, torch.float32)
    for placements in PLACEMENTS[world]:
        args = plain.map(lambda x, p=placements: distributed(x, mesh, p))
        for reduction in ("sum", "mean", "batchmean"):
            case = BY_NAME["normal_kl_sample"]
            found, wanted = (
                with_gradients(case, Arguments(a.tensors, {"reduction": reduction}))
                for a in (args, plain)
            )
            expect_results(reduction, found, wanted, placements)


def _mean_of_losses(world: int) -> None:
    """The gradient of a mean over the batch is the one that the loss made, untouched.

    Only the output of the model is sharded, as with tensor parallel layers.
    """
    mesh = mesh_of(world)
    for name in ("denoising_loss_epsilon", "denoising_loss_v_prediction"):
        case = BY_NAME[name]
        for dtype in (torch.float32, torch.float16):
            plain = case.make(SHAPE, dtype)
            m = plain.tensors["model_output"].requires_grad_()
            case.native(plain).mean().backward()
            for placements in PLACEMENTS[world]:
                there = distributed(m, mesh, placements)
                args = Arguments({**plain.tensors, "model_output": there}, plain.options)
                case.native(args).mean().backward()
                expect_same(f"{name} {dtype}", there.grad, m.grad)


def _number_as_gradient(world: int) -> None:
    """The gradient of ``.sum()`` of an elementwise term, which is one number expanded."""
    mesh = mesh_of(world)
    plain = BY_NAME["normal_kl"].make(SHAPE, torch.float32).map(Tensor.requires_grad_)
    (3 * ops.normal_kl(**plain.tensors).sum()).backward()
    for placements in PLACEMENTS[world]:
        args = plain.map(lambda x, p=placements: distributed(x, mesh, p))
        (3 * ops.normal_kl(**args.tensors).sum()).backward()
        for name, x in plain.tensors.items():
            expect_same(name, args.tensors[name].grad, x.grad)


def _coefficient_gradients(world: int) -> None:
    """Coefficients of every kind, trained: each rank adds what its shard contributes."""
    mesh = mesh_of(world)
    x, z = torch.randn(2, *SHAPE, dtype=torch.float64)
    for shape in ((SHAPE[0],), (), (1,)):
        sigma = torch.rand(shape, dtype=torch.float64).requires_grad_()
        backward((ops.add_noise(x, z, 0.5, sigma),))
        for placements in PLACEMENTS[world]:
            rows = rows_of(placements) if shape == SHAPE[:1] else (Replicate(),) * mesh.ndim
            for s in (sigma.detach().clone().requires_grad_(), distributed(sigma, mesh, rows)):
                there, noise = (distribute(y, mesh, placements) for y in (x, z))
                backward((ops.add_noise(there, noise, 0.5, s),))
                grad = s.grad.full_tensor() if isinstance(s.grad, DTensor) else s.grad
                torch.testing.assert_close(grad, sigma.grad, rtol=1e-13, atol=1e-13)


def _masks(world: int) -> None:
    """Masks, replicated or sharded like the samples, also where plain torch computes."""
    mesh = mesh_of(world)
    m, x0, z = torch.randn(3, *SHAPE)
    mask = (torch.rand(SHAPE) > 0.4).float()
    numbers: dict[str, Any] = {"weight": torch.rand(STEPS), "t": steps_of(SHAPE[0])}
    bound = {"t": numbers["t"], "coefficients": vlb_table(given="noise")}

    def results(m: Tensor, x0: Tensor, z: Tensor, q: Tensor) -> list[Tensor]:
        found = [
            ops.denoising_loss(m, x0, z, mask=q, **numbers),
            ops.denoising_loss(m, x0, PhiloxNoise(3), mask=q, reduction="mean"),
            ops.denoising_loss(m, x0, z, mask=q, reduction="none", **numbers),
            ops.blend_known(m, q, x0, PhiloxNoise(3), 0.8, 0.6),
        ]
        if not torch.__version__.startswith("2.10."):  # its DTensors have no rule for erfcx
            found.append(ops.vlb_term(x0, m, noise=z, mask=q, scale=torch.ones(SHAPE[0]), **bound))
        return found

    wanted = results(m, x0, z, mask)
    for placements in PLACEMENTS[world]:
        there = [distribute(y, mesh, placements) for y in (m, x0, z)]
        for q in (mask, distribute(mask, mesh, placements)):
            for found, expected in zip(results(*there, q), wanted, strict=True):
                assert isinstance(found, DTensor)
                torch.testing.assert_close(found.full_tensor(), expected)


def _outputs_given(world: int) -> None:
    """``out=``, placed like the inputs or not, and inputs that are placed differently."""
    mesh = mesh_of(world)
    x, y = torch.randn(2, *SHAPE)
    wanted = ops.linear_combination(x, y, (0.3, -2.0))
    for placements in PLACEMENTS[world]:
        for others in PLACEMENTS[world]:
            a, b = distribute(x, mesh, placements), distribute(y, mesh, others)
            out = distribute(torch.zeros(SHAPE), mesh, others)
            found = ops.linear_combination(a, b, (0.3, -2.0), out=out)
            assert found is out
            assert out.placements == others
            expect_same("out", out, wanted)
            expect_same("plain beside", ops.linear_combination(x, b, (0.3, -2.0)), wanted)


def _partial_inputs(world: int) -> None:
    """A tensor that is pending a sum is summed first: most ops are not linear."""
    mesh = mesh_of(world)
    x = torch.arange(60.0).reshape(5, 12)
    partial = DTensor.from_local(x, mesh, (Partial(),) * mesh.ndim, run_check=False)
    wanted = ops.standard_normal_kl(x * world, x * 0)
    expect_same("partial", ops.standard_normal_kl(partial, torch.zeros(5, 12)), wanted)


def _second_derivatives(world: int) -> None:
    """The gradient of a gradient; the truth is plain torch."""
    mesh = mesh_of(world)
    x = torch.randn(SHAPE, dtype=torch.float64).requires_grad_()

    def formula(mean: Tensor, logvar: Tensor) -> Tensor:
        return 0.5 * (mean**2 + torch.expm1(logvar) - logvar)

    def twice(term: Callable[..., Tensor], x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(term(x, x.sin()).sum(), x, create_graph=True)
        return torch.autograd.grad((g * g).sum(), x)[0]

    wanted = twice(formula, x)
    for placements in PLACEMENTS[world]:
        found = twice(ops.standard_normal_kl, distributed(x, mesh, placements))
        torch.testing.assert_close(found.full_tensor(), wanted, rtol=1e-12, atol=1e-12)


def _layouts(world: int) -> None:
    """channels_last stays channels_last."""
    mesh = mesh_of(world)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    wanted = ops.add_noise(x, PhiloxNoise(3), 0.5, 0.5)
    for placements in PLACEMENTS[world]:
        found = ops.add_noise(distribute(x, mesh, placements), PhiloxNoise(3), 0.5, 0.5)
        expect_same("channels_last", found, wanted)
        assert found.stride() == wanted.stride()


def _promotion(world: int) -> None:
    """Of several dtypes the widest, and nothing is communicated for any of this."""
    mesh = mesh_of(world)
    m, x0 = torch.randn(2, *SHAPE)
    low = m.to(torch.bfloat16).requires_grad_()
    wanted = ops.denoising_loss(low, x0, PhiloxNoise(3))
    backward((wanted,))
    for placements in PLACEMENTS[world]:
        there, data = distributed(low, mesh, placements), distribute(x0, mesh, placements)
        with CommDebugMode() as counter:
            found = ops.denoising_loss(there, data, PhiloxNoise(3), weight=torch.ones(SHAPE[0]))
            backward((found,))
        assert counter.get_total_counts() == 0
        expect_same("loss", found, wanted.detach())
        expect_same("gradient", there.grad, low.grad)


def _wrong_arguments(world: int) -> None:
    """What is wrong is named as for plain tensors, by global shapes."""
    mesh, other = mesh_of(world), init_device_mesh("cpu", (1, world))
    x = distribute(torch.randn(SHAPE), mesh, (Shard(0),) * mesh.ndim)
    for call, message in (
        (lambda: ops.add_noise(x, x[:4], 0.1, 0.2), r"noise must have the shape of x0, \(5, 3, 6"),
        (lambda: ops.add_noise(x, x, 0.1, torch.rand(4)), "sigma must have 1 or 5 entries"),
        (
            lambda: ops.add_noise(x, distribute(torch.randn(SHAPE), other, [Shard(0)] * 2), 0.1, 1),
            "must be on one DeviceMesh",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def cells(world: int) -> Cells:
    """The checks for this many ranks, by name."""
    checks: tuple[Callable[[int], None], ...] = (
        *(_noise_parts, _default_noise, _reductions, _mean_of_losses, _number_as_gradient),
        *(_coefficient_gradients, _masks, _outputs_given, _partial_inputs, _second_derivatives),
        *(_layouts, _promotion, _wrong_arguments),
    )
    every = 1 if world == 2 else 3  # a second dimension of the mesh is the same for all ops
    return {
        **{case.name: _case_cell(case) for case in CASES[::every]},
        **{f"{case.name}, noise of a key": _noise_cell(case) for case in NOISED[::every]},
        **{check.__name__.strip("_").replace("_", " "): check for check in checks},
    }
