"""The settings of a demo run: every number that determines its result."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcore._checks import check_choice
from diffcore._files import replace_file
from diffcore.demo.checkpoint import DamagedFileError
from diffcore.demo.classes import CLASSES
from diffcore.demo.data import DATASETS

# What a run has memory, time and a formula for.
_STEPS, _OTHER = (1, 10**7), (1, 4096)
_RANGES = {
    "seed": (-(2**63), 2**63 - 1),
    "steps": _STEPS,
    "vae_steps": _STEPS,
    "flow_steps": _STEPS,
    "checkpoint_every": _STEPS,
    "warmup_steps": _STEPS,
    "num_timesteps": (21, 10**5),  # with fewer, the last of the scaled betas is not below 1
}
_NAMES = tuple(name for name in DATASETS if name != "auto")


@dataclass(frozen=True)
class DemoConfig:
    """Settings of a demo run, saved with the results and loaded by ``--resume``.

    Attributes:
        data: Data set name, ``mnist``, ``fashion`` or ``digits``.
        seed: Seed of initial weights, batches, timesteps, noise and samples.
        steps: Optimizer steps of the DDPM.
        vae_steps: Optimizer steps of the VAE.
        flow_steps: Optimizer steps of the flow.
        batch_size: Images per step.
        learning_rate: Peak AdamW learning rate of the DDPM.
        vae_learning_rate: Peak AdamW learning rate of the VAE.
        flow_learning_rate: Peak AdamW learning rate of the flow.
        warmup_steps: Steps of linear warmup before the cosine decay.
        ema_decay: Decay of the averaged weights, which are used for sampling.
        num_timesteps: T of the diffusion, with linear betas scaled by 1000/T.
        ddim_steps: Steps of the DDIM sampler.
        flow_sampling_steps: Steps of Euler's method in the flow.
        guidance_scale: Scale of the classifier-free guidance of the DDPM and of the flow.
        class_dropout: Share of the images whose class the two are not told in training.
        patch: Block size of the ``pixel_unshuffle`` before the U-Net.
        width: Channels of the upper level of the U-Net; the lower level has twice as many.
        vae_width: Channels of the upper level of the VAE; the lower level has twice as many.
        latent_dim: Latent dimensions of the VAE.
        decoder_std: Standard deviation s of the Gaussian decoder N(D(z), s^2 I) of the VAE, for
            pixels in [-1, 1].
        samples: Images in a sample grid, a multiple of 10: a column for each class.
        bits_images: Largest number of held-out images for the estimate of bits per dimension.
        bits_strata: Strata of the estimate, which calls the network once more than this per image.
        bits_exact_images: Images evaluated at every timestep, for the picture.
        flow_bits_images: Largest number of held-out images for the likelihood of the flow.
        flow_bits_steps: Steps of Heun's method from an image to its noise.
        checkpoint_every: Steps between two saves of the training state.
    """

    data: str
    seed: int = 0
    steps: int = 2500
    vae_steps: int = 3000
    flow_steps: int = 2500
    batch_size: int = 64
    learning_rate: float = 3e-3
    vae_learning_rate: float = 2e-3
    flow_learning_rate: float = 3e-3
    warmup_steps: int = 200
    ema_decay: float = 0.99
    num_timesteps: int = 200
    ddim_steps: int = 50
    flow_sampling_steps: int = 8
    guidance_scale: float = 2.0
    class_dropout: float = 0.1
    patch: int = 2
    width: int = 32
    vae_width: int = 32
    latent_dim: int = 16
    decoder_std: float = 1.0
    samples: int = 80
    bits_images: int = 500
    bits_strata: int = 16
    bits_exact_images: int = 50
    flow_bits_images: int = 200
    flow_bits_steps: int = 32
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        """Refuse other types, and numbers out of range."""
        check_choice("data", self.data, _NAMES)
        for field in dataclasses.fields(self)[1:]:
            _check_number(field.name, getattr(self, field.name), field.type == "float")
        for name in ("ema_decay", "class_dropout"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be less than 1, got {getattr(self, name)}")
        if self.ddim_steps > self.num_timesteps:
            raise ValueError(f"ddim_steps must be at most num_timesteps, got {self.ddim_steps}")
        for name in ("width", "vae_width"):  # group norms of 8 groups
            if getattr(self, name) % 8:
                raise ValueError(f"{name} must be a multiple of 8, got {getattr(self, name)}")
        if self.samples % CLASSES:
            raise ValueError(f"samples must be a multiple of {CLASSES}, got {self.samples}")
        half = 4 if self.data == "digits" else 14  # the U-Net has two levels
        if half % self.patch:
            raise ValueError(f"patch must be a divisor of {half}, got {self.patch}")

    def replace(self, changes: Mapping[str, object]) -> DemoConfig:
        """Return a copy with some settings changed.

        Args:
            changes: New values by name.

        Returns:
            The copy.
        """
        return DemoConfig(**{**dataclasses.asdict(self), **changes})

    def save(self, path: Path) -> None:
        """Write the settings as JSON.

        Args:
            path: File to write.
        """
        replace_file(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> DemoConfig:
        """Read settings written by ``save``.

        Args:
            path: File to read.

        Returns:
            The settings.

        Raises:
            DamagedFileError: If the file does not hold the settings of a demo run.
        """
        try:
            return cls(**json.loads(path.read_bytes()))
        except (TypeError, ValueError, RecursionError) as error:
            kind = "the settings of a demo run"
            raise DamagedFileError.of(path, kind, error) from error


def _check_number(name: str, value: Any, is_float: bool) -> None:
    if is_float:
        if type(value) not in (int, float):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
        return
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    least, most = _RANGES.get(name, _OTHER)
    if not least <= value <= most:
        raise ValueError(f"{name} must be in {least} .. {most}, got {value}")


def full_config(data: str) -> DemoConfig:
    """Return the settings for 28x28 images: a run of a few minutes on two cores."""
    return DemoConfig(data=data)


def quick_config(data: str) -> DemoConfig:
    """Return the settings for the smoke run on 8x8 digits: a run of seconds with rough samples."""
    return DemoConfig(
        data=data,
        steps=400,
        vae_steps=400,
        flow_steps=400,
        vae_learning_rate=1e-2,
        warmup_steps=60,
        num_timesteps=50,
        ddim_steps=25,
        patch=1,
        width=16,
        vae_width=16,
        latent_dim=8,
        ema_decay=0.98,
        decoder_std=0.25,
        samples=40,
    )
