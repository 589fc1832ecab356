"""Noise that is not white, and the second noise of input perturbation, from a noise key."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffcore._checks import as_int, as_real, as_shape
from diffcore._engine.kept import made_plainly
from diffcore.noise.key import Noise, PhiloxNoise

__all__ = ["offset_noise", "perturbation_key", "pyramid_noise"]

_WORDS = 2**32
# Where their streams begin after the key's. Levels are so far apart that the levels of one training
# step do not meet those of another: a step may be the stream.
_OFFSET, _PYRAMID, _PERTURBATION = 2**30, 2**31, 3 * 2**30
_LEVEL = 2**26
_MAX_LEVELS = 15


def offset_noise(
    noise: PhiloxNoise,
    shape: Sequence[int],
    strength: float = 0.1,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise with one more normal for each sample and channel: ``z + strength n[b, c]``.

    z is ``noise.tensor(shape)``; n comes from a stream of its own, 2^30 after the key's. A model
    that is trained with it learns to change the mean of a channel.

    Args:
        noise: The noise key, not one of a shard or of groups.
        shape: ``[B, C, ...]``.
        strength: Standard deviation of the offset, at least 0.
        dtype: float32, float64, bfloat16 or float16; torch's default if ``None``.
        device: ``None`` for that of the key's tensors, else torch's default.

    Returns:
        ``shape``, for any ``noise=``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Less than two dimensions, or a negative strength.

    Source:
        Guttenberg 2023, "Diffusion with offset noise".
    """
    sizes = _sizes(noise, shape, 2, "[B, C, ...]")
    strength = _at_least_0("strength", strength)
    z = noise.tensor(sizes, dtype=dtype, device=device)
    n = _later(noise, _OFFSET).tensor(sizes[:2], dtype=dtype, device=device)
    return z + strength * n.reshape(*sizes[:2], *[1] * (len(sizes) - 2))


def pyramid_noise(
    noise: PhiloxNoise,
    shape: Sequence[int],
    discount: float = 0.9,
    *,
    levels: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Multi-resolution noise: ``(z + Σ_k discount^k up(z_k)) / sd`` over halved resolutions.

    z_k has 1/2^k of the height and width, rounded up, and is interpolated bilinearly. sd is the
    standard deviation of the sum at each pixel, so that each element is standard normal; neighbors
    are correlated. z is ``noise.tensor(shape)``; z_k comes from a stream of its own,
    2^31 + 2^26 k after the key's.

    Args:
        noise: The noise key, not one of a shard or of groups.
        shape: ``[B, ..., H, W]``.
        discount: Factor of each level, at least 0; with 0 the noise is z.
        levels: How many lower resolutions, at most 15; ``None`` for all down to one pixel.
        dtype: float32, float64, bfloat16 or float16; torch's default if ``None``.
        device: ``None`` for that of the key's tensors, else torch's default.

    Returns:
        ``shape``, for any ``noise=``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Less than three dimensions, or a number outside its range.

    Source:
        Whitaker 2023, "Multi-resolution noise for diffusion model training". There the resolutions
        are random and the sum is divided by the standard deviation of the batch.
    """
    sizes = _sizes(noise, shape, 3, "[B, ..., H, W]")
    discount = _at_least_0("discount", discount)
    depth = max(0, *(max(n - 1, 0).bit_length() for n in sizes[-2:]))
    count = min(depth if levels is None else as_int("levels", levels, 0), depth)
    count = min(count, _MAX_LEVELS)
    final = torch.get_default_dtype() if dtype is None else dtype
    wide = torch.float64 if final == torch.float64 else torch.float32
    total = noise.tensor(sizes, dtype=wide, device=device)
    if not total.numel() or not count:
        return total.to(final)
    planes = (sizes[0], -1, *sizes[-2:])
    for k in range(1, count + 1):
        low = tuple(-(-n // 2**k) for n in sizes[-2:])
        z = _later(noise, _PYRAMID + k * _LEVEL).tensor(
            (*sizes[:-2], *low), dtype=wide, device=device
        )
        up = interpolate(z.reshape(sizes[0], -1, *low), size=sizes[-2:], mode="bilinear")
        total = total + discount**k * up.reshape(sizes)
    sd = _deviation(sizes[-2:], count, discount).to(total)
    return (total.reshape(planes) / sd).reshape(sizes).to(final)


def perturbation_key(noise: Noise) -> PhiloxNoise:
    """The key of the second noise z' of input perturbation: x_t = alpha x_0 + sigma (z + gamma z').

    The model's input has both, its target is z alone. With ``noise`` the key of z,
    ``add_noise(x_t, perturbation_key(noise), 1.0, gamma * sigma)`` adds z' to a noised x_t;
    ``GaussianDiffusion.training_losses(input_perturbation=gamma)`` does so.

    Args:
        noise: The key of z.

    Returns:
        The same key, 3 · 2^30 streams on.

    Raises:
        TypeError: ``noise`` is no noise key.

    Source:
        Ning et al. 2023 (arXiv 2301.11706).
    """
    if not isinstance(noise, PhiloxNoise):
        raise TypeError(f"noise must be a PhiloxNoise, got {type(noise).__name__}")
    return _later(noise, _PERTURBATION)


def _later(noise: PhiloxNoise, streams: int) -> PhiloxNoise:
    stream = noise.stream
    later = stream + streams
    return noise.at(later if isinstance(later, Tensor) else later % _WORDS)


def _sizes(noise: Any, shape: Any, dims: int, form: str) -> tuple[int, ...]:
    if not isinstance(noise, PhiloxNoise):
        raise TypeError(f"noise must be a PhiloxNoise, got {type(noise).__name__}")
    if type(noise) is not PhiloxNoise or noise.first_element:
        raise ValueError("noise must be a key of complete samples, got one of a shard or of groups")
    sizes = as_shape("shape", shape)
    if len(sizes) < dims:
        raise ValueError(f"shape must be {form}, got {tuple(sizes)}")
    return tuple(sizes)


def _at_least_0(name: str, value: Any) -> float:
    found = as_real(name, value)
    if not 0 <= found < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {found}")
    return found


@functools.lru_cache(maxsize=64)
def _deviation(size: tuple[int, int], levels: int, discount: float) -> Tensor:
    """The standard deviation of the sum at each pixel, float64 ``[H, W]`` on the CPU."""

    def deviation() -> Tensor:
        variance = torch.ones(size, dtype=torch.float64, device="cpu")
        for k in range(1, levels + 1):
            rows, columns = (_variance(n, -(-n // 2**k)) for n in size)
            variance += discount ** (2 * k) * rows[:, None] * columns
        return variance.sqrt()

    return made_plainly(deviation)


def _variance(size: int, low: int) -> Tensor:
    """The variance of ``low`` independent normals interpolated to ``size`` places."""
    one_each = torch.eye(low, dtype=torch.float64, device="cpu").unsqueeze(0)
    return interpolate(one_each, size=size, mode="linear")[0].square().sum(0)
