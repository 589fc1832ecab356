"""Reads the disassembly of CUDA kernels: wide memory accesses, and loads in flight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_SECTION = re.compile(r"\.text\.(\S+):$")
_LABEL = re.compile(r"(\.L_\S+):$")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)\b")


class Instruction(NamedTuple):
    """One line of a disassembly."""

    opcode: str
    operands: str
    conditional: bool  # has a predicate
    target: int | None  # of a branch: the index of an instruction

    @property
    def writes(self) -> int | None:
        """The first register that it writes."""
        first = re.match(r"R(\d+)(?=,|$)", self.operands)
        return int(first[1]) if first else None

    @property
    def reads(self) -> set[int]:
        """The registers that it reads: of a pair or four, the first."""
        _, _, others = self.operands.partition(",")
        text = self.operands if self.writes is None else others
        return {int(r) for r in _REGISTER.findall(text)}

    def wide(self, kind: str) -> bool:
        """Whether it is an access of 16 bytes to global memory; `kind` is LDG or STG."""
        first, *rest = self.opcode.split(".")
        return first == kind and "128" in rest


class Access(NamedTuple):
    """The 16-byte accesses of a kernel to global memory."""

    loads: int
    in_flight: int
    stores: int


def sections(sass: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """The mangled name and the instructions of each kernel, its subroutines included."""
    name = ""
    lines: list[str] = []
    for line in sass:
        text = line.strip()
        if start := _SECTION.match(text):
            if name:
                yield name, _instructions(lines)
            name, lines = start[1], []
        elif text.startswith("//-----") or text.startswith(".section"):
            if name:
                yield name, _instructions(lines)
            name = ""
        elif name:
            lines.append(text)
    if name:
        yield name, _instructions(lines)


def _instructions(lines: Iterable[str]) -> list[Instruction]:
    labels: dict[str, int] = {}
    found: list[tuple[bool, str, str]] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif parts := _LINE.match(line):
            found.append((parts[1] is not None, parts[2], parts[3].strip()))
    code = []
    for conditional, opcode, operands in found:
        label = re.search(r"`\((\.L_\S+?)\)", operands) if opcode.startswith("BRA") else None
        target = labels.get(label[1]) if label else None
        # BRA P0, `(.L) and BRA.DIV UR4, `(.L) have their condition among the operands.
        either = conditional or (label is not None and not operands.startswith("`"))
        code.append(Instruction(opcode, operands, either, target))
    while code and code[-1].opcode == "NOP":  # the end of a section is padded
        code.pop()
    return code


def accesses(code: list[Instruction]) -> Access:
    """Counts the 16-byte accesses of a kernel."""
    loads = sum(i.wide("LDG") for i in code)
    stores = sum(i.wide("STG") for i in code)
    return Access(loads, _in_flight(code) if loads else 0, stores)


def _in_flight(code: list[Instruction]) -> int:
    """The most 16-byte loads that some path issues before it uses a value that one of them loads.

    Follows every path through the kernel; a state is a place and the registers being loaded.
    Subroutines are taken to use none of them.
    """
    most = 0
    start: tuple[int, frozenset[int]] = (0, frozenset())
    seen, waiting = {start}, [start]
    while waiting:
        place, pending = waiting.pop()
        if place >= len(code):
            continue
        now = code[place]
        if pending and any(r // 4 * 4 in pending for r in now.reads):
            most = max(most, len(pending))
            continue
        written = now.writes
        if written is not None and now.wide("LDG"):
            pending = pending | {written}
        elif written is not None and not now.conditional:
            pending = pending - {written // 4 * 4}
        following = []
        stops = now.opcode.split(".")[0] in ("EXIT", "RET") or now.target is not None
        if now.conditional or not stops:
            following.append((place + 1, pending))
        if now.target is not None:
            following.append((now.target, pending))
        for state in following:
            if state not in seen:
                seen.add(state)
                waiting.append(state)
    return most
