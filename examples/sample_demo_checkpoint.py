"""Load the DDPM and the VAE that `diffcore demo` trained, and sample new digits from both.

diffcore demo
python examples/sample_demo_checkpoint.py demo-output digits.png --seed 7
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffcore.demo import ddpm, vae
from diffcore.demo.checkpoint import load_checkpoint
from diffcore.demo.classes import CLASSES
from diffcore.demo.config import DemoConfig
from diffcore.demo.data import load_images
from diffcore.demo.pictures import save_mosaic


def main(folder: Path, picture: Path, seed: int) -> None:
    """Save a PNG: two rows of DDIM samples, a column for each class, and two of VAE samples."""
    weights, scalars = load_checkpoint(folder / "checkpoints" / "ddpm.safetensors")
    config = DemoConfig(**scalars["config"])
    shape = load_images(config.data).image_shape

    unet = ddpm.build_network(config, shape)
    unet.load_state_dict(weights)
    diffusion = ddpm.build_diffusion(config)
    count = 2 * CLASSES
    x_T = ddpm.initial_noise((count, *shape), seed, torch.device("cpu"))
    by_ddpm = ddpm.sample_ddim(
        diffusion,
        unet.eval(),
        x_T,
        torch.arange(count) % CLASSES,
        guidance_scale=config.guidance_scale,
        num_steps=config.ddim_steps,
        progress=False,
    )

    autoencoder = vae.build_network(config, shape)
    autoencoder.load_state_dict(load_checkpoint(folder / "checkpoints" / "vae.safetensors")[0])
    by_vae = vae.sample(autoencoder.eval(), count, seed=seed, device=torch.device("cpu"))

    rows = torch.cat([by_ddpm, by_vae]).reshape(4, CLASSES, *shape[1:])
    save_mosaic(
        picture,
        rows,
        title="Samples of the demo's networks, by diffusion of the classes 0 to 9",
        row_labels=["diffusion", "diffusion", "VAE", "VAE"],
    )
    print(f"saved {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the --out folder of diffcore demo")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.picture, arguments.seed)
