"""Compare the bits of the CPU kernels of two processors.

    make arm                                          # builds, runs and compares
    python tools/compare_bits.py v3.txt neon.txt      # what `kernel_bits` printed on each

A file begins with the instruction set, and has a line for each result of each kernel: its name and
a hash. Without fused multiply-add (v2) only the noise has the bits of the others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

# What may differ: a function of the C library, which rounds as its version and processor do.
FROM_LIBRARY = {"guidance_weights f64": "hypot"}
NOISE = "randn "


class Comparison(NamedTuple):
    """How many results are compared, and the names of those that differ."""

    sets: tuple[str, str]
    total: int
    different: list[str]
    excused: list[str]  # because of FROM_LIBRARY


def read(text: str) -> tuple[str, dict[str, str]]:
    """The instruction set, and the hash of each result.

    Raises:
        ValueError: The text is not what ``kernel_bits`` prints.
    """
    head, *lines = text.splitlines() or [""]
    if not head.startswith("# ") or not lines:
        raise ValueError(f"a file must begin with '# <instruction set>' and have results: {head!r}")
    return head[2:], dict(line.split(": ") for line in lines)


def compare(one: str, other: str) -> Comparison:
    """Compares two outputs of ``kernel_bits``.

    Args:
        one: The text of the first.
        other: The text of the second.

    Returns:
        What differs; a result that only one of them has does.

    Raises:
        ValueError: A text is not what ``kernel_bits`` prints.
    """
    (set_a, a), (set_b, b) = read(one), read(other)
    if "v2" in (set_a, set_b) and set_a != set_b:
        a, b = ({k: v for k, v in x.items() if k.startswith(NOISE)} for x in (a, b))
    wrong = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    excused = [name for name in wrong if name.startswith(tuple(FROM_LIBRARY))]
    different = [name for name in wrong if name not in excused]
    return Comparison((set_a, set_b), len({*a, *b}), different, excused)


def main() -> int:
    """Prints what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs=2, type=Path)
    found = compare(*(path.read_text(encoding="utf-8") for path in parser.parse_args().files))
    for name in found.different[:20]:
        print(f"DIFFERENT {name}")
    same = found.total - len(found.different) - len(found.excused)
    print(f"{same} of {found.total} results have the same bits on {' and '.join(found.sets)}")
    if found.excused:
        print(f"{len(found.excused)} differ by a function of the C library: {FROM_LIBRARY}")
    return int(bool(found.different))


if __name__ == "__main__":
    sys.exit(main())
