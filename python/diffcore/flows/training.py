"""The training step of a flow: its times, its noised samples, and its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._engine.dtensor import per_sample
from diffcore._types import Model
from diffcore.diffusion import training_levels
from diffcore.diffusion.training_levels import levels_beside, of_level, perturbed
from diffcore.flows.convention import Convention
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
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    fix = f"; divide timesteps by num_train_timesteps, {scale:g}" if scale != 1 else ""
    return levels_beside("t", t, x, name, 0.0, 1.0, group_dim, dtype=dtype, fix=fix)


def noised(
    convention: Convention, x_start: Tensor, t: Tensor, noise: Noise, group_dim: int | None
) -> Tensor:
    """x_t from x_0 and checked times: one launch."""
    alpha, sigma = convention.signal(t), convention.noise(convention.turned(t))
    return training_levels.noised(x_start, noise, alpha, sigma, group_dim)


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
        target=convention.target(),
        weight=weights(weighting, sigma),
        group_dim=group_dim,
        loss=loss,
        delta=of_level("delta", delta, sigma),
        **options,
    )
    return {"loss": mse, "mse": mse}
