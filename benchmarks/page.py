"""The report: one HTML page with pictures, losses, every table and the raw results."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import report
from .compare import Comparison
from .contest import MODES
from .report import Row, Table
from .suite import times

INK, GRID = "#24292f", "#e4e8ec"
COLORS = {
    "diffcore": "#1f6feb",
    "eager": "#8c959f",
    "compile": "#bf8700",
    "diffusers": "#8250df",
    "copy": "#d1242f",
}
CYCLE = ("#1f6feb", "#d1242f", "#1a7f37", "#bf8700", "#8250df")
MARKERS = {"diffcore": "o", "eager": "s", "compile": "D", "diffusers": "^", "copy": "|"}
ROW, WIDTH = 0.235, 9.2  # inches

STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #24292f; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.35rem; margin-top: 2.5rem; border-bottom: 1px solid #d0d7de; }
h3 { font-size: 1.05rem; margin: 2rem 0 .3rem; } p { margin: .3rem 0 .8rem; max-width: 48rem; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #eaeef2; }
th { position: sticky; top: 0; background: #f6f8fa; } .left { text-align: left; }
.wide { overflow: auto; max-height: 40rem; } .note { color: #57606a; font-size: 13px; }
.slower { color: #cf222e; } summary { cursor: pointer; padding: .25rem 0; font-weight: 600; }
"""


# ---- pictures -------------------------------------------------------------------------------

Panel = dict[str, dict[str, float]]
"""By label, the value of each contestant."""


def svg(figure: Figure) -> str:
    """A figure as an SVG element, its text as text in the font of the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _style(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10.5, color=INK)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelsize=9, colors=INK)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def _plain_ticks(axis: Any, limits: tuple[float, float], room: float = 9) -> None:
    """Marks 1, 2, 5, 10 on a log axis, or fewer if there is no room for their labels."""
    low, high = limits
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for subs, skipped in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 4)):
        ticks = [s * 10.0**k for k in decades if k % skipped == 0 for s in subs]
        ticks = [x for x in ticks if low <= x <= high]
        if len(ticks) <= room:
            break
    axis.set_major_locator(mpl.ticker.FixedLocator(ticks))
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(mpl.ticker.NullLocator())


def dots(
    panels: Mapping[str, Panel],
    unit: str,
    *,
    log: bool = True,
    line: float | None = None,
    across: bool = False,
) -> str:
    """A line for each label with a mark for each contestant.

    Args:
        panels: By title.
        unit: Of the values.
        log: Whether the axis is logarithmic.
        line: A value to mark, if any.
        across: Panels beside each other, with the labels in common; else below each other.
    """
    common = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    labels = {title: common if across else list(panel) for title, panel in panels.items()}
    heights = [len(some) for some in labels.values()]
    n = len(panels)
    below = 1 if across else n
    height = ROW * sum(heights[:below]) + 0.75 * below + 0.3
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ratios = None if across else {"height_ratios": [h + 1.5 for h in heights]}
    grid = figure.subplots(
        *(below, n // below),
        squeeze=False,
        sharex=line is not None,
        sharey=across,
        gridspec_kw=ratios,
    )
    names: dict[str, Any] = {}
    for ax, (title, panel) in zip(list(grid.flat), panels.items(), strict=True):
        places = {label: y for y, label in enumerate(labels[title])}
        contestants = dict.fromkeys(name for values in panel.values() for name in values)
        for i, name in enumerate(contestants):
            known = [(v[name], places[label]) for label, v in panel.items() if v.get(name)]
            x, y = zip(*known, strict=True) if known else ((), ())
            color, mark = COLORS.get(name, CYCLE[i % len(CYCLE)]), MARKERS.get(name, "o")
            size, above = 90 if mark == "|" else 34, 4 if name == "diffcore" else 3
            names[name] = ax.scatter(x, y, size, color, marker=mark, zorder=above, alpha=0.9)
        if log:
            ax.set_xscale("log")
            _plain_ticks(ax.xaxis, ax.get_xlim(), 13 * below / n)
        else:
            ax.set_xlim(left=0)
        if line is not None:
            ax.axvline(line, color=INK, linewidth=1, linestyle="--", zorder=2)
        ax.set_yticks(range(len(places)), list(places))
        ax.set_ylim(len(places) - 0.4, -0.6)
        _style(ax, title)
        if across or title == list(panels)[-1]:
            ax.set_xlabel(unit, fontsize=9, color=INK)
    figure.legend(
        names.values(),
        list(names),
        loc="outside upper left",
        ncol=6,
        frameon=False,
        fontsize=9.5,
    )
    return svg(figure)


def _first(rows: Sequence[Row]) -> list[Row]:
    """Rows of the shape that was measured first."""
    return [r for r in rows if r["shape"] == rows[0]["shape"]]


def panels_of(
    rows: Sequence[Row],
    title: Callable[[Row], str],
    label: Callable[[Row], str],
    values: Callable[[Row], Mapping[str, float | None]],
) -> dict[str, Panel]:
    """What :func:`dots` draws.

    Args:
        rows: Of a section.
        title: Of the panel that a row is in.
        label: Of a row in it.
        values: By contestant; None for no mark.
    """
    found: dict[str, Panel] = {}
    for r in rows:
        panel = found.setdefault(title(r), {})
        known = {k: v for k, v in values(r).items() if v is not None}
        panel.setdefault(label(r), {}).update(known)
    return found


def _mode(r: Row) -> str:
    return str(r["mode"]).replace("+", " + ")


def _microseconds(r: Row) -> dict[str, float]:
    return {k: 1e6 * r["timings"][k]["median"] for k in COLORS if k in r["timings"]}


def roof(rows: Sequence[Row]) -> str:
    """The share of the copy's bandwidth, of every op and dtype."""
    panels = panels_of(
        _first(rows), _mode, lambda r: r["op"], lambda r: {r["dtype"]: r["percent_of_copy"]}
    )
    return dots(panels, f"% of a copy, {times(rows[0]['shape'])}", log=False, line=100, across=True)


def by_size(rows: Sequence[Row]) -> str:
    """How many times faster, by the number of elements, on two log axes."""
    names = list(dict.fromkeys(r["op"] for r in rows))
    against = [b for b in ("eager", "compile") if any(b in r["timings"] for r in rows)]
    ratios = {
        (r["op"], r["elements"], b): r["timings"][b]["median"] / r["timings"]["diffcore"]["median"]
        for r in rows
        for b in against
        if b in r["timings"]
    }
    low, high = min(0.8, 0.9 * min(ratios.values())), max(2.0, 1.1 * max(ratios.values()))
    sizes = sorted({n for _, n, _ in ratios})
    base = 4 if len(against) == 1 or sizes[-1] < 2**14 * sizes[0] else 16
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes = figure.subplots(1, len(against), squeeze=False, sharey=True).flat
    for ax, baseline in zip(axes, against, strict=True):
        for i, name in enumerate(names):
            x = [n for n in sizes if (name, n, baseline) in ratios]
            y = [ratios[name, n, baseline] for n in x]
            ax.plot(x, y, "o-", color=CYCLE[i % len(CYCLE)], markersize=5)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(mpl.ticker.LogLocator(base=base, numticks=12))
        ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(_elements))
        ax.set_ylim(low, high)
        _plain_ticks(ax.yaxis, (low, high))
        ax.axhspan(low, 1, color="#ffebe9", zorder=0)
        ax.axhline(1, color=INK, linewidth=1)
        ax.text(0.99, 0.02, "diffcore is slower", transform=ax.transAxes, ha="right", fontsize=9)
        _style(ax, f"times faster than {'torch.compile' if baseline == 'compile' else 'eager'}")
        ax.set_xlabel(f"elements of a tensor, {rows[0]['dtype']}", fontsize=9, color=INK)
    modes = {r["op"]: r["mode"].replace("forward", "").replace("+", ", ") for r in rows}
    figure.legend(
        figure.axes[0].lines[: len(names)],
        [name + modes[name] for name in names],
        loc="outside upper left",
        ncol=3,
        frameon=False,
        fontsize=9.5,
    )
    return svg(figure)


def _elements(n: float, _: object = None) -> str:
    """64 Ki for 65536."""
    for unit, scale in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if n >= scale:
            return f"{n / scale:g} {unit}"
    return f"{n:g}"


def accuracy(rows: Sequence[Row]) -> str:
    """Errors against float64, a panel for each dtype."""

    def name(r: Row) -> str:
        return str(r["op"]) + (" + backward" if r["mode"] != MODES[0] else "")

    panels = panels_of(_first(rows), lambda r: r["dtype"], name, lambda r: r["errors"])
    return dots(panels, "error, in epsilons of the dtype", across=True)


def steps(rows: Sequence[Row]) -> str:
    """The time of one reverse step, a panel for each shape."""
    panels = panels_of(
        rows,
        lambda r: times(r["shape"]),
        lambda r: f"{r['step']}, {r['dtype']}",
        _microseconds,
    )
    return dots(panels, "µs for one step")


def overhead(rows: Sequence[Row]) -> str:
    """The cost of a call on 64 elements."""
    panels = panels_of(rows, _mode, lambda r: r["op"], _microseconds)
    return dots(panels, "µs for a call", across=True)


PICTURES: dict[str, tuple[str, str, Callable[[Sequence[Row]], str]]] = {
    "ops": (
        "Share of the bandwidth of a copy",
        "A copy of as many bytes as the fused op has to move, timed in turns with it, is 100 %. "
        "It is the limit for large tensors; small ones, which caches hold, also pay for the call.",
        roof,
    ),
    "sizes": (
        "By size",
        "Each point is a ratio of medians timed in turns. Small tensors measure a call's cost.",
        by_size,
    ),
    "accuracy": (
        "How exact",
        "Distance from the same formula in float64, relative to the length of the result, in "
        "epsilons of the dtype: further left is better. Rounding an exact result gives about 0.2.",
        accuracy,
    ),
    "steps": (
        "What a step of a sampler costs",
        "One reverse step in the middle of 50, without the network: further left is faster.",
        steps,
    ),
    "overhead": (
        "What a call costs",
        "64 elements: the time is that of Python and of the launch. Further left is faster.",
        overhead,
    ),
}


# ---- the page -------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML; numbers to the right."""
    css = [' class="left"' if name in report.LEFT | {"verdict"} else "" for name in header]

    def line(tag: str, cells: Sequence[str]) -> str:
        texts = (f"<{tag}{c}>{escape(x)}</{tag}>" for c, x in zip(css, cells, strict=True))
        return f"<tr>{''.join(texts)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{line("th", header)}\n{body}</table></div>'


def facts(section: Mapping[str, Any]) -> str:
    """The machine, the versions, the command."""
    known = {**section["machine"], "measured": section["date"], "command": section["command"]}
    flat = {
        k.replace("_", " "): ", ".join(f"{a} {b}" for a, b in v.items())
        if isinstance(v, Mapping)
        else str(v)
        for k, v in known.items()
    }
    rows = "\n".join(
        f'<tr><td class="left">{escape(k)}</td><td class="left">{escape(v)}</td></tr>'
        for k, v in flat.items()
    )
    return f"<details><summary>Machine and versions</summary><table>{rows}</table></details>"


def _slower(found: Table) -> str:
    header, rows = found
    if not rows:
        return "<p>No row of this run.</p>"
    text = "Rows where a baseline is faster, the worst first; ± is how far the samples scatter."
    return f"<p>{text}</p>{table(header, rows)}"


def chapter(results: Mapping[str, Any], old: Comparison | None) -> str:
    """All of one device.

    Args:
        results: Sections by name.
        old: What it was compared with.
    """
    first = next(iter(results.values()))
    machine = first["machine"]
    parts = [f"<h2>{escape(machine['device'])}</h2>"]
    threads = f", threads: {machine['threads']}" if machine["device_type"] == "cpu" else ""
    parts.append(
        f"<p>torch {escape(machine['torch'])}, diffcore {escape(machine['diffcore'])} (commit "
        f"{escape(machine['commit'])}){threads}, {escape(first['date'])}: "
        f"<code>{escape(first['command'])}</code></p>{facts(first)}"
    )
    parts.append(f"<h3>Where diffcore is slower</h3>{_slower(report.losses(results))}")
    if old is not None:
        parts.append(f"<h3>Compared with earlier results</h3><p>{old.summary()}.</p>")
        header, rows = old.table()
        parts.append(table(header, rows) if rows else "")
    for name, (heading, text, draw) in PICTURES.items():
        rows = results.get(name, {}).get("rows")
        if rows:
            parts.append(f"<h3>{heading}</h3><p>{text}</p>{draw(rows)}")
    parts.append("<h3>All tables</h3>")
    for name, body in results.items():
        notes = [*body["notes"], *(f"refused: {x}" for x in body["refused"])]
        below = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
        if body["rows"]:
            below = table(*report.SECTIONS[name].table(body["rows"])) + below
        heading = escape(report.SECTIONS[name].heading)
        parts.append(f"<details><summary>{heading}</summary>{below}</details>")
    raw = base64.b64encode(json.dumps(results, default=str).encode()).decode()
    link = f'<a download="diffcore-bench.json" href="data:application/json;base64,{raw}">JSON</a>'
    return "\n".join([*parts, f"<p>The raw results: {link}.</p>"])


def write_page(
    devices: Sequence[Mapping[str, Any]], path: Path, old: Comparison | None = None
) -> None:
    """Writes the page.

    Args:
        devices: The results of each device.
        path: The file.
        old: What they were compared with.
    """
    body = "\n".join(chapter(results, old) for results in devices if results)
    body = re.sub(r"<dc:.*?</dc:\w+>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    title = "diffcore: measured against PyTorch and diffusers"
    head = f"""<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light"><title>{title}</title><style>{STYLE}</style>"""
    text = f"""<!doctype html>
<html lang="en"><head>{head}</head>
<body><h1>{title}</h1>
{body}</body></html>
"""
    path.write_text(text, encoding="utf-8")
