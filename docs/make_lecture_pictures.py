"""Draws the pictures of lecture.md.

    python docs/make_lecture_pictures.py [--out docs/assets]

KL of two Gaussians, the chain x_0 -> x_1 -> x_2, the VAE and the DDPM. The numbers in the first two
come from diffcore.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from torch import Tensor

import diffcore

INK, PALE, BLUE, RED, FILL = "#24292f", "#6e7781", "#0969da", "#cf222e", "#eaf2fd"
Point = tuple[float, float]


# ---- KL of two Gaussians --------------------------------------------------------------------


def log_density(x: Tensor, mean: float, std: float) -> Tensor:
    """Log density of N(mean, std^2)."""
    logvar = torch.full_like(x, 2 * math.log(std))
    return -diffcore.gaussian_nll(x, torch.full_like(x, mean), logvar)


def draw_kl(path: Path) -> None:
    """Two densities, and the integrands whose areas are the two divergences."""
    first, second = (0.5, 0.6), (0.0, 1.0)  # mean and standard deviation of p and q
    x = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    log_p, log_q = log_density(x, *first), log_density(x, *second)
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.1))
    axes[0].plot(x, log_p.exp(), color=BLUE, label=r"$p = \mathcal{N}(0.5,\ 0.6^2)$")
    axes[0].plot(x, log_q.exp(), color=RED, label=r"$q = \mathcal{N}(0,\ 1)$")
    axes[0].legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left")
    axes[0].set_title("densities", fontsize=11, loc="left", color=INK)
    axes[0].set_ylim(0, 0.95)
    for ax, a, b, (mean, std), (mean_, std_), name, color in (
        (axes[1], log_p, log_q, first, second, "p,q", BLUE),
        (axes[2], log_q, log_p, second, first, "q,p", RED),
    ):
        left, right = name.split(",")
        integrand = a.exp() * (a - b)
        ax.plot(x, integrand, color=color)
        ax.fill_between(x, integrand, color=color, alpha=0.15)
        ax.axhline(0, color=INK, linewidth=0.8)
        numbers = [
            torch.tensor([v], dtype=torch.float64)
            for v in (mean, 2 * math.log(std), mean_, 2 * math.log(std_))
        ]
        value = diffcore.normal_kl(*numbers).item()
        assert abs(torch.trapezoid(integrand, x).item() - value) < 1e-5  # the area is the KL
        title = rf"${left}\,\log({left}/{right})$: area = KL$({left}\,\|\,{right})$ = {value:.3f}"
        ax.set_title(title, fontsize=11, loc="left", color=INK)
    for ax in axes:
        _style(ax)
        ax.set_xlim(-3.5, 3.5)
        ax.set_xlabel("x", fontsize=10, color=INK)
    _save(figure, path)


# ---- the chain of two steps -----------------------------------------------------------------


def draw_chain(path: Path) -> None:
    """x_0 -> x_1 -> x_2 as a graphical model, and the density of each."""
    betas = torch.tensor([0.3, 0.5], dtype=torch.float64)
    schedule = diffcore.NoiseSchedule.from_betas(betas)
    means, std, weights = (-1.2, 1.0), 0.22, (0.6, 0.4)  # the data: two Gaussians
    figure = plt.figure(figsize=(10, 4.1))
    graph = figure.add_axes((0, 0.64, 1, 0.36))
    _canvas(graph, 10, 1.45)
    places = [(1.85, 0.62), (5.2, 0.62), (8.55, 0.62)]
    for k, place in enumerate(places):
        _node(graph, place, rf"$x_{k}$", shaded=k == 0)
    for k in (1, 2):
        text = rf"$q(x_{k}\,|\,x_{k - 1}) = \mathcal{{N}}(\sqrt{{1-\beta_{k}}}"
        text += rf"\,x_{k - 1},\ \beta_{k} I)$"
        _arrow(graph, places[k - 1], places[k], text, dy=0.27)
    x = torch.linspace(-3.4, 3.4, 400, dtype=torch.float64)
    factors = [(1.0, 0.0), *zip(schedule.alpha.tolist(), schedule.sigma.tolist(), strict=True)]
    for k, (alpha, sigma) in enumerate(factors):
        ax = figure.add_axes((0.045 + 0.335 * k, 0.13, 0.27, 0.47))
        width = math.sqrt((alpha * std) ** 2 + sigma**2)
        parts = [
            w * log_density(x, alpha * mean, width).exp()
            for w, mean in zip(weights, means, strict=True)
        ]
        density = torch.stack(parts).sum(0)
        ax.plot(x, density, color=BLUE)
        ax.fill_between(x, density, color=BLUE, alpha=0.15)
        limit = log_density(x, 0.0, 1.0).exp()
        ax.plot(x, limit, color=PALE, linestyle=(0, (4, 2)), linewidth=1.1)
        ax.set_ylim(0, 1.15)
        label = rf"$q(x_{k})$"
        if k:
            label += rf",   $\alpha_{k} = {alpha:.2f},\ \sigma_{k} = {sigma:.2f}$"
        ax.set_title(label, fontsize=11, loc="left", color=INK)
        if k == 0:
            ax.text(1.75, 0.19, r"$\mathcal{N}(0, 1)$", fontsize=9.5, color=PALE)
        _style(ax)
        ax.set_xlabel(rf"$x_{k}$", fontsize=10, color=INK)
    _save(figure, path)


# ---- the two models -------------------------------------------------------------------------


def draw_vae(path: Path) -> None:
    """Encoder, latent and decoder, with the two terms of the ELBO."""
    figure = plt.figure(figsize=(10, 3.6))
    ax = figure.add_axes((0, 0, 1, 1))
    _canvas(ax, 10, 3.6)
    row = 2.35
    _node(ax, (0.6, row), r"$x$", shaded=True)
    _box(ax, (2.15, row), 1.5, "encoder\n" + r"$q_\phi(z\,|\,x)$")
    _box(ax, (4.25, row), 1.2, "mean\nlogvar")
    _node(ax, (6.0, row), r"$z$")
    _box(ax, (7.6, row), 1.5, "decoder\n" + r"$p_\theta(x\,|\,z)$")
    _node(ax, (9.35, row), r"$\hat x$")
    for a, b in ((0.94, 1.4), (2.9, 3.65), (4.85, 5.66), (6.34, 6.85), (8.35, 9.01)):
        _line(ax, (a, row), (b, row))
    _node(ax, (6.0, 3.2), r"$\varepsilon$", radius=0.24)
    _line(ax, (6.0, 2.96), (6.0, row + 0.34))
    ax.text(6.4, 3.2, r"$z = \mathrm{mean} + e^{\mathrm{logvar}/2}\,\varepsilon$", **_TEXT)
    posterior = r"\mathcal{N}(\mathrm{mean}, e^{\mathrm{logvar}})"
    terms = (
        (4.25, rf"$-\mathrm{{KL}}(\,{posterior}\,\|\,\mathcal{{N}}(0, I)\,)$"),
        (7.7, r"$\log p_\theta(x\,|\,z) = -\frac{1}{2}\|x - \hat x\|^2 + \mathrm{const}$"),
    )
    for place, text in terms:
        _line(ax, (place, row - 0.42), (place, 1.3), color=RED)
        ax.text(place, 1.05, text, **{**_TEXT, "ha": "center", "color": RED})
    ax.text(5.97, 1.05, "$+$", **{**_TEXT, "ha": "center", "color": RED})
    expected = r"\mathbb{E}_{z \sim q_\phi}\,[\,\log p_\theta(x\,|\,z)\,]"
    text = rf"ELBO $= {expected} - \mathrm{{KL}}\ \leq\ \log p_\theta(x)$"
    ax.text(5.0, 0.4, text, **{**_TEXT, "ha": "center", "fontsize": 12})
    _save(figure, path)


def draw_ddpm(path: Path) -> None:
    """The forward chain q without parameters, and the reverse chain p_theta."""
    figure = plt.figure(figsize=(10, 3.0))
    ax = figure.add_axes((0, 0, 1, 1))
    _canvas(ax, 10, 3.0)
    row = 1.5
    names = (r"$x_0$", r"$\cdots$", r"$x_{t-1}$", r"$x_t$", r"$\cdots$", r"$x_T$")
    at = (0.7, 2.55, 4.4, 6.5, 8.0, 9.3)
    for text, x in zip(names, at, strict=True):
        if "cdots" in text:
            ax.text(x, row, text, **{**_TEXT, "ha": "center", "fontsize": 16})
        else:
            _node(ax, (x, row), text, shaded=text == r"$x_0$", radius=0.38)
    for k in range(len(at) - 1):
        for color, rad, (a, b) in (
            (BLUE, -0.35, (at[k], at[k + 1])),
            (RED, -0.35, (at[k + 1], at[k])),
        ):
            up = color == BLUE
            y = row + (0.3 if up else -0.3)
            shift = 0.22 if b > a else -0.22
            _line(ax, (a + shift, y), (b - shift, y), color=color, rad=rad)
    ax.text(5.45, 2.45, r"$q(x_t\,|\,x_{t-1})$", **{**_TEXT, "ha": "center", "color": BLUE})
    ax.text(5.45, 0.52, r"$p_\theta(x_{t-1}\,|\,x_t)$", **{**_TEXT, "ha": "center", "color": RED})
    marginal = r"$q(x_t\,|\,x_0) = \mathcal{N}(\alpha_t x_0,\ \sigma_t^2 I)$"
    forward = f"forward, fixed: add noise;  {marginal}"
    ax.text(0.3, 2.75, forward, **{**_TEXT, "color": BLUE})
    reverse = r"reverse, learned: remove noise;  start from $x_T \sim \mathcal{N}(0, I)$"
    ax.text(0.3, 0.2, reverse, **{**_TEXT, "color": RED})
    _save(figure, path)


# ---- parts ----------------------------------------------------------------------------------

_TEXT = {"fontsize": 11, "color": INK, "va": "center"}


def _canvas(ax: Axes, width: float, height: float) -> None:
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")


def _node(ax: Axes, place: Point, text: str, *, shaded: bool = False, radius: float = 0.34) -> None:
    fill = FILL if shaded else "white"
    ax.add_patch(Circle(place, radius, facecolor=fill, edgecolor=INK, linewidth=1.3, zorder=2))
    ax.text(*place, text, ha="center", va="center", fontsize=13, color=INK, zorder=3)


def _box(ax: Axes, place: Point, width: float, text: str) -> None:
    corner = place[0] - width / 2, place[1] - 0.38
    style = "round,pad=0,rounding_size=0.08"
    box = FancyBboxPatch(corner, width, 0.76, boxstyle=style, facecolor=FILL, edgecolor=INK)
    ax.add_patch(box)
    ax.text(*place, text, ha="center", va="center", fontsize=11, color=INK)


def _line(ax: Axes, start: Point, end: Point, *, color: str = INK, rad: float = 0.0) -> None:
    style = f"arc3,rad={rad}"
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=13, color=color, lw=1.3,
        connectionstyle=style, shrinkA=0, shrinkB=0,
    )  # fmt: skip
    ax.add_patch(arrow)


def _arrow(ax: Axes, start: Point, end: Point, text: str, dy: float) -> None:
    _line(ax, (start[0] + 0.36, start[1]), (end[0] - 0.36, end[1]))
    ax.text((start[0] + end[0]) / 2, start[1] + dy, text, **{**_TEXT, "ha": "center"})


def _style(ax: Axes) -> None:
    ax.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if ax.get_ylim()[0] == 0:
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    if figure.axes[0].get_position().width < 0.9:
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor="white")  # solid: also for dark pages
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    assets = Path(__file__).resolve().parent / "assets"
    parser.add_argument("--out", type=Path, default=assets, help="folder")
    out = parser.parse_args().out
    draw_kl(out / "lecture-kl.png")
    draw_chain(out / "lecture-chain.png")
    draw_vae(out / "lecture-vae.png")
    draw_ddpm(out / "lecture-ddpm.png")
