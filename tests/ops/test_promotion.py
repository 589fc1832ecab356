"""Tensors of several dtypes: the op in the widest of them, as torch promotes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import GaussianDiffusion, PhiloxNoise, make_betas, ops, vae
from support.bounds import each_case
from support.cases import Arguments, OpCase, as_tuple

PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),  # both become float32
    (torch.float64, torch.float32),
]
KEY = PhiloxNoise(3)


def _gradients(case: OpCase, tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Any]:
    leaves = {n: x.detach().requires_grad_(n in case.differentiable) for n, x in tensors.items()}
    outputs = [y for y in as_tuple(case.op(**leaves, **options)) if y.requires_grad]
    wanted = [leaves[n] for n in case.differentiable]
    found = torch.autograd.grad([y.double().sum() for y in outputs], wanted, allow_unused=True)
    return [(leaf, g) for leaf, g in zip(wanted, found, strict=True)]


@each_case
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_mixed_inputs_are_converted_to_the_widest(
    case: OpCase, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    first, other = dtypes
    widest = torch.promote_types(first, other)
    made = case.make((4, 3), torch.float32)
    mixed = {n: x.to(other if k else first) for k, (n, x) in enumerate(made.tensors.items())}
    wide = {n: x.to(widest) for n, x in mixed.items()}
    expected = as_tuple(case.op(**wide, **made.options))
    for route in (contextlib.nullcontext, torch.no_grad, lambda: torch.device("cpu")):
        with route():
            found = as_tuple(case.op(**mixed, **made.options))
        for y, e in zip(found, expected, strict=True):
            assert y.dtype == e.dtype
            assert torch.equal(y, e)
    by_reference = as_tuple(case.reference(Arguments(mixed, made.options)))
    for y, e in zip(by_reference, expected, strict=True):
        torch.testing.assert_close(y, e)
    if not case.differentiable:
        return
    pairs = zip(
        _gradients(case, mixed, made.options), _gradients(case, wide, made.options), strict=True
    )
    for (leaf, g), (_, e) in pairs:
        if e is not None:
            assert g.dtype == leaf.dtype
            assert torch.equal(g, e.to(leaf.dtype))


@each_case
def test_without_memory_too(case: OpCase) -> None:
    made = case.make((4, 3), torch.float32)
    mixed = {n: x.to(torch.float64 if k else None) for k, (n, x) in enumerate(made.tensors.items())}
    expected = as_tuple(case.op(**mixed, **made.options))
    on_meta = {n: x.to("meta") for n, x in mixed.items()}
    options = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in made.options.items()}
    found = as_tuple(case.op(**on_meta, **options))
    assert [(y.dtype, y.shape) for y in found] == [(y.dtype, y.shape) for y in expected]


def test_a_noise_key_is_checked_before_it_is_rounded() -> None:
    key = PhiloxNoise(3, sample_ids=torch.arange(8))
    with pytest.raises(ValueError, match="sample_ids must have 7 entries, one per sample, got 8"):
        ops.reverse_step(torch.ones(7, 5), torch.ones(7, 5).double(), (1.0,) * 8, noise=key)


@pytest.mark.parametrize("kind", ops.PREDICTION_TYPES)
@pytest.mark.parametrize("x0_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_noise_of_the_loss_is_that_of_the_sample(kind: str, x0_dtype: torch.dtype) -> None:
    # Rounded to the dtype of x_0 in add_noise, so it must be the same rounded noise in the loss.
    x0 = torch.randn(4, 3, 5).to(x0_dtype)
    m = torch.randn(4, 3, 5).to(torch.bfloat16 if x0_dtype == torch.float32 else torch.float32)
    levels = {"alpha": 0.8, "sigma": 0.6} if kind == "v_prediction" else {}
    z = KEY.tensor(x0.shape, dtype=x0_dtype)
    by_key = ops.denoising_loss(m, x0, KEY, prediction_type=kind, **levels)
    by_tensor = ops.denoising_loss(m.float(), x0.float(), z.float(), prediction_type=kind, **levels)
    assert torch.equal(by_key, by_tensor)
    step = ops.ddpm_step(m, x0, 0.5, 0.8, 0.6, 0.7, noise=KEY)
    by_tensor = ops.ddpm_step(m.float(), x0.float(), 0.5, 0.8, 0.6, 0.7, noise=z.float())
    assert torch.equal(step, by_tensor)


def test_a_training_step_under_autocast() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 6)
    x0, noise = torch.randn(5, 6), torch.randn(5, 6)
    t = torch.tensor([0, 3, 7, 12, 19])
    diffusion = GaussianDiffusion(make_betas("linear", 20))
    losses = []
    for of_class in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if of_class:
                loss = diffusion.training_losses(lambda x, t: net(x), x0, t, noise=noise)["loss"]
            else:
                x_t = diffusion.q_sample(x0, t, noise)
                output = net(x_t)
                assert output.dtype == torch.bfloat16
                loss = ops.denoising_loss(output, x0, noise)
        assert loss.dtype == torch.float32
        net.zero_grad()
        loss.mean().backward()
        losses.append((loss, net.weight.grad.clone()))
    output = output.detach()
    right = (output.double() - noise.double()).square().mean(1)
    torch.testing.assert_close(losses[0][0].double(), right, rtol=1e-6, atol=0)
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


def test_the_vae_step_under_autocast() -> None:
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(6, 4), torch.nn.Linear(2, 6)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = encoder(x).chunk(2, 1)
        z, kl = ops.reparameterize_kl(mean, logvar, KEY)
        loss = vae.vae_loss(x, decoder(z), kl)["loss"]
        nll = ops.gaussian_nll(x, decoder(z), 0.0 * x)
    assert loss.dtype == nll.dtype == torch.float32
    loss.mean().backward()
    assert encoder.weight.grad.abs().sum() > 0


def test_freed_memory_is_named_before_it_is_converted() -> None:
    x = torch.zeros(4, 3, dtype=torch.bfloat16)
    for offset in (0, 4):
        freed = torch.zeros(20)[offset : offset + 12].view(4, 3)
        freed.untyped_storage().resize_(0)
        for route in (contextlib.nullcontext, lambda: torch.device("cpu")):
            with route(), pytest.raises(ValueError, match=r"^noise must have memory"):
                ops.add_noise(x, freed, 0.8, 0.6)
        with pytest.raises(ValueError, match=r"^x0 must have memory"):
            ops.denoising_loss(x, freed, KEY)
