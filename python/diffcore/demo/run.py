"""A complete demo run: data, three trainings, pictures, report."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffcore._checks import check_choice
from diffcore._engine.info import collect_info, installed_version
from diffcore._files import replace_file
from diffcore.demo import ddpm, flow, likelihood, vae
from diffcore.demo.checkpoint import save_checkpoint
from diffcore.demo.config import DemoConfig, full_config, quick_config
from diffcore.demo.data import ImageData, check_installed, load_images, resolve
from diffcore.demo.draw import draw_ddpm, draw_flow, draw_vae
from diffcore.demo.training import Trainer, TrainingConfig

TITLES = {"vae": "VAE", "ddpm": "DDPM", "flow": "Flow"}
MODELS = tuple(TITLES)
DRAWN: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., list[str]]]] = {
    "vae": (draw_vae, likelihood.summary_of_vae),
    "ddpm": (draw_ddpm, likelihood.summary_of_ddpm),
    "flow": (draw_flow, likelihood.summary_of_flow),
}

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
    flow_steps: int | None,
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
        flow_steps: Steps of the flow, or None for the default.
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
    given["flow_steps"] = flow_steps
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
        shortest = min(config.steps, config.vae_steps, config.flow_steps)
        warmup = max(1, min(config.warmup_steps, shortest // 4))
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
    flow_steps: int | None = None,
    only: str | None = None,
    seed: int | None = None,
    quick: bool = False,
    resume: bool = False,
    device: str = "auto",
    progress: bool = True,
    log: Callable[[str], object] = print,
) -> dict[str, object]:
    """Train the models, draw the pictures, and write ``report.json``.

    Args:
        out: Folder for all results, created if missing.
        data: ``auto``, ``mnist``, ``fashion``, ``digits``, or None for the default.
        steps: Optimizer steps of the DDPM, or None for the default.
        vae_steps: Optimizer steps of the VAE, or None for the default.
        flow_steps: Optimizer steps of the flow, or None for the default.
        only: "vae", "ddpm" or "flow" for this model alone, or None for all.
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
    if only is not None:
        check_choice("only", only, MODELS)
    place = choose_device(device)
    config = choose_config(
        out,
        data=data,
        steps=steps,
        vae_steps=vae_steps,
        flow_steps=flow_steps,
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
    train, labels = images.train.to(place), images.train_labels.to(place)
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
    trainers = build_trainers(config, images, checkpoints, place)
    if only is not None:
        trainers = {only: trainers[only]}
    for model, trainer in trainers.items():
        name = TITLES[model]
        if resume and trainer.path.exists():
            trainer.load()
            log(f"{name}: resumed at step {trainer.step} of {trainer.config.steps}")
        trainer.fit(train, labels, name=name, progress=progress)
        per_step = 1000 * trainer.seconds / trainer.config.steps
        log(f"{name}: {trainer.step} steps in {trainer.seconds:.0f} s, {per_step:.1f} ms per step")
        scalars = {"config": dataclasses.asdict(config), "step": trainer.step}
        weights = trainer.averaged_model.state_dict()
        save_checkpoint(checkpoints / f"{model}.safetensors", weights, scalars)
    bars = progress and sys.stderr.isatty()
    streams = {
        "sample_seed": config.seed + _STREAM_SAMPLES,
        "evaluation_seed": config.seed + _STREAM_EVALUATION,
    }
    for model, trainer in trainers.items():
        draw, summary = DRAWN[model]
        options = streams if model == "vae" else {**streams, "progress": bars}
        found = report[model] = draw(out, config, images, trainer, **options)
        for line in summary(found):
            log(line)
    report["total_seconds"] = round(time.perf_counter() - started, 2)
    replace_file(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    log(f"Pictures, checkpoints and report.json are in {out}")
    return report


def build_trainers(
    config: DemoConfig, images: ImageData, checkpoints: Path, device: torch.device
) -> dict[str, Trainer]:
    """Return the trainers of the models.

    Args:
        config: Settings of the run.
        images: The data, for the shape of an image.
        checkpoints: Folder for the training states.
        device: Device to train on.

    Returns:
        One for each of ``MODELS``, in that order.
    """
    common: dict[str, Any] = {
        "batch_size": config.batch_size,
        "warmup_steps": config.warmup_steps,
        "seed": config.seed,
        "checkpoint_every": config.checkpoint_every,
        "ema_decay": config.ema_decay,
    }
    parts = {
        "vae": (vae, vae.training_loss(config.decoder_std)),
        "ddpm": (ddpm, ddpm.training_loss(ddpm.build_diffusion(config), config.class_dropout)),
        "flow": (flow, flow.training_loss(flow.build_flow(), config.class_dropout)),
    }
    lengths = {
        "vae": (config.vae_steps, config.vae_learning_rate),
        "ddpm": (config.steps, config.learning_rate),
        "flow": (config.flow_steps, config.flow_learning_rate),
    }

    def trainer(model: str) -> Trainer:
        module, loss = parts[model]
        steps, learning_rate = lengths[model]
        return Trainer(
            lambda: module.build_network(config, images.image_shape),
            loss,
            module.METRICS,
            TrainingConfig(steps=steps, learning_rate=learning_rate, **common),
            path=checkpoints / f"{model}.training.safetensors",
            device=device,
        )

    return {model: trainer(model) for model in MODELS}


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
