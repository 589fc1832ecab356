"""Draws the picture of how-to/inversion.md: an edit by inversion, with exact predictions.

    python docs/make_inversion_pictures.py [--out docs/assets]

The data are points in the plane on one of two arcs, the condition says which. Each arc is a mixture
of Gaussians, so the prediction of a perfect network has a closed form.
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

from diffcore import sample, solvers

INK, PALE = "#24292f", "#8b949e"
COUNT, STD, STEPS = 600, 0.12, 60
ANGLES = torch.linspace(0.08 * math.pi, 0.92 * math.pi, 40, dtype=torch.float64)
ARCS = {  # the centers of the Gaussians: a bow, and a bowl below it
    "bow": torch.stack([1.7 * ANGLES.cos(), 1.3 * ANGLES.sin()], 1),
    "bowl": torch.stack([1.7 * ANGLES.cos(), -1.3 * ANGLES.sin()], 1),
}


def noise(x: Tensor, t: Tensor, arc: str) -> Tensor:
    """The best prediction of the noise at sigma = t: (x - E[x_0 | x]) / sigma, also at 0."""
    variance = STD**2 + t[:, None] ** 2
    from_centers = x[:, None] - ARCS[arc]
    weights = (-(from_centers**2).sum(-1) / (2 * variance)).softmax(1)
    return t[:, None] / variance * (weights[..., None] * from_centers).sum(1)


def main() -> None:
    """Inverts, samples, draws and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(len(ANGLES), (COUNT,), generator=generator)
    points = torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)
    points = ARCS["bow"][kind] + STD * points
    sigmas = 20 * torch.linspace(0, 1, STEPS + 1, dtype=torch.float64) ** 3
    up, down = solvers.heun_table(sigmas), solvers.heun_table(sigmas.flip(0))
    found = sample(noise, points, up, model_kwargs={"arc": "bow"})
    back = sample(noise, found, down, model_kwargs={"arc": "bow"})
    print(f"largest error of the way back: {float((back - points).abs().max()):.1e}")
    fresh = 20 * torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)
    bowl = {"model_kwargs": {"arc": "bowl"}}
    panels = {
        "data of one condition": points,
        "the noise behind them, / 20": found / 20,
        "sampled from it\nunder the other condition": sample(noise, found, down, **bowl),
        "sampled from other noise\nunder the other condition": sample(noise, fresh, down, **bowl),
    }
    figure, every = plt.subplots(1, 4, figsize=(10, 3.2), layout="constrained")
    for axes, (title, where) in zip(every, panels.items(), strict=True):
        colors = points[:, 0].tolist()
        axes.scatter(*where.T.tolist(), c=colors, cmap="viridis", s=4, linewidths=0)
        reach = 3.2 if where is panels["the noise behind them, / 20"] else 2.2
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=9, color=INK)
        for spine in axes.spines.values():
            spine.set_color(PALE)
    figure.savefig(options.out / "inversion.png", dpi=110)


if __name__ == "__main__":
    main()
