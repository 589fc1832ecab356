"""A whole demo run: data, two trainings, pictures, report."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffcore._engine.info import collect_info, installed_version
from diffcore.demo import ddpm, likelihood, vae
from diffcore.demo.checkpoint import read_scalars, save_checkpoint
from diffcore.demo.config import DemoConfig, full_config, quick_config
from diffcore.demo.data import ImageData, load_images, resolve
from diffcore.demo.draw import draw_ddpm, draw_vae
from diffcore.demo.training import Trainer, TrainingConfig

# Each use of randomness gets its own stream; the seed shifts them all.
_STREAM_SAMPLES, _STREAM_EVALUATION = 1_000_003, 2_000_003


def choose_device(name: str) -> torch.device:
    """Turn ``auto`` into a CUDA device where there is one.

    Args:
        name: ``auto`` or what `torch.device` takes.

    Returns:
        The device.

    Raises:
        ValueError: If torch does not know it or cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto or a torch device, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch sees no CUDA device")
    return device


def choose_config(
    out: Path,
    *,
    data: str | None,
    steps: int | None,
    vae_steps: int | None,
    seed: int | None,
    quick: bool,
    resume: bool,
) -> DemoConfig:
    """Settle the settings: those of the run being resumed, or new ones.

    Args:
        out: The run's folder.
        data: Data set, or None for the default.
        steps: Steps of the DDPM, or None for the default.
        vae_steps: Steps of the VAE, or None for the default.
        seed: Seed, or None for the default.
        quick: Whether to take the smoke run's settings.
        resume: Whether to go on with the run in `out`.

    Returns:
        The settings.

    Raises:
        FileNotFoundError: If there is nothing to resume.
        ValueError: If a setting contradicts the run being resumed, or is unknown.
    """
    given = {"data": data, "steps": steps, "vae_steps": vae_steps, "seed": seed}
    changes = {
        name: value for name, value in given.items() if value is not None and value != "auto"
    }
    if not resume:
        name = "digits" if quick and data in (None, "auto") else resolve(data or "auto")
        if quick and name != "digits":
            raise ValueError(f"data must be digits with --quick, got {name}")
        config = quick_config(name) if name == "digits" else full_config(name)
        config = config.replace({**changes, "data": name})
        # A short run still needs most of its steps at a useful learning rate.
        warmup = max(1, min(config.warmup_steps, config.steps // 4, config.vae_steps // 4))
        return config.replace({"warmup_steps": warmup})
    path = out / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume in {out}: it has no config.json")
    config = DemoConfig.load(path)
    for name, value in changes.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} of the run in {out} is {getattr(config, name)}, not {value}; "
                "resume without it, or start afresh without --resume"
            )
    return config


def run_demo(
    out: Path,
    *,
    data: str | None = None,
    steps: int | None = None,
    vae_steps: int | None = None,
    seed: int | None = None,
    quick: bool = False,
    resume: bool = False,
    device: str = "auto",
    progress: bool = True,
    log: Callable[[str], object] = print,
) -> dict[str, object]:
    """Train both models, draw the pictures, write ``report.json``.

    Args:
        out: Folder for everything, made if need be.
        data: ``auto``, ``mnist``, ``fashion``, ``digits``, or None for the default.
        steps: Optimiser steps of the DDPM, or None for the default.
        vae_steps: Optimiser steps of the VAE, or None for the default.
        seed: Governs everything, or None for 0.
        quick: Smoke run on 8x8 digits.
        resume: Go on with the run in `out`.
        device: ``auto`` or a torch device.
        progress: Whether to show progress bars on a terminal.
        log: Takes each line about what happens.

    Returns:
        The report.

    Raises:
        Interrupted: After Ctrl-C during training; the state is saved.
        ValueError: If the settings make no sense.
        FileNotFoundError: If there is nothing to resume, or no such data.
    """
    place = choose_device(device)
    config = choose_config(
        out,
        data=data,
        steps=steps,
        vae_steps=vae_steps,
        seed=seed,
        quick=quick,
        resume=resume,
    )
    started = time.perf_counter()
    images = load_images(config.data)
    log(f"{images.title}: {len(images.train)} to train on, {len(images.test)} held out, on {place}")
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if not resume:
        _discard_old(checkpoints, log)
    config.save(out / "config.json")
    train = images.train.to(place)
    report: dict[str, object] = {
        "config": dataclasses.asdict(config),
        "device": str(place),
        "data": {
            "title": images.title,
            "train_images": len(images.train),
            "test_images": len(images.test),
            "image_shape": list(images.image_shape),
        },
        "environment": collect_info(),
        "packages": {
            name: installed_version(name)
            for name in ("torch", "numpy", "matplotlib", "safetensors", "mlxtend", "scikit-learn")
        },
    }
    ddpm_trainer, vae_trainer = build_trainers(config, images, checkpoints, place)
    for name, trainer in (("VAE", vae_trainer), ("DDPM", ddpm_trainer)):
        if resume and trainer.path.exists():
            trainer.load()
            log(f"{name}: resumed at step {trainer.step} of {trainer.config.steps}")
        trainer.fit(train, name=name, progress=progress)
        per_step = 1000 * trainer.seconds / trainer.config.steps
        log(f"{name}: {trainer.step} steps in {trainer.seconds:.0f} s, {per_step:.1f} ms a step")
        scalars = {"config": dataclasses.asdict(config), "step": trainer.step}
        weights = trainer.averaged_model.state_dict()
        save_checkpoint(checkpoints / f"{name.lower()}.safetensors", weights, scalars)
    bars = progress and sys.stderr.isatty()
    streams = {
        "sample_seed": config.seed + _STREAM_SAMPLES,
        "evaluation_seed": config.seed + _STREAM_EVALUATION,
    }
    of_vae = draw_vae(out, config, images, vae_trainer, **streams)
    of_ddpm = draw_ddpm(out, config, images, ddpm_trainer, progress=bars, **streams)
    for line in likelihood.summary(of_ddpm["held_out_bits"], of_vae["held_out"]):
        log(line)
    report["vae"], report["ddpm"] = of_vae, of_ddpm
    report["total_seconds"] = round(time.perf_counter() - started, 2)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    log(f"Pictures, checkpoints and report.json are in {out}")
    return report


def build_trainers(
    config: DemoConfig, images: ImageData, checkpoints: Path, device: torch.device
) -> tuple[Trainer, Trainer]:
    """Return the trainers of the DDPM and of the VAE.

    Args:
        config: Settings of the run.
        images: For their shape.
        checkpoints: Folder for the training states.
        device: Where to train.

    Returns:
        DDPM, VAE.
    """
    diffusion = ddpm.build_diffusion(config)
    common = {
        "batch_size": config.batch_size,
        "warmup_steps": config.warmup_steps,
        "seed": config.seed,
        "checkpoint_every": config.checkpoint_every,
    }
    return Trainer(
        lambda: ddpm.build_network(config, images.image_shape),
        ddpm.training_loss(diffusion),
        ddpm.METRICS,
        TrainingConfig(
            steps=config.steps,
            learning_rate=config.learning_rate,
            ema_decay=config.ema_decay,
            **common,
        ),
        path=checkpoints / "ddpm.training.safetensors",
        device=device,
    ), Trainer(
        lambda: vae.build_network(config, images.image_shape),
        vae.training_loss(config.decoder_std),
        vae.METRICS,
        TrainingConfig(
            steps=config.vae_steps,
            learning_rate=config.vae_learning_rate,
            ema_decay=config.ema_decay,
            **common,
        ),
        path=checkpoints / "vae.training.safetensors",
        device=device,
    )


def _discard_old(checkpoints: Path, log: Callable[[str], object]) -> None:
    for path in sorted(checkpoints.glob("*.training.safetensors")):
        scalars = read_scalars(path)
        if scalars["step"] < scalars["steps"]:
            log(f"Starting afresh: {path.name}, stopped at step {scalars['step']}, is discarded")
        path.unlink()
