"""Writes docs/routes.md: each public call on each route, from the cases and refusals of the tests.

    python tools/routes_table.py [--check]

`--check` changes nothing and fails if the page is not what this tool would write.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "routes.md"
sys.path.insert(0, str(ROOT / "tests"))

from support.routes.matrix import CASES, COLUMNS, ROUTES  # noqa: E402
from support.routes.refusals import REFUSALS, Refusal, is_open, refused  # noqa: E402

HEAD = """\
# Routes

A call may run in plain eager, under a mode, inside a transform, or in a compiled graph. It gives
the same answer on each of these routes, or it is refused with an error that says so. Each run of
the tests covers all cells of the table below without a compiler, and in the columns compile and
export one case of each kind of kernel; `make routes` runs every case of these columns, and
AOTInductor, too.
`tools/routes_table.py` writes this page from the tests.

"Same" means the same as plain eager, whose results the other tests compare with the truth: values,
gradients and tangents. An object that keeps tables (a `GaussianDiffusion`, a `SolverTable`) may be
used on a route first: its first call gives the same as the next ones, and plain eager gives the
same afterwards.
"""


def columns() -> list[str]:
    """What belongs to each column, and how results are compared."""
    lines = ["## Columns", "", "| column | routes | compared |", "|:--|:--|:--|"]
    for name, compared in COLUMNS.items():
        routes = "; ".join(route.name for route in ROUTES if route.column == name)
        lines.append(f"| {name} | {routes} | {compared} |")
    return lines


def cell(public: str, column: str, numbers: dict[Refusal, int]) -> str:
    """Whether the cases of one public name give the same on the routes of one column."""
    pairs = [
        (case, route)
        for case in CASES
        if case.public == public
        for route in ROUTES
        if route.column == column and route.applies(case)
    ]
    if not pairs:
        return "–"
    if any(is_open(case, route) for case, route in pairs):
        return "not yet"
    cells = [refused(case, route) for case, route in pairs]
    found = {refusal for refusal in cells if refusal is not None}
    marks = " ".join(f"[{n}](#refused-{n})" for n in sorted(numbers[r] for r in found))
    if not marks:
        return "same"
    return f"refused {marks}" if None not in cells else f"same, but {marks}"


def table(numbers: dict[Refusal, int]) -> list[str]:
    """One row for each public name, in the order of the cases."""
    names = list(dict.fromkeys(case.public for case in CASES))
    lines = ["## Table", "", f"| | {' | '.join(COLUMNS)} |", f"|:--|{':--|' * len(COLUMNS)}"]
    for public in sorted(names, key=lambda name: (not name.startswith("ops."), names.index(name))):
        cells = (cell(public, column, numbers) for column in COLUMNS)
        lines.append(f"| `{public}` | {' | '.join(cells)} |")
    return lines


def refusals(numbers: dict[Refusal, int]) -> list[str]:
    """The numbered reasons."""
    lines = ["## Refused", ""]
    for refusal, n in numbers.items():
        routes = [r for r in ROUTES if any(refusal.covers(case, r) for case in CASES)]
        names = ", ".join(route.name for route in routes)
        lines += [f'<a id="refused-{n}"></a>**{n}.** {names}: {refusal.reason}.', ""]
    return lines[:-1]


def page() -> str:
    """The text of docs/routes.md."""
    numbers = {refusal: n for n, refusal in enumerate(REFUSALS, 1)}
    parts = (columns(), table(numbers), refusals(numbers))
    return HEAD + "".join("\n" + "\n".join(lines) + "\n" for lines in parts)


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/routes.md is not up to date: run python tools/routes_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
