"""denoising_loss, which makes its gradient with its value: each weight and upstream gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from diffcore import ops
from diffcore.testing import assert_within_bound
from support.bounds import assert_same_bits, each_low_dtype
from support.cases import STEPS
from support.losses import (
    BATCH,
    KEY,
    UPSTREAM,
    WEIGHTS,
    Options,
    each_kind,
    each_noise,
    each_weight,
    eager,
    gradient,
    judge,
    needs_module,
    options_of,
    tensors_of,
)

# ---- values and gradients -----------------------------------------------------------------------


@each_kind
@each_weight
@each_low_dtype
def test_every_weight_and_upstream_gradient(
    kind: str, weight: Callable[[str], Options], dtype: torch.dtype, device: str
) -> None:
    m, x0, noise = tensors_of(dtype, device)
    options = options_of(kind, weight, device)
    wide = tuple(x.detach().double() for x in (m, x0, noise))
    exact, plain = (eager(*x, **options)[:, None] for x in (wide, (m, x0, noise)))
    for form in (noise, KEY):
        judge(ops.denoising_loss(m, x0, form, **options)[:, None], plain, exact, "loss")
    for name, total in UPSTREAM.items():
        truth = gradient(eager, wide[0], wide[1:], options, total)
        by_eager = gradient(eager, m, (x0, noise), options, total)
        for form in (noise, KEY):
            found = gradient(ops.denoising_loss, m, (x0, form), options, total)
            judge(found, by_eager, truth, f"gradient of {name}")


@each_kind
@pytest.mark.parametrize("weight", ["none", "table"])
@each_noise
def test_gradcheck(kind: str, weight: str, drawn: bool, device: str) -> None:
    m, x0, noise = tensors_of(torch.float64, device, (BATCH, 2))
    options = options_of(kind, WEIGHTS[weight], device)

    def f(m: Tensor) -> Tensor:
        return ops.denoising_loss(m, x0, KEY if drawn else noise, **options)

    assert torch.autograd.gradcheck(f, m)
    assert torch.autograd.gradcheck(lambda m: f(m).mean(), m)
    assert torch.autograd.gradgradcheck(f, m)


@each_kind
@pytest.mark.parametrize("shape", [(), (1,), (6,), (0, 5), (6, 0), (6, 1), (6, 3, 4, 5)], ids=str)
def test_gradient_for_any_shape(kind: str, shape: tuple[int, ...], device: str) -> None:
    m, x0, noise = tensors_of(torch.float64, device, shape)
    options = {"prediction_type": kind, "weight": 1.5}
    if kind == "v_prediction":
        options |= {"alpha": 0.8, "sigma": 0.6}
    for form in (noise, KEY):
        loss = ops.denoising_loss(m, x0, form, **options)
        assert loss.shape == shape[:1]
        for total in (torch.sum, torch.mean):
            found = gradient(ops.denoising_loss, m, (x0, form), options, total)
            wanted = gradient(eager, m, (x0, noise), options, total)
            torch.testing.assert_close(found, wanted, equal_nan=True)


@each_noise
def test_float16_under_any_weight_and_scale(drawn: bool, device: str) -> None:
    """Where the weight, or the gradient before the loss scale comes, is no float16."""
    for weight, scale, error in ((1e5, 1.0, 1.0), (1e-4, 2.0**20, 0.03), (1e5, 2.0**-9, 1.0)):
        m, _, noise = tensors_of(torch.float16, device)
        m = (noise + error * m.detach()).requires_grad_()
        options = {"weight": torch.full((STEPS,), weight, device=device), "t": 3}
        rest = (noise, KEY if drawn else noise)
        total = lambda loss, s=scale: loss.mean() * s  # noqa: E731
        found = gradient(ops.denoising_loss, m, rest, options, total)
        # What mixed precision does: the loss in float32, its gradient rounded.
        by_eager = gradient(
            lambda m, *r, **o: eager(m.float(), *r, **o), m, rest[:1] * 2, options, total
        )
        truth = gradient(eager, m.detach().double(), (noise.double(),) * 2, options, total)
        assert found.isfinite().all()
        assert found.count_nonzero() > 0.9 * found.numel()
        assert_within_bound(found, by_eager, truth)


def test_no_gradient_of_nothing_and_of_overflow(device: str) -> None:
    m, x0, _ = tensors_of(torch.float32, device)
    for total, check in (
        (lambda loss: 0 * loss.sum(), lambda g: (g == 0).all()),
        (lambda loss: torch.inf * loss.sum(), lambda g: g.isinf().all()),
        (lambda loss: torch.nan * loss.sum(), lambda g: g.isnan().all()),
    ):
        assert check(gradient(ops.denoising_loss, m, (x0, KEY), {}, total))


# ---- which gradients are asked for, and how often -----------------------------------------------


@each_kind
@each_noise
@each_low_dtype
def test_a_graph_that_is_kept(kind: str, drawn: bool, dtype: torch.dtype, device: str) -> None:
    m, x0, noise = tensors_of(dtype, device)
    options = options_of(kind, WEIGHTS["table"], device)
    rest = (x0, KEY if drawn else noise)
    wanted = {n: gradient(ops.denoising_loss, m, rest, options, f) for n, f in UPSTREAM.items()}
    loss = ops.denoising_loss(m, *rest, **options)
    found = []
    for name, total in (*UPSTREAM.items(), *UPSTREAM.items()):
        (g,) = torch.autograd.grad(total(loss), m, retain_graph=True)
        found.append((name, g))
    (last,) = torch.autograd.grad(UPSTREAM["weighted"](loss), m)
    for name, g in (*found, ("weighted", last)):
        assert_same_bits(g, wanted[name], name)  # all of them at the end: none changed another
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss.sum(), m)


def test_gradients_add_up_in_the_leaf(device: str) -> None:
    m, x0, noise = tensors_of(torch.float32, device)
    once = gradient(ops.denoising_loss, m, (x0, noise), {}, torch.mean)
    loss = ops.denoising_loss(m, x0, KEY)
    loss.mean().backward(retain_graph=True)
    loss.mean().backward()
    assert m.grad is not None
    assert_same_bits(m.grad, 2 * once)
    m.grad = None
    (ops.denoising_loss(m, x0, KEY).mean() + ops.denoising_loss(m, x0, noise).mean()).backward()
    assert_same_bits(m.grad, 2 * once)
    h = (2 * m.detach()).requires_grad_()
    ops.denoising_loss(0.5 * h, x0, KEY).mean().backward()  # an output that is no leaf
    assert_same_bits(h.grad, 0.5 * once)


@each_kind
@each_noise
def test_gradient_of_a_gradient(kind: str, drawn: bool, device: str) -> None:
    m, x0, noise = tensors_of(torch.float32, device)
    options = options_of(kind, WEIGHTS["samples"], device)

    def penalty(f: Callable[..., Tensor], m: Tensor, *rest: Any) -> Tensor:
        (g,) = torch.autograd.grad(f(m, *rest, **options).mean(), m, create_graph=True)
        return (g**2).sum(1)

    wide = tuple(x.detach().double() for x in (m, x0, noise))
    truth = gradient(lambda m, *r: penalty(eager, m, *r), wide[0], wide[1:], {}, torch.sum)
    plain = gradient(lambda m, *r: penalty(eager, m, *r), m, (x0, noise), {}, torch.sum)
    rest = (x0, KEY if drawn else noise)
    found = gradient(lambda m, *r: penalty(ops.denoising_loss, m, *r), m, rest, {}, torch.sum)
    judge(found, plain, truth)


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction", "sample"])
@each_noise
@each_low_dtype
def test_a_target_that_is_trained_too(
    kind: str, drawn: bool, dtype: torch.dtype, device: str
) -> None:
    m, x0, noise = tensors_of(dtype, device)
    options = options_of(kind, WEIGHTS["table"], device)

    def gradients(f: Callable[..., Tensor], *tensors: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in tensors]
        used = leaves[: 2 if drawn or kind == "sample" else 3]
        return list(torch.autograd.grad(f(*leaves, **options).mean(), used))

    wide = (x.detach().double() for x in (m, x0, noise))
    truth, plain = gradients(eager, *wide), gradients(eager, m, x0, noise)
    found = gradients(ops.denoising_loss, m, x0, KEY if drawn else noise)
    for i, results in enumerate(zip(found, plain, truth, strict=True)):
        judge(*results, name=f"gradient in tensor {i}")


def test_upstream_gradients_of_any_kind(device: str) -> None:
    m, x0, _ = tensors_of(torch.float32, device)
    values = torch.randn(BATCH, dtype=torch.complex64, device=device)
    upstream = torch.randn(BATCH, device=device)
    for g in (
        torch.stack([upstream, upstream], 1)[:, 0],
        upstream[:1].expand(BATCH),
        upstream.flip(0),
        values.conj().imag,  # with a pending negation
    ):
        loss = ops.denoising_loss(m, x0, KEY)
        (found,) = torch.autograd.grad(loss, m, g)
        (wanted,) = torch.autograd.grad(ops.denoising_loss(m, x0, KEY), m, 1 * g)
        assert_same_bits(found, wanted)


# ---- memory -------------------------------------------------------------------------------------


@needs_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_backward_allocates_nothing(dtype: torch.dtype) -> None:
    m, x0, _ = tensors_of(dtype, shape=(8, 50_000))
    for total in (torch.mean, torch.sum):
        m.grad = None
        loss = ops.denoising_loss(m, x0, KEY)
        made = loss.grad_fn.saved_tensors[-1].data_ptr()
        value = total(loss)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            value.backward()
        assert m.grad is not None
        assert m.grad.data_ptr() == made
        allocated = [e.self_cpu_memory_usage for e in profiled.key_averages()]
        assert sum(n for n in allocated if n > 0) < m.nbytes / 100


@needs_module
def test_a_gradient_that_is_right_already_is_not_touched() -> None:
    m, x0, _ = tensors_of(torch.float32)
    loss = ops.denoising_loss(m, x0, KEY)
    made = loss.grad_fn.saved_tensors[-1].detach()
    # Numbers that any arithmetic would change, put there behind autograd's back.
    signalling = torch.full_like(made, 0x7F800001, dtype=torch.int32)
    made.numpy().view("int32")[...] = signalling.numpy()
    loss.mean().backward()
    assert m.grad is not None
    assert torch.equal(m.grad.view(torch.int32), signalling)
