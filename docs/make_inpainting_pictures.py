"""Draws the picture of how-to/img2img.md: inpainting and img2img of disks, with an exact model.

    python docs/make_inpainting_pictures.py [--out docs/assets]

The data are 1000 images of disks; the best prediction of x_0 is their mean weighted by likelihood.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from diffcore import PhiloxNoise, add_noise, sample, solvers
from diffcore.sigmas import get_sigmas_karras

INK, PALE = "#24292f", "#8b949e"
SIZE, COUNT = 24, 6
SIGMAS = get_sigmas_karras(40, 0.02, 30.0).double()
KEY = PhiloxNoise(seed=3)


def disks() -> Tensor:
    """1000 disks, ``[1000, 1, 24, 24]``, from -1 to 1."""
    at = torch.linspace(0, 1, SIZE, dtype=torch.float64)
    y, x = torch.meshgrid(at, at, indexing="ij")
    random = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centers, radii = 0.3 + 0.4 * random[:, :2], 0.12 + 0.22 * random[:, 2]
    from_center = torch.hypot(x - centers[:, :1, None], y - centers[:, 1:, None])
    return torch.tanh(SIZE * (radii[:, None, None] - from_center))[:, None]


DATA = disks()


def denoised(x: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x] for one of the images plus noise of deviation t."""
    distance = torch.cdist(x.flatten(1), DATA.flatten(1)).square()
    weights = (-distance / (2 * t[:, None] ** 2)).softmax(1)
    return (weights @ DATA.flatten(1)).view_as(x)


def repaint(known: Tensor, mask: Tensor, repeats: int) -> Tensor:
    """Each step ``repeats`` times, with the noise put back in between (RePaint)."""
    table = solvers.euler_ancestral_table(SIGMAS, prediction_type="sample")
    x, stream = KEY.tensor(known.shape, dtype=known.dtype) * table.init_noise_sigma, 1
    for i, row in enumerate(table.rows):
        for left in reversed(range(repeats if row.next_sigma > 0 else 1)):
            noise, of_known, back = (KEY.at(stream + k) for k in range(3))
            m, stream = denoised(x, table.timesteps[i].expand(len(x))), stream + 3
            given = {"mask": mask, "known": known, "known_noise": of_known}
            x, _ = table.step(i, x, m, noise=noise, **given)
            if left:
                x = add_noise(x, back, 1.0, math.sqrt(row.sigma**2 - row.next_sigma**2))
    return x


def img2img(image: Tensor, first: int) -> Tensor:
    """The samples from step ``first`` on, of the image with the noise of that step."""
    levels = solvers.NoiseLevels.from_sigmas(SIGMAS).skip(first)
    table = solvers.euler_ancestral_table(levels, prediction_type="sample")
    x = add_noise(image, KEY, 1.0, float(levels.sigma[0]))
    return sample(denoised, x, table, noise=KEY)


def main() -> None:
    """Draws and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    options = parser.parse_args()
    image = DATA[7:8].expand(COUNT, -1, -1, -1).contiguous()
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool)
    mask[: SIZE // 2, : SIZE // 2] = False  # known: a quarter
    table = solvers.euler_ancestral_table(SIGMAS, prediction_type="sample")
    x = KEY.tensor(image.shape, dtype=image.dtype) * table.init_noise_sigma
    rows = {
        "known quarter": torch.where(mask, -0.4, image),
        "mask=, known=": sample(denoised, x, table, noise=KEY, mask=mask, known=image),
        "RePaint, 10 repeats": repaint(image, mask, 10),
        f"img2img from σ = {SIGMAS[12]:.2g}": img2img(image, 12),
        f"img2img from σ = {SIGMAS[22]:.2g}": img2img(image, 22),
    }
    figure, panels = plt.subplots(len(rows), COUNT, figsize=(6.2, 4.6), layout="constrained")
    for line, (title, images) in zip(panels, rows.items(), strict=True):
        for axes, one in zip(line, images[:, 0].tolist(), strict=True):
            axes.imshow(one, cmap="Blues", vmin=-1.2, vmax=1.2)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color(PALE)
        line[0].set_ylabel(title, fontsize=7, color=INK, rotation=0, ha="right", va="center")
    figure.savefig(options.out / "inpainting.png", dpi=110)


if __name__ == "__main__":
    main()
