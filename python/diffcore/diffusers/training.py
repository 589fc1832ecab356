"""What diffusers' training scripts compute around the loss, under its names."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffcore import losses
from diffcore import timesteps as densities
from diffcore._checks import as_int, as_positive, as_real, check_choice
from diffcore._engine.kept import made_plainly
from diffcore.diffusers.families.schedule import prediction_of
from diffcore.schedules import NoiseSchedule

__all__ = [
    "compute_density_for_timestep_sampling",
    "compute_loss_weighting_for_sd3",
    "compute_snr",
    "min_snr_weights",
]

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")

# Of each scheduler: the alphas_cumprod that it held, and their ratios on the device of the last
# call. So a training step copies nothing to the device.
_snr: WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def compute_snr(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """SNR = alphas_cumprod[t] / (1 - alphas_cumprod[t]), in float64 and rounded once.

    Args:
        noise_scheduler: A scheduler of diffusers with ``alphas_cumprod``, fused or not.
        timesteps: Integers of any shape, those of ``noise_scheduler.add_noise``.

    Returns:
        float32, the shape of ``timesteps``; infinite where alphas_cumprod is 1.

    Raises:
        TypeError: A scheduler without ``alphas_cumprod``, as for flows, or timesteps that are no
            integers.

    Source:
        Hang et al. 2023 (arXiv 2303.09556) section 3.3; ``diffusers.training_utils``.
    """
    return _snr_at(noise_scheduler, timesteps).float()


def min_snr_weights(noise_scheduler: Any, timesteps: Tensor, *, snr_gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma for the scheduler's ``prediction_type``: ``--snr_gamma`` of the scripts.

    The weight on the squared error is min(snr, gamma) / snr for "epsilon", min(snr, gamma) /
    (snr + 1) for "v_prediction" and min(snr, gamma) for "sample". At snr = 0 (zero terminal SNR)
    that of "epsilon" is 1, its limit, where the scripts divide 0 by 0.

    Args:
        noise_scheduler: A scheduler of diffusers with ``alphas_cumprod``, fused or not.
        timesteps: Integers of any shape, one a sample.
        snr_gamma: Above 0.

    Returns:
        float32, the shape of ``timesteps``, for ``weight=`` of ``denoising_loss`` or as a factor of
        the mean squared error of each sample.

    Raises:
        TypeError: As for ``compute_snr``.
        ValueError: ``snr_gamma`` is not positive.

    Source:
        Hang et al. 2023 (arXiv 2303.09556) section 3.4.
    """
    gamma = as_positive("snr_gamma", snr_gamma)
    weights = losses.min_snr_weights(
        _snr_at(noise_scheduler, timesteps),
        gamma=gamma,
        prediction_type=prediction_of(noise_scheduler.config),
    )
    return weights.float()


def compute_density_for_timestep_sampling(
    weighting_scheme: str,
    batch_size: int,
    logit_mean: float | None = None,
    logit_std: float | None = None,
    mode_scale: float | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws u in (0, 1) by a density; diffusers' own numbers of the same generator.

    "logit_normal": sigmoid(logit_mean + logit_std z), z normal; "mode": 1 - u - mode_scale
    (cos²(πu/2) - 1 + u), u uniform; the others: u. The scripts take the timestep at index
    u num_train_timesteps of timesteps that fall, so a large u is little noise;
    ``timesteps.draw`` has the noise level itself, from a noise key.

    Args:
        weighting_scheme: "logit_normal", "mode", or "none", "sigma_sqrt", "cosmap" for uniform.
        batch_size: B.
        logit_mean: For "logit_normal".
        logit_std: For "logit_normal"; above 0.
        mode_scale: For "mode"; see ``timesteps.mode``.
        device: Of the result.
        generator: On that device; ``None`` for torch's default one.

    Returns:
        ``[B]``, in torch's default dtype.

    Raises:
        TypeError: A parameter of the density is missing, or no number.
        ValueError: Another scheme, which diffusers would take for "none", or a parameter out of its
            range.

    Source:
        Esser et al. 2024 (arXiv 2403.03206) section 3.1; ``diffusers.training_utils``.
    """
    check_choice("weighting_scheme", weighting_scheme, WEIGHTING_SCHEMES)
    shape = (as_int("batch_size", batch_size, 0),)
    if weighting_scheme == "logit_normal":
        mean = as_real("logit_mean", logit_mean)
        std = as_positive("logit_std", logit_std, finite=True)
        # The generator gives z, of which timesteps.logit_normal would want the probability.
        z = torch.normal(mean, std, shape, device=device, generator=generator)
        return torch.sigmoid(z)
    u = torch.rand(shape, device=device, generator=generator)
    if weighting_scheme == "mode":
        return densities.mode(u, scale=as_real("mode_scale", mode_scale)).to(u.dtype)
    return u


def compute_loss_weighting_for_sd3(weighting_scheme: str, sigmas: Tensor) -> Tensor:
    """Weights of Stable Diffusion 3 on the squared error of a flow's prediction.

    "sigma_sqrt": 1 / sigma²; "cosmap": 2 / (π (1 - 2 sigma + 2 sigma²)); the others: 1. Computed in
    float64 and rounded once.

    Args:
        weighting_scheme: As for ``compute_density_for_timestep_sampling``.
        sigmas: Noise levels in (0, 1), of any shape.

    Returns:
        The shape and dtype of ``sigmas``; float32 for "sigma_sqrt", which overflows in 16 bits.

    Raises:
        TypeError: ``sigmas`` are not made of floating-point numbers.
        ValueError: Another scheme, which diffusers would take for "none", or a sigma outside (0, 1)
            (checked on the CPU).

    Source:
        Esser et al. 2024 (arXiv 2403.03206) section 3.1; ``diffusers.training_utils``.
    """
    check_choice("weighting_scheme", weighting_scheme, WEIGHTING_SCHEMES)
    known = weighting_scheme if weighting_scheme in losses.FLOW_WEIGHTINGS else "none"
    weights = losses.flow_weights(sigmas, known)
    return weights.to(torch.float32 if known == "sigma_sqrt" else sigmas.dtype)


def _snr_at(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """float64, the shape of the timesteps."""
    held = getattr(noise_scheduler, "alphas_cumprod", None)
    if not isinstance(held, Tensor):
        raise TypeError(
            "noise_scheduler must have alphas_cumprod, got "
            f"{type(noise_scheduler).__name__}; for a flow use compute_loss_weighting_for_sd3"
        )
    if not isinstance(timesteps, Tensor) or timesteps.is_floating_point():
        came = timesteps.dtype if isinstance(timesteps, Tensor) else type(timesteps).__name__
        raise TypeError(f"timesteps must be a tensor of integers, got {came}")
    kept = _snr.get(noise_scheduler)
    if kept is None or kept[0] is not held or kept[1].device != timesteps.device:

        def ratios() -> Tensor:
            return NoiseSchedule.from_alphas_cumprod(held).snr.to(timesteps.device)

        kept = _snr[noise_scheduler] = (held, made_plainly(ratios))
    return kept[1][timesteps]
