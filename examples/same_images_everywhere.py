"""Sample the same 64 images in one batch, in 64 batches, and in two processes: equal bits.

    python examples/same_images_everywhere.py

The noise is given by a key: image i gets the noise of sample i in any batch and any process. The
model has a closed form, so there is nothing to train or download: the data are eight shapes on
grainy paper, and the model returns the best prediction of x_0.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise

SIZE, GRAIN, STEPS = 24, 0.15, 25


def shapes() -> Tensor:
    """Eight images [8, SIZE, SIZE], light (0.8) on dark (-0.8)."""
    ticks = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    r, across, down = (x * x + y * y).sqrt(), x.abs(), y.abs()
    white = (
        *(r < 0.7, (r > 0.45) & (r < 0.8), (across < 0.6) & (down < 0.6), across + down < 0.9),
        *(torch.minimum(across, down) < 0.2, (across - down).abs() < 0.2),
        *(torch.sin(9 * x) > 0, torch.sin(6 * x) * torch.sin(6 * y) > 0),
    )
    return torch.stack(white) * 1.6 - 0.8


class BestGuess:
    """E[x_0 | x_t] for data that are one of the shapes plus N(0, GRAIN^2) in every pixel."""

    def __init__(self, diffusion: diffcore.GaussianDiffusion) -> None:
        alpha, sigma = diffusion.schedule.alpha, diffusion.schedule.sigma  # float64 [T]
        variance = (alpha * GRAIN) ** 2 + sigma**2
        gain = alpha * GRAIN**2 / variance
        self.table = torch.stack([alpha, variance.log(), gain]).float()
        self.shapes = shapes()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x_t [B, 1, SIZE, SIZE] and t [B] to x_0, each sample on its own."""
        alpha, logvar, gain = self.table[:, t].view(3, -1, 1, 1, 1)
        logvar = logvar.expand_as(x)
        # How well each shape explains x_t. diffcore's sums have the same bits in any batch.
        nll = [
            diffcore.gaussian_nll(x, alpha * shape.expand_as(x), logvar, reduction="sample")
            for shape in self.shapes
        ]
        weights = torch.softmax(-torch.stack(nll, dim=1), dim=1)
        clean = torch.zeros_like(x)
        for weight, shape in zip(weights.unbind(1), self.shapes, strict=True):
            clean = clean + weight.view(-1, 1, 1, 1) * shape
        return clean + gain * (x - alpha * clean)


def images(noise: PhiloxNoise, count: int) -> np.ndarray:
    """Sample images [count, SIZE, SIZE] from the noise."""
    betas = diffcore.make_betas("squaredcos_cap_v2", 1000)
    diffusion = diffcore.GaussianDiffusion(betas, "sample", clip_sample=False)
    shape = (count, 1, SIZE, SIZE)
    return diffusion.p_sample_loop(
        BestGuess(diffusion), shape, num_steps=STEPS, noise=noise
    ).numpy()[:, 0]


def main(count: int, picture: Path) -> bool:
    """Sample the images in three ways, and return whether all bits are equal."""
    noise = PhiloxNoise(seed=0)
    together = images(noise, count)
    alone = np.concatenate([images(noise.for_samples(i), 1) for i in range(count)])

    # A noise key can be pickled. In a distributed run each process takes the range of its rank.
    half = count // 2
    ranges = [(noise.for_samples(0), half), (noise.for_samples(half), count - half)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        apart = np.concatenate(pool.starmap(images, ranges))

    equal = np.array_equal(together, alone) and np.array_equal(together, apart)
    print(f"{count} images from one batch, {count} batches and two processes: equal bits: {equal}")
    save([together, alone, apart], picture)
    return equal


def save(rows: list[np.ndarray], picture: Path) -> None:
    """Save the first twelve images of each run as a PNG, if matplotlib is installed."""
    try:
        from diffcore.demo.pictures import save_mosaic
    except ImportError:
        print("no picture: pip install 'diffcore[demo]'")
        return
    save_mosaic(
        picture,
        torch.from_numpy(np.stack([row[:12] for row in rows])),
        title="The same images in any batch",
        row_labels=["one batch", "one by one", "two processes"],
    )
    print(f"saved {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--picture", type=Path, default=Path("same_images.png"))
    arguments = parser.parse_args()
    if not main(arguments.count, arguments.picture):
        raise SystemExit(1)
