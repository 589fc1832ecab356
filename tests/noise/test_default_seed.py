"""The seed of default noise is drawn once, also where a compiler recomputes the forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config as partitioner
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffcore import PhiloxNoise, ops

X, WEIGHT = torch.randn(512, 16), torch.randn(16, 16)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(m: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    z, kl = ops.reparameterize_kl(m, 0.1 * m)
    return torch.sin(z).exp().cos() @ w, kl.mean()


def loss(w: Tensor, recomputed: bool = False) -> Tensor:
    """Two layers with default noise, maybe in checkpoints that do not restore the generator."""
    m, total = X @ w, torch.zeros(())
    for _ in range(2):
        if recomputed:
            m, kl = checkpoint(layer, m, w, use_reentrant=False, preserve_rng_state=False)
        else:
            m, kl = layer(m, w)
        total = total + kl
    return total + m.square().mean()


def gradient(compiled: bool, recomputed: bool = False) -> Tensor:
    w = WEIGHT.clone().requires_grad_()
    backend = "aot_eager_decomp_partition"  # partitions as Inductor does
    f = torch.compile(loss, backend=backend, fullgraph=True) if compiled else loss
    torch.manual_seed(3)
    return torch.autograd.grad(f(w, recomputed), w)[0]


@pytest.mark.parametrize("budget", [0.5, 1e-6])
def test_a_memory_budget_does_not_change_the_noise(budget: float) -> None:
    with partitioner.patch(activation_memory_budget=budget):
        found = gradient(compiled=True)
    torch.testing.assert_close(found, gradient(compiled=False))


def test_a_compiled_checkpoint_does_not_change_the_noise() -> None:
    found = gradient(compiled=True, recomputed=True)
    torch.testing.assert_close(found, gradient(compiled=False))


@partitioner.patch(activation_memory_budget=0.0)
def test_a_budget_of_nothing_is_refused() -> None:
    """It keeps inputs alone, so no mark on the seed would help."""
    match = "noise must be given where activation_memory_budget is 0"
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=match):
        gradient(compiled=True)
    keyed = torch.compile(
        lambda x: ops.reparameterize_kl(x, x, PhiloxNoise(0))[0].sum(),
        backend="aot_eager_decomp_partition",
    )
    x = torch.zeros(3, 4, requires_grad=True)
    found = torch.autograd.grad(keyed(x), x)[0]
    torch.testing.assert_close(found, 1 + 0.5 * PhiloxNoise(0).tensor((3, 4)))


def test_the_operator_draws_what_eager_draws() -> None:
    torch.manual_seed(3)
    found = torch.ops.diffcore.draw_seed(device="cpu")
    torch.manual_seed(3)
    assert found.tolist() == [PhiloxNoise.from_generator().seed]
