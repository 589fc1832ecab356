"""What compilers are given of an op: the operator or the formula; programs that are exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import diffcore
from diffcore import GaussianDiffusion, PhiloxNoise, make_betas, ops, solvers
from diffcore._engine import compiled_ops, native
from support.bounds import assert_same_bits
from support.calls import Given, calls_of, outputs_and_gradients
from support.cases import as_tuple

pytestmark = [
    pytest.mark.skipif(native._C is None, reason="needs the compiled module"),
    # torch's own compiler warns about its own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture(autouse=True)
def _the_default() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    diffcore.set_compiled_ops("kernel")


class Ops(torch.nn.Module):
    """Every op, or some."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        _, calls = calls_of((2, 3))
        self.calls = {name: calls[name] for name in names or calls}

    def forward(self, tensors: Given) -> dict[str, tuple[Tensor, ...]]:
        return {name: as_tuple(call(**tensors[name])) for name, call in self.calls.items()}


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if "diffcore" in str(n.target)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", compiled_ops.KINDS)
def test_every_op_is_exported(kind: str) -> None:
    diffcore.set_compiled_ops(kind)
    module, (tensors, _) = Ops(), calls_of((3, 37))
    with torch.no_grad():
        program = torch.export.export(module, (tensors,), strict=False)
        found, wanted = program.module()(tensors), module(tensors)
    assert bool(operators(program)) == (kind == "kernel")
    for name, ys in wanted.items():
        if kind == "kernel":
            assert_same_bits(found[name], ys, name)
        else:
            torch.testing.assert_close(found[name], ys, rtol=1e-5, atol=1e-5)


# A float that is not in the code is an input, for which Dynamo starts again before it specializes.
@torch._dynamo.config.patch(specialize_float=True)
def test_formulas_of_any_size_have_their_gradients() -> None:
    diffcore.set_compiled_ops("formula")
    names = ("q_sample", "ddpm_step", "normal_kl_mean", "denoising_loss_v_prediction")
    module, counter = Ops(*names), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((3, 37), (5, 41)):
        given, again = ({n: calls_of(shape)[0][n] for n in names} for _ in range(2))
        wanted = outputs_and_gradients(module, again)
        for name, ys in outputs_and_gradients(compiled, given).items():
            torch.testing.assert_close(ys, wanted[name], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert not any("diffcore" in str(n.target) for g in counter.graphs for n in g.graph.nodes)


def test_a_key_keeps_its_noise_and_a_switch_its_word() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(ops.add_noise, fullgraph=True, backend=counter)
    x, key = torch.randn(2, 3, 5), PhiloxNoise(4)
    for kind in ("kernel", "formula", "kernel"):
        diffcore.set_compiled_ops(kind)
        compiled(x[0], x[1], 0.8, 0.6)
        assert_same_bits(compiled(x[0], key, 0.8, 0.6), ops.add_noise(x[0], key, 0.8, 0.6))
    given = [any("diffcore" in str(n.target) for n in g.graph.nodes) for g in counter.graphs]
    assert given.count(False) == 1, "with a tensor of noise, the formula"


def test_other_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="ops must be one of 'kernel', 'formula', got 'fused'"):
        diffcore.set_compiled_ops("fused")
    with pytest.raises(TypeError, match="ops must be a string, got int"):
        diffcore.set_compiled_ops(1)  # type: ignore[arg-type]


class Means(torch.nn.Module):
    """Sums over a batch, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion = GaussianDiffusion(make_betas("linear", 20, beta_end=0.5))

    def forward(self, x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        x_t = self.diffusion.q_sample(x, t, z)
        loss = ops.denoising_loss(x_t, x, z).mean()
        return x_t, loss, *(ops.normal_kl(x, z, x_t, x, reduction=r) for r in ("mean", "batchmean"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_batch_of_any_size_is_exported(strict: bool) -> None:
    batch = torch.export.Dim("batch", min=2)
    given = [(torch.randn(b, 5), torch.randn(b, 5), torch.arange(b)) for b in (3, 7)]
    program = torch.export.export(Means(), given[0], dynamic_shapes=[{0: batch}] * 3, strict=strict)
    for arguments in given:
        for y, w in zip(program.module()(*arguments), Means()(*arguments), strict=True):
            assert_same_bits(y, w)


def test_an_exported_step_holds_no_infinite_number() -> None:
    """Ahead-of-time inductor writes one, a missing clip, but cannot read it again."""
    table = solvers.euler_table([2.0, 1.0, 0.0])

    class Step(torch.nn.Module):
        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            return table.step(0, x, m)[0]

    x, m = torch.randn(2, 3, 5)
    program = torch.export.export(Step(), (x, m), strict=False)
    calls = [n for n in program.graph.nodes if str(n.target).startswith("diffcore.")]
    assert calls
    for node in calls:
        numbers, _ = torch.utils._pytree.tree_flatten(node.args)
        assert not any(isinstance(n, float) and math.isinf(n) for n in numbers)
    assert_same_bits(program.module()(x, m), Step()(x, m))


@pytest.mark.slow
def test_an_ahead_of_time_package_runs(tmp_path: Path) -> None:
    x, z = torch.randn(2, 3, 5)

    class Some(torch.nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
            kl = ops.normal_kl(x, z, z, x)  # an op without coefficients
            return kl, ops.add_noise(x, z, 0.8, 0.6), *ops.reparameterize_kl(x, z, PhiloxNoise(3))

    program = torch.export.export(Some(), (x, z))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "means.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for y, w in zip(loaded(x, z), Some()(x, z), strict=True):
        assert_same_bits(y, w)


def test_the_gradient_passes_at_the_bound_of_a_clip_by_every_route() -> None:
    # x0 = m, clipped to [-1, 1]; torch's clip has another gradient there in each version
    row, m = (0.0, 0.0, 1.0, 0.0, 0.0, 1.0, -1.0, 1.0), torch.tensor([[-1.0, 1.0, -1.5, 0.5]])

    def total(m: Tensor) -> Tensor:
        return ops.reverse_step(torch.zeros_like(m), m, row).sum()

    def gradient(f: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = m.clone().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    found = [gradient(total), torch.func.grad(total)(m)]
    for kind in compiled_ops.KINDS:
        diffcore.set_compiled_ops(kind)
        found.append(gradient(torch.compile(total, fullgraph=True, backend="aot_eager")))
    assert [g.tolist() for g in found] == [[[1.0, 1.0, 0.0, 1.0]]] * 4
