"""Compare solvers with the same number of model calls, and plot their samples.

    python examples/compare_solvers.py solvers.png --calls 16

The data are eight Gaussians on a ring, so the best denoiser has a formula and needs no training.
All sampling loops start from the same noise. The deterministic solvers are compared with a loop of
500 steps from the same start.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from diffcore import PhiloxNoise, sample, solvers
from diffcore.sigmas import get_sigmas_karras

STD = 0.08
ANGLES = torch.arange(8) * (math.pi / 4)
CENTERS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)

SOLVERS = {  # with the number of model calls per step
    "DDPM": (solvers.ddpm_table, 1),
    "Euler": (solvers.euler_table, 1),
    "Heun": (solvers.heun_table, 2),
    "DPM++ 2M": (solvers.dpmpp_2m_table, 1),
    "UniPC": (solvers.unipc_table, 1),
}


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x] for x = x_0 + sigma noise."""
    variance = (STD**2 + sigma**2).unsqueeze(1)
    weights = torch.softmax(-(torch.cdist(x, CENTERS) ** 2) / (2 * variance), dim=1)
    center = weights @ CENTERS
    return center + STD**2 / variance * (x - center)


def main(calls: int, picture: Path | None = None, *, count: int = 1000) -> dict[str, float]:
    """Sample with each solver; return its average distance from the loop of 500 steps."""
    noise = PhiloxNoise(seed=0)  # the start, and one stream per step of DDPM
    start = 20.0 * noise.tensor((count, 2))

    def run(make: solvers.SolverTable, steps: int) -> Tensor:
        table = make(get_sigmas_karras(steps, 0.02, 20.0), prediction_type="sample")
        return sample(denoise, start, table, noise=noise, progress=None)

    truth = run(solvers.heun_table, 500)
    samples = {name: run(make, calls // each) for name, (make, each) in SOLVERS.items()}
    errors = {name: float((x - truth).norm(dim=1).mean()) for name, x in samples.items()}
    for name, error in errors.items():
        what = "adds noise" if name == "DDPM" else f"{error:.3f} from the loop of 500 steps"
        print(f"{name}: {what}")
    if picture is not None:
        draw({**samples, "500 steps": truth}, picture)
    return errors


def draw(samples: dict[str, Tensor], picture: Path) -> None:
    """Plot the samples of each solver side by side."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure, axes = plt.subplots(1, len(samples), figsize=(2.4 * len(samples), 2.7))
    for ax, (name, x) in zip(axes, samples.items(), strict=True):
        ax.scatter(*x.T, s=2, linewidths=0, c=torch.atan2(x[:, 1], x[:, 0]), cmap="hsv")
        ax.set(title=name, xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    print(f"saved {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--calls", type=int, default=16, help="of the model, for each solver")
    arguments = parser.parse_args()
    main(arguments.calls, arguments.picture)
