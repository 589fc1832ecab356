"""The pages of the documentation and the Python blocks in them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"(?:^<!-- requires: (\w+) -->\n)?^( *)```python[^\n]*\n(.*?)^\2```", re.MULTILINE | re.DOTALL
)


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path) -> list[tuple[int, str]]:
    """(number of the first line, code) of each block that can run here."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        package, indent, code = match.groups()
        if package is not None and importlib.util.find_spec(package) is None:
            continue
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        found.append((text.count("\n", 0, match.start(3)) + 1, "\n".join(lines)))
    return found
