"""Offset and pyramid noise, and input perturbation: their law, their streams, their replay."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffcore import GaussianDiffusion, PhiloxNoise
from diffcore.noise import offset_noise, perturbation_key, pyramid_noise

KEY = PhiloxNoise(7, stream=3)
MANY = (4000, 2, 5, 6)


def test_offset_noise_is_z_and_one_normal_for_each_channel() -> None:
    for dtype in (torch.float64, torch.float32):
        found = offset_noise(KEY, MANY, 0.3, dtype=dtype)
        n = (found - KEY.tensor(MANY, dtype=dtype)) / 0.3
        torch.testing.assert_close(n, n[:, :, :1, :1].expand(MANY), rtol=0, atol=1e-5)
        n = n[:, :, 0, 0].double()
        torch.testing.assert_close(n.float(), KEY.at(3 + 2**30).tensor(MANY[:2]), atol=1e-5, rtol=0)
        assert abs(n.mean()) < 4 / math.sqrt(n.numel())
        assert abs(n.var() - 1) < 4 * math.sqrt(2 / n.numel())
        assert abs((n[:, 0] * n[:, 1]).mean()) < 4 / math.sqrt(len(n))
    assert torch.equal(offset_noise(KEY, MANY, 0.0), KEY.tensor(MANY))


@pytest.mark.parametrize("size", [(8, 8), (5, 12), (1, 7), (1, 1)], ids=str)
def test_pyramid_noise_is_standard_normal_at_each_pixel(size: tuple[int, int]) -> None:
    """The variance is exact: the weights of the independent normals, one of them 1 at a time."""
    discount = 0.8
    depth = max(math.ceil(math.log2(max(size))), 0)
    variance = torch.ones(size, dtype=torch.float64)
    total = KEY.tensor((2, 3, *size), dtype=torch.float64)
    for k in range(1, depth + 1):
        low = [math.ceil(n / 2**k) for n in size]
        for i, j in itertools.product(*map(range, low)):
            one = torch.zeros(1, 1, *low, dtype=torch.float64)
            one[0, 0, i, j] = discount**k
            variance += interpolate(one, size=size, mode="bilinear")[0, 0] ** 2
        z = KEY.at(3 + 2**31 + k * 2**26).tensor((2, 3, *low), dtype=torch.float64)
        total = total + discount**k * interpolate(z, size=size, mode="bilinear")
    found = pyramid_noise(KEY, (2, 3, *size), discount, dtype=torch.float64)
    torch.testing.assert_close(found, total / variance.sqrt(), rtol=1e-12, atol=1e-12)


def test_pyramid_noise_of_many_samples() -> None:
    found = pyramid_noise(KEY, (20000, 1, 4, 4), 0.9).double()
    assert (found.var(0) - 1).abs().max() < 6 * math.sqrt(2 / 20000)
    assert found.mean(0).abs().max() < 5 / math.sqrt(20000)
    assert (found[:, 0, 0, 0] * found[:, 0, 0, 1]).mean() > 0.3  # neighbors are correlated
    assert torch.equal(pyramid_noise(KEY, (3, 2, 9, 9), 0.0), KEY.tensor((3, 2, 9, 9)))
    assert torch.equal(pyramid_noise(KEY, (3, 2, 9, 9), levels=0), KEY.tensor((3, 2, 9, 9)))
    video = pyramid_noise(KEY, (2, 3, 4, 8, 8))
    assert torch.equal(video.reshape(2, 12, 8, 8), pyramid_noise(KEY, (2, 12, 8, 8)))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    ids = torch.tensor([11, 3, 8])
    for function in (offset_noise, pyramid_noise):
        of_all = function(KEY.for_samples(ids), (3, 2, 8, 8))
        for i, one in enumerate(ids):
            alone = function(KEY.for_samples(int(one)), (1, 2, 8, 8))
            torch.testing.assert_close(alone[0], of_all[i], rtol=0, atol=0)


def test_streams_wrap_around_and_may_be_tensors() -> None:
    key = PhiloxNoise(7, stream=2**32 - 1)
    by_tensor = PhiloxNoise(7, stream=torch.tensor(2**32 - 1))
    for function in (offset_noise, pyramid_noise):
        one, other = (function(k, (2, 2, 4, 4)) for k in (key, by_tensor))
        assert torch.equal(one, other)
    assert perturbation_key(key).stream == 3 * 2**30 - 1
    streams = {(3 + s) % 2**32 for s in (0, 2**30, 3 * 2**30)}
    streams |= {3 + 2**31 + k * 2**26 for k in range(1, 16)}
    assert len(streams) == 18  # none is that of another


@pytest.mark.parametrize("of_groups", [False, True], ids=["samples", "groups"])
def test_input_perturbation(of_groups: bool, device: str) -> None:
    diffusion = GaussianDiffusion(torch.linspace(1e-3, 0.2, 20))
    x0 = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(1)).to(device)
    t = torch.tensor([0, 7, 19, 3], device=device)
    options: dict[str, Any] = {"noise": KEY}
    shape = (4, 1, 1, 1)
    if of_groups:
        t = torch.stack([t, t, t + 0, (t + 5) % 20, t, t], 1)
        options["group_dim"], shape = 2, (4, 1, 6, 1)
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return 0.3 * x

    found = diffusion.training_losses(model, x0, t, input_perturbation=0.1, **options)["loss"]
    again = diffusion.training_losses(model, x0, t, input_perturbation=0.1, **options)["loss"]
    assert torch.equal(found, again)
    z = KEY.tensor(x0.shape, device=device).double()
    z_too = KEY.at(3 + 3 * 2**30).tensor(x0.shape, device=device).double()
    alpha, sigma = (
        c.to(device)[t].reshape(shape)
        for c in (diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod)
    )
    x_t = alpha * x0.double() + sigma * (z + 0.1 * z_too)
    torch.testing.assert_close(seen[0].double(), x_t, rtol=1e-5, atol=1e-6)
    wanted = ((0.3 * x_t - z) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_refused() -> None:
    shard = KEY.for_shard((4, 8), (4, 4), (0, 4))
    groups = KEY.for_groups(torch.zeros(2, 3, dtype=torch.int64), 1)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (offset_noise, (torch.zeros(2, 3), (2, 3)), TypeError, "noise must be a PhiloxNoise, got"),
        (offset_noise, (KEY, (2,)), ValueError, r"shape must be \[B, C, ...\], got \(2,\)"),
        (offset_noise, (KEY, (2, 3), -1.0), ValueError, "strength must be at least 0 and finite"),
        (offset_noise, (shard, (4, 4)), ValueError, "noise must be a key of complete samples"),
        (pyramid_noise, (groups, (2, 3, 4)), ValueError, "noise must be a key of complete samples"),
        (pyramid_noise, (KEY, (2, 3)), ValueError, r"shape must be \[B, ..., H, W\], got"),
        (pyramid_noise, (KEY, (2, 3, 4), math.inf), ValueError, "discount must be at least 0"),
        (perturbation_key, (torch.zeros(2),), TypeError, "noise must be a PhiloxNoise, got Tensor"),
    ]
    for function, arguments, error, message in cases:
        with pytest.raises(error, match=message):
            function(*arguments)
    diffusion = GaussianDiffusion(torch.linspace(1e-3, 0.2, 20))
    x0, t = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2])
    for gamma, noise, error, message in [
        (0.1, torch.zeros_like(x0), ValueError, "noise must be a PhiloxNoise or None with input_p"),
        (-0.1, KEY, ValueError, "input_perturbation must be at least 0 and finite, got -0.1"),
        ("x", KEY, TypeError, "input_perturbation must be"),
    ]:
        with pytest.raises(error, match=message):
            diffusion.training_losses(
                lambda x, t: x,
                x0,
                t,
                noise=noise,
                input_perturbation=gamma,  # type: ignore[arg-type]
            )
