"""Results as JSON, and as tables for the terminal and for Markdown."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from diffcore._engine import native

Row = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]
SCHEMA = 1
LEFT = {"op", "mode", "dtype", "shape", "where", "what", "contestant", "step", "scheduler"}
"""Columns of text."""


# ---- shared by the scripts -------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --device, --out and --quick."""
    parser.add_argument(
        "--device", default="auto", help="auto (the CPU, and a GPU with kernels), cpu, cuda, cuda:1"
    )
    parser.add_argument(
        "--out",
        "--output",
        type=Path,
        help="folder, or a .json file; existing sections of other scripts stay "
        "[default: benchmarks/results]",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small and short: a smoke test, not a measurement"
    )


def devices(name: str) -> list[torch.device]:
    """The devices that --device names.

    Raises:
        SystemExit: The device is not available.
    """
    gpu = torch.cuda.is_available()
    if name == "auto":
        cuda = torch.device("cuda", 0)
        return [torch.device("cpu"), *([cuda] if gpu and native.has_kernels(cuda) else [])]
    device = torch.device(name)
    if device.type != "cuda":
        return [device]
    if not gpu:
        raise SystemExit(f"--device {name}: torch sees no GPU here")
    return [torch.device("cuda", device.index or 0)]


def on_each_device(
    measure: Callable[[torch.device], Mapping[str, Mapping[str, Any]]],
    args: argparse.Namespace,
    argv: Sequence[str] | None,
) -> int:
    """Measures, prints and writes; 1 if a result was refused.

    Args:
        measure: gives the sections of a device, by name.
        args: the common arguments, parsed.
        argv: as for `finish`.
    """
    wrong = False
    for device in devices(args.device):
        native.warm_up(device)
        sections = measure(device)
        finish(sections, device, args.out or machine.RESULTS, argv)
        wrong |= any(section.get("refused") for section in sections.values())
    return int(wrong)


def progress(text: str) -> None:
    """Shows one line of progress in place, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)


def times(shape: Sequence[int]) -> str:
    """A shape for people."""
    return "×".join(str(n) for n in shape)


def finish(
    sections: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    out: Path,
    argv: Sequence[str] | None,
) -> Path:
    """Writes the sections beside those of the other scripts, and prints them.

    Args:
        sections: by name.
        device: that was measured.
        out: a folder, or a .json file.
        argv: the arguments of the script; None for the process's own.

    Returns:
        The file.
    """
    path = out if out.suffix == ".json" else out / f"{machine.slug(device)}.json"
    command = [f"python -m benchmarks.{Path(sys.argv[0]).stem}"]
    command += [shlex.quote(x) for x in (sys.argv[1:] if argv is None else argv)]
    facts = {
        "machine": machine.describe(device),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(command),
    }
    existing = load(path) if path.exists() else {"schema": SCHEMA}
    save({**existing, **{name: {**facts, **body} for name, body in sections.items()}}, path)
    for name, body in sections.items():
        print_table(*TABLES[name](body["rows"]), title=name)
        for note in body.get("notes", []):
            print(f"  {note}")
        for refused in body.get("refused", []):
            print(f"  REFUSED: {refused}")
    print(f"\n{path}")
    return path


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


def ops_table(rows: Sequence[Row]) -> Table:
    """Every op: its time; nanoseconds an element, also of the others; bandwidth and ratios."""
    header = ["op", "mode", "dtype", "shape", "time", "ns/element", "out=", "eager", "compile"]
    header += ["copy", "GB/s", "% of copy", "× eager", "× compile"]
    return header, [
        [
            r["op"],
            r["mode"],
            r["dtype"],
            times(r["shape"]),
            duration(r["timings"]["diffcore"]["median"]),
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
    return ["op", "mode", "diffcore", "eager", "× eager"], [
        [
            r["op"],
            r["mode"],
            *(duration(r["timings"][k]["median"]) for k in ("diffcore", "eager")),
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
    header = ["step", "dtype", "shape", *used, "% of copy", "× eager", "× compile"]
    return [*header, "× diffusers"], [
        [
            r["step"],
            r["dtype"],
            times(r["shape"]),
            *(duration(r["timings"].get(k, {}).get("median")) for k in used),
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
    header = ["scheduler", "dtype", "shape", *names, "× stock", "× stock, philox"]
    return header, [
        [
            r["what"],
            r["dtype"],
            times(r["shape"]),
            *(duration(r["timings"].get(k, {}).get("median")) for k in names),
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


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "ops": ops_table,
    "noise": noise_table,
    "threshold": ops_table,
    "guidance": ops_table,
    "groups": ops_table,
    "masks": ops_table,
    "bound": ops_table,
    "call": call_table,
    "likelihood": whole_table,
    "overhead": overhead_table,
    "memory": memory_table,
    "steps": steps_table,
    "training": whole_table,
    "flow": whole_table,
    "sampling": whole_table,
    "compile": whole_table,
    "schedulers": schedulers_table,
    "scheduler_errors": scheduler_errors_table,
}


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
