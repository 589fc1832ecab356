"""Writes the measured tables into the README and the documentation.

    python -m benchmarks.tables [RESULT.json ...]

A table goes between the markers ``<!-- bench:cpu:begin -->`` and ``<!-- bench:cpu:end -->`` of its
page; the names are cpu, cuda (short) and cpu-full, cuda-full. Without arguments the newest results
of each kind of device under ``benchmarks/results`` are taken.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.machine import RESULTS, ROOT

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARKED = re.compile(
    r"(<!-- bench:(?P<name>[\w-]+):begin -->\n).*?(\n<!-- bench:(?P=name):end -->)", re.DOTALL
)

SHORT = (
    ("q_sample", "forward"),
    ("ddpm_step", "forward"),
    ("ddpm_step_guided", "forward"),
    ("ddim_step", "forward"),
    ("normal_kl", "forward"),
    ("normal_kl", "forward+backward"),
    ("reparameterize_kl", "forward+backward"),
    ("denoising_loss_v_prediction", "forward+backward"),
)
"""The rows of the short tables."""

SHORT_NOISE = (
    ("q_sample", "forward"),
    ("ddpm_step", "forward"),
    ("reparameterize_kl", "forward+backward"),
)
"""The rows of those with drawn noise."""

HEADINGS = {
    "ops": "Every op, nanoseconds an element",
    "noise": "Noise drawn where it is used, nanoseconds an element",
    "threshold": "The threshold of dynamic thresholding, nanoseconds an element",
    "bound": "The terms of the variational bound, nanoseconds an element",
    "likelihood": "The discretised likelihood, exact, against its approximation (eager, compile)",
    "overhead": "What a call costs, on 64 elements",
    "memory": "Peak memory of a call, beyond its inputs",
    "steps": "A reverse step, against diffusers",
    "training": "A training step",
    "sampling": "Whole sampling loops, time of a step",
}


def measured_on(section: Mapping[str, Any]) -> str:
    """One line: device, threads or driver, versions, date and command."""
    facts = section["machine"]
    where = [facts["device"]]
    if facts["device_type"] == "cpu":
        where += [f"threads: {facts['threads']}", f"x86-64-{facts['instruction_set']}"]
    else:
        where += [f"driver {facts['driver']}", f"CUDA {facts['cuda']}"]
    where += [f"torch {facts['torch']}", f"diffcore {facts['diffcore']}", section["date"][:10]]
    return f"{', '.join(where)}: `{section['command']}`."


def short(results: Mapping[str, Any]) -> str:
    """The tables of the README: chosen ops in the dtype and shape measured first.

    Args:
        results: of one device.
    """
    section = results["ops"]
    first = section["rows"][0]
    unit = f"Nanoseconds an element, {first['dtype']}, {report.times(first['shape'])}."
    text = f"{unit} {measured_on(section)}\n\n{_short_table(section['rows'], SHORT)}"
    noise = results.get("noise")
    if noise and noise["rows"]:
        text += "\n\nThe same with noise that each draws itself, diffcore inside the kernel. "
        text += f"{measured_on(noise)}\n\n{_short_table(noise['rows'], SHORT_NOISE)}"
    return text


def _short_table(rows: Sequence[report.Row], chosen: Sequence[tuple[str, str]]) -> str:
    first = rows[0]
    found = {
        (r["op"], r["mode"]): r
        for r in rows
        if (r["shape"], r["dtype"], r.get("where"))
        == (first["shape"], first["dtype"], first.get("where"))
    }
    header = ["op", "mode", "eager", "compile", "diffcore", "copy", "× eager", "× compile"]
    body = [
        [
            f"`{name}`",
            mode,
            *(
                report.number(found[name, mode]["ns_per_element"].get(k), ".3g")
                for k in ("eager", "compile", "diffcore", "copy")
            ),
            report.number(found[name, mode]["times_eager"], ".1f", "×"),
            report.number(found[name, mode]["times_compile"], ".1f", "×"),
        ]
        for name, mode in chosen
        if (name, mode) in found
    ]
    return report.markdown(header, body)


def full(results: Mapping[str, Any]) -> str:
    """Every table of a device, each with where and how it was measured.

    Args:
        results: of one device.
    """
    parts = []
    for name, heading in HEADINGS.items():
        section = results.get(name)
        if not section or not section["rows"]:
            continue
        table = report.markdown(*report.TABLES[name](section["rows"]))
        notes = "".join(f"\n\n{note[0].upper()}{note[1:]}." for note in section.get("notes", []))
        parts.append(f"### {heading}\n\n{measured_on(section)}\n\n{table}{notes}")
    return "\n\n".join(parts)


def fill(page: str, tables: Mapping[str, str]) -> str:
    """A page with its marked places filled.

    Args:
        page: the text.
        tables: Markdown for each marker name; places without one stay as they are.
    """

    def put(match: re.Match[str]) -> str:
        table = tables.get(match["name"])
        return match[0] if table is None else f"{match[1]}{table}{match[3]}"

    return MARKED.sub(put, page)


def newest(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """For "cpu" and "cuda" the results whose ops were measured last."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        results = report.load(path)
        if not results.get("ops", {}).get("rows"):
            continue
        kind = results["ops"]["machine"]["device_type"]
        if kind not in found or results["ops"]["date"] > found[kind]["ops"]["date"]:
            found[kind] = results
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Fills the pages in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", nargs="*", type=Path, help="result files")
    args = parser.parse_args(argv)
    tables: dict[str, str] = {}
    for kind, results in newest(args.results or sorted(RESULTS.glob("*.json"))).items():
        tables |= {kind: short(results), f"{kind}-full": full(results)}
    if not tables:
        raise SystemExit("no results: run python -m benchmarks.bench_ops first")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text, tables)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
