"""Densities of the noise level of a training step, for flows: from uniform numbers to sigma.

Each density is a function of u, uniform in (0, 1), whose result has it: by the inverse of its
distribution function, so evenly spaced u cover it evenly, and a u from a noise key makes a training
step that can be replayed. sigma is the weight of the noise, x_t = (1 - sigma) x_0 + sigma noise.
``spacings.shift_sigmas`` shifts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffcore._checks import as_device, as_flag, as_int, as_positive, as_real, as_tensor
from diffcore._devices import beside, has_float64, in_float64, to_device
from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager
from diffcore.noise import GroupNoise, PhiloxNoise, ShardNoise

__all__ = ["DENSITIES", "beta", "cosmap", "draw", "logit_normal", "mode", "stratified", "uniform"]

Density: TypeAlias = str | Callable[[Tensor], Tensor]

# Half the spacing of a uniform number in float64: it moves 0 and leaves every u inside (0, 1).
_HALF = 2.0**-54
_CPU = torch.device("cpu")


def uniform(u: Tensor) -> Tensor:
    """Sigma = u.

    Args:
        u: Uniform numbers in (0, 1), of any shape.

    Returns:
        float64, the shape of ``u``; float32 where its device has no float64.

    Raises:
        TypeError: ``u`` is not made of floating-point numbers.
    """
    return beside(_float64(u), u)


def logit_normal(u: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Its logarithm of odds is normal: sigma = sigmoid(mean + std z), z the normal quantile of u.

    Args:
        u: Uniform numbers in (0, 1), of any shape.
        mean: Above 0 for more noise.
        std: Above 0.

    Returns:
        float64, the shape of ``u``; float32 where its device has no float64.

    Raises:
        TypeError: ``u`` is not made of floating-point numbers, or a parameter is no number.
        ValueError: ``std`` is not positive.

    Source:
        Esser et al. 2024 (Stable Diffusion 3, arXiv 2403.03206) eq. 19.
    """
    mean, std = as_real("mean", mean), as_positive("std", std, finite=True)
    return beside(torch.sigmoid(mean + std * torch.special.ndtri(_float64(u))), u)


def mode(u: Tensor, *, scale: float = 1.29) -> Tensor:
    """More weight in the middle, and some at both ends: 1 - u - scale (cos²(πu/2) - 1 + u).

    Args:
        u: Uniform numbers in (0, 1), of any shape.
        scale: From -1 to 2 / (π - 2), where sigma is a falling function of u; 0 is uniform.

    Returns:
        float64, the shape of ``u``; float32 where its device has no float64.

    Raises:
        TypeError: ``u`` is not made of floating-point numbers, or ``scale`` is no number.
        ValueError: ``scale`` is outside its range.

    Source:
        Esser et al. 2024 (arXiv 2403.03206) eq. 20.
    """
    scale = as_real("scale", scale)
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale must be in [-1, 2 / (pi - 2)], got {scale}")
    wide = _float64(u)
    found = 1 - wide - scale * (torch.cos(0.5 * math.pi * wide) ** 2 - 1 + wide)
    return beside(found, u)


def cosmap(u: Tensor) -> Tensor:
    """The noise levels that the cosine schedule visits evenly: 1 - 1 / (tan(πu/2) + 1).

    Its density is 2 / (π (1 - 2 sigma + 2 sigma²)).

    Args:
        u: Uniform numbers in (0, 1), of any shape.

    Returns:
        float64, the shape of ``u``; float32 where its device has no float64.

    Raises:
        TypeError: ``u`` is not made of floating-point numbers.
        ValueError: A u outside [0, 1] (checked on the CPU).

    Source:
        Esser et al. 2024 (arXiv 2403.03206) eq. 21.
    """
    angle = 0.5 * math.pi * _float64(u)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    return beside(sine / (sine + cosine), u)


def beta(
    u: Tensor, *, a: float = 1.5, b: float = 1.0, low: float = 0.001, high: float = 1.0
) -> Tensor:
    """A Beta(a, b) between two levels: low + (high - low) times its quantile of u.

    The defaults are those of openpi: 0.999 Beta(1.5, 1) + 0.001.

    Args:
        u: Uniform numbers in (0, 1), of any shape.
        a: Above 0.
        b: Above 0. One of both must be 1: then the quantile is u^(1/a), or 1 - (1 - u)^(1/b).
        low: The least sigma, at least 0.
        high: The largest, at most 1.

    Returns:
        float64, the shape of ``u``; float32 where its device has no float64.

    Raises:
        TypeError: ``u`` is not made of floating-point numbers, or a parameter is no number.
        ValueError: A parameter is outside its range, or neither a nor b is 1.

    Source:
        Black et al. 2024 (π0, arXiv 2410.24164), appendix B.
    """
    a, b = as_positive("a", a, finite=True), as_positive("b", b, finite=True)
    low, high = as_real("low", low), as_real("high", high)
    if not 0 <= low < high <= 1:
        raise ValueError(f"low must be at least 0 and below high, at most 1, got {low} and {high}")
    if 1 not in (a, b):
        raise ValueError(
            f"b must be 1 where a is not, got a={a} and b={b}; for another Beta pass sigma from "
            "torch.distributions.Beta"
        )
    wide = _float64(u)
    quantile = wide ** (1 / a) if b == 1 else -torch.expm1(torch.log1p(-wide) / b)
    return beside(low + (high - low) * quantile, u)


DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
    "beta": beta,
}
"""The densities by name."""


def stratified(u: Tensor) -> Tensor:
    """Uniform numbers, one in each of B equal parts of (0, 1): (i + u_i) / B.

    Each of them alone is uniform, if the batch is shuffled; their mean varies less.

    Args:
        u: Uniform numbers in (0, 1), ``[B]``.

    Returns:
        float64 ``[B]``; float32 where the device of u has no float64.

    Raises:
        TypeError: ``u`` is not made of floating-point numbers.
        ValueError: ``u`` is not ``[B]``, or outside [0, 1].
    """
    wide = _float64(u)
    if wide.ndim != 1:
        raise ValueError(f"u must have shape [B], got {tuple(wide.shape)}")
    place = torch.arange(len(wide), dtype=wide.dtype, device=wide.device)
    return beside((place + wide) / max(len(wide), 1), u)


_stratified = stratified  # where a parameter has its name


def draw(
    density: Density,
    batch: int,
    noise: PhiloxNoise | None = None,
    *,
    shift: float = 1.0,
    stratified: bool = False,
    groups: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **parameters: Any,
) -> Tensor:
    """The noise level of each sample of a training step.

    From a noise key it is a function of (seed, sample id, stream), independent of the key's noise,
    so one key gives a training step its levels and its noise, and the step can be replayed. Shards
    of a sample have one level.

    Args:
        density: The name of a density (``DENSITIES``), or a function of u in (0, 1), float64
            ``[B]``.
        batch: B.
        noise: A noise key; ``None`` for one seeded by torch's generator.
        shift: ``spacings.shift_sigmas`` after the density; 3 for Stable Diffusion 3.
        stratified: Apply the function of that name to u first. A level then
            depends on the place in the batch.
        groups: G, for a level of each group of a sample (a frame, a token).
        dtype: Of the result, to which the float64 level is rounded; float64 is float32 on a device
            without.
        device: ``None`` for that of the key's tensors, else torch's default.
        parameters: Of the density.

    Returns:
        ``[B]``, or ``[B, G]``.

    Raises:
        TypeError: An argument of the wrong type, or a function that returns no floating-point
            tensor.
        ValueError: An unknown density, parameters of a function, a parameter out of its range, or a
            function that returns another shape or levels outside [0, 1] (checked on the CPU).
    """
    messages.check_dtype(dtype)
    sigma, at = drawn(
        density,
        batch,
        noise,
        shift=shift,
        stratified=stratified,
        groups=groups,
        device=device,
        **parameters,
    )
    return to_device(sigma.to(dtype), at)


def drawn(
    density: Density,
    batch: int,
    noise: PhiloxNoise | None = None,
    *,
    shift: float = 1.0,
    stratified: bool = False,
    groups: int | None = None,
    device: torch.device | str | None = None,
    **parameters: float,
) -> tuple[Tensor, torch.device]:
    """The levels of ``draw`` before they are rounded, for what is computed of them.

    Args:
        density: See ``draw``.
        batch: See ``draw``.
        noise: See ``draw``.
        shift: See ``draw``.
        stratified: See ``draw``.
        groups: See ``draw``.
        device: See ``draw``.
        parameters: See ``draw``.

    Returns:
        The levels, float64; and the device that they are for, on which they are if it has float64.

    Raises:
        TypeError: See ``draw``.
        ValueError: See ``draw``.
    """
    if not isinstance(batch, torch.SymInt):
        batch = as_int("batch", batch, 0)
    by_strata = as_flag("stratified", stratified)
    device = None if device is None else as_device("device", device)
    if noise is None:
        noise = PhiloxNoise.from_generator(device=device)
    if not isinstance(noise, PhiloxNoise):
        raise TypeError(f"noise must be a PhiloxNoise, got {type(noise).__name__}")
    at = torch.empty(0, device=noise._device(device)).device
    u = _uniform(noise, batch, groups, at if has_float64(at) else _CPU)
    if by_strata:
        u = _stratified(u.reshape(-1)).view(u.shape)
    if callable(density):
        if parameters:
            given = ", ".join(parameters)
            raise ValueError(f"density must be a name with {given}, got a function")
        sigma = _of_function(density, u)
    elif density in DENSITIES:
        sigma = DENSITIES[density](u, **parameters)
    else:
        names = ", ".join(map(repr, DENSITIES))
        raise ValueError(f"density must be one of {names} or a function, got {density!r}")
    if shift != 1:
        shift = as_positive("shift", shift, finite=True)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)  # shift_sigmas, of meta tensors too
    return sigma, at


def _uniform(noise: PhiloxNoise, batch: int, groups: int | None, device: torch.device) -> Tensor:
    """Uniform numbers in (0, 1) from a noise key, float64 ``[B]`` or ``[B, G]``."""
    if groups is None:
        return _of_samples(noise, (batch,), device)
    if not isinstance(groups, torch.SymInt):
        groups = as_int("groups", groups, 1)
    if not isinstance(noise, GroupNoise):
        return _of_samples(noise, (batch, groups), device)
    if noise.group_ids.shape != (batch, groups):
        raise ValueError(
            f"group_ids must have shape {(batch, groups)}, one for each group, got "
            f"{tuple(noise.group_ids.shape)}"
        )
    flat = _of_samples(noise.groups_as_samples, (batch * groups,), device)
    return flat.view(batch, groups)


def _of_samples(noise: PhiloxNoise, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform numbers of samples, the same for every shard of them."""
    if noise.first_element or type(noise) is ShardNoise:
        noise = PhiloxNoise(noise.seed, noise.sample_ids, noise.stream)
    return noise.uniform(shape, dtype=torch.float64, device=device) + _HALF


def _of_function(density: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """What a density function returns, checked."""
    sigma = density(u)
    if not isinstance(sigma, Tensor) or not sigma.is_floating_point():
        came = sigma.dtype if isinstance(sigma, Tensor) else type(sigma).__name__
        raise TypeError(f"density must return a floating-point tensor, got {came}")
    if sigma.shape != u.shape:
        raise ValueError(
            f"density must return the shape of u, {tuple(u.shape)}, got {tuple(sigma.shape)}"
        )
    if sigma.device.type == "cpu" and sigma.numel() and plain_eager():
        low, high = (float(end) for end in torch.aminmax(sigma.detach()))
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"density must return levels in [0, 1], got values from {low:g} to {high:g}"
            )
    return sigma


def _float64(u: Tensor) -> Tensor:
    u = as_tensor("u", u, "a tensor of floating-point numbers")
    if not u.is_floating_point():
        raise TypeError(f"u must be a tensor of floating-point numbers, got {u.dtype}")
    if u.device.type == "cpu" and u.numel() and plain_eager():
        low, high = (float(end) for end in torch.aminmax(u.detach()))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"u must be in (0, 1), got values from {low:g} to {high:g}")
    return in_float64(u)
