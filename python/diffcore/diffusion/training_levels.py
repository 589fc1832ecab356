"""A training step at a noise level of each sample, as users pass it: a number or ``[B]``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_real, as_tensor, check_float_tensor
from diffcore._devices import to_device, wide_dtype
from diffcore._engine.dtensor import per_sample, shard_of
from diffcore._kernels.linear import LINEAR_COMBINATION
from diffcore.diffusion.checks import can_read_values, check_batch
from diffcore.noise import Noise, PhiloxNoise, perturbation_key
from diffcore.ops._arguments import as_coef
from diffcore.ops._groups import Groups
from diffcore.ops._noise import default_key, run_noisy

# The kernel of ops.add_noise, with the names of the classes.
_NOISED = LINEAR_COMBINATION.renamed(("x_start", "noise"), ("alpha", "sigma"))


def noised(
    x_start: Tensor,
    noise: Noise | None,
    alpha: Tensor | float,
    sigma: Tensor,
    group_dim: int | None,
) -> Tensor:
    """``alpha x_0 + sigma noise``; with noise ``None`` that of a key seeded by torch's generator.

    Args:
        x_start: x_0, ``[B, ...]``, checked.
        noise: The noise.
        alpha: A number or float64 ``[B]``, with groups ``[B, G]``.
        sigma: The same.
        group_dim: The dimension of the groups, or ``None``.

    Returns:
        x, like ``x_start``.
    """
    noise = default_key(x_start) if noise is None else noise
    if group_dim is not None:
        return ops.add_noise(x_start, noise, alpha, sigma, group_dim=group_dim)
    x: Tensor = run_noisy(_NOISED, (x_start,), noise, (alpha, sigma))
    return x


def levels_beside(
    name: str,
    value: Any,
    x: Tensor,
    beside: str,
    low: float,
    high: float = math.inf,
    group_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    fix: str = "",
) -> Tensor:
    """A noise level or time of each sample, ``[B]`` on the device of the samples.

    Args:
        name: Name of the argument.
        value: A number, or a floating-point tensor, an array or a list of one or B numbers.
        x: The samples ``[B, ...]``.
        beside: Name of ``x``.
        low: The least value; 0 with infinite ``high`` is not allowed itself. Values of tensors
            are read on the CPU only.
        high: The largest value; infinity is not allowed itself.
        group_dim: The dimension of groups that have a level each, or ``None``.
        dtype: That of the result; float64 levels stay float64. Where the device of the samples has
            none, float32.
        fix: What may mend integers, or values out of range.

    Returns:
        ``[B]``; with groups ``[B, G]``, of which the values may be ``[B]`` or one.

    Raises:
        TypeError: No numbers, or integers; ``x`` is not a floating-point tensor ``[B, ...]``.
        ValueError: Another shape or device, or a value out of range.
    """
    check_batch(beside, x)
    wanted: tuple[int, ...] = tuple(x.shape[:1])
    if group_dim is not None:
        groups = Groups.of(beside, x, group_dim)
        wanted = (groups.counts[0], groups.counts[2])
    if not isinstance(value, (Tensor, list, tuple)) and not getattr(value, "ndim", 0):
        number = as_real(name, value)
        if not _within(number, low, high):
            raise ValueError(f"{name} must be {_range(low, high)}, got {number:.6g}{fix}")
        return torch.full(wanted, number, dtype=_there(dtype, x), device=x.device)
    levels = as_tensor(name, value, "a number or a floating-point tensor [B]")
    if fix and not levels.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {levels.dtype}{fix}")
    check_float_tensor(name, levels)
    if levels.shape != wanted:
        one = levels.numel() == 1 and levels.ndim < 2
        if not one and (group_dim is None or levels.shape != x.shape[:1]):
            frames = ""
            if group_dim is None and levels.ndim == 2:
                frames = "; for a level of each frame pass [B, F] with group_dim"
            each = "" if group_dim is None else ", one for each group"
            raise ValueError(
                f"{name} must have shape {wanted}{each}, got {tuple(levels.shape)}{frames}"
            )
        levels = levels.reshape(-1, *[1] * (len(wanted) - 1)).expand(wanted)
    if not isinstance(value, Tensor) or (value.ndim == 0 and value.device.type == "cpu"):
        levels = to_device(levels, x.device)  # a 0-dim CPU tensor goes with any device
    elif levels.device != x.device:
        raise ValueError(
            f"{name} must be on {x.device}, the device of {beside}, got {levels.device}; "
            f"{name}.to({beside}.device)"
        )
    if can_read_values(levels) and levels.numel():
        own = shard_of(levels).detach()
        least, most = (float(end) for end in torch.aminmax(own))  # both nan if one value is
        if not (_within(least, low, high) and _within(most, low, high)):
            came = next(v for v in own.tolist() if not _within(v, low, high))
            raise ValueError(f"{name} must be {_range(low, high)}, got {came:.6g}{fix}")
    return levels if levels.dtype == torch.float64 else levels.to(_there(dtype, x))


def perturbed(
    x: Tensor, noise: Noise, strength: float, sigma: Tensor, group_dim: int | None
) -> Tensor:
    """``x + strength sigma z'``, the input perturbation of a training step.

    Args:
        x: Noised samples.
        noise: The key of their noise, of which z' is another stream.
        strength: gamma.
        sigma: How much noise is in ``x``, ``[B]``, with groups ``[B, G]``.
        group_dim: The dimension of the groups, or ``None``.

    Returns:
        Like ``x``.
    """
    return ops.add_noise(x, perturbation_key(noise), 1.0, strength * sigma, group_dim=group_dim)


def of_level(name: str, value: Any, level: Tensor) -> Any:
    """What a function of the noise levels returns, checked; another value as it is.

    Args:
        name: Name of the argument.
        value: A function, or a value.
        level: The noise levels.

    Raises:
        TypeError: The function returned no tensor.
        ValueError: It returned another shape.
    """
    if not callable(value):
        return value
    found = value(level)
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor, got {type(found).__name__}")
    if found.shape != level.shape:
        raise ValueError(
            f"{name} must return the shape of sigma, {tuple(level.shape)}, got {tuple(found.shape)}"
        )
    return found


def as_model_input(level: Tensor, x: Tensor) -> Tensor:
    """Timestep inputs ``[B]`` as ``diffcore.sample`` passes them: float64 beside float64 samples.

    Args:
        level: float64 ``[B]``.
        x: The samples.

    Returns:
        float32, or float64 beside float64 samples; beside a DTensor a DTensor.
    """
    return per_sample(level if x.dtype == torch.float64 else level.float(), x)


def noise_and_levels(
    noise: Noise | None,
    levels: Any,
    x: Tensor,
    beside: str,
    sample: Callable[..., Tensor],
    group_dim: int | None,
) -> tuple[Noise, Any]:
    """The noise of a training step and its levels, by default of one key.

    Args:
        noise: The noise, or ``None`` for a key seeded by torch's generator.
        levels: The levels, or ``None`` for those that ``sample`` makes from the key; from a key
            seeded by torch's generator where the noise is a tensor.
        x: The samples ``[B, ...]``.
        beside: Name of ``x``.
        sample: ``sample(batch, key, groups=, dtype=, device=)``.
        group_dim: The dimension of the groups, or ``None``.

    Returns:
        Noise and levels.
    """
    check_batch(beside, x)
    if noise is None:
        noise = default_key(x)
    if levels is None:
        count = None if group_dim is None else Groups.of(beside, x, group_dim).counts[2]
        key = noise if isinstance(noise, PhiloxNoise) else default_key(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        levels = sample(x.shape[0], key, groups=count, dtype=dtype, device=x.device)
    return noise, levels


def weights_beside(weights: Any, x: Tensor, group_dim: int | None) -> Any:
    """Weights of the samples for ``ops.denoising_loss``, checked under their name.

    Args:
        weights: A number, a tensor ``[B]``, or ``None``.
        x: The samples.
        group_dim: The dimension of the groups, which ``denoising_loss`` checks, or ``None``.

    Returns:
        A number, a tensor, or ``None``.

    Raises:
        TypeError: No numbers.
        ValueError: Not one for each sample.
    """
    if weights is None or group_dim is not None:
        return weights
    found = as_coef("weights", weights, None)
    if isinstance(found, Tensor) and found.ndim and len(found) not in (1, x.shape[0]):
        raise ValueError(f"weights must have shape ({x.shape[0]},), got {tuple(found.shape)}")
    return found


def _there(dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """The dtype, or the one that the device of the samples has for it."""
    return wide_dtype(x.device) if dtype == torch.float64 else dtype


def _within(value: float, low: float, high: float) -> bool:
    return low < value < high if math.isinf(high) else low <= value <= high


def _range(low: float, high: float) -> str:
    return f"above {low:g} and finite" if math.isinf(high) else f"in [{low:g}, {high:g}]"
