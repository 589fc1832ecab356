"""What nvcc made of the CUDA kernels, held in tables: registers, spills, memory accesses.

    python tools/compiled_code.py [--check | --write] [--arch 90 ...]

Compiles csrc/cuda/kernels.cu once per architecture and storage type, prints what differs from the
tables in tests/cuda/compiled_code/, and fails if a rule is broken (`broken` of compiled_table.py).
`--write` writes the tables again, but keeps their allowances. Needs nvcc and nvdisasm, and no GPU.
An architecture takes one to two minutes; its results stay in build/compiled_code/ and are used
while the sources are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.compiled_table import (  # noqa: E402
    Facts,
    Kernel,
    Table,
    broken,
    changes,
    read_table,
    table_text,
)
from tools.sass import accesses, sections  # noqa: E402

TABLES = ROOT / "tests" / "cuda" / "compiled_code"
BUILD = ROOT / "build" / "compiled_code"
KERNELS = ROOT / "csrc" / "cuda" / "kernels.cu"
FACTS = ROOT / "tools" / "kernel_facts.cu"
THREADS = 256  # kThreads of csrc/cuda/launch.cuh
STORAGE = {"float": "f32", "double": "f64", "Bf16": "bf16", "F16": "f16"}


class Limits(NamedTuple):
    """What one multiprocessor has."""

    warps: int
    blocks: int
    shared: int  # bytes


# "Technical specifications per compute capability" of the CUDA C++ programming guide. All have
# 65,536 registers, given to warps of one quarter in units of 256.
LIMITS = {
    80: Limits(64, 32, 164 << 10),
    90: Limits(64, 32, 228 << 10),
    100: Limits(64, 32, 228 << 10),
    120: Limits(48, 24, 100 << 10),
}


class Resources(NamedTuple):
    """What a kernel occupies, from ptxas; bytes except registers."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


# ---- Reading what the tools print ----------------------------------------------------------------


def short(demangled: str) -> str:
    """``map<PriorKl,f16>`` of the demangled name of a kernel, or of one of its arguments."""
    name = re.sub(r"^void |\([\w:]+\)(?=\d)", "", demangled)  # enumerators are printed as (Enum)1
    name = re.sub(r"\([^()]*\)$", "", name)  # the parameters
    name = name.replace("diffcore::", "").replace(" ", "")
    return re.sub(rf"\b({'|'.join(STORAGE)})(?=>?$)", lambda m: STORAGE[m[1]], name)


def read_resources(log: str) -> dict[str, Resources]:
    """The resources of each kernel, by its mangled name, from the output of ``ptxas -v``."""
    found = {}
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'(\w+)'", part)
        of_name = re.search(
            r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            part,
        )
        used = re.search(r"Used (\d+) registers", part)
        if not (name and of_name and used and name[1] == of_name[1]):
            raise ValueError(f"ptxas -v printed something else than expected: {part[:500]}")
        shared = re.search(r"(\d+) bytes smem", part)
        found[name[1]] = Resources(
            int(used[1]), int(shared[1]) if shared else 0, *map(int, of_name.groups()[1:])
        )
    return found


def blocks_per_sm(arch: int, used: Resources) -> int:
    """Blocks of 256 threads that fit on a multiprocessor."""
    limits = LIMITS[arch]
    warps = THREADS // 32
    registers_of_warp = -(-used.registers * 32 // 256) * 256
    by_registers = 65536 // 4 // registers_of_warp * 4 // warps
    shared = -(-(used.shared + 1024) // 128) * 128  # the system takes 1 KB of each block
    return min(by_registers, limits.warps // warps, limits.blocks, limits.shared // shared)


def read_kernels(
    arch: int, log: str, sass: Iterable[str], demangle: Mapping[str, str]
) -> dict[str, Kernel]:
    """The rows of a table, from the output of ``ptxas -v`` and of ``nvdisasm -c``."""
    resources = read_resources(log)
    rows = {}
    for mangled, code in sections(sass):
        used, access = resources[mangled], accesses(code)
        rows[short(demangle[mangled])] = Kernel(
            used.registers, blocks_per_sm(arch, used), *used[2:], *access, len(code)
        )
    if len(rows) != len(resources):
        raise ValueError(f"ptxas compiled {len(resources)} kernels, nvdisasm printed {len(rows)}")
    return rows


def read_facts(text: str) -> dict[str, Facts]:
    """By ``"PriorKl,f16"``; from the demangled output of kernel_facts.cu."""
    found = {}
    for line in text.splitlines():
        op, storage, loads, stores, exists = line.split("\t")
        name = f"{short(op)},{short(storage)}"
        found[name] = Facts(int(loads), int(stores), exists == "1")
    return found


# ---- Compiling -----------------------------------------------------------------------------------


def table_path(arch: int) -> Path:
    """Where the table of an architecture is."""
    return TABLES / f"sm_{arch}.txt"


def nvdisasm() -> str | None:
    """On PATH, beside nvcc, or from the package nvidia-cuda-nvdisasm of this environment."""
    nvcc = shutil.which("nvcc")
    package = importlib.util.find_spec("nvidia")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    if package and package.submodule_search_locations:
        folders += [p for at in package.submodule_search_locations for p in Path(at).glob("*/bin")]
    return shutil.which("nvdisasm") or next(
        (str(f / "nvdisasm") for f in folders if os.access(f / "nvdisasm", os.X_OK)), None
    )


def missing() -> str | None:
    """Why this machine cannot compile and read the kernels; None when it can."""
    if not shutil.which("nvcc"):
        return "nvcc is not on PATH"
    if not shutil.which("c++filt"):
        return "c++filt (of binutils) is not on PATH"
    if not nvdisasm():
        return "nvdisasm is not on PATH; pip install nvidia-cuda-nvdisasm has it"
    return None


def flags() -> list[str]:
    """The flags of CMakeLists.txt for CUDA."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    own = re.search(r"target_compile_options\(cuda_kernels_\S+ PRIVATE ([^)]+)\)", cmake)
    standard = re.search(r"set\(CMAKE_CUDA_STANDARD (\d+)\)", cmake)
    if not own or not standard:
        raise ValueError("CMakeLists.txt has no flags for CUDA where they were")
    # What CMake passes on to the host compiler, in quotes, is not about kernels.
    options = [option for option in own[1].split() if not option.startswith('"')]
    return ["-O3", "-DNDEBUG", f"-std=c++{standard[1]}", f"-I{ROOT / 'csrc'}", *options]


def output(*command: str, stdin: str | None = None) -> str:
    """Standard output and error of a command, which must succeed."""
    done = subprocess.run(
        command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def nvcc_version() -> str:
    """Such as ``13.0.88``."""
    found = re.search(r"V(\d+\.\d+\.\d+)", output("nvcc", "--version"))
    return found[1] if found else "unknown"


def compiled(source: Path, name: str, *options: str) -> tuple[Path, str]:
    """The product of nvcc and what it printed, from an earlier run if the sources are the same."""
    product, log, key = (BUILD / f"{name}{end}" for end in (".bin", ".log", ".key"))
    sources = [source, *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    content = hashlib.sha256(b"\0".join(p.read_bytes() for p in sources)).hexdigest()
    now = "\n".join([content, nvcc_version(), *flags(), *options])
    if not (key.exists() and key.read_text() == now and product.exists() and log.exists()):
        BUILD.mkdir(parents=True, exist_ok=True)
        key.unlink(missing_ok=True)
        command = ["nice", "nvcc", *flags(), *options, "-o", str(product), str(source)]
        log.write_text(output(*command))
        key.write_text(now)
    return product, log.read_text()


def measure(arch: int) -> dict[str, Kernel]:
    """The rows of one architecture; compiles the kernels."""
    rows = {}
    for storage in STORAGE:
        options = ("-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", f"-DDIFFCORE_STORAGE={storage}")
        product, log = compiled(KERNELS, f"sm_{arch}_{STORAGE[storage]}", *options)
        mangled = list(read_resources(log))
        names = output("c++filt", stdin="\n".join(mangled)).splitlines()
        sass = output(str(nvdisasm()), "-c", str(product)).splitlines()
        rows.update(read_kernels(arch, log, sass, dict(zip(mangled, names, strict=True))))
    return rows


def facts_of_source() -> dict[str, Facts]:
    """Compiles and runs kernel_facts.cu."""
    program, _ = compiled(FACTS, "facts")
    return read_facts(output("c++filt", "-t", stdin=output(str(program))))


def main() -> None:
    """Compares, or writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=list(LIMITS), default=list(LIMITS))
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--check", action="store_true", help="compare with the tables (the default)")
    does.add_argument("--write", action="store_true", help="write the tables again")
    options = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    facts, nvcc, wrong = facts_of_source(), nvcc_version(), 0
    for arch in options.arch:
        path, kernels = table_path(arch), measure(arch)
        table = read_table(path.read_text()) if path.exists() else Table(nvcc, {}, {})
        for line in changes(kernels, table):
            print(f"sm_{arch}: {line}")
        if options.write:
            table = Table(nvcc, table.allowed, kernels)
            path.parent.mkdir(exist_ok=True)
            path.write_text(table_text(arch, table))
        for line in broken(kernels, table, facts, nvcc):
            wrong += 1
            print(f"sm_{arch}: WRONG: {line}")
        print(f"sm_{arch}: {len(kernels)} kernels, nvcc {nvcc} (the table's: {table.nvcc})")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
