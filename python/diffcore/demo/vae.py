"""The VAE of the demo: loss, samples and reconstructions, each a call into diffcore."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffcore.demo.config import DemoConfig
from diffcore.demo.networks import ConvVAE
from diffcore.demo.training import LossFunction
from diffcore.noise import PhiloxNoise
from diffcore.vae import (
    DiagonalGaussianDistribution,
    elbo_terms,
    importance_weighted_bound,
    vae_loss,
)

METRICS = ("loss", "reconstruction", "kl")
_CHUNK = 250
_IMPORTANCE_SAMPLES = 16


def build_network(config: DemoConfig, image_shape: tuple[int, int, int]) -> ConvVAE:
    """Return the convolutional VAE."""
    return ConvVAE(image_shape, width=config.vae_width, latent_dim=config.latent_dim)


def training_loss(decoder_std: float) -> LossFunction:
    """Return the loss of the lecture, L1 + L2, for a Gaussian decoder N(D(z), s^2 I).

    ``L1 = |x - D(z)|^2 / (2 s^2)`` and ``L2 = KL(N(mean, var) || N(0, I))``, in nats, summed over
    each image and averaged over the batch. L1 omits the constant ``n/2 log(2 pi s^2)``.

    Args:
        decoder_std: Standard deviation s of the decoder.

    Returns:
        A loss for ``Trainer``.
    """

    def loss(model: nn.Module, x: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
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
    """Estimate the evidence lower bound of held-out images from one latent sample per image.

    ``ELBO = E[log N(x; D(z), s^2 I)] - KL``, the log of a density over pixels in [-1, 1], constant
    included; and the importance-weighted bound, which is tighter, from several samples of z.

    Args:
        model: The VAE.
        images: ``[N, C, H, W]`` in [-1, 1].
        decoder_std: Standard deviation s of the decoder.
        seed: Seed of the latent samples.

    Returns:
        Means over the images: ``elbo_nats`` per image, ``elbo_nats_per_dim`` per pixel, the two
        terms ``log_likelihood_nats`` and ``kl_nats``, -ELBO in bits per pixel (``bits_per_dim``)
        with its ``standard_error``, ``importance_weighted_nats`` from ``importance_samples``
        samples, and ``mse`` per pixel.
    """
    pixels = math.prod(images.shape[1:])
    found = []
    for start, x in zip(range(0, len(images), _CHUNK), images.split(_CHUNK), strict=True):
        posterior = DiagonalGaussianDistribution(model.encode(x))
        noise = PhiloxNoise(seed, sample_ids=start)
        z = torch.stack([posterior.sample(noise=noise.at(k)) for k in range(_IMPORTANCE_SAMPLES)])
        decoded = torch.stack([model.decode(latent) for latent in z])
        terms = elbo_terms(x, decoded[0], posterior.kl(), decoder_std=decoder_std)
        weighted = importance_weighted_bound(
            x, decoded, z, posterior.mean, posterior.logvar, decoder_std=decoder_std
        )
        error = (x - decoded[0]).square().flatten(1).mean(1)
        values = (terms["elbo"], terms["kl"], terms["bpd"], weighted, error)
        found.append(torch.stack([v.double() for v in values]).cpu())
    measured = torch.cat(found, dim=1)
    bound, kl, bits, weighted_mean, mse = measured.mean(dim=1).tolist()
    return {
        "elbo_nats": bound,
        "elbo_nats_per_dim": bound / pixels,
        "log_likelihood_nats": bound + kl,
        "kl_nats": kl,
        "bits_per_dim": bits,
        "standard_error": (measured[2].std() / math.sqrt(len(images))).item(),
        "importance_weighted_nats": weighted_mean,
        "importance_samples": _IMPORTANCE_SAMPLES,
        "mse": mse,
    }


@torch.inference_mode()
def sample(model: ConvVAE, count: int, *, seed: int, device: torch.device) -> Tensor:
    """Sample images: ``z ~ N(0, I)``, then the mean D(z) of the decoder.

    Args:
        model: The VAE.
        count: Number of images.
        seed: Seed of z.
        device: Device of the model.

    Returns:
        ``[count, C, H, W]``.
    """
    return model.decode(PhiloxNoise(seed).tensor((count, model.latent_dim), device=device))


@torch.inference_mode()
def reconstruct(model: ConvVAE, images: Tensor) -> Tensor:
    """Encode images and decode the mode of the posterior.

    Args:
        model: The VAE.
        images: ``[B, C, H, W]``.

    Returns:
        ``[B, C, H, W]``.
    """
    return model.decode(DiagonalGaussianDistribution(model.encode(images)).mode())
