"""The demo's VAE: loss, samples and reconstructions, each a call into diffcore."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffcore.demo.config import DemoConfig
from diffcore.demo.networks import ConvVAE
from diffcore.demo.training import LossFunction
from diffcore.noise import PhiloxNoise
from diffcore.vae import DiagonalGaussianDistribution, elbo, vae_loss

METRICS = ("loss", "reconstruction", "kl")
_CHUNK = 250


def build_network(config: DemoConfig, image_shape: tuple[int, int, int]) -> ConvVAE:
    """Return the convolutional VAE."""
    return ConvVAE(image_shape, width=config.vae_width, latent_dim=config.latent_dim)


def training_loss(decoder_std: float) -> LossFunction:
    """Return the lecture's loss, L1 + L2, for a Gaussian decoder N(D(z), s^2 I).

    ``L1 = |x - D(z)|^2 / (2 s^2)`` and ``L2 = KL(N(mean, var) || N(0, I))``, in nats, summed over
    one image and averaged over the batch. L1 leaves out the constant ``n/2 log(2 pi s^2)``.

    Args:
        decoder_std: s.

    Returns:
        A loss for `Trainer`.
    """

    def loss(model: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(model, ConvVAE)
        posterior = DiagonalGaussianDistribution(model.encode(x))
        z, kl = posterior.sample_kl(generator)
        terms = vae_loss(x, model.decode(z), kl, decoder_std=decoder_std)
        return torch.stack([terms[name].mean() for name in METRICS])

    return loss


@torch.inference_mode()
def held_out_elbo(
    model: ConvVAE, images: Tensor, *, decoder_std: float, seed: int
) -> dict[str, float]:
    """Estimate the evidence lower bound on unseen images, one latent draw an image.

    ``ELBO = E[log N(x; D(z), s^2 I)] - KL``, a density over pixels in [-1, 1], constant included.

    Args:
        model: The VAE.
        images: ``[N, C, H, W]`` in [-1, 1].
        decoder_std: s.
        seed: Governs the draws.

    Returns:
        Means over the images: ``elbo_nats``, ``elbo_nats_per_dim`` (a pixel), its two terms
        ``log_likelihood_nats`` and ``kl_nats``, and ``mse`` a pixel.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    pixels = math.prod(images.shape[1:])
    constant = 0.5 * pixels * math.log(2 * math.pi * decoder_std**2)
    for start, x in zip(range(0, len(images), _CHUNK), images.split(_CHUNK), strict=True):
        posterior = DiagonalGaussianDistribution(model.encode(x))
        decoded = model.decode(posterior.sample(noise=PhiloxNoise(seed, sample_ids=start)))
        bound = elbo(x, decoded, posterior.mean, posterior.logvar, decoder_std=decoder_std)
        error = (x - decoded).square().flatten(1).mean(1)
        values = (bound - constant, posterior.kl(), error)
        totals += torch.stack([v.double().sum().cpu() for v in values])
    bound_mean, kl_mean, mse = (totals / len(images)).tolist()
    return {
        "elbo_nats": bound_mean,
        "elbo_nats_per_dim": bound_mean / pixels,
        "log_likelihood_nats": bound_mean + kl_mean,
        "kl_nats": kl_mean,
        "mse": mse,
    }


@torch.inference_mode()
def sample(model: ConvVAE, count: int, *, seed: int, device: torch.device) -> Tensor:
    """Draw images: ``z ~ N(0, I)``, then the decoder's mean D(z).

    Args:
        model: The VAE.
        count: How many.
        seed: Governs z.
        device: Where the model is.

    Returns:
        ``[count, C, H, W]``.
    """
    return model.decode(PhiloxNoise(seed).tensor((count, model.latent_dim), device=device))


@torch.inference_mode()
def reconstruct(model: ConvVAE, images: Tensor) -> Tensor:
    """Encode images, take the posterior's mode, and decode it.

    Args:
        model: The VAE.
        images: ``[B, C, H, W]``.

    Returns:
        ``[B, C, H, W]``.
    """
    return model.decode(DiagonalGaussianDistribution(model.encode(images)).mode())
