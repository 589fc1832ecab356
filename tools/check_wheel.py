"""Check a built wheel and sdist, then use the wheel in a throw-away environment.

    python tools/check_wheel.py [--wheel-only] dist

Checks what is inside, how large it is, which shared libraries it asks for and in which versions,
and that the sdist builds without git; `tools/wheel_smoke.py` does the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 10_000_000
# The runtimes that every Linux has, and the OpenMP runtime that torch has already loaded. Not
# libtorch, libcudart or libcuda: one wheel serves every torch and imports without a driver.
ALLOWED_LIBRARIES: tuple[str, ...] = (
    "libstdc++.so",
    "libgcc_s.so",
    "libm.so",
    "libc.so",
    "ld-linux",
    "libgomp.so",
)
ALLOWED_LIBRARIES += ("libpthread.so", "libdl.so", "librt.so")
# The newest symbol versions that every distribution of manylinux_2_28 has (PEP 600, RHEL 8).
NEWEST_VERSIONS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
PLATFORM = re.compile(r"manylinux_2_(\d+)_\w+")


def only(folder: Path, pattern: str) -> Path:
    """The one file in `folder` that matches `pattern`.

    Raises:
        SystemExit: there is none, or there are several.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"wanted one {pattern} in {folder}, found {[p.name for p in found]}")
    return found[0]


def relative_links(text: str) -> list[str]:
    """The targets of Markdown links in `text` that lead to another file beside it."""
    return re.findall(r"(?<!\w)\[[^\]]*\]\((?![a-z]+:|#)([^)\s]+)\)", text)


def check_wheel_contents(wheel: Path) -> None:
    """The wheel is small and holds the package, its types and its binary, but no C++ sources."""
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size:,} bytes")
    if size >= MAX_WHEEL_BYTES:
        sys.exit(f"the wheel has {size:,} bytes, the limit is {MAX_WHEEL_BYTES:,}")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("diffcore/__init__.py", "diffcore/py.typed", "diffcore/_C.pyi"):
        if wanted not in names:
            sys.exit(f"{wanted} is not in the wheel")
    modules = [n for n in names if n.startswith("diffcore/_C.") and n.endswith(".so")]
    if len(modules) != 1:  # a build packs what lies in python/diffcore, too
        sys.exit(f"wanted one compiled module diffcore/_C in the wheel, found {modules}")
    metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode("utf-8")
    if relative := relative_links(text):
        sys.exit(f"an index cannot follow these links of the README: {relative}")
    if not any(n.endswith("/LICENSE") for n in names):
        sys.exit("the license is not in the wheel")
    strays = [n for n in names if n.endswith((".cc", ".cu", ".cuh", ".h", ".o", ".a"))]
    strays += [n for n in names if not n.startswith(("diffcore/", "diffcore-"))]
    if strays:
        sys.exit(f"these do not belong in the wheel: {strays}")


def check_tag(name: str) -> None:
    """The name of the wheel has a tag that an index accepts, no newer than manylinux_2_28."""
    for tag in name.removesuffix(".whl").rpartition("-")[2].split("."):
        found = PLATFORM.fullmatch(tag)
        if not found or int(found[1]) > NEWEST_VERSIONS["GLIBC"][1]:
            sys.exit(f"{name} must have the tag manylinux_2_28 or an older one: auditwheel repair")


def needed_libraries(shared_object: Path) -> list[str]:
    """The shared libraries that `shared_object` asks the loader for (ELF NEEDED entries)."""
    dynamic = subprocess.run(
        ["readelf", "-d", shared_object], capture_output=True, text=True, check=True
    ).stdout
    return [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]


def undefined_symbols(shared_object: Path) -> list[str]:
    """The symbols that `shared_object` needs, such as ``log@GLIBC_2.29`` or ``PyList_New``.

    Without the weak ones, which may be missing.
    """
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "--with-symbol-versions", shared_object],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [line.split()[1] for line in listing.splitlines() if line.split()[0] == "U"]


def too_new(symbols: list[str]) -> list[str]:
    """Those of `symbols` that a distribution of manylinux_2_28 may lack.

    A symbol without a version must be Python's: any other library could lack it unnoticed.
    """
    found = []
    for symbol in symbols:
        name, _, version = symbol.partition("@")
        family, _, number = version.rpartition("_")
        if family in NEWEST_VERSIONS:
            parts = tuple(int(part) for part in number.split("."))
            if parts > NEWEST_VERSIONS[family]:
                found.append(symbol)
        elif not version and not name.startswith(("Py", "_Py")):
            found.append(symbol)
    return found


def newest_versions(symbols: list[str]) -> str:
    """The newest version of each library in `symbols`, in words."""
    newest: dict[str, tuple[int, ...]] = {}
    for symbol in symbols:
        family, _, number = symbol.partition("@")[2].rpartition("_")
        if family in NEWEST_VERSIONS:
            version = tuple(int(part) for part in number.split("."))
            newest[family] = max(newest.get(family, ()), version)
    return ", ".join(f"{f}_{'.'.join(map(str, v))}" for f, v in sorted(newest.items()))


def check_binary(wheel: Path) -> None:
    """The binary asks only for the system's runtimes, in old versions, and torch's OpenMP."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                binary = Path(archive.extract(name, folder))
                libraries, symbols = needed_libraries(binary), undefined_symbols(binary)
                print(f"{name} needs {', '.join(libraries)}; {newest_versions(symbols)}")
                foreign = [lib for lib in libraries if not lib.startswith(ALLOWED_LIBRARIES)]
                if foreign:
                    sys.exit(f"{name} must not need {foreign}")
                if new := too_new(symbols):
                    sys.exit(f"{name} needs {new}, which manylinux_2_28 lacks")


def check_sdist_contents(sdist: Path) -> None:
    """The sdist holds all that a build reads, and nothing that one made."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "python"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    wanted = ["CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", *tracked]
    missing = [name for name in wanted if name not in names]
    if missing:
        sys.exit(f"{sdist.name} lacks {missing}")
    made = [name for name in names if name.endswith((".so", ".pyc", ".o"))]
    if made:
        sys.exit(f"these do not belong in {sdist.name}: {made}")


def check_sdist_builds(sdist: Path) -> None:
    """The sdist builds where there is no repository, and without a call of git.

    A quick build: the CPU's kernels for one instruction set, not optimized.
    """
    with tempfile.TemporaryDirectory(prefix="diffcore-sdist-") as name:
        folder = Path(name)
        subprocess.run(["tar", "-xzf", sdist, "-C", folder], check=True)
        calls, git = folder / "git-was-called", folder / "bin" / "git"
        git.parent.mkdir()
        git.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 1\n', encoding="utf-8")
        git.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{git.parent}{os.pathsep}{os.environ['PATH']}",
            "DIFFCORE_CUDA": "OFF",
            "CMAKE_ARGS": "-DDIFFCORE_ISAS=v2 -DDIFFCORE_KERNEL_OPTIMIZATION=-O0",
        }
        source = folder / sdist.name.removesuffix(".tar.gz")
        wheels = folder / "wheels"
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(wheels), str(source)]
        subprocess.run(build, check=True, env=environment, stdout=subprocess.DEVNULL)
        only(wheels, "*.whl")
        if calls.exists():
            sys.exit(f"the build of {sdist.name} called git {calls.read_text().splitlines()}")
    print(f"{sdist.name}: builds without git")


def check_in_fresh_environment(wheel: Path, requirement_suffix: str) -> None:
    """Install the wheel with its declared dependencies in a new environment; smoke-test it."""
    with tempfile.TemporaryDirectory(prefix="diffcore-wheel-") as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints = ["-c", str(ROOT / "constraints-dev.txt")]
        subprocess.run([*install, *constraints, f"{wheel}{requirement_suffix}"], check=True)
        # -I and another folder: the repository's own python/ must not be found.
        smoke = str(ROOT / "tools" / "wheel_smoke.py")
        subprocess.run([python, "-I", smoke], check=True, cwd=folder)


def main() -> None:
    """Run every check on the wheel and sdist of one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dist", type=Path, help="the folder that holds one wheel and one sdist")
    parser.add_argument("--wheel-only", action="store_true", help="no sdist, no installation")
    arguments = parser.parse_args()
    folder = arguments.dist.resolve()
    wheel = only(folder, "*.whl")
    check_tag(wheel.name)
    check_wheel_contents(wheel)
    check_binary(wheel)
    if arguments.wheel_only:
        return
    sdist = only(folder, "*.tar.gz")
    check_sdist_contents(sdist)
    check_sdist_builds(sdist)
    check_in_fresh_environment(wheel, "[cli]")
    print(f"{wheel.name}: ready")


if __name__ == "__main__":
    main()
