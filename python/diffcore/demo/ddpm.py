"""The DDPM of the demo, told the class: loss, samples and strips, each a call into diffcore."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffcore.demo.classes import CLASSES, class_guidance, drop_classes
from diffcore.demo.config import DemoConfig
from diffcore.demo.networks import UNet
from diffcore.demo.training import LossFunction
from diffcore.diffusion import GaussianDiffusion
from diffcore.noise import PhiloxNoise
from diffcore.schedules import make_betas

METRICS = ("loss",)

Denoiser = Callable[..., Tensor]
_CHUNK = 250


def build_diffusion(config: DemoConfig) -> GaussianDiffusion:
    """Return the diffusion: T linear betas scaled by 1000/T, epsilon prediction."""
    betas = make_betas("linear", config.num_timesteps, scale_to_1000=True)
    return GaussianDiffusion(betas, prediction_type="epsilon", variance_type="fixed_small")


def build_network(config: DemoConfig, image_shape: tuple[int, int, int]) -> nn.Module:
    """Return the U-Net with classes, which predicts the noise."""
    return UNet(
        channels=image_shape[0],
        width=config.width,
        patch=config.patch,
        num_timesteps=config.num_timesteps,
        num_classes=CLASSES,
    )


def training_loss(diffusion: GaussianDiffusion, class_dropout: float) -> LossFunction:
    """Return Algorithm 1 of Ho et al., told the class.

    ``|epsilon - epsilon_theta(x_t, t, class)|^2``, mean over pixels.

    Args:
        diffusion: The diffusion.
        class_dropout: Share of the images whose class the network is not told.

    Returns:
        A loss for ``Trainer``.
    """

    def loss(model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        told = {"labels": drop_classes(labels, class_dropout, generator)}
        t = torch.randint(diffusion.num_timesteps, (len(x),), generator=generator).to(x.device)
        noise = PhiloxNoise.from_generator(generator)
        terms = diffusion.training_losses(model, x, t, model_kwargs=told, noise=noise)
        return terms["loss"].mean().reshape(1)

    return loss


@torch.inference_mode()
def held_out_loss(
    diffusion: GaussianDiffusion,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    repeats: int = 4,
) -> float:
    """Average the loss over held-out images given their class, with evenly spaced timesteps.

    No class is dropped, and nothing is guided.

    Args:
        diffusion: The diffusion.
        model: Predicts the noise.
        images: ``[N, C, H, W]`` in [-1, 1].
        labels: Their classes ``[N]``.
        seed: Seed of timesteps and noise.
        repeats: Timesteps per image.

    Returns:
        The mean squared error of the predicted noise; 1 for a model that predicts 0.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    order = torch.randperm(len(images), generator=generator)
    timesteps = (order * diffusion.num_timesteps) // len(images)
    total = 0.0
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        terms = diffusion.training_losses(
            model,
            images[part],
            timesteps[part].to(images.device),
            model_kwargs={"labels": labels[part]},
            noise=PhiloxNoise(seed, sample_ids=start),
        )
        total += terms["loss"].double().sum().item()
    return total / len(images)


def initial_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Return x_T, which has the same values on every device."""
    return PhiloxNoise(seed).tensor(shape, device=device)


@torch.inference_mode()
def sample_ddpm(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    x_T: Tensor,
    labels: Tensor,
    *,
    guidance_scale: float,
    seed: int,
    progress: bool,
) -> Tensor:
    """Sample by Algorithm 2 of Ho et al. in T steps, with classifier-free guidance.

    Args:
        diffusion: The diffusion.
        model: Predicts the noise.
        x_T: Standard normal, ``[B, C, H, W]``.
        labels: The classes to sample, ``[B]``.
        guidance_scale: Scale of the guidance; 1 for none.
        seed: Seed of the noise of the steps.
        progress: Whether to show a progress bar.

    Returns:
        ``[B, C, H, W]``.
    """
    return diffusion.p_sample_loop(
        model,
        x_T.shape,
        noise=x_T,
        step_noise=PhiloxNoise(seed),
        progress=progress,
        **class_guidance(labels, guidance_scale),
    )


@torch.inference_mode()
def sample_ddim(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    x_T: Tensor,
    labels: Tensor,
    *,
    guidance_scale: float,
    num_steps: int,
    progress: bool,
) -> Tensor:
    """Sample by DDIM with eta = 0, a deterministic map of x_T, with classifier-free guidance.

    Args:
        diffusion: The diffusion.
        model: Predicts the noise.
        x_T: Standard normal, ``[B, C, H, W]``.
        labels: The classes to sample, ``[B]``.
        guidance_scale: Scale of the guidance; 1 for none.
        num_steps: Number of steps, evenly spaced over the T timesteps.
        progress: Whether to show a progress bar.

    Returns:
        ``[B, C, H, W]``.
    """
    return diffusion.ddim_sample_loop(
        model,
        x_T.shape,
        noise=x_T,
        num_steps=num_steps,
        progress=progress,
        **class_guidance(labels, guidance_scale),
    )


def strip_timesteps(num_timesteps: int, columns: int) -> list[int]:
    """Return ``columns`` timesteps from T-1 down to 0, denser near 0, where images take shape."""
    last = num_timesteps - 1
    return [round(last * (1 - i / (columns - 1)) ** 1.7) for i in range(columns)]


@torch.inference_mode()
def forward_strip(
    diffusion: GaussianDiffusion, images: Tensor, timesteps: list[int], *, seed: int
) -> Tensor:
    """Noise images to several timesteps: ``x_t = alpha_t x_0 + sigma_t epsilon``.

    Args:
        diffusion: The diffusion.
        images: ``[B, 1, H, W]``.
        timesteps: The timesteps.
        seed: Seed of the noise, the same at every timestep of an image.

    Returns:
        ``[B, len(timesteps), H, W]``.
    """
    noise = PhiloxNoise(seed)
    columns = [
        diffusion.q_sample(images, torch.full((len(images),), t, device=images.device), noise)
        for t in timesteps
    ]
    return torch.cat(columns, dim=1)


@torch.inference_mode()
def reverse_strip(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    x_T: Tensor,
    labels: Tensor,
    timesteps: list[int],
    *,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    """Sample as ``sample_ddpm`` does, and keep x_t at several timesteps.

    Args:
        diffusion: The diffusion.
        model: Predicts the noise.
        x_T: Standard normal, ``[B, 1, H, W]``.
        labels: The classes to sample, ``[B]``.
        timesteps: The timesteps, decreasing.
        guidance_scale: Scale of the guidance; 1 for none.
        seed: Seed of the noise of the steps.

    Returns:
        ``[B, len(timesteps) + 1, H, W]``: x_t for each timestep, then x_0.
    """
    kept: dict[int, Tensor] = {}

    def recording(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        kept[int(t[0])] = x.clone()  # both calls of a step have the same x
        prediction: Tensor = model(x, t, labels=labels)
        return prediction

    result = sample_ddpm(
        diffusion,
        recording,
        x_T,
        labels,
        guidance_scale=guidance_scale,
        seed=seed,
        progress=False,
    )
    return torch.cat([*(kept[t] for t in timesteps), result], dim=1)
