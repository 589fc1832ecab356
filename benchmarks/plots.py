"""Draws the results: the time of each op relative to eager PyTorch, with the roof marked.

    python -m benchmarks.plots [RESULT.json ...] [--out docs/assets]

For each kind of device ``bench-cpu.png`` or ``bench-cuda.png``, and ``bench-noise-cpu.png`` or
``bench-noise-cuda.png`` for noise that is drawn where it is used (on a CPU beside the time that one
core takes), from the newest results under ``benchmarks/results`` unless files are named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.contest import MODES
from benchmarks.machine import RESULTS, ROOT
from benchmarks.tables import newest

OURS, COMPILED, ROOF, INK = "#1f6feb", "#b8c0cc", "#d1242f", "#24292f"
BAR, RIGHT = 0.36, 1.25


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One picture: a panel for forward, one for forward and backward.

    Args:
        results: of one device; the first dtype and shape measured are drawn.
        path: the PNG.
    """
    section = results["ops"]
    first = section["rows"][0]
    rows = [
        r for r in section["rows"] if r["shape"] == first["shape"] and r["dtype"] == first["dtype"]
    ]
    panels = [[r for r in rows if r["mode"] == mode] for mode in MODES]
    height = 1.5 + 0.36 * max(map(len, panels))
    figure, axes = plt.subplots(1, 2, figsize=(11, height), sharex=True, sharey=True)
    for ax, mode, panel in zip(axes, MODES, panels, strict=True):
        _panel(ax, mode.replace("+", " + "), panel)
    _finish(figure, axes[0], f"Time relative to eager PyTorch (= 1): {_about(section)}", path)


def draw_noise(results: Mapping[str, Any], path: Path) -> None:
    """One picture of the ops that draw their noise, relative to eager; and of one core, if any.

    Args:
        results: of one device; the first dtype and shape measured are drawn.
        path: the PNG.
    """
    section = results["noise"]
    first = section["rows"][0]
    rows = [r for r in section["rows"] if r["dtype"] == first["dtype"]]
    ours = [
        {**r, "op": r["op"] + (" + backward" if r["mode"] != MODES[0] else "")}
        for r in rows
        if r["shape"] == first["shape"] and not r["where"]
    ]
    alone = [r for r in rows if r["where"].startswith("1 thread") and r["op"] == "q_sample"]
    count = 2 if alone else 1
    size = (5.5 * count, 1.7 + 0.36 * len(ours))
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False)
    _panel(axes[0, 0], "time relative to eager (= 1)", ours)
    if alone:
        _one_core(axes[0, 1], alone)
    _finish(figure, axes[0, 0], f"Noise drawn in the kernel: {_about(section)}", path)


def _one_core(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Nanoseconds an element of noising on one thread, for each instruction set."""
    times = [r["ns_per_element"] for r in rows]
    names = [f"x86-64-{r['where'].rpartition(' ')[2]}" for r in rows]
    # Eager does not know of the instruction sets: the best of its times stands for all.
    eager = min(t["eager"] for t in times)
    values, labels = [t["diffcore"] for t in times] + [eager], [*names, "eager"]
    places = range(len(values))
    ax.barh(places, values, BAR, color=[OURS] * len(times) + [INK])
    for y, value in zip(places, values, strict=True):
        ax.text(value + 0.01 * max(values), y, f"{value:.2f}", va="center", fontsize=8, color=INK)
    ax.set_xlim(0, 1.12 * max(values))
    _style(ax, labels, "q_sample on one core, nanoseconds an element")


def _about(section: Mapping[str, Any]) -> str:
    """What was measured where, for a title."""
    facts, first = section["machine"], section["rows"][0]
    threads = f", threads: {facts['threads']}" if facts["device_type"] == "cpu" else ""
    return f"{facts['device']}{threads}, {first['dtype']}, {report.times(first['shape'])}"


def _finish(figure: Figure, ax: Axes, title: str, path: Path) -> None:
    """Adds the legend of one panel and the title, and writes the file."""
    handles, labels = ax.get_legend_handles_labels()
    handles, labels = [*handles[1:], handles[0]], [*labels[1:], labels[0]]  # the roof comes last
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(ax: Axes, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(rows))
    times = [r["ns_per_element"] for r in rows]
    compiled = ["compile" in t for t in times]
    # The bar is in the middle where it is alone.
    ours = [p - BAR / 2 if c else p for p, c in zip(places, compiled, strict=True)]
    fused = [t["diffcore"] / t["eager"] for t in times]
    roof = [t["copy"] / t["eager"] for t in times]
    ax.barh(ours, fused, BAR, color=OURS, label="diffcore")
    if any(compiled):
        at = [p + BAR / 2 for p, c in zip(places, compiled, strict=True) if c]
        width = [t["compile"] / t["eager"] for t in times if "compile" in t]
        ax.barh(at, width, BAR, color=COMPILED, label="torch.compile")
        for y, w in zip(at, width, strict=True):
            if w > RIGHT:  # the bar goes on: say how far
                ax.text(RIGHT - 0.01, y, f"{w:.1f}", va="center", ha="right", fontsize=8, color=INK)
    label = "a copy of the same bytes (the roof)"
    ax.scatter(roof, places, s=230, marker="|", linewidths=2, color=ROOF, zorder=3, label=label)
    for y, r, end in zip(ours, rows, map(max, fused, roof), strict=True):
        right = min(end + 0.015, RIGHT - 0.07)
        ax.text(right, y, f"{r['times_eager']:.1f}×", va="center", fontsize=8, color=INK)
    ax.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    ax.set_xlim(0, RIGHT)
    _style(ax, [r["op"] for r in rows], title)


def _style(ax: Axes, labels: Sequence[str], title: str) -> None:
    ax.set_yticks(range(len(labels)), labels, fontsize=9)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_title(title, fontsize=10, loc="left", color=INK)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws every device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", nargs="*", type=Path, help="result files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets", help="folder")
    args = parser.parse_args(argv)
    for kind, results in newest(args.results or sorted(RESULTS.glob("*.json"))).items():
        pictures = {"ops": (draw, f"bench-{kind}"), "noise": (draw_noise, f"bench-noise-{kind}")}
        for section, (draws, name) in pictures.items():
            if results.get(section, {}).get("rows"):
                path = args.out / f"{name}.png"
                draws(results, path)
                print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
