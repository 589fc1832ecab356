"""Likelihood of held-out images under the models, in bits per dimension and in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore.demo.config import DemoConfig
from diffcore.diffusion import GaussianDiffusion
from diffcore.likelihood import BitsPerDim, bits_per_dim
from diffcore.noise import PhiloxNoise

_CHUNK = 250


def on_grid(images: Tensor) -> Tensor:
    """Round pixels to the nearest k/127.5 - 1, the values of 8-bit pixels.

    Args:
        images: Pixels in [-1, 1].

    Returns:
        The rounded pixels. 8-bit pixels do not change; the 17 levels of the 8x8 digits do, by at
        most half a gray level.
    """
    return (images * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1


def held_out_bits(
    diffusion: GaussianDiffusion,
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor,
    config: DemoConfig,
    *,
    seed: int,
    progress: bool,
) -> tuple[BitsPerDim, BitsPerDim]:
    """The bound of held-out images given their class, from a few timesteps and from all of them.

    All timesteps of all images would take most of the time of the demo. The estimate is unbiased.
    The model is told the class, and not guided. Images of the mixture of the 10 classes, each of
    probability 1/10, need at most log2(10) / n more bits per dimension, for n pixels.

    Args:
        diffusion: The noising process.
        model: Predicts the noise.
        images: ``[N, C, H, W]`` in [-1, 1]; evenly spaced ones are used if there are too many.
        labels: Their classes ``[N]``.
        config: Settings of the run: numbers of images and of strata.
        seed: Seed of noise and timesteps.
        progress: Whether to show progress bars.

    Returns:
        The estimate, and the exact bound of fewer images, in bits per dimension.
    """
    strata = min(config.bits_strata, diffusion.num_timesteps - 1)
    found = []
    for most, timesteps in ((config.bits_images, strata), (config.bits_exact_images, None)):
        count = min(len(images), most)
        chosen = torch.linspace(0, len(images) - 1, count).round().long().to(images.device)
        pixels, classes = on_grid(images[chosen]), labels[chosen]
        measured = bits_per_dim(
            diffusion,
            model,
            list(zip(pixels.split(_CHUNK), classes.split(_CHUNK), strict=True)),
            timesteps=timesteps,
            model_kwargs=lambda batch: {"labels": batch[1]},
            noise=PhiloxNoise(seed),
            progress=progress,
        )
        found.append(measured)
    return found[0], found[1]


def as_report(found: tuple[BitsPerDim, BitsPerDim], num_timesteps: int) -> dict[str, Any]:
    """The entries of ``report.json``.

    Args:
        found: Result of ``held_out_bits``.
        num_timesteps: T.

    Returns:
        Numbers and lists, in bits per dimension.
    """
    estimate, exact = found
    return {
        "images": estimate.samples,
        "calls_per_image": 1 + (estimate.timesteps or 0),
        "bits_per_dim": estimate.total,
        "standard_error": estimate.standard_error,
        "prior": estimate.prior,
        "decoder": estimate.terms[0].item(),
        "exact": {
            "images": exact.samples,
            "calls_per_image": num_timesteps,
            "bits_per_dim": exact.total,
            "standard_error": exact.standard_error,
            "prior": exact.prior,
            "terms": exact.terms.tolist(),
        },
        "is": "variational bound on -log2 of the probability of 8-bit pixels given their class, "
        "per pixel, without guidance, averaged weights: a stratified estimate, and the exact value "
        "for fewer images; terms[t] is the term of timestep t, terms[0] = L_0 that of the decoder",
    }


def summary_of_ddpm(found: Mapping[str, Any]) -> list[str]:
    """The lines printed at the end of a run.

    Args:
        found: The report of the DDPM.

    Returns:
        The lines.
    """
    bits = found["held_out_bits"]
    exact = bits["exact"]
    rest = bits["bits_per_dim"] - bits["prior"] - bits["decoder"]
    return [
        f"DDPM: {bits['bits_per_dim']:.3f} ± {bits['standard_error']:.3f} bits/dim on "
        f"{bits['images']} held-out images given their class, {bits['calls_per_image']} model "
        f"calls per image: L_0 {bits['decoder']:.3f} + L_t {rest:.3f} + L_T {bits['prior']:.2g}",
        f"DDPM: {exact['bits_per_dim']:.3f} ± {exact['standard_error']:.3f} bits/dim on "
        f"{exact['images']} of them, exact: all {exact['calls_per_image']} timesteps",
    ]


def summary_of_vae(found: Mapping[str, Any]) -> list[str]:
    """The lines printed at the end of a run.

    Args:
        found: The report of the VAE.

    Returns:
        The lines.
    """
    bound = found["held_out"]
    return [
        f"VAE: ELBO {bound['elbo_nats']:.1f} nats per image = log-likelihood "
        f"{bound['log_likelihood_nats']:.1f} - KL {bound['kl_nats']:.1f}; "
        f"{bound['bits_per_dim']:.3f} bits/dim of the density on [-1, 1]",
        f"VAE: importance-weighted bound {bound['importance_weighted_nats']:.1f} nats per image, "
        f"{bound['importance_samples']} samples",
    ]


def summary_of_flow(found: Mapping[str, Any]) -> list[str]:
    """The lines printed at the end of a run.

    Args:
        found: The report of the flow.

    Returns:
        The lines.
    """
    bits = found["held_out_bits"]
    return [
        f"Flow: {bits['bits_per_dim']:.3f} ± {bits['standard_error']:.3f} bits/dim on "
        f"{bits['images']} held-out images given their class, {bits['calls_per_image']} model "
        "calls per image"
    ]
