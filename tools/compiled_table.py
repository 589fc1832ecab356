"""The tables of compiled CUDA kernels, and the rules that a compilation must keep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Functions that read packs of 16 bytes.
PACKED = ("map", "select_few_kernel", "select_kernel", "select_count_kernel")


class Kernel(NamedTuple):
    """A row of a table."""

    registers: int
    blocks: int  # of 256 threads that fit on a multiprocessor
    stack: int
    spill_stores: int
    spill_loads: int
    loads: int  # of 16 bytes, from global memory
    in_flight: int  # of these, under way before the first use of a value they loaded
    stores: int  # of 16 bytes, to global memory
    instructions: int


class Facts(NamedTuple):
    """The packed loads and stores of an op by the source, and whether its kernel can be called."""

    loads: int
    stores: int
    exists: bool


class Allowance(NamedTuple):
    """The bytes that a kernel may keep in local memory: stack, spill stores or spill loads."""

    size: int
    reason: str


class Table(NamedTuple):
    """The file of one architecture."""

    nvcc: str
    allowed: Mapping[str, Allowance]
    kernels: Mapping[str, Kernel]


def function_of(kernel: str) -> tuple[str, str]:
    """``("map", "PriorKl,f16")`` of ``map<PriorKl,f16>``."""
    function, _, arguments = kernel.partition("<")
    return function, arguments.removesuffix(">")


# ---- The rules -----------------------------------------------------------------------------------


def broken(
    kernels: Mapping[str, Kernel], table: Table, facts: Mapping[str, Facts], nvcc: str
) -> Iterator[str]:
    """A line for each rule that a compilation breaks."""
    for name, row in table.kernels.items():
        if name not in kernels:
            yield f"{name}: in the table, but not compiled; run with --write"
        elif kernels[name].blocks < row.blocks:
            yield (
                f"{name}: {kernels[name].blocks} blocks fit on a multiprocessor "
                f"({kernels[name].registers} registers), {row.blocks} ({row.registers}) before"
            )
        elif nvcc == table.nvcc and kernels[name].in_flight < row.in_flight:
            yield (
                f"{name}: {kernels[name].in_flight} packed loads are under way before the first "
                f"use, {row.in_flight} before"
            )
    for name, kernel in kernels.items():
        if name not in table.kernels:
            yield f"{name}: compiled, but not in the table; run with --write"
        spilled = max(kernel.stack, kernel.spill_stores, kernel.spill_loads)
        allowed = table.allowed.get(name, Allowance(0, ""))
        if spilled > allowed.size:
            yield (
                f"{name}: {kernel.stack} bytes of stack, {kernel.spill_stores} spilled and "
                f"{kernel.spill_loads} loaded again; allowed: {allowed.size}"
            )
        yield from _broken_accesses(name, kernel, facts)
    compiled = {arguments for function, arguments in map(function_of, kernels)}
    for arguments, fact in facts.items():
        if fact.exists and arguments not in compiled:
            yield f"{arguments}: the op has no kernel"


def _broken_accesses(name: str, kernel: Kernel, facts: Mapping[str, Facts]) -> Iterator[str]:
    function, arguments = function_of(name)
    fact = facts.get(arguments)
    if fact and not fact.exists:
        yield f"{name}: nothing calls this kernel; the engine reads the noise of a double tensor"
    if function not in PACKED:
        return
    if fact is None:
        yield f"{name}: no op of AllOps"
        return
    stores = fact.stores if function == "map" else 0
    for what, has, wants in (
        ("loads", kernel.loads, fact.loads),
        ("stores", kernel.stores, stores),
    ):
        if has < wants:
            yield f"{name}: {has} {what} of 16 bytes, {wants} by the source; the others are narrow"


def changes(kernels: Mapping[str, Kernel], table: Table) -> Iterator[str]:
    """A line for each kernel whose row differs."""
    for name in sorted(kernels.keys() & table.kernels.keys()):
        old, new = table.kernels[name], kernels[name]
        different = [
            f"{field} {was} -> {now}"
            for field, was, now in zip(Kernel._fields, old, new, strict=True)
            if was != now
        ]
        if different:
            yield f"{name}: {', '.join(different)}"


# ---- The tables ----------------------------------------------------------------------------------

HEAD = """\
# CUDA kernels on sm_{arch}, written by tools/compiled_code.py --write.
# nvcc {nvcc}
# Registers; blocks of 256 threads that fit on a multiprocessor; bytes of stack, of spill stores and
# of spill loads; 16-byte loads; how many of them are under way before the first use of a loaded
# value; 16-byte stores; instructions.
# Allowed bytes of stack and spills (by hand), and why:
"""
COLUMNS = "reg blk stk st/ld  ldg fly stg instr kernel"


def table_text(arch: int, table: Table) -> str:
    """The file of a table."""
    lines = [HEAD.format(arch=arch, nvcc=table.nvcc).rstrip("\n")]
    lines += [f"#   {k}: {a.size}: {a.reason}" for k, a in sorted(table.allowed.items())]
    lines.append(COLUMNS)
    for name, k in sorted(table.kernels.items()):
        spills = f"{k.spill_stores}/{k.spill_loads}"
        lines.append(
            f"{k.registers:3} {k.blocks:3} {k.stack:3} {spills:>5} {k.loads:4} {k.in_flight:3} "
            f"{k.stores:3} {k.instructions:5} {name}"
        )
    return "\n".join(lines) + "\n"


def read_table(text: str) -> Table:
    """The inverse of `table_text`."""
    nvcc, allowed, kernels = "", {}, {}
    for line in text.splitlines():
        if version := re.fullmatch(r"# nvcc (\S+)", line):
            nvcc = version[1]
        elif allowance := re.fullmatch(r"#   (\S+): (\d+): (.+)", line):
            allowed[allowance[1]] = Allowance(int(allowance[2]), allowance[3])
        elif not line.startswith("#") and line != COLUMNS:
            *numbers, name = line.replace("/", " ", 1).split()
            kernels[name] = Kernel(*map(int, numbers))
    return Table(nvcc, allowed, kernels)
