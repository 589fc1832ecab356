"""The pictures of a demo run: mosaics of images, and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffcore.likelihood import BitsPerDim

_DPI = 150
_COLORS = ("#1f5fa8", "#c8501e", "#2f7d4f")


def mosaic(images: Tensor) -> np.ndarray:
    """Lay out images in rows and columns with white gaps.

    Args:
        images: ``[rows, columns, H, W]``, pixels in [-1, 1]; values outside are clipped.

    Returns:
        Gray picture, float32 in [0, 1].

    Raises:
        ValueError: If ``images`` is not 4-D.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [rows, columns, H, W], got {tuple(images.shape)}")
    rows, columns, height, width = images.shape
    gap = _gap(width)
    canvas = torch.ones(rows, height + gap, columns, width + gap)
    gray = images.detach().float().cpu().clamp(-1, 1).add(1).mul(0.5)
    canvas[:, :height, :, :width] = gray.transpose(1, 2)
    canvas = canvas.reshape(rows * (height + gap), columns * (width + gap))
    return canvas[:-gap, :-gap].numpy()


def _gap(width: int) -> int:
    return max(1, width // 14)


def save_mosaic(
    path: Path,
    images: Tensor,
    *,
    title: str,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    caption: str = "",
) -> None:
    """Save images in rows and columns as a PNG.

    Args:
        path: File to write.
        images: ``[rows, columns, H, W]``, pixels in [-1, 1].
        title: Title above the picture.
        column_labels: Label above each column, or none.
        row_labels: Label to the left of each row, or none.
        caption: Text below the picture.
    """
    rows, columns, height, width = images.shape
    cell, gap = 0.75, _gap(width)
    left, right = (1.15 if row_labels else 0.15), 0.15
    top, bottom = (0.7 if column_labels else 0.45), (0.35 if caption else 0.12)
    figure_width = max(left + columns * cell + right, 4.6)
    figure_height = top + rows * cell + bottom
    figure = Figure(figsize=(figure_width, figure_height), dpi=_DPI)
    spare = (figure_width - left - columns * cell - right) / 2
    axes = figure.add_axes(
        (
            (left + spare) / figure_width,
            bottom / figure_height,
            columns * cell / figure_width,
            rows * cell / figure_height,
        )
    )
    axes.imshow(mosaic(images), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, top=False, labeltop=bool(column_labels))
    axes.tick_params(labelbottom=False, labelleft=bool(row_labels))
    if column_labels:
        axes.set_xticks(
            [i * (width + gap) + (width - 1) / 2 for i in range(columns)], column_labels
        )
    if row_labels:
        axes.set_yticks([i * (height + gap) + (height - 1) / 2 for i in range(rows)], row_labels)
    figure.text(0.5, 1 - 0.22 / figure_height, title, ha="center", va="center", fontsize=10)
    if caption:
        figure.text(
            0.5, 0.16 / figure_height, caption, ha="center", va="center", fontsize=7.5, color="0.35"
        )
    figure.savefig(path, facecolor="white")


@dataclass(frozen=True)
class Curves:
    """One panel of training curves.

    Attributes:
        title: Title above the panel.
        ylabel: Quantity and unit.
        lines: Values per step, by name.
        levels: Horizontal lines, by name, such as a held-out value.
        log: Whether the vertical axis is logarithmic.
    """

    title: str
    ylabel: str
    lines: Mapping[str, Tensor]
    levels: Mapping[str, float]
    log: bool = False


def running_mean(values: Tensor, window: int) -> Tensor:
    """Average each value with those before it, over at most ``window`` values.

    Args:
        values: ``[N]``.
        window: Number of values in an average.

    Returns:
        ``[N]`` float64.
    """
    total = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    last = torch.arange(1, len(values) + 1)
    first = (last - window).clamp(min=0)
    return (total[last] - total[first]) / (last - first)


def _plain_number(value: float, _position: int | None) -> str:
    # The minor ticks between 5 and 10 would run into each other.
    return f"{value:g}" if f"{value:e}"[0] in "1235" else ""


def save_curves(path: Path, panels: Sequence[Curves]) -> None:
    """Save training curves side by side: each step pale, their running mean strong.

    Args:
        path: File to write.
        panels: What to draw.
    """
    figure = Figure(figsize=(5.2 * len(panels), 3.6), dpi=_DPI, layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for color, (name, values) in zip(_COLORS, panel.lines.items(), strict=False):
            values = values.detach().float().cpu()
            window = max(1, len(values) // 50)
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values.numpy(), color=color, alpha=0.22, linewidth=0.6)
            mean = running_mean(values, window).numpy()
            label = f"{name}, mean of {window} steps" if window > 1 else name
            axes.plot(steps, mean, color=color, linewidth=1.6, label=label)
        for style, (name, level) in zip(("--", ":", "-."), panel.levels.items(), strict=False):
            label = f"{name}: {level:.3g}"
            axes.axhline(level, color="0.25", linestyle=style, linewidth=1, label=label)
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_plain_number)
            axes.yaxis.set_minor_formatter(_plain_number)
        axes.set(title=panel.title, xlabel="optimizer step", ylabel=panel.ylabel)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white")


def save_terms(path: Path, bits: BitsPerDim) -> None:
    """Save the terms of the bound of images given their class, on a logarithmic axis.

    Args:
        path: File to write.
        bits: Measured at every timestep, with the class.
    """
    figure = Figure(figsize=(6.8, 3.8), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    terms = bits.terms.numpy()
    rest = float(terms[1:].sum())
    label = f"L_t, t > 0: sum {rest:.3f}"
    axes.plot(np.arange(1, len(terms)), terms[1:], color=_COLORS[0], linewidth=1.6, label=label)
    label = f"L_0 (decoder): {terms[0]:.3f}"
    axes.plot([0], terms[:1], "o", color=_COLORS[1], markersize=6, clip_on=False, label=label)
    label = f"L_T (prior): {bits.prior:.2g}"
    axes.axhline(bits.prior, color="0.25", linestyle="--", linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_xlim(0, max(1, len(terms) - 1))
    axes.set(
        title=f"Variational bound, {bits.samples} held-out images: "
        f"{bits.total:.3f} ± {bits.standard_error:.3f} bits/dim",
        xlabel="timestep t",
        ylabel="term of the bound, given the class (bits/dim)",
    )
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white")
