"""The training step of a flow: its times, its noised samples, and its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_real, as_tensor
from diffcore._engine import native
from diffcore._engine.dispatch import plain_eager
from diffcore._engine.dtensor import per_sample, shard_of
from diffcore._types import Model
from diffcore.diffusion.training_levels import of_level, perturbed
from diffcore.flows.convention import Convention
from diffcore.flows.shifts import groups_of
from diffcore.losses import flow_weights
from diffcore.noise import Noise
from diffcore.sampling.model import call_model, check_model_kwargs

WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


def check_samples(name: str, x: Any) -> None:
    """Refuses what is not a floating-point tensor ``[B, ...]``."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
        came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor [B, ...], got {came}")


def times(t: Any, x: Tensor, name: str, group_dim: int | None, scale: float) -> Tensor:
    """Times as a tensor beside the samples, checked.

    Args:
        t: A number in [0, 1], or ``[B]``, or with groups ``[B, G]``.
        x: The samples.
        name: What the caller calls them.
        group_dim: The dimension of the groups, or ``None``.
        scale: Of the timestep input, for errors.

    Returns:
        float32, or float64 for float64 times or samples: ``[B]``, or ``[B, G]``.

    Raises:
        TypeError: Integers, or no numbers.
        ValueError: Another shape or device, or a value outside [0, 1].
    """
    batch = x.shape[:1]
    if isinstance(t, (int, float)):
        number = as_real("t", t)
        if not 0 <= number <= 1:
            raise _out_of_range(f"{number:g}", scale)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.full(batch, number, dtype=dtype, device=x.device)
    if not isinstance(t, Tensor):
        t = as_tensor("t", t, "a number or a floating-point tensor in [0, 1]").to(x.device)
    if not t.is_floating_point():
        raise TypeError(
            f"t must be a number or a floating-point tensor in [0, 1], got {t.dtype}; divide "
            "timesteps by num_train_timesteps"
        )
    if t.device != x.device:
        raise ValueError(f"t must be on {x.device}, the device of {name}, got {t.device}")
    if t.dtype != torch.float64:
        t = t.double() if x.dtype == torch.float64 else t.float()
    found = _one_each(t, x) if group_dim is None else _of_groups(t, x, group_dim)
    if t.numel() and plain_eager() and (t.device.type == "cpu" or native.DEBUG):
        low, high = (float(end) for end in torch.aminmax(shard_of(t).detach()))
        if not (low >= 0 and high <= 1):
            raise _out_of_range(f"values from {low:g} to {high:g}", scale)
    return found


def _one_each(t: Tensor, x: Tensor) -> Tensor:
    """``[B]``."""
    if t.shape == x.shape[:1]:
        return t
    if t.numel() == 1:
        return t.reshape(1).repeat(x.shape[0])
    fix = "; for a time of each frame pass [B, F] with group_dim" if t.ndim > 1 else ""
    raise ValueError(f"t must have shape {tuple(x.shape[:1])}, got {tuple(t.shape)}{fix}")


def _of_groups(t: Tensor, x: Tensor, group_dim: int) -> Tensor:
    """``[B, G]``."""
    wanted = (x.shape[0], groups_of(tuple(x.shape), group_dim))
    if t.numel() == 1 or t.shape == x.shape[:1]:
        return t.reshape(-1, 1).expand(wanted)
    if t.shape != wanted:
        raise ValueError(
            f"t must have shape {wanted}, one for each group, or {wanted[:1]}, got {tuple(t.shape)}"
        )
    return t


def noised(
    convention: Convention, x_start: Tensor, t: Tensor, noise: Noise, group_dim: int | None
) -> Tensor:
    """x_t from x_0 and checked times: one launch."""
    alpha, sigma = convention.signal(t), convention.turned(t)
    return ops.add_noise(x_start, noise, alpha, convention.noise(sigma), group_dim=group_dim)


def timestep_input(convention: Convention, t: Tensor, x: Tensor) -> Tensor:
    """What the model gets: as in sampling, float32, or float64 beside float64 samples."""
    scaled = t if convention.scale == 1 else t * convention.scale
    return per_sample(scaled if x.dtype == torch.float64 else scaled.float(), x)


def weights(weighting: str | Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor | None:
    """The weight of each sample or group; ``None`` for 1.

    Raises:
        TypeError: A function returned no tensor.
        ValueError: It returned another shape.
    """
    if weighting == "none":
        return None
    if isinstance(weighting, str):
        return flow_weights(sigma, weighting)
    found: Tensor = of_level("weighting", weighting, sigma)
    return found


def losses(
    convention: Convention,
    weighting: str | Callable[[Tensor], Tensor],
    model: Model,
    x_start: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None,
    noise: Noise,
    group_dim: int | None,
    *,
    perturbation: float,
    error: tuple[str, Any],
    **options: Any,
) -> dict[str, Tensor]:
    """The losses at checked times: see ``FlowMatching.training_losses``.

    Args:
        convention: That of the model.
        weighting: The weight, a name or a function of sigma.
        model: ``model(x_t, scale * t, **model_kwargs)``.
        x_start: x_0, ``[B, ...]``.
        t: Times, ``[B]`` or ``[B, G]``.
        model_kwargs: More arguments for the model.
        noise: The noise.
        group_dim: The dimension of the groups, or ``None``.
        perturbation: Strength of the second noise in the model's input; 0 for none.
        error: The loss of an error and its delta.
        **options: Of ``denoising_loss``.

    Returns:
        ``loss`` and ``mse``.
    """
    check_model_kwargs(model_kwargs)
    sigma, (loss, delta) = convention.turned(t), error
    x_t = noised(convention, x_start, t, noise, group_dim)
    if perturbation:
        x_t = perturbed(x_t, noise, perturbation, convention.noise(sigma), group_dim)
    output = call_model(model, x_t, timestep_input(convention, t, x_t), model_kwargs)
    mse = ops.denoising_loss(
        output,
        x_start,
        noise,
        target=convention.target,
        weight=weights(weighting, sigma),
        group_dim=group_dim,
        loss=loss,
        delta=of_level("delta", delta, sigma),
        **options,
    )
    return {"loss": mse, "mse": mse}


def _out_of_range(came: str, scale: float) -> ValueError:
    fix = f"; divide timesteps by num_train_timesteps, {scale:g}" if scale != 1 else ""
    return ValueError(f"t must be in [0, 1], got {came}{fix}")
