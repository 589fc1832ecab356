"""Free bits, capacity, annealing and balanced KL, from their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore.vae import (
    balanced_kl,
    capacity_loss,
    cyclical_annealing,
    free_bits,
    linear_annealing,
    vae_loss,
)

G = torch.Generator().manual_seed(5)
MEAN, LOGVAR, MEAN2, LOGVAR2 = torch.randn(4, 6, 3, 4, 2, generator=G, dtype=torch.float64)
FREE = 1.1


def formula(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def kl_of(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    kind = torch.distributions.Normal
    first, second = kind(mean1, (logvar1 / 2).exp()), kind(mean2, (logvar2 / 2).exp())
    return torch.distributions.kl_divergence(first, second).flatten(1).sum(1)


UNITS = {
    "dimension": lambda kl: kl.flatten(1),
    "group": lambda kl: kl.sum((2, 3)),
    "sample": lambda kl: kl.flatten(1).sum(1, keepdim=True),
}


@pytest.mark.parametrize("per", UNITS)
@pytest.mark.parametrize("over", ["batch", "sample"])
def test_free_bits(per: str, over: str) -> None:
    free = {"dimension": 0.6, "group": 5.0, "sample": 14.5}[per]
    leaves = [v.clone().requires_grad_() for v in (MEAN, LOGVAR)]
    copies = [v.clone().requires_grad_() for v in (MEAN, LOGVAR)]
    kl = diffcore.standard_normal_kl(*leaves)
    found = free_bits(kl, free, per=per, over=over)
    units = UNITS[per](formula(*copies))
    assert found.shape == (6,)
    if over == "batch":  # the formula of the paper, a number for the batch
        held = units.mean(0) < free
        right = units.mean(0).clamp(min=free).sum()
    else:
        held = units < free
        right = units.clamp(min=free).sum(1).mean()
        torch.testing.assert_close(found, units.clamp(min=free).sum(1), rtol=1e-13, atol=0)
    assert per == "sample" or 0 < held.sum() < held.numel()  # some are free, some are not
    torch.testing.assert_close(found.mean(), right, rtol=1e-13, atol=0)
    for a, b in zip(
        torch.autograd.grad(found.mean(), leaves), torch.autograd.grad(right, copies), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_free_bits_along_another_dimension_and_in_16_bits() -> None:
    kl = formula(MEAN, LOGVAR)
    right = kl.sum((1, 3)).mean(0).clamp(min=4.0).sum()
    found = free_bits(kl, 4.0, per="group", group_dim=2)
    torch.testing.assert_close(found.mean(), right, rtol=1e-13, atol=0)
    flat = kl[:, :, 0, 0]
    assert torch.equal(free_bits(flat, 0.7, per="group"), free_bits(flat, 0.7))
    half = kl.bfloat16()
    found = free_bits(half, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), free_bits(half.double(), 0.5), rtol=1e-6, atol=0)
    x = torch.zeros(6, 5, dtype=torch.float64)
    loss = vae_loss(x, x, free_bits(kl, 0.5))
    torch.testing.assert_close(loss["loss"], free_bits(kl, 0.5))
    assert torch.equal(free_bits(kl, 0.0, over="sample"), kl.flatten(1).sum(1))


def test_capacity() -> None:
    kl = torch.tensor([3.0, 7.0, 5.0], requires_grad=True)
    for capacity in (5.0, torch.tensor([5.0])):
        found = capacity_loss(kl, capacity, beta=10.0)
        assert found.tolist() == [20.0, 20.0, 0.0]
    assert torch.autograd.grad(found.sum(), kl)[0].tolist() == [-10.0, 10.0, 0.0]
    assert capacity_loss(kl.mean(), 4.5).item() == 0.5


def test_linear_annealing() -> None:
    values = [linear_annealing(i, 4) for i in (0, 1, 2, 3, 4, 100)]
    assert values == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    values = [linear_annealing(i, 2, start=1.0, end=25.0, delay=3) for i in range(7)]
    assert values == [1.0, 1.0, 1.0, 1.0, 13.0, 25.0, 25.0]


def test_cyclical_annealing() -> None:
    # The formulas of Fu et al. with t = step + 1.
    for total, cycles, ratio in ((40, 4, 0.5), (37, 4, 0.3), (10, 1, 1.0), (9, 2, 0.75)):
        for step in range(total):
            tau = (step % math.ceil(total / cycles)) / (total / cycles)
            right = tau / ratio if tau <= ratio else 1.0
            found = cyclical_annealing(step, total, cycles=cycles, ratio=ratio)
            assert math.isclose(found, right, rel_tol=1e-14), (total, cycles, step)
        assert cyclical_annealing(total, total, cycles=cycles, ratio=ratio) == 1.0
    values = [cyclical_annealing(i, 8, cycles=2, start=2.0, end=4.0) for i in range(9)]
    assert values == [2.0, 3.0, 4.0, 4.0, 2.0, 3.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("weights", "free"), [((0.8, None), 0.0), ((0.5, 0.1), 40.0), ((1.0, 0.0), 1.0)]
)
def test_balanced_kl(weights: tuple[float, float | None], free: float) -> None:
    given = (MEAN, LOGVAR, MEAN2, LOGVAR2)
    leaves, copies = ([v.clone().requires_grad_() for v in given] for _ in range(2))
    found = balanced_kl(
        *leaves, prior_weight=weights[0], posterior_weight=weights[1], free_nats=free
    )
    a, b = weights[0], 1 - weights[0] if weights[1] is None else weights[1]
    kl = kl_of(*copies)
    torch.testing.assert_close(found, (a + b) * kl.clamp(min=free), rtol=1e-12, atol=0)
    slopes = torch.autograd.grad(kl.clamp(min=free).sum(), copies)
    if free == 40.0:
        assert 0 < (kl < free).sum() < 6
    for k, (mine, plain) in enumerate(
        zip(torch.autograd.grad(found.sum(), leaves), slopes, strict=True)
    ):
        torch.testing.assert_close(mine, (b if k < 2 else a) * plain, rtol=1e-12, atol=1e-14)


def test_refusals() -> None:
    kl = formula(MEAN, LOGVAR)
    for call, message in (
        (lambda: free_bits(kl, -1.0), r"free_nats must be at least 0, got -1\.0"),
        (lambda: free_bits(kl, 1.0, per="channel"), "per must be one of 'dimension', 'group', "),
        (
            lambda: free_bits(kl, 1.0, over="all"),
            "over must be one of 'batch', 'sample', got 'all'",
        ),
        (lambda: free_bits(kl.sum(), 1.0), r"kl must have shape \[B, ...\], got a 0-dim tensor"),
        (
            lambda: free_bits(kl, 1.0, per="group", group_dim=4),
            r"group_dim must be a .* 1 \.\. 3, ",
        ),
        (lambda: capacity_loss(kl, -2.0), r"capacity must be at least 0, got -2\.0"),
        (lambda: capacity_loss(kl, torch.ones(2)), "capacity must be a number or a 0-dim tensor, "),
        (lambda: linear_annealing(-1, 4), "step must be at least 0, got -1"),
        (lambda: cyclical_annealing(1, 3), "num_steps must be at least cycles, 4, got 3"),
        (lambda: cyclical_annealing(1, 9, ratio=0.0), r"ratio must be in \(0, 1\], got 0\.0"),
        (
            lambda: balanced_kl(MEAN, LOGVAR, MEAN2, LOGVAR2, free_nats=-1),
            "free_nats must be at le",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="kl must be a floating-point tensor, got float"):
        free_bits(0.3, 1.0)
