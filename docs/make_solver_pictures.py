"""Draws the pictures of solvers.md: solvers on one-dimensional data with a known exact flow.

    python docs/make_solver_pictures.py [--out docs/assets]

The data are a mixture of Gaussians, so the best denoiser has a closed form. In one dimension the
probability flow keeps every sample at its quantile, so the exact flow has one too.
``diffcore.sample`` computes everything in float64.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffcore import sample, solvers
from diffcore.sigmas import get_sigmas_exponential
from diffcore.solvers import SolverTable

INK, PALE = "#24292f", "#8b949e"
WEIGHTS, MEANS, STDS = (
    torch.tensor(x, dtype=torch.float64)
    for x in ((0.35, 0.4, 0.25), (-1.5, 0.2, 1.6), (0.25, 0.35, 0.25))
)
MULTISTEP = partial(solvers.dpmpp_table, lower_order_final=False)
UNIPC = partial(solvers.unipc_table, order=3, lower_order_final=False)
Make = Callable[..., SolverTable]
Callback = Callable[[dict[str, Any]], object]


# ---- the data -------------------------------------------------------------------------------


def std_of(sigma: float) -> Tensor:
    """Standard deviation of each component of the noisy mixture."""
    return (STDS**2 + sigma**2).sqrt()


def density(x: Tensor, sigma: float) -> Tensor:
    """Density of the noisy data."""
    std = std_of(sigma)
    z = (x[..., None] - MEANS) / std
    return (WEIGHTS * torch.exp(-(z**2) / 2) / std).sum(-1) / math.sqrt(2 * math.pi)


def denoised(x: Tensor, sigma: float) -> Tensor:
    """E[x_0 | x], the output of a perfect network."""
    std = std_of(sigma)
    z = (x[..., None] - MEANS) / std
    parts = torch.softmax(WEIGHTS.log() - std.log() - z**2 / 2, -1)
    return (parts * (MEANS + STDS**2 / std * z)).sum(-1)


def at_quantile(q: Tensor, sigma: float) -> Tensor:
    """The quantiles q of the noisy data, by bisection. The exact flow keeps q."""
    std = std_of(sigma)
    reach = 3 + 10 * float(std.max())
    low, high = torch.full_like(q, -reach), torch.full_like(q, reach)
    for _ in range(80):
        middle = (low + high) / 2
        z = (middle[..., None] - MEANS) / std
        below = (WEIGHTS * torch.special.ndtr(z)).sum(-1) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


# ---- the sampling loops, over geometric sigmas ----------------------------------------------

HIGH, LOW = 80.0, 0.05


def geometric(steps: int, high: float = HIGH) -> Tensor:
    """The sigmas of a loop with this number of steps."""
    return get_sigmas_exponential(steps + 1, LOW, high)[:-1]


def solve(
    make: Make, sigmas: Tensor, quantiles: Tensor, callback: Callback | None = None
) -> Tensor:
    """The end of the samples that start at these quantiles."""
    table = make(sigmas, prediction_type="sample")
    start = at_quantile(quantiles, float(sigmas[0]))
    return sample(lambda x, s: denoised(x, float(s[0])), start, table, callback=callback)


# ---- trajectories ----------------------------------------------------------------------------

CALLS, TRAJECTORY_HIGH = 8, 10.0
LOOPS: dict[str, tuple[Make, int]] = {  # and the number of steps that makes CALLS model calls
    "Euler (DDIM)": (solvers.euler_table, CALLS),
    "Heun": (solvers.heun_table, CALLS // 2),
    "LMS-4": (solvers.lms_table, CALLS),
    "DPM++ 2M": (solvers.dpmpp_2m_table, CALLS),
    "DPM++ 3M, exact": (partial(MULTISTEP, order=3, exact_third_order=True), CALLS),
    "UniPC-3": (UNIPC, CALLS),
}
STARTS = torch.linspace(0.04, 0.96, 9, dtype=torch.float64)
COLORS = plt.colormaps["viridis"](torch.linspace(0.05, 0.85, len(STARTS)).numpy())


def draw_trajectories(path: Path) -> None:
    """Six solvers, each against the exact flow, over the density of the noisy data.

    The picture shows x / sqrt(1 + sigma^2), which has about the same range at every sigma.
    """
    fine, y = geometric(120, TRAJECTORY_HIGH), torch.linspace(-2.9, 2.9, 140).double()
    size = (1 + fine**2).sqrt()
    shade = torch.stack([z * density(z * y, s) for z, s in zip(size, fine.tolist(), strict=True)])
    exact = torch.stack([at_quantile(STARTS, s) for s in fine.tolist()]) / size[:, None]
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.6), sharex=True, sharey=True)
    for ax, (name, (make, steps)) in zip(axes.flat, LOOPS.items(), strict=True):
        ax.pcolormesh(fine, y, shade.T.sqrt(), cmap="Greys", vmax=2.2, shading="nearest")
        ax.plot(fine, exact, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        sigmas = geometric(steps, TRAJECTORY_HIGH)
        states = [at_quantile(STARTS, float(sigmas[0]))]
        end = solve(make, sigmas, STARTS, lambda state, states=states: states.append(state["x"]))
        solved = torch.stack(states) / (1 + sigmas[:, None] ** 2).sqrt()
        for k, color in enumerate(COLORS):
            ax.plot(sigmas, solved[:, k], "o-", color=color, lw=1.3, markersize=2.8)
        error = float((end - at_quantile(STARTS, LOW)).square().mean().sqrt())
        ax.set_title(f"{name}: error {error:.2g}", fontsize=10, loc="left", color=INK)
        ax.set(xscale="log", xlim=(TRAJECTORY_HIGH, LOW), ylim=(-2.9, 2.9))
        ticks = [10, 1, 0.1]
        ax.set_xticks(ticks, [f"{s:g}" for s in ticks])
        ax.minorticks_off()
        _style(ax)
    for ax in axes[1]:
        ax.set_xlabel("sigma, from noise to data", fontsize=9, color=INK)
    for ax in axes[:, 0]:
        ax.set_ylabel("x / sqrt(1 + sigma²)", fontsize=9, color=INK)
    title = f"{CALLS} model calls each; dashed: the exact flow; shade: the density of noisy data"
    _finish(figure, title, path)


# ---- error against model calls -----------------------------------------------------------------

SIZES = (6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
CURVES: dict[str, tuple[Make, str, str]] = {
    "Euler (DDIM)": (solvers.euler_table, "#57606a", "o"),
    "Heun": (solvers.heun_table, "#9a6700", "s"),
    "DPM2": (solvers.dpm2_table, "#d4a72c", "D"),
    "DPM++ 2M": (solvers.dpmpp_2m_table, "#0969da", "o"),
    "DPM++ 3M": (partial(MULTISTEP, order=3), "#8250df", "^"),
    "DPM++ 3M, exact": (partial(MULTISTEP, order=3, exact_third_order=True), "#cf222e", "v"),
    "LMS-4": (solvers.lms_table, "#1a7f37", "s"),
    "UniPC-3": (UNIPC, "#bf3989", "D"),
}
QUANTILES = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)


def error(make: Make, calls: int) -> tuple[int, float]:
    """The number of model calls, and the root-mean-square distance from the exact flow."""
    each = len(make(geometric(2))) // 2
    end = solve(make, geometric(calls // each), QUANTILES)
    return calls // each * each, float((end - at_quantile(QUANTILES, LOW)).square().mean().sqrt())


def draw_convergence(path: Path) -> None:
    """Error against model calls, with the slopes of the orders."""
    figure, ax = plt.subplots(figsize=(8.6, 5.6))
    ends: list[tuple[float, str, str]] = []
    for name, (make, color, marker) in CURVES.items():
        points = [error(make, calls) for calls in SIZES]
        ax.loglog(*zip(*points, strict=True), marker=marker, color=color, markersize=4, lw=1.5)
        ends.append((points[-1][1], name, color))
        slope = math.log2(points[-3][1] / points[-1][1]) / math.log2(points[-1][0] / points[-3][0])
        print(f"{name:16} error {points[5][1]:.2e} at 32, {points[-1][1]:.2e}; slope {slope:.2f}")
    previous = math.inf
    for value, name, color in sorted(ends, reverse=True):
        place = min(value, previous / 2.2)  # labels do not overlap
        previous = place
        ax.text(SIZES[-1] * 1.09, place, name, color=color, va="center", fontsize=9)
    for order in (1, 2, 3, 4):
        n, y = (7, 20), (3e-5, 3e-5 * (7 / 20) ** order)
        ax.plot(n, y, color=PALE, linewidth=0.9, linestyle=":")
        ax.text(n[1] * 1.04, y[1], f"order {order}", color=PALE, fontsize=8, va="center")
    ax.set_xlim(SIZES[0] * 0.9, SIZES[-1] * 2.1)
    ticks = [8, 16, 32, 64, 128, 256, 512, 1024]
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.grid(color="#eaeef2", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel("model calls", fontsize=10, color=INK)
    ax.set_ylabel("error, root mean square", fontsize=10, color=INK)
    _style(ax)
    _finish(figure, f"Distance from the exact probability flow, sigma from {HIGH:g} to {LOW}", path)


def _style(ax: Axes) -> None:
    ax.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _finish(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=115)
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    assets = Path(__file__).resolve().parent / "assets"
    parser.add_argument("--out", type=Path, default=assets, help="folder")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # the tensors are tiny
    draw_trajectories(out / "solvers-trajectories.png")
    draw_convergence(out / "solvers-convergence.png")
