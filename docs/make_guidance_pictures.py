"""Draws the picture of guidance.md: rules of guidance on data in the plane with exact predictions.

    python docs/make_guidance_pictures.py [--out docs/assets]

The data are a mixture of three Gaussians; the condition chooses one of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from diffcore import sample, solvers
from diffcore.guidance import APG, CFG, CFGPlusPlus, Guidance, RescaledCFG
from diffcore.sigmas import get_sigmas_karras

INK, PALE, BLUE = "#24292f", "#8b949e", "#0969da"
CENTERS = torch.tensor([[0.0, 1.6], [-1.5, -0.9], [1.5, -0.9]], dtype=torch.float64)
STDS = torch.tensor([[0.55, 0.3], [0.4, 0.4], [0.4, 0.4]], dtype=torch.float64)
SIGMAS = get_sigmas_karras(30, 0.02, 20.0).double()
SCALE = 4.0


def denoised(x: Tensor, t: Tensor, one: bool) -> Tensor:
    """E[x_0 | x] of the mixture, or of its first component."""
    variance = STDS**2 + t[:, None, None] ** 2
    from_centers = x[:, None] - CENTERS
    of_each = CENTERS + STDS**2 / variance * from_centers
    if one:
        return of_each[:, 0]
    log_density = -0.5 * (from_centers**2 / variance + variance.log()).sum(-1)
    return (log_density.softmax(1)[..., None] * of_each).sum(1)


def samples(rule: Guidance, count: int) -> Tensor:
    """Samples of the first component under a rule."""
    make = solvers.cfg_pp_table if isinstance(rule, CFGPlusPlus) else solvers.euler_table
    table = make(SIGMAS, prediction_type="sample")
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    conditions = {"model_kwargs": {"one": True}, "uncond_kwargs": {"one": False}}
    return sample(denoised, noise * SIGMAS[0], table, guidance=rule, **conditions)


def draw(axes: Axes, title: str, points: Tensor) -> None:
    """One panel: the data, pale, and the samples."""
    data = CENTERS[:, None] + STDS[:, None] * torch.randn(
        3, 400, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    axes.scatter(*data.reshape(-1, 2).T.tolist(), s=2, color=PALE, alpha=0.35, linewidths=0)
    axes.scatter(*points.T.tolist(), s=3, color=BLUE, alpha=0.6, linewidths=0)
    axes.set(xlim=(-3, 3), ylim=(-2.2, 3.6), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9, color=INK)
    for spine in axes.spines.values():
        spine.set_color(PALE)


def main() -> None:
    """Draws and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    options = parser.parse_args()
    rules = {
        "no guidance: CFG(1)": CFG(1.0),
        "CFG(4)": CFG(SCALE),
        "CFG(4, interval=(0.4, 0.8))": CFG(SCALE, interval=(0.4, 0.8)),
        "RescaledCFG(4, 0.7)": RescaledCFG(SCALE, 0.7),
        "APG(4, eta=0, norm_threshold=0.5)": APG(SCALE, norm_threshold=0.5),
        "CFGPlusPlus(0.9)": CFGPlusPlus(0.9),
    }
    figure, panels = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
    for axes, (title, rule) in zip(panels.flat, rules.items(), strict=True):
        draw(axes, title, samples(rule, 600))
    figure.savefig(options.out / "guidance.png", dpi=110)


if __name__ == "__main__":
    main()
