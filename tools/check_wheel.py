"""Check a built wheel and sdist, then use the wheel in a throw-away environment.

    python tools/check_wheel.py dist

Checks what is inside, how large it is and which shared libraries it asks for;
`tools/wheel_smoke.py` does the rest.
"""

from __future__ import annotations

import argparse
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


def only(folder: Path, pattern: str) -> Path:
    """The one file in `folder` that matches `pattern`.

    Raises:
        SystemExit: there is none, or there are several.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"wanted one {pattern} in {folder}, found {[p.name for p in found]}")
    return found[0]


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
    if not any(n.startswith("diffcore/_C.") and n.endswith(".so") for n in names):
        sys.exit("the compiled module diffcore/_C is not in the wheel")
    if not any(n.endswith("/LICENSE") for n in names):
        sys.exit("the license is not in the wheel")
    strays = [n for n in names if n.endswith((".cc", ".cu", ".cuh", ".h", ".o", ".a"))]
    strays += [n for n in names if not n.startswith(("diffcore/", "diffcore-"))]
    if strays:
        sys.exit(f"these do not belong in the wheel: {strays}")


def needed_libraries(shared_object: Path) -> list[str]:
    """The shared libraries that `shared_object` asks the loader for (ELF NEEDED entries)."""
    dynamic = subprocess.run(
        ["readelf", "-d", shared_object], capture_output=True, text=True, check=True
    ).stdout
    return [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]


def check_needed(wheel: Path) -> None:
    """The binary asks for nothing but the system's runtimes and torch's OpenMP."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                libraries = needed_libraries(Path(archive.extract(name, folder)))
                print(f"{name} needs {', '.join(libraries)}")
                foreign = [lib for lib in libraries if not lib.startswith(ALLOWED_LIBRARIES)]
                if foreign:
                    sys.exit(f"{name} must not need {foreign}")


def check_sdist_contents(sdist: Path) -> None:
    """The sdist holds all that a build reads."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "python"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    wanted = ["CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", *tracked]
    missing = [name for name in wanted if name not in names]
    if missing:
        sys.exit(f"{sdist.name} lacks {missing}")


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
    folder = parser.parse_args().dist.resolve()
    wheel = only(folder, "*.whl")
    check_wheel_contents(wheel)
    check_needed(wheel)
    check_sdist_contents(only(folder, "*.tar.gz"))
    check_in_fresh_environment(wheel, "[cli]")
    print(f"{wheel.name}: ready")


if __name__ == "__main__":
    main()
