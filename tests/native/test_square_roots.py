"""The square roots that the noise takes: correctly rounded, for every argument there is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "cuda" / "square_roots.cu"
HOST_FLAGS = ("-fopenmp", "-ffp-contract=off", "-fno-math-errno")
EXACT = "return __builtin_sqrtf(x)"
# x times a rounded reciprocal root, as a faster root could be written, is not always the right one.
INEXACT = "const float r = 1 / __builtin_sqrtf(x); return x == 0 ? 0 : x * r"


def compiled(program: Path, sources: Path = ROOT / "csrc") -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ("-O3", "-std=c++17", *HOST_FLAGS, f"-I{sources}", "-x", "c++")
    subprocess.run([compiler, *flags, SOURCE, "-o", program], check=True)
    return program


def run(program: Path, every: int) -> tuple[int, str]:
    done = subprocess.run([program, str(every)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_some_roots(tmp_path: Path) -> None:
    code, found = run(compiled(tmp_path / "roots"), 256)
    assert found.startswith("CPU: 8388608 square roots, 0 of them wrong")
    assert code == 0


def test_inexact_roots_are_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / "noise" / "philox.h"
    text = header.read_text(encoding="utf-8")
    assert text.count(EXACT) == 1
    header.write_text(text.replace(EXACT, INEXACT), encoding="utf-8")
    code, found = run(compiled(tmp_path / "roots", tmp_path / "csrc"), 1024)
    assert code == 1
    assert " 0 of them wrong" not in found


@pytest.mark.slow
def test_all_roots(tmp_path: Path) -> None:
    code, found = run(compiled(tmp_path / "roots"), 1)
    assert found.startswith("CPU: 2147483648 square roots, 0 of them wrong")
    assert code == 0


@pytest.mark.slow
def test_the_part_for_cuda_compiles(tmp_path: Path) -> None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc")
    flags = ("-std=c++17", "-arch=sm_80", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}")
    host = f"-Xcompiler={','.join(HOST_FLAGS)}"
    subprocess.run([compiler, *flags, host, SOURCE, "-o", tmp_path / "roots"], check=True)
