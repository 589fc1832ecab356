"""Compares a run with an earlier one on the same device.

Machines drift: a row is slower only if its time grew and its ratio to the baselines that were timed
in turns with it grew too, each by more than both runs scatter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import report
from .report import Row, Table, duration, label, number, ours, spread

CONTROLS = ("eager", "stock", "diffusers", "copy")
"""Contestants whose time does not depend on diffcore. ``torch.compile`` draws its own kernels."""

LEAST = 0.05
"""Two processes differ by so much though nothing changed: memory is laid out in another way."""


@dataclass
class Change:
    """One row, before and now.

    Attributes:
        section: Its section.
        row: Its name, for people.
        before: Seconds.
        now: Seconds.
        factor: How many times slower, the drift of the machine taken out; under 1 is faster.
        allowed: How far the factor may be from 1.
    """

    section: str
    row: str
    before: float
    now: float
    factor: float
    allowed: float

    @property
    def verdict(self) -> str:
        """slower, faster or within the spread."""
        if self.factor > 1 + self.allowed:
            return "slower"
        return "faster" if self.factor < 1 / (1 + self.allowed) else "within"


def key(row: Row) -> tuple[Any, ...]:
    """What tells a row from the others of its section."""
    return tuple(str(row.get(k)) for k in report.LABELS)


def change(section: str, now: Row, before: Row) -> Change | None:
    """Compares two rows with the same key; None where nothing of diffcore was timed.

    Args:
        section: their section.
        now: the row.
        before: the same of an earlier run.
    """
    name = ours(now)
    if name is None or name not in before.get("timings", {}):
        return None
    t, t0 = now["timings"], before["timings"]
    raw = t[name]["median"] / t0[name]["median"]
    drifts = [t[k]["median"] / t0[k]["median"] for k in CONTROLS if k in t and k in t0]
    drift = math.exp(sum(map(math.log, drifts)) / len(drifts)) if drifts else 1.0
    relative = raw / drift
    # Of the two the one nearer to no change; no change where they disagree.
    nearer = min(raw, relative, key=lambda x: abs(math.log(x)))
    factor = nearer if (raw > 1) == (relative > 1) else 1.0
    allowed = max(LEAST, spread(t[name]) + spread(t0[name]))
    found = (t0[name]["median"], t[name]["median"])
    return Change(section, label(now), *found, factor, allowed)


@dataclass
class Comparison:
    """A run against an earlier one.

    Args:
        old: The results of the earlier one.
    """

    old: Mapping[str, Any]
    changes: list[Change] = field(default_factory=list)

    def of(self, section: str, rows: Sequence[Row]) -> list[Change]:
        """The changes of some rows of a section.

        Args:
            section: its name.
            rows: some of its rows.
        """
        known = {key(r): r for r in self.old.get(section, {}).get("rows", ())}
        pairs = ((r, known[key(r)]) for r in rows if key(r) in known)
        found = (change(section, now, before) for now, before in pairs)
        return [c for c in found if c is not None]

    @property
    def slower(self) -> list[Change]:
        """Beyond the spread."""
        return [c for c in self.changes if c.verdict == "slower"]

    def table(self) -> Table:
        """Every row that changed beyond the spread, the worst first."""
        changed = sorted(self.changes, key=lambda c: -c.factor)
        return ["section", "row", "before", "now", "time ×", "allowed", "verdict"], [
            [
                *(c.section, c.row, duration(c.before), duration(c.now)),
                *(number(c.factor, unit="×"), f"±{c.allowed:.0%}", c.verdict),
            ]
            for c in changed
            if c.verdict != "within"
        ]

    def summary(self) -> str:
        """How many rows are faster, within the spread and slower."""
        counts = dict.fromkeys(("faster", "within", "slower"), 0)
        for c in self.changes:
            counts[c.verdict] += 1
        return (
            f"{len(self.changes)} rows compared: {counts['faster']} faster, {counts['within']} "
            f"within the spread, {counts['slower']} slower"
        )
