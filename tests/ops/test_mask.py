"""What a mask selects, bit for bit, and what it keeps out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from support.bounds import assert_same_bits, each_dtype
from support.cases import without_kernels

SHAPE = (4, 3, 6, 8)
KEY = PhiloxNoise(7, sample_ids=100, stream=3)
MASKS = {  # 1 where x stays
    "[B, 1, H, W]": (4, 1, 6, 8),
    "[1, 1, H, W]": (1, 1, 6, 8),
    "[H, W]": (6, 8),
    "[W]": (8,),
    "[]": (),
    "[B, 1, 1, 1]": (4, 1, 1, 1),
    "[B, C, H, W]": SHAPE,
    "[1, C, 1, 1]": (1, 3, 1, 1),
}
each_mask = pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    x, known = (draw(SHAPE, seed, dtype).to(device) for seed in (1, 2))
    return x, known


@each_dtype
@each_mask
def test_hard_masks_select_bits(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, known = tensors(dtype, device)
    hard = (draw(shape, 3) > 0).to(device)
    noised = ops.add_noise(known, KEY, 0.8, 0.6)
    expected = torch.where(hard, x, noised)
    for mask in (hard, hard.int(), hard.to(torch.uint8), hard.float(), hard.to(dtype)):
        assert_same_bits(ops.blend_known(x, mask, known, KEY, 0.8, 0.6), expected)
    z = KEY.tensor(SHAPE, dtype=dtype, device=device)
    assert_same_bits(ops.blend_known(x, hard, known, z, 0.8, 0.6), expected)
    in_place = x.clone()
    assert ops.blend_known(in_place, hard, known, z, 0.8, 0.6, out=in_place) is in_place
    assert_same_bits(in_place, expected)


@each_dtype
def test_levels_of_each_sample(dtype: torch.dtype, device: str) -> None:
    x, known = tensors(dtype, device)
    mask = (draw((6, 8), 3) > 0).to(device)
    alpha, sigma = (torch.linspace(*ends, 5, device=device) for ends in ((1, 0.2), (0, 0.9)))
    t = torch.tensor([0, 4, 2, 2], device=device)
    expected = torch.where(mask, x, ops.add_noise(known, KEY, alpha[t], sigma[t]))
    assert_same_bits(ops.blend_known(x, mask, known, KEY, alpha, sigma, t=t), expected)
    assert torch.equal(expected[0][~mask.expand(3, 6, 8)], known[0][~mask.expand(3, 6, 8)])


@each_mask
def test_every_memory_order(shape: tuple[int, ...], device: str) -> None:
    x, known = tensors(torch.float32, device)
    mask = draw(shape, 3).sigmoid().to(device)
    expected = ops.blend_known(x, mask, known, KEY, 0.8, 0.6)
    last, of_last = (y.to(memory_format=torch.channels_last) for y in (x, known))
    found = ops.blend_known(last, mask, of_last, KEY, 0.8, 0.6)
    assert_same_bits(found, expected)
    assert found.stride() == last.stride()
    every_other = torch.stack([x, x], 1).flatten(0, 1)[::2]
    assert_same_bits(ops.blend_known(every_other, mask, known, KEY, 0.8, 0.6), expected)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_dropped_reaches_nothing(bad: float, reference: bool, device: str) -> None:
    """Neither values nor gradients, also of the coefficients and of a second derivative."""
    x, known = tensors(torch.float64, device)
    mask = (draw((6, 8), 3) > 0).to(device)
    z = KEY.tensor(SHAPE, dtype=torch.float64, device=device)
    ours = mask.expand(SHAPE)
    leaves = [y.masked_fill(where, bad) for y, where in ((x, ~ours), (known, ours), (z, ours))]
    clean = [y.masked_fill(where, 0.0) for y, where in ((x, ~ours), (known, ours), (z, ours))]

    def results(given: list[Tensor]) -> list[Tensor]:
        x, known, z = (y.clone().requires_grad_() for y in given)
        alpha = torch.tensor(0.8, dtype=torch.float64, device=device, requires_grad=True)
        y = ops.blend_known(x, mask, known, z, 0.8, 0.6)
        first = torch.autograd.grad(y.sin().sum(), (x, known, z), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, known, z))
        by_alpha = ops.blend_known(x, mask, known, z, alpha, 0.6)
        return [y, *first, *second, *torch.autograd.grad(by_alpha.sum(), alpha)]

    if reference:
        with without_kernels():
            found, expected = results(leaves), results(clean)
    else:
        found, expected = results(leaves), results(clean)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_mask_of_all_samples_is_not_stored_for_each() -> None:
    """Its one copy is of a sample's size: what is written is in proportion."""
    x, known = (torch.randn(64, 3, 32, 32) for _ in range(2))
    z = torch.randn_like(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.blend_known(x, torch.ones(32, 32, dtype=torch.bool), known, z, 0.8, 0.6, out=x)
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert taken < 2 * x[0].nbytes + 8 * 32 * 32


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": (
        {"mask": [1.0]},
        TypeError,
        "^mask must be a torch.Tensor, got list$",
    ),
    "complex": (
        {"mask": torch.ones(8, dtype=torch.complex64)},
        TypeError,
        "^mask must have dtype bool, .* or float16, got torch.complex64$",
    ),
    "of 16 unsigned bits": (
        {"mask": torch.ones(8, dtype=torch.uint16)},
        TypeError,
        "^mask must have dtype bool, .* or float16, got torch.uint16$",
    ),
    "one sample short": (
        {"mask": torch.ones(3, 1, 6, 8)},
        ValueError,
        r"^mask must broadcast to the shape of x, \(4, 3, 6, 8\), got \(3, 1, 6, 8\); a mask of",
    ),
    "[B, H, W]": (
        {"mask": torch.ones(4, 6, 8)},
        ValueError,
        r"^mask must broadcast to the shape of x, .*; a mask of each sample has the shape \[B, 1",
    ),
    "more dimensions": (
        {"mask": torch.ones(1, 4, 3, 6, 8)},
        ValueError,
        "^mask must broadcast",
    ),
    "negative": (
        {"mask": torch.tensor([0.5, -0.25]).repeat(4)},
        ValueError,
        r"^mask must have values in \[0, 1\], got values from -0.25 to 0.5$",
    ),
    "of 8 bits": (
        {"mask": torch.full((8,), 255, dtype=torch.uint8)},
        ValueError,
        r"^mask must have values in \[0, 1\], got values from 255 to 255$",
    ),
    "nan": (
        {"mask": torch.full((8,), math.nan)},
        ValueError,
        r"^mask must have values in \[0, 1\], got values from nan to nan$",
    ),
    "trained": (
        {"mask": torch.ones(8, requires_grad=True)},
        ValueError,
        "^mask must not require grad, got a tensor that does",
    ),
    "elsewhere": (
        {"mask": torch.ones(8, device="meta")},
        ValueError,
        "^mask must be on cpu, as the samples, got meta$",
    ),
    "sparse": (
        {"mask": torch.ones(6, 8).to_sparse()},
        TypeError,
        "^mask must be a dense, strided tensor",
    ),
    "known of another shape": (
        {"known": torch.ones(4, 3, 8, 6)},
        ValueError,
        r"^known must have the shape of x, \(4, 3, 6, 8\), got \(4, 3, 8, 6\)",
    ),
    "noise of another shape": (
        {"known_noise": torch.ones(3, 6, 8)},
        ValueError,
        r"^known_noise must have the shape of x, \(4, 3, 6, 8\), got \(3, 6, 8\)",
    ),
    "no noise": (
        {"known_noise": None},
        TypeError,
        "^known_noise must be a torch.Tensor or a PhiloxNoise, got NoneType$",
    ),
    "no known samples": (
        {"known": None},
        TypeError,
        "^known must be a torch.Tensor, got NoneType$",
    ),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_bad_arguments(change: tuple[dict[str, Any], type[Exception], str]) -> None:
    wrong, kind, message = change
    x, known = tensors(torch.float32)
    given = {"mask": torch.ones(8), "known": known, "known_noise": KEY, "alpha": 0.8, "sigma": 0.6}
    with pytest.raises(kind, match=message):
        ops.blend_known(x, **{**given, **wrong})


@each_mask
def test_a_loss_under_one_mask_of_all_samples(shape: tuple[int, ...], device: str) -> None:
    """The sum of such a mask is a number on the CPU, and a tensor otherwise."""
    x, known = tensors(torch.float32, device)
    m = draw(SHAPE, 4).to(device).requires_grad_()
    hard = (draw(shape, 3) > 0).to(device)
    for mask in (hard, torch.zeros_like(hard)):
        one = ops.denoising_loss(m, x, known, mask=mask)
        each = ops.denoising_loss(m, x, known, mask=mask.expand(SHAPE).contiguous())
        assert_same_bits(one, each)
        assert_same_bits(*(torch.autograd.grad(y.mean(), m)[0] for y in (one, each)))
