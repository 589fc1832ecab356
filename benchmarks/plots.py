"""Draws the pictures of the benchmarks.

    python -m benchmarks.plots [RESULT.json ...] [--out docs/assets]

- ``speed.png``, for the README: speedup over eager PyTorch and ``torch.compile``, CPU and GPU.
- ``bench-cpu.png``, ``bench-cuda.png``: time of every op relative to eager PyTorch, with the time
  of a copy of the same bytes.
- ``bench-noise-cpu.png``, ``bench-noise-cuda.png``: the same with noise that each contestant
  generates; on a CPU also the time of one core.

Without file names it reads the newest results of each kind of device under ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .contest import MODES
from .machine import RESULTS, ROOT
from .suite import times
from .tables import SHORT, SHORT_NOISE, newest

OURS, COMPILED, ROOF, INK = "#1f6feb", "#b8c0cc", "#d1242f", "#24292f"
FASTER, SLOWER = ("#1f6feb", "#9a6ee0"), "#d1242f"  # over eager, over torch.compile; and a loss
BAR, RIGHT = 0.36, 1.25
END_TO_END = "training step, U-Net"


# ---- the picture of the README --------------------------------------------------------------


def draw_speed(devices: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Speedup over eager PyTorch and over torch.compile; a bar to the left of 1 is a loss.

    Args:
        devices: Results by kind of device.
        path: The PNG.
    """
    kinds = [kind for kind in ("cpu", "cuda") if kind in devices]
    panels = {kind: speedups(devices[kind]) for kind in kinds}
    labels = list(dict.fromkeys(label for kind in kinds for label in panels[kind]))
    labels.sort(key=lambda label: label == END_TO_END)  # the complete step comes last
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(2.6 + 3.5 * len(kinds), 2.3 + 0.38 * len(labels)), squeeze=False
    )
    for ax, kind in zip(axes[0], kinds, strict=True):
        _speed_panel(ax, labels if kind == kinds[0] else [""] * len(labels), labels, panels[kind])
        section = devices[kind]["ops"]
        facts, first = section["machine"], section["rows"][0]
        threads = f", {facts['threads']} threads" if kind == "cpu" else ""
        ax.set_title(
            f"{facts['device']}{threads}\n{first['dtype']}, {times(first['shape'])}",
            fontsize=10.5,
            loc="left",
            color=INK,
        )
        names = [name for name in ("ops", "noise", "training") if devices[kind].get(name)]
        text = f"torch {facts['torch']}, diffcore {facts['diffcore']}, {section['date'][:10]}\n"
        text += f"diffcore bench {' '.join(names)}"
        ax.text(-0.04, -0.075, text, transform=ax.transAxes, fontsize=8.3, color=INK, va="top")
    figure.legend(
        [Patch(color=c) for c in (*FASTER, SLOWER)],
        ["than eager PyTorch", "than torch.compile", "diffcore is slower"],
        loc="upper left",
        bbox_to_anchor=(0.0, 0.955),
        ncol=3,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
    )
    title = "How many times faster diffcore is (log scale)"
    figure.suptitle(title, x=0.012, y=0.98, ha="left", fontsize=13, color=INK)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    _save(figure, path, dpi=105)


def speedups(results: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Speedup over eager and over torch.compile of the rows in the short tables, by label.

    The last row is a complete training step, where the network takes nearly all of the time.
    """
    found = {}
    for name, chosen in (("ops", SHORT), ("noise", SHORT_NOISE)):
        rows = results.get(name, {}).get("rows", [])
        for op, mode in chosen:
            label = op + (" + backward" if mode != MODES[0] else "")
            label += ", noise generated" if name == "noise" else ""
            for r in rows:
                same = all(r.get(k) == rows[0].get(k) for k in ("shape", "dtype", "where"))
                if same and (r["op"], r["mode"]) == (op, mode):
                    found[label] = r["times_eager"], r["times_compile"]
    for r in results.get("training", {}).get("rows", []):
        if r["what"].startswith(END_TO_END):
            t = r["timings"]
            found[END_TO_END] = t["eager"]["median"] / t["diffcore"]["median"], None
    return found


def _speed_panel(
    ax: Axes,
    shown: Sequence[str],
    labels: Sequence[str],
    rows: Mapping[str, tuple[float | None, float | None]],
) -> None:
    for place, label in enumerate(labels):
        if label not in rows:
            ax.text(1.06, place, "not run yet", va="center", fontsize=9, color=INK, style="italic")
            continue
        ratios = rows[label]
        for ratio, color, side in zip(ratios, FASTER, (-0.5, 0.5), strict=True):
            if ratio is None:
                continue
            y = place + side * BAR * (None not in ratios)  # centered if it is the only bar
            text = f"{ratio:.1f}×" if ratio >= 1.95 else f"{ratio:.2f}×"
            color = SLOWER if text < "1" else color
            ink = SLOWER if text < "1" else INK
            ax.barh(y, ratio - 1, BAR, left=1, color=color)
            ax.text(max(ratio, 1) * 1.05, y, text, va="center", fontsize=9, color=ink)
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_xscale("log")
    ax.set_xlim(0.8, 85)
    ticks = (1, 2, 5, 10, 20, 50)
    ax.set_xticks(ticks, [f"{x}×" for x in ticks])
    ax.minorticks_off()
    ax.grid(axis="x", color="#eaeef2", linewidth=0.8)
    ax.set_axisbelow(True)
    _style(ax, shown, "")


# ---- the pictures of the benchmarks page ----------------------------------------------------


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One picture: a panel for forward, one for forward and backward.

    Args:
        results: Of one device; the picture shows the first dtype and shape measured.
        path: The PNG.
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
    """The ops that generate their noise, relative to eager; and one core, if measured.

    Args:
        results: Of one device; the picture shows the first dtype and shape measured.
        path: The PNG.
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
    _finish(figure, axes[0, 0], f"Noise generated in the kernel: {_about(section)}", path)


def _one_core(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Nanoseconds per element of q_sample on one thread, for each instruction set."""
    times = [r["ns_per_element"] for r in rows]
    names = [f"x86-64-{r['where'].rpartition(' ')[2]}" for r in rows]
    # Eager PyTorch does not depend on the choice of instruction set: show its best time.
    eager = min(t["eager"] for t in times)
    values, labels = [t["diffcore"] for t in times] + [eager], [*names, "eager"]
    places = range(len(values))
    ax.barh(places, values, BAR, color=[OURS] * len(times) + [INK])
    for y, value in zip(places, values, strict=True):
        ax.text(value + 0.01 * max(values), y, f"{value:.2f}", va="center", fontsize=8, color=INK)
    ax.set_xlim(0, 1.12 * max(values))
    _style(ax, labels, "q_sample on one core, nanoseconds per element")


def _about(section: Mapping[str, Any]) -> str:
    """Device, dtype and shape, for a title."""
    facts, first = section["machine"], section["rows"][0]
    threads = f", {facts['threads']} threads" if facts["device_type"] == "cpu" else ""
    return f"{facts['device']}{threads}, {first['dtype']}, {times(first['shape'])}"


def _finish(figure: Figure, ax: Axes, title: str, path: Path) -> None:
    """Adds the legend of one panel and the title, and writes the file."""
    handles, labels = ax.get_legend_handles_labels()
    handles, labels = [*handles[1:], handles[0]], [*labels[1:], labels[0]]  # the roof comes last
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    _save(figure, path, dpi=110)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A solid background: the pictures are also shown on dark pages.
    figure.savefig(path, dpi=dpi, facecolor="white")
    plt.close(figure)


def _panel(ax: Axes, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(rows))
    times = [r["ns_per_element"] for r in rows]
    compiled = ["compile" in t for t in times]
    # A bar without a neighbor is centered.
    ours = [p - BAR / 2 if c else p for p, c in zip(places, compiled, strict=True)]
    fused = [t["diffcore"] / t["eager"] for t in times]
    roof = [t["copy"] / t["eager"] for t in times]
    ax.barh(ours, fused, BAR, color=OURS, label="diffcore")
    if any(compiled):
        at = [p + BAR / 2 for p, c in zip(places, compiled, strict=True) if c]
        width = [t["compile"] / t["eager"] for t in times if "compile" in t]
        ax.barh(at, width, BAR, color=COMPILED, label="torch.compile")
        for y, w in zip(at, width, strict=True):
            if w > RIGHT:  # the bar is cut: label its length
                ax.text(RIGHT - 0.01, y, f"{w:.1f}", va="center", ha="right", fontsize=8, color=INK)
    label = "a copy of the same bytes"
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
    devices = newest(args.results or sorted(RESULTS.glob("*.json")))
    if devices:
        draw_speed(devices, args.out / "speed.png")
        print(args.out / "speed.png")
    for kind, results in devices.items():
        pictures = {"ops": (draw, f"bench-{kind}"), "noise": (draw_noise, f"bench-noise-{kind}")}
        for section, (draws, name) in pictures.items():
            if results.get(section, {}).get("rows"):
                path = args.out / f"{name}.png"
                draws(results, path)
                print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
