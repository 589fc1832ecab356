"""Pictures and measurements of the trained models."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffcore.demo import ddpm, flow, likelihood, pictures, vae
from diffcore.demo.classes import CLASSES
from diffcore.demo.config import DemoConfig
from diffcore.demo.data import ImageData
from diffcore.demo.networks import ConvVAE
from diffcore.demo.training import Trainer
from diffcore.noise import PhiloxNoise

_STRIP_COLUMNS = 9
_STRIP_ROWS = 6


def _grid(images: Tensor) -> Tensor:
    """Reshape ``[N, 1, H, W]`` to ``[rows, 10, H, W]``."""
    return images.reshape(-1, CLASSES, *images.shape[-2:])


def _classes(count: int, device: torch.device) -> Tensor:
    """The classes ``[N]`` of a grid with a column for each."""
    return torch.arange(count, device=device) % CLASSES


def _save_classes(path: Path, images: Tensor, title: str) -> None:
    """Save a grid of samples of ``_classes``."""
    labels = [str(label) for label in range(CLASSES)]
    pictures.save_mosaic(path, _grid(images), title=title, column_labels=labels)


def _training_summary(trainer: Trainer) -> dict[str, Any]:
    history = trainer.history.cpu()
    tail = max(1, len(history) // 20)
    return {
        "steps": trainer.step,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "train_seconds": round(trainer.seconds, 2),
        "ms_per_step": round(1000 * trainer.seconds / trainer.step, 3),
        "first_loss": history[0, 0].item(),
        **{
            f"final_{name}": history[-tail:, i].mean().item()
            for i, name in enumerate(trainer.metrics)
        },
        "final_is_mean_of_steps": tail,
    }


def draw_vae(
    out: Path,
    config: DemoConfig,
    images: ImageData,
    trainer: Trainer,
    *,
    sample_seed: int,
    evaluation_seed: int,
) -> dict[str, Any]:
    """Draw curves, samples and reconstructions of the VAE, and measure it on held-out images.

    Args:
        out: Folder for the pictures.
        config: Settings of the run.
        images: The data.
        trainer: The trained VAE.
        sample_seed: Seed of the samples.
        evaluation_seed: Seed of the latent samples of the bound.

    Returns:
        The measurements.
    """
    model = cast(ConvVAE, trainer.averaged_model)
    device = trainer.device
    test = images.test.to(device)
    bound = vae.held_out_elbo(model, test, decoder_std=config.decoder_std, seed=evaluation_seed)
    samples = vae.sample(model, config.samples, seed=sample_seed, device=device)
    pictures.save_mosaic(
        out / "vae_samples.png",
        _grid(samples),
        title=f"VAE samples: D(z), z ~ N(0, I), {config.latent_dim} latents",
    )
    shown = test[torch.linspace(0, len(test) - 1, 20).long().to(device)]
    pairs = torch.stack([shown, vae.reconstruct(model, shown)]).squeeze(2)
    pictures.save_mosaic(
        out / "vae_reconstructions.png",
        torch.cat([pairs[:, :10], pairs[:, 10:]]),
        title="VAE reconstructions of held-out images",
        row_labels=["real", "decoded"] * 2,
    )
    history = trainer.history.cpu()
    pictures.save_curves(
        out / "vae_training.png",
        [
            pictures.Curves(
                "VAE: reconstruction, L1",
                f"|x - D(z)|²/2s², s = {config.decoder_std} (nats per image)",
                {"L1": history[:, 1]},
                {},
                log=True,
            ),
            pictures.Curves(
                "VAE: KL to the prior, L2",
                "KL (nats per image)",
                {"L2": history[:, 2]},
                {"held out": bound["kl_nats"]},
            ),
        ],
    )
    return {
        **_training_summary(trainer),
        "decoder_std": config.decoder_std,
        "latent_dim": config.latent_dim,
        "held_out": bound,
        "elbo_is": "log-density of pixels in [-1, 1] under N(D(z), decoder_std^2 I) minus KL, "
        "in nats, constants included, one latent sample per image, averaged weights; bits_per_dim "
        "is its negative in bits per pixel",
    }


def draw_ddpm(
    out: Path,
    config: DemoConfig,
    images: ImageData,
    trainer: Trainer,
    *,
    sample_seed: int,
    evaluation_seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Draw curve, samples of each class and strips of the DDPM, and measure it given the class.

    Args:
        out: Folder for the pictures.
        config: Settings of the run.
        images: The data.
        trainer: The trained DDPM.
        sample_seed: Seed of the samples.
        evaluation_seed: Seed of timesteps and noise of the held-out loss and bound.
        progress: Whether to show progress bars while sampling and measuring.

    Returns:
        The measurements.
    """
    diffusion = ddpm.build_diffusion(config)
    model = trainer.averaged_model
    device = trainer.device
    test, test_labels = images.test.to(device), images.test_labels.to(device)
    held_out = ddpm.held_out_loss(diffusion, model, test, test_labels, seed=evaluation_seed)
    started = time.perf_counter()
    bits = likelihood.held_out_bits(
        diffusion, model, test, test_labels, config, seed=evaluation_seed, progress=progress
    )
    bits_seconds = time.perf_counter() - started
    pictures.save_terms(out / "ddpm_bits.png", bits[1])
    x_T = ddpm.initial_noise((config.samples, *images.image_shape), sample_seed, device)
    classes = _classes(config.samples, device)
    options: dict[str, Any] = {"guidance_scale": config.guidance_scale, "progress": progress}
    started = time.perf_counter()
    ancestral = ddpm.sample_ddpm(
        diffusion, model, x_T, classes, seed=sample_seed + 1, **options
    ).cpu()  # waits for the device
    between = time.perf_counter()
    ddim = ddpm.sample_ddim(
        diffusion, model, x_T, classes, num_steps=config.ddim_steps, **options
    ).cpu()
    finished = time.perf_counter()
    guided = f"guidance scale {config.guidance_scale:g}"
    _save_classes(
        out / "ddpm_samples.png",
        ancestral,
        f"DDPM samples of each class, {config.num_timesteps} steps, {guided}",
    )
    _save_classes(
        out / "ddim_samples.png",
        ddim,
        f"Same network and x_T, DDIM, {config.ddim_steps} steps, η = 0, {guided}",
    )
    _draw_strips(out, config, test, trainer, x_T, sample_seed)
    pictures.save_curves(
        out / "ddpm_training.png",
        [
            pictures.Curves(
                "DDPM: |ε − ε_θ(x_t, t, class)|², mean over pixels",
                "loss (a prediction of 0 has loss 1)",
                {"training": trainer.history.cpu()[:, 0]},
                {"held out, averaged weights": held_out},
                log=True,
            )
        ],
    )
    return {
        **_training_summary(trainer),
        "held_out_loss": held_out,
        "held_out_bits": likelihood.as_report(bits, config.num_timesteps),
        "bits_seconds": round(bits_seconds, 3),
        "samples": config.samples,
        "guidance_scale": config.guidance_scale,
        "ddpm_steps": config.num_timesteps,
        "ddpm_sampling_seconds": round(between - started, 3),
        "ddim_steps": config.ddim_steps,
        "ddim_sampling_seconds": round(finished - between, 3),
    }


def draw_flow(
    out: Path,
    config: DemoConfig,
    images: ImageData,
    trainer: Trainer,
    *,
    sample_seed: int,
    evaluation_seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Draw curve and samples of the flow, a column for each class, and measure it.

    Args:
        out: Folder for the pictures.
        config: Settings of the run.
        images: The data.
        trainer: The trained flow.
        sample_seed: Seed of the samples.
        evaluation_seed: Seed of times and noise of the held-out loss and likelihood.
        progress: Whether to show progress bars while sampling and measuring.

    Returns:
        The measurements.
    """
    model, device = trainer.averaged_model, trainer.device
    test, labels = images.test.to(device), images.test_labels.to(device)
    held_out = flow.held_out_loss(model, test, labels, seed=evaluation_seed)
    started = time.perf_counter()
    bits = flow.held_out_bits(model, test, labels, config, seed=evaluation_seed, progress=progress)
    bits_seconds = time.perf_counter() - started
    shape = (config.samples, *images.image_shape)
    noise = PhiloxNoise(sample_seed).tensor(shape, device=device)
    classes = _classes(config.samples, device)
    started = time.perf_counter()
    samples = flow.sample_flow(model, noise, classes, config, progress=progress).cpu()
    seconds = time.perf_counter() - started
    _save_classes(
        out / "flow_samples.png",
        samples,
        f"Flow samples of each class, {config.flow_sampling_steps} steps, "
        f"guidance scale {config.guidance_scale:g}",
    )
    pictures.save_curves(
        out / "flow_training.png",
        [
            pictures.Curves(
                "Flow: |(ε − x_0) − u_θ(x_t, t, class)|², mean over pixels",
                "loss",
                {"training": trainer.history.cpu()[:, 0]},
                {"held out, averaged weights": held_out},
                log=True,
            )
        ],
    )
    return {
        **_training_summary(trainer),
        "held_out_loss": held_out,
        "held_out_bits": bits,
        "bits_seconds": round(bits_seconds, 3),
        "samples": config.samples,
        "sampling_steps": config.flow_sampling_steps,
        "guidance_scale": config.guidance_scale,
        "sampling_seconds": round(seconds, 3),
    }


def _draw_strips(
    out: Path, config: DemoConfig, test: Tensor, trainer: Trainer, x_T: Tensor, seed: int
) -> None:
    diffusion = ddpm.build_diffusion(config)
    falling = ddpm.strip_timesteps(config.num_timesteps, _STRIP_COLUMNS)
    rising = falling[::-1]
    shown = test[torch.linspace(0, len(test) - 1, _STRIP_ROWS).long().to(test.device)]
    noised = ddpm.forward_strip(diffusion, shown, rising, seed=seed + 2)
    pictures.save_mosaic(
        out / "forward.png",
        torch.cat([shown, noised], dim=1),
        title="Forward: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε",
        column_labels=["x_0", *(f"t = {t}" for t in rising)],
    )
    x_T = x_T[:_STRIP_ROWS]
    strip = ddpm.reverse_strip(
        diffusion,
        trainer.averaged_model,
        x_T,
        _classes(len(x_T), x_T.device),
        falling,
        guidance_scale=config.guidance_scale,
        seed=seed + 3,
    )
    pictures.save_mosaic(
        out / "reverse.png",
        strip,
        title=f"Reverse: from x_T ~ N(0, I) to samples of classes 0 to {len(x_T) - 1}, by "
        f"Algorithm 2 with guidance scale {config.guidance_scale:g}",
        column_labels=[*(f"t = {t}" for t in falling), "x_0"],
    )
