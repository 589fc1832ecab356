"""denoising_loss by every route through torch: the same values, gradients and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffcore import PhiloxNoise, ops
from support.bounds import assert_same_bits, each_low_dtype
from support.cases import NOISE_TABLE, without_kernels
from support.losses import (
    BATCH,
    KEY,
    UPSTREAM,
    WEIGHTS,
    each_kind,
    eager,
    gradient,
    judge,
    needs_module,
    options_of,
    tensors_of,
)

TABLE = NOISE_TABLE.float()


def training_step(m: Tensor, x0: Tensor, noise: Any = None) -> tuple[Tensor, Tensor]:
    """x_t, which stands for what a model would be given, and the loss of its output `m`."""
    if not isinstance(noise, PhiloxNoise):
        seed = noise
        noise = PhiloxNoise.from_generator() if seed is None else PhiloxNoise(seed)
    t = torch.arange(m.shape[0], device=m.device) * 7
    x_t = ops.q_sample(x0, t, noise, TABLE)
    loss = ops.denoising_loss(m, x0, noise, weight=TABLE[:, 1] + 1, t=t)
    return x_t, loss


def step_and_gradient(run: Callable[..., Any], *noise: Any) -> tuple[Tensor, ...]:
    """Of noise that is drawn twice; and it is the same noise."""
    m, x0, _ = tensors_of(torch.float64, shape=(BATCH, 37))
    torch.manual_seed(3)
    x_t, loss = run(m, x0, *noise)
    loss.mean().backward()
    alpha, sigma = TABLE[::7][:BATCH].double().unbind(1)
    noise_seen = (x_t - alpha[:, None] * x0) / sigma[:, None]
    assert m.grad is not None
    error = m.grad * (37 * BATCH) / (2 * (sigma[:, None] + 1))
    torch.testing.assert_close(m.detach() - error, noise_seen)
    return x_t, loss.detach(), m.grad


@needs_module
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(training_step, fullgraph=True, backend=backend)
    found = step_and_gradient(run)
    assert_same_bits(step_and_gradient(run), found)
    if backend == "inductor":  # which has a generator of its own
        return
    assert_same_bits(found, step_and_gradient(training_step))
    torch._dynamo.utils.counters.clear()
    for seed in (5, -1, 2**62):
        at = torch.tensor(seed)
        assert_same_bits(step_and_gradient(run, at), step_and_gradient(training_step, at))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "a seed compiles again"


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("noise", [None, KEY], ids=["default", "key"])
def test_checkpoint(reentrant: bool, noise: PhiloxNoise | None) -> None:
    found = step_and_gradient(
        lambda *args: checkpoint(training_step, *args, use_reentrant=reentrant), noise
    )
    assert_same_bits(found, step_and_gradient(training_step, noise))


@each_kind
def test_a_mode_that_has_ended_before_the_backward(kind: str) -> None:
    m, x0, noise = tensors_of(torch.float32)
    options = options_of(kind, WEIGHTS["table"])
    for form in (noise, KEY):
        with torch.device("cpu"):  # a function mode
            loss = ops.denoising_loss(m, x0, form, **options)
        (found,) = torch.autograd.grad(loss.sum(), m)
        wanted = gradient(ops.denoising_loss, m, (x0, form), options, torch.sum)
        assert_same_bits(found, wanted)


def test_saved_tensors_hooks() -> None:
    m, x0, _ = tensors_of(torch.float32)
    wanted = gradient(ops.denoising_loss, m, (x0, KEY), {}, torch.sum)
    kept: list[Tensor] = []
    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x) or x.clone(), lambda x: x
        ),
    ):
        with hooks:
            loss = ops.denoising_loss(m, x0, KEY)
        (found,) = torch.autograd.grad(loss.sum(), m)
        assert_same_bits(found, wanted)
    assert kept


@each_kind
def test_vmap_over_samples(kind: str) -> None:
    m, x0, noise = tensors_of(torch.float32, shape=(BATCH, 37))
    m = m.detach()
    options = {"prediction_type": kind, "weight": 1.5}
    if kind == "v_prediction":
        options |= {"alpha": 0.8, "sigma": 0.6}

    def loss(m: Tensor, x0: Tensor, sample_id: Tensor) -> Tensor:
        key = KEY.for_samples(sample_id)
        return ops.denoising_loss(m[None], x0[None], key, **options)[0]

    ids = torch.arange(BATCH) + KEY.sample_ids
    wide = tuple(x.double() for x in (m, x0, noise))
    found = torch.vmap(loss)(m, x0, ids)
    plain, exact = eager(m, x0, noise, **options), eager(*wide, **options)
    judge(found[:, None], plain[:, None], exact[:, None])
    each = torch.vmap(torch.func.grad(loss))(m, x0, ids)
    truth = gradient(eager, wide[0], wide[1:], options, torch.sum)
    judge(each, gradient(eager, m, (x0, noise), options, torch.sum), truth)


@each_kind
@each_low_dtype
def test_without_kernels(kind: str, dtype: torch.dtype) -> None:
    m, x0, noise = tensors_of(dtype)
    options = options_of(kind, WEIGHTS["table"])
    wide = tuple(x.detach().double() for x in (m, x0, noise))
    for total in UPSTREAM.values():
        with without_kernels():
            found, drawn = (
                gradient(ops.denoising_loss, m, (x0, form), options, total) for form in (noise, KEY)
            )
        assert_same_bits(found, drawn)
        plain, truth = (
            gradient(eager, x[0], x[1:], options, total) for x in ((m, x0, noise), wide)
        )
        judge(found, plain, truth)
