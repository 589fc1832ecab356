"""Draws the results: the time of each op relative to eager PyTorch, with the roof marked.

    python -m benchmarks.plots [RESULT.json ...] [--out docs/assets]

One picture for each kind of device, ``bench-cpu.png`` and ``bench-cuda.png``, from the newest
results under ``benchmarks/results`` unless files are named.
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
        _panel(ax, mode, panel)
    handles, labels = axes[0].get_legend_handles_labels()
    handles, labels = [*handles[1:], handles[0]], [*labels[1:], labels[0]]  # the roof comes last
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    facts = section["machine"]
    what = f"{first['dtype']}, {report.times(first['shape'])}"
    threads = f", threads: {facts['threads']}" if facts["device_type"] == "cpu" else ""
    figure.suptitle(
        f"Time relative to eager PyTorch (= 1): {facts['device']}{threads}, {what}",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(ax: Axes, mode: str, rows: Sequence[Mapping[str, Any]]) -> None:
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
    label = "a copy of the same bytes (the roof)"
    ax.scatter(roof, places, s=230, marker="|", linewidths=2, color=ROOF, zorder=3, label=label)
    for y, r, end in zip(ours, rows, map(max, fused, roof), strict=True):
        right = min(end + 0.015, RIGHT - 0.07)
        ax.text(right, y, f"{r['times_eager']:.1f}×", va="center", fontsize=8, color=INK)
    ax.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    ax.set_yticks(places, [r["op"] for r in rows], fontsize=9)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, RIGHT)
    ax.set_title(mode.replace("+", " + "), fontsize=10, loc="left", color=INK)
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
        path = args.out / f"bench-{kind}.png"
        draw(results, path)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
