"""Every loop of the CPU kernels over elements is vectorized.

GCC gives up on a loop as soon as one condition becomes a branch. That kernel then takes ten times
as long and computes the same numbers, so no other test notices.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
ARITHMETIC = re.compile(r"\s+[0-9a-f]+:\s+v?(?:f\w+|mul|add|sub|div)(ps|pd|ss|sd)\b")
LOOP = re.compile(r"::(?:map_numbers|map_vectors|sum_vectors)<")


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def scalar_loops(disassembly: str) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    name = ""
    for line in disassembly.splitlines():
        if function := FUNCTION.match(line):
            name = function[1]
        elif (instruction := ARITHMETIC.match(line)) and LOOP.search(name):
            kind = "vectors" if instruction[1].startswith("p") else "numbers"
            counts.setdefault(name, Counter())[kind] += 1
    assert len(counts) > 150
    # Single numbers are also what comes before the first vector and after the last.
    return [f"{loop}: {dict(c)}" for loop, c in counts.items() if c["numbers"] > 20 * c["vectors"]]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the assembler of x86-64")
@pytest.mark.parametrize("isa", ["v2", "v3", "v4"])
def test_every_loop_is_vectorized(isa: str, tmp_path: Path) -> None:
    tools = ("g++", "cmake", "ninja", "objdump")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    target = f"cpu_kernels_{isa}"
    options = ("-DCMAKE_BUILD_TYPE=Release", "-DDIFFCORE_CUDA=OFF", "-DDIFFCORE_MODULE=OFF")
    run("cmake", "-S", ROOT, "-B", tmp_path, "-GNinja", "-DCMAKE_CXX_COMPILER=g++", *options)
    run("cmake", "--build", tmp_path, "--target", target)
    (kernels,) = tmp_path.glob(f"CMakeFiles/{target}.dir/**/*.o")
    assert scalar_loops(run("objdump", "-dC", "--no-show-raw-insn", kernels)) == []
