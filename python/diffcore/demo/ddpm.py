"""The DDPM of the demo: loss, samples and strips, each a call into diffcore."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
    """Return the noise-predicting U-Net."""
    return UNet(
        channels=image_shape[0],
        width=config.width,
        patch=config.patch,
        num_timesteps=config.num_timesteps,
    )


def training_loss(diffusion: GaussianDiffusion) -> LossFunction:
    """Return Algorithm 1 of Ho et al.: ``|epsilon - epsilon_theta(x_t, t)|^2``, mean over pixels.

    Args:
        diffusion: The diffusion.

    Returns:
        A loss for ``Trainer``.
    """

    def loss(model: nn.Module, x: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.randint(diffusion.num_timesteps, (len(x),), generator=generator).to(x.device)
        noise = PhiloxNoise.from_generator(generator)
        return diffusion.training_losses(model, x, t, noise=noise)["loss"].mean().reshape(1)

    return loss


@torch.inference_mode()
def held_out_loss(
    diffusion: GaussianDiffusion, model: nn.Module, images: Tensor, *, seed: int, repeats: int = 4
) -> float:
    """Average the training loss over held-out images, with evenly spaced timesteps.

    Args:
        diffusion: The diffusion.
        model: Predicts the noise.
        images: ``[N, C, H, W]`` in [-1, 1].
        seed: Seed of timesteps and noise.
        repeats: Timesteps per image.

    Returns:
        The mean squared error of the predicted noise; 1 for a model that predicts 0.
    """
    generator = torch.Generator().manual_seed(seed)
    images = images.repeat(repeats, 1, 1, 1)
    order = torch.randperm(len(images), generator=generator)
    timesteps = (order * diffusion.num_timesteps) // len(images)
    total = 0.0
    starts = range(0, len(images), _CHUNK)
    for start, x, t in zip(starts, images.split(_CHUNK), timesteps.split(_CHUNK), strict=True):
        noise = PhiloxNoise(seed, sample_ids=start)
        losses = diffusion.training_losses(model, x, t.to(x.device), noise=noise)["loss"]
        total += losses.double().sum().item()
    return total / len(images)


def initial_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Return x_T, which has the same values on every device."""
    return PhiloxNoise(seed).tensor(shape, device=device)


@torch.inference_mode()
def sample_ddpm(
    diffusion: GaussianDiffusion, model: Denoiser, x_T: Tensor, *, seed: int, progress: bool
) -> Tensor:
    """Sample by Algorithm 2 of Ho et al., in T steps.

    Args:
        diffusion: The diffusion.
        model: Predicts the noise.
        x_T: Standard normal, ``[B, C, H, W]``.
        seed: Seed of the noise of the steps.
        progress: Whether to show a progress bar.

    Returns:
        ``[B, C, H, W]``.
    """
    return diffusion.p_sample_loop(
        model, x_T.shape, noise=x_T, step_noise=PhiloxNoise(seed), progress=progress
    )


@torch.inference_mode()
def sample_ddim(
    diffusion: GaussianDiffusion, model: Denoiser, x_T: Tensor, *, num_steps: int, progress: bool
) -> Tensor:
    """Sample by DDIM with eta = 0, a deterministic map of x_T.

    Args:
        diffusion: The diffusion.
        model: Predicts the noise.
        x_T: Standard normal, ``[B, C, H, W]``.
        num_steps: Number of steps, evenly spaced over the T timesteps.
        progress: Whether to show a progress bar.

    Returns:
        ``[B, C, H, W]``.
    """
    return diffusion.ddim_sample_loop(
        model, x_T.shape, noise=x_T, num_steps=num_steps, progress=progress
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
    diffusion: GaussianDiffusion, model: Denoiser, x_T: Tensor, timesteps: list[int], *, seed: int
) -> Tensor:
    """Sample by Algorithm 2 and keep x_t at several timesteps.

    Args:
        diffusion: The diffusion.
        model: Predicts the noise.
        x_T: Standard normal, ``[B, 1, H, W]``.
        timesteps: The timesteps, decreasing.
        seed: Seed of the noise of the steps.

    Returns:
        ``[B, len(timesteps) + 1, H, W]``: x_t for each timestep, then x_0.
    """
    kept: dict[int, Tensor] = {}

    def recording(x: Tensor, t: Tensor) -> Tensor:
        kept[int(t[0])] = x.clone()
        prediction: Tensor = model(x, t)
        return prediction

    result = sample_ddpm(diffusion, recording, x_T, seed=seed, progress=False)
    return torch.cat([*(kept[t] for t in timesteps), result], dim=1)
