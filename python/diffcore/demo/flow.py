"""The rectified flow of the demo, told the class: loss, samples, likelihood, each a call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.demo.classes import CLASSES, class_guidance, drop_classes
from diffcore.demo.config import DemoConfig
from diffcore.demo.likelihood import on_grid
from diffcore.demo.networks import UNet
from diffcore.demo.training import LossFunction
from diffcore.flows import FlowMatching
from diffcore.likelihood import ode_log_likelihood
from diffcore.noise import PhiloxNoise
from diffcore.solvers import flow_heun_table

METRICS = ("loss",)

_CHUNK = 250
_BIN = 2 / 255


def build_flow() -> FlowMatching:
    """Return the flow: x_t = (1 - t) x_0 + t epsilon, t more often in the middle."""
    return FlowMatching(timestep_density="logit_normal")


def build_network(config: DemoConfig, image_shape: tuple[int, int, int]) -> UNet:
    """Return the U-Net of the DDPM, which here predicts epsilon - x_0."""
    return UNet(
        channels=image_shape[0],
        width=config.width,
        patch=config.patch,
        num_timesteps=1000,
        num_classes=CLASSES,
    )


def training_loss(flow: FlowMatching, class_dropout: float) -> LossFunction:
    """Return ``|(epsilon - x_0) - u_theta(x_t, t, class)|^2``, mean over pixels.

    x_0 is an image with uniform noise inside the bins of 8-bit pixels, which has a density: that of
    exact gray levels would be infinite.

    Args:
        flow: The flow.
        class_dropout: Share of the images whose class the network is not told.

    Returns:
        A loss for ``Trainer``.
    """

    def loss(model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        told = {"labels": drop_classes(labels, class_dropout, generator)}
        noise = PhiloxNoise.from_generator(generator)  # gives t too
        x = dequantized(x, noise.at(1))
        terms = flow.training_losses(model, x, model_kwargs=told, noise=noise)
        return terms["loss"].mean().reshape(1)

    return loss


def dequantized(images: Tensor, noise: PhiloxNoise) -> Tensor:
    """Images with uniform noise of the width of a bin, 2/255.

    Args:
        images: ``[B, C, H, W]`` in [-1, 1].
        noise: Key of the noise.

    Returns:
        Like ``images``.
    """
    inside = noise.uniform(images.shape, device=images.device)
    return images + _BIN * (inside - 0.5)


@torch.inference_mode()
def held_out_loss(
    model: nn.Module, images: Tensor, labels: Tensor, *, seed: int, repeats: int = 4
) -> float:
    """Average the training loss over held-out images, with evenly spread times.

    Args:
        model: Predicts the velocity.
        images: ``[N, C, H, W]`` in [-1, 1].
        labels: Their classes ``[N]``.
        seed: Seed of times and noise.
        repeats: Times per image.

    Returns:
        The mean squared error of the velocity.
    """
    flow = build_flow()
    images, labels = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    total = 0.0
    starts = range(0, len(images), _CHUNK)
    for start, x, classes in zip(starts, images.split(_CHUNK), labels.split(_CHUNK), strict=True):
        noise = PhiloxNoise(seed, sample_ids=start)
        x = dequantized(x, noise.at(1))
        terms = flow.training_losses(model, x, model_kwargs={"labels": classes}, noise=noise)
        total += terms["loss"].double().sum().item()
    return total / len(images)


@torch.inference_mode()
def sample_flow(
    model: nn.Module, noise: Tensor, labels: Tensor, config: DemoConfig, *, progress: bool
) -> Tensor:
    """Sample by Euler's method with classifier-free guidance.

    Args:
        model: Predicts the velocity.
        noise: Standard normal, ``[B, C, H, W]``.
        labels: The classes to sample, ``[B]``.
        config: Settings of the run: steps and scale of the guidance.
        progress: Whether to show a progress bar.

    Returns:
        ``[B, C, H, W]``.
    """
    return build_flow().sample(
        model,
        noise.shape,
        config.flow_sampling_steps,
        noise=noise,
        progress=progress,
        **class_guidance(labels, config.guidance_scale),
    )


def held_out_bits(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: DemoConfig,
    *,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """The log-likelihood of held-out images, given their class, by the probability flow.

    The density of 8-bit pixels with uniform noise of the width 2/255 of a bin: its average is a
    lower bound of the log-probability of the pixels themselves (Theis et al. 2016), which makes
    -log2 p(x) / n - log2(2/255) an upper bound of their bits.

    Args:
        model: Predicts the velocity.
        images: ``[N, C, H, W]`` in [-1, 1]; evenly spaced ones are used if there are too many.
        labels: Their classes ``[N]``.
        config: Settings of the run: numbers of images and of steps.
        seed: Seed of the noise of the pixels and of Hutchinson's vectors.
        progress: Whether to show a progress bar.

    Returns:
        The entry of ``report.json``, in bits per dimension.
    """
    count = min(len(images), config.flow_bits_images)
    chosen = torch.linspace(0, len(images) - 1, count).round().long().to(images.device)
    pixels, classes = on_grid(images[chosen]), labels[chosen]
    flow = build_flow()
    levels = flow.levels(config.flow_bits_steps)
    table = flow_heun_table(levels.reversed())
    found = ode_log_likelihood(
        model,
        dequantized(pixels, PhiloxNoise(seed)),
        table,
        divergence="hutchinson",
        noise=PhiloxNoise(seed + 1),
        model_kwargs={"labels": classes},
        progress=progress,
    )
    return {
        "images": count,
        "calls_per_image": len(table),
        "bits_per_dim": found.mean_bpd - math.log2(_BIN),
        "standard_error": found.standard_error,
        "is": "bound on -log2 of the probability of 8-bit pixels given their class, per pixel: the "
        "density of pixels with uniform noise, by the probability flow with Heun's method and one "
        "random vector a call for the divergence; averaged weights",
    }
