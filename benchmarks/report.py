"""Results as JSON, and as tables for the terminal and for Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .suite import times

Row = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]
SCHEMA = 1
LEFT = {"op", "mode", "dtype", "shape", "where", "what", "contestant", "step", "scheduler"}
LEFT |= {"section", "row", "against"}
"""Columns of text."""


# ---- JSON -----------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: The file has another schema version.
    """
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if results.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} must have schema {SCHEMA}, got {results.get('schema')}; remove it"
        )
    return results


def save(results: Mapping[str, Any], path: Path) -> None:
    """Writes a result file, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, section in results.items():
        if not isinstance(section, Mapping):
            parts.append(f"{json.dumps(name)}: {json.dumps(section)}")
            continue
        rows = ",\n".join(f"    {json.dumps(_short(row))}" for row in section["rows"])
        facts = {k: v for k, v in section.items() if k != "rows"}
        lines = [f"  {json.dumps(k)}: {json.dumps(_short(v))}" for k, v in facts.items()]
        lines.append(f'  "rows": [\n{rows}\n  ]')
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _short(value: Any) -> Any:
    """Rounds floats to five digits, and maps infinities, which JSON lacks, to None."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value]
    return value


# ---- tables ---------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """A time with three digits and its unit."""
    if seconds is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:{form}}{unit}"


def spread(timing: Row) -> float:
    """Half of what lies between the 20th and the 80th percentile, over the median."""
    half: float = (timing["p80"] - timing["p20"]) / 2 / timing["median"]
    return half


def spread_text(timing: Row) -> str:
    """The spread, in percent."""
    return f"{100 * spread(timing):.0f} %"


def ops_table(rows: Sequence[Row]) -> Table:
    """Every op: its time; nanoseconds an element, also of the others; bandwidth and ratios."""
    header = ["op", "mode", "dtype", "shape", "time", "±", "ns/element", "out=", "eager"]
    header += ["compile", "copy", "GB/s", "% of copy", "× eager", "× compile"]
    return header, [
        [
            r["op"],
            r["mode"],
            r["dtype"],
            times(r["shape"]),
            duration(r["timings"]["diffcore"]["median"]),
            spread_text(r["timings"]["diffcore"]),
            *(
                number(r["ns_per_element"].get(k), ".3g")
                for k in ("diffcore", "out=", "eager", "compile", "copy")
            ),
            number(r["gb_per_s"], ".3g"),
            number(r["percent_of_copy"], ".0f"),
            number(r["times_eager"], unit="×"),
            number(r["times_compile"], unit="×"),
        ]
        for r in rows
    ]


def noise_table(rows: Sequence[Row]) -> Table:
    """As for the ops, with a column for what is special: the layout, or one core only."""
    header, body = ops_table(rows)
    header.insert(4, "where")
    for cells, r in zip(body, rows, strict=True):
        cells.insert(4, r["where"])
    return header, body


def overhead_table(rows: Sequence[Row]) -> Table:
    """What a call costs the host."""
    return ["op", "mode", "diffcore", "±", "eager", "× eager"], [
        [
            r["op"],
            r["mode"],
            duration(r["timings"]["diffcore"]["median"]),
            spread_text(r["timings"]["diffcore"]),
            duration(r["timings"]["eager"]["median"]),
            number(r["times_eager"], unit="×"),
        ]
        for r in rows
    ]


def memory_table(rows: Sequence[Row]) -> Table:
    """Peak bytes beyond the inputs."""
    return ["op", "mode", "dtype", "shape", "inputs", "diffcore", "eager", "less by"], [
        [
            r["op"],
            r["mode"],
            r["dtype"],
            times(r["shape"]),
            _mib(r["input_bytes"]),
            *(_mib(r["peak_bytes"][k]) for k in ("diffcore", "eager")),
            number(r["peak_bytes"]["eager"] / max(r["peak_bytes"]["diffcore"], 1), ".1f", "×"),
        ]
        for r in rows
    ]


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.3g} MiB"


def whole_table(rows: Sequence[Row]) -> Table:
    """Complete pieces of work, one contestant a row; eager is 1."""
    others = [k for k in ("eager", "diffusers") if any(k in r["timings"] for r in rows)]
    header = ["what", "contestant", "time", "p20 – p80", *(f"× {k}" for k in others), "peak memory"]
    body = []
    for r in rows:
        for name, t in r["timings"].items():
            spread = f"{duration(t['p20'])} – {duration(t['p80'])}"
            against = [r["timings"].get(k) for k in others]
            ratios = [number(o and o["median"] / t["median"], unit="×") for o in against]
            peak = r.get("peak_bytes", {}).get(name)
            cells = [duration(t["median"]), spread, *ratios]
            body.append([r["what"], name, *cells, "–" if peak is None else _mib(peak)])
    if all(cells[-1] == "–" for cells in body):
        return header[:-1], [cells[:-1] for cells in body]
    return header, body


def steps_table(rows: Sequence[Row]) -> Table:
    """One reverse step a row."""
    times_of = ("diffcore", "reverse_step", "diffusers", "eager", "compile", "copy")
    used = [k for k in times_of if any(k in r["timings"] for r in rows)]
    header = ["step", "dtype", "shape", *used, "±", "% of copy", "× eager", "× compile"]
    return [*header, "× diffusers"], [
        [
            r["step"],
            r["dtype"],
            times(r["shape"]),
            *(duration(r["timings"].get(k, {}).get("median")) for k in used),
            spread_text(r["timings"]["diffcore"]),
            number(r["percent_of_copy"], ".0f"),
            number(r["times_eager"], unit="×"),
            number(r["times_compile"], unit="×"),
            number(r["times_diffusers"], ".1f", "×"),
        ]
        for r in rows
    ]


def call_table(rows: Sequence[Row]) -> Table:
    """The parts of a call."""
    return ["what", "median"], [[r["what"], duration(r["median"])] for r in rows]


def schedulers_table(rows: Sequence[Row]) -> Table:
    """One scheduler of diffusers a row, the time of a step."""
    names = ("stock", "fused", "philox")
    header = ["scheduler", "dtype", "shape", *names, "±", "× stock", "× stock, philox"]
    return header, [
        [
            r["what"],
            r["dtype"],
            times(r["shape"]),
            *(duration(r["timings"].get(k, {}).get("median")) for k in names),
            spread_text(r["timings"]["fused"]),
            *(number(r["times_stock"].get(k), ".1f", "×") for k in names[1:]),
        ]
        for r in rows
    ]


def scheduler_errors_table(rows: Sequence[Row]) -> Table:
    """One scheduler of diffusers a row, the errors of a step in 16 bits."""
    dtypes = ("bf16", "f16")
    header = ["scheduler", *(f"{d}, {k}" for d in dtypes for k in ("stock", "fused", "ratio"))]
    return header, [
        [
            r["what"],
            *(
                cell
                for d in dtypes
                for cell in (
                    f"{r[d]['stock']:.1e}",
                    f"{r[d]['fused']:.1e}",
                    number(r[d]["stock"] / r[d]["fused"], ".1f", "×"),
                )
            ),
        ]
        for r in rows
    ]


def pipelines_table(rows: Sequence[Row]) -> Table:
    """One pipeline of diffusers a row, the time of a whole run."""
    names = ("stock", "fused")
    header = ["pipeline", "scheduler", "steps", *names, "±", "× stock"]
    header += [f"share of the scheduler, {name}" for name in names]
    return header, [
        [
            r["pipeline"],
            r["scheduler"],
            str(r["steps"]),
            *(duration(r["timings"][name]["median"]) for name in names),
            spread_text(r["timings"]["fused"]),
            number(r["times_stock"], ".2f", "×"),
            *(f"{100 * r['shares'][name]:.1f} %" for name in names),
        ]
        for r in rows
    ]


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Errors against float64, in units of epsilon."""
    names = [n for n in ("diffcore", "eager", "compile") if any(n in r["errors"] for r in rows)]
    header = ["op", "mode", "dtype", "shape", *names, "eager / diffcore", "of the bound"]
    return header, [
        [
            r["op"],
            r["mode"],
            r["dtype"],
            times(r["shape"]),
            *(number(r["errors"].get(n), ".3g") for n in names),
            number(_over(r["errors"]["eager"], r["errors"]["diffcore"]), ".2f", "×"),
            number(r["error_over_bound"]),
        ]
        for r in rows
    ]


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


class Section(NamedTuple):
    """How a section of the results is shown."""

    heading: str
    table: Callable[[Sequence[Row]], Table]


_PER_ELEMENT = "nanoseconds per element"
SECTIONS = {
    "ops": Section(f"All ops, {_PER_ELEMENT}", ops_table),
    "sizes": Section(f"A few ops by size, {_PER_ELEMENT}", ops_table),
    "noise": Section(f"Noise generated by each contestant, {_PER_ELEMENT}", noise_table),
    "one_core": Section(f"Noise on one core, {_PER_ELEMENT}", noise_table),
    "threshold": Section(f"Dynamic threshold, {_PER_ELEMENT}", ops_table),
    "call": Section("Where the time of a small call goes, on the host", call_table),
    "guidance": Section(f"Guided step of DPM-Solver++ (2M), {_PER_ELEMENT}", ops_table),
    "groups": Section(f"A level for each frame, {_PER_ELEMENT}", ops_table),
    "masks": Section(f"Known parts and masked losses, {_PER_ELEMENT}", ops_table),
    "density": Section(f"Log-probabilities and KLs of steps, {_PER_ELEMENT}", ops_table),
    "bound": Section(f"Terms of the variational bound, {_PER_ELEMENT}", ops_table),
    "likelihood": Section(
        "Discretized likelihood: exact, and the usual approximation (eager, compile)", whole_table
    ),
    "overhead": Section("Cost of a call on 64 elements", overhead_table),
    "memory": Section("Peak memory of a call, beyond its inputs", memory_table),
    "accuracy": Section(
        "Errors against float64: |y − y*| / |y*|, in units of the dtype's epsilon", accuracy_table
    ),
    "steps": Section("One reverse step, with diffusers", steps_table),
    "training": Section("One training step", whole_table),
    "flow": Section("The mathematics of a training step of a flow and of EDM", whole_table),
    "sampling": Section("Complete sampling loops, time per step", whole_table),
    "compile": Section("An MLP compiled with the operators, and with the formulas", whole_table),
    "pipelines": Section(
        "Whole pipelines of diffusers with tiny networks, stock and fused", pipelines_table
    ),
    "schedulers": Section("Steps of diffusers' schedulers, stock and fused", schedulers_table),
    "scheduler_errors": Section(
        "Errors of a step in 16 bits, stock and fused, relative", scheduler_errors_table
    ),
}


# ---- losses ---------------------------------------------------------------------------------

OURS = ("diffcore", "fused")
BASELINES = ("eager", "compile", "diffusers", "stock", "exact, eager", "exact, compile")
LABELS = ("op", "step", "what", "mode", "dtype", "shape", "where")
"""What names a row: whichever of these it has."""


def label(row: Row) -> str:
    """A row for people."""
    parts = [row.get(k) for k in LABELS]
    return ", ".join(times(x) if isinstance(x, list) else str(x) for x in parts if x)


def ours(row: Row) -> str | None:
    """The contestant of this library; None in a row that compares nothing with it."""
    return next((name for name in OURS if name in row.get("timings", {})), None)


def losses(results: Mapping[str, Any]) -> Table:
    """Where diffcore is slower than a baseline, the worst first.

    Args:
        results: sections by name.
    """
    found = []
    for section, body in results.items():
        for r in body["rows"] if isinstance(body, Mapping) else ():
            name, t = ours(r), r.get("timings", {})
            for baseline in BASELINES if name else ():
                ratio = t[baseline]["median"] / t[name]["median"] if baseline in t else 1.0
                if f"{ratio:.2f}" < "1.00":
                    cells = [section, label(r), baseline, f"{ratio:.2f}×", spread_text(t[name])]
                    found.append((ratio, cells))
    found.sort(key=lambda pair: pair[0])
    return ["section", "row", "against", "ratio", "±"], [cells for _, cells in found]


def print_results(results: Mapping[str, Any]) -> None:
    """Prints sections, and the losses under a heading of their own.

    Args:
        results: sections by name.
    """
    for name, body in results.items():
        if body["rows"]:
            print_table(*SECTIONS[name].table(body["rows"]), title=SECTIONS[name].heading)
        for note in body["notes"]:
            print(f"  {note}")
        for refused in body["refused"]:
            print(f"  REFUSED: {refused}")
    header, rows = losses(results)
    if rows:
        print_table(header, rows, title="Where diffcore is slower")
    elif any(ours(r) for body in results.values() for r in body["rows"]):
        print("\nNo row in which diffcore is slower.")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> None:
    """Prints a table on the terminal, with rich if it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        _print_plain(header, rows, title)
        return
    table = RichTable(title=title, title_justify="left", box=None, header_style="bold")
    for name in header:
        left = name in LEFT
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Wide enough for every column, also when the output goes to a file.
    width = sum(max(map(len, column)) + 2 for column in zip(header, *rows, strict=True))
    console = Console()
    Console(width=max(console.width, width)).print(table, markup=False)


def _print_plain(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; numbers to the right."""
    lines = [f"| {' | '.join(header)} |"]
    lines.append("|" + "|".join(":--" if name in LEFT else "--:" for name in header) + "|")
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
