"""A complete demo run: data, two trainings, pictures, report."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffcore._engine.info import collect_info, installed_version
from diffcore._files import replace_file
from diffcore.demo import ddpm, likelihood, vae
from diffcore.demo.checkpoint import save_checkpoint
from diffcore.demo.config import DemoConfig, full_config, quick_config
from diffcore.demo.data import ImageData, check_installed, load_images, resolve
from diffcore.demo.draw import draw_ddpm, draw_vae
from diffcore.demo.training import Trainer, TrainingConfig

# Offsets from the seed of the run, so that no two uses of randomness share a seed.
_STREAM_SAMPLES, _STREAM_EVALUATION = 1_000_003, 2_000_003


def choose_device(name: str) -> torch.device:
    """Resolve ``auto``: the CUDA device if there is one, else the CPU.

    Args:
        name: ``auto`` or the name of a torch device.

    Returns:
        The device.

    Raises:
        ValueError: If torch does not know the device or cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto or a torch device, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be available, got {name!r}, but torch sees no CUDA device")
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # each backend has its own kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be one that can hold values here, got {name!r}: {reason}"
        ) from error
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
    """Return the settings of the run: new ones, or those of the run to resume.

    Args:
        out: Folder of the run.
        data: Data set, or None for the default.
        steps: Steps of the DDPM, or None for the default.
        vae_steps: Steps of the VAE, or None for the default.
        seed: Seed, or None for the default.
        quick: Whether to use the settings of the smoke run.
        resume: Whether to continue the run in ``out``.

    Returns:
        The settings.

    Raises:
        FileNotFoundError: If ``out`` holds no run to resume.
        ValueError: If a setting differs from the run to resume, or is invalid.
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
        # Warmup takes at most a quarter of a short run.
        warmup = max(1, min(config.warmup_steps, config.steps // 4, config.vae_steps // 4))
        return config.replace({"warmup_steps": warmup})
    path = out / "config.json"
    if not os.path.isfile(path):  # unlike Path.is_file, also False for a name that is too long
        raise FileNotFoundError(f"out must hold a run to resume, got {out} without config.json")
    config = DemoConfig.load(path)
    for name, value in changes.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} must be {getattr(config, name)} to resume the run in {out}, got {value}; "
                "omit it, or start a new run without --resume"
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
    """Train both models, draw the pictures, and write ``report.json``.

    Args:
        out: Folder for all results, created if missing.
        data: ``auto``, ``mnist``, ``fashion``, ``digits``, or None for the default.
        steps: Optimizer steps of the DDPM, or None for the default.
        vae_steps: Optimizer steps of the VAE, or None for the default.
        seed: Seed of all randomness, or None for 0.
        quick: Whether to make the smoke run on 8x8 digits.
        resume: Whether to continue the run in ``out``.
        device: ``auto`` or a torch device.
        progress: Whether to show progress bars on a terminal.
        log: Called with each line of output.

    Returns:
        The report.

    Raises:
        Interrupted: After Ctrl-C during training, with the state saved.
        ValueError: If a setting is invalid, or ``out`` cannot be a folder.
        DamagedFileError: If the run to resume has a damaged file, or one of another program.
        MissingExtraError: If the package that has the data is not installed.
        FileNotFoundError: If there is no run to resume, or the data are not installed.
        OSError: If a result cannot be written, for example because the disk is full.
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
    check_installed(config.data)
    checkpoints = _make_folder(out)
    started = time.perf_counter()
    images = load_images(config.data)
    log(
        f"{images.title}: {len(images.train)} training images, {len(images.test)} held out, "
        f"device {place}"
    )
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
        log(f"{name}: {trainer.step} steps in {trainer.seconds:.0f} s, {per_step:.1f} ms per step")
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
    replace_file(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    log(f"Pictures, checkpoints and report.json are in {out}")
    return report


def build_trainers(
    config: DemoConfig, images: ImageData, checkpoints: Path, device: torch.device
) -> tuple[Trainer, Trainer]:
    """Return the trainers of the DDPM and of the VAE.

    Args:
        config: Settings of the run.
        images: The data, for the shape of an image.
        checkpoints: Folder for the training states.
        device: Device to train on.

    Returns:
        (DDPM, VAE).
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


def _make_folder(out: Path) -> Path:
    """The folder for checkpoints in ``out``, created with its parents if missing."""
    checkpoints = out / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a file, too long, a null character
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"out must be a folder that can be written, got {str(out)!r}: {reason}"
        ) from error
    return checkpoints


def _discard_old(checkpoints: Path, log: Callable[[str], object]) -> None:
    # They are not read: a damaged file must not keep a new run from starting.
    for path in sorted(checkpoints.glob("*.training.safetensors")):
        log(f"New run: discarding {path.name} of the run before")
        path.unlink(missing_ok=True)  # another process may have done it
