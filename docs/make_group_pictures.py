"""Draws the picture of how-to/video-and-tokens.md: a schedule of frames, and what it samples.

    python docs/make_group_pictures.py [--out docs/assets]

The frames are a Gaussian process, whose prediction is exact at any levels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from diffcore import PhiloxNoise, sample, solvers
from diffcore.sampling import pyramid_schedule
from diffcore.sigmas import get_sigmas_flow

INK, PALE, BLUE = "#24292f", "#8b949e", "#0969da"
FRAMES, STEPS, DELAY = 6, 20, 5
COVARIANCE = 0.8 ** (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs().double()


def model(x: Tensor, level: Tensor) -> Tensor:
    """E[noise - x_0 | x], each frame at its own level."""
    level = level[0]
    data, noise = torch.diag(1 - level), torch.diag(level)
    spread = data @ COVARIANCE @ data + noise @ noise
    return x @ torch.linalg.solve(spread, (noise - COVARIANCE @ data).mT)


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    out: Path = parser.parse_args().out

    levels = solvers.NoiseLevels.from_flow(get_sigmas_flow(STEPS).double())
    table = solvers.euler_table(levels, prediction_type="flow_prediction")
    schedule = pyramid_schedule(STEPS, FRAMES, DELAY)
    start = PhiloxNoise(0).tensor((4000, FRAMES), dtype=torch.float64)
    before: list[Tensor] = []

    def called(x: Tensor, t: Tensor) -> Tensor:
        level = t.double() / table.timesteps[0]
        before.append(level[0])
        return model(x, level)

    x = sample(called, start, table, schedule=schedule, group_dim=1)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 2.7), width_ratios=(1.5, 1, 1))
    image = left.imshow(torch.stack(before).T, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    left.set(xlabel="model call", ylabel="frame", yticks=range(FRAMES))
    left.set_title("noise level before the call", fontsize=9, color=INK)
    figure.colorbar(image, ax=left)
    middle.plot(x[:40].T, color=BLUE, alpha=0.35, linewidth=0.8)
    middle.set(xlabel="frame", xticks=range(FRAMES))
    middle.set_title("40 samples", fontsize=9, color=INK)
    correlation = torch.corrcoef(x.T)[0]
    right.plot(COVARIANCE[0], color=PALE, linewidth=4, label="data")
    right.plot(correlation, "o", color=BLUE, markersize=4, label="4000 samples")
    right.set(xlabel="frame", xticks=range(FRAMES), ylim=(0, 1.05))
    right.set_title("correlation with frame 0", fontsize=9, color=INK)
    right.legend(fontsize=8, frameon=False)
    for axes in (middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "groups.png", dpi=130)


if __name__ == "__main__":
    main()
