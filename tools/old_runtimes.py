"""Link for Linux distributions from glibc 2.28 on (manylinux_2_28), on a machine with newer ones.

    flags="$(python tools/old_runtimes.py build/old-runtimes)"
    CMAKE_ARGS="'-DCMAKE_MODULE_LINKER_FLAGS=$flags'" python -m build

A linker takes the newest version of a symbol that the C library of the machine defines, such as
``log@GLIBC_2.29``, though the library keeps the older ones for older programs. This makes stubs of
the C library that define only what glibc 2.28 had, compiles `tools/old_runtimes.cc`, which has what
headers of newer compilers ask for, and prints the flags that link a module with both. Only that
object gets into the wheel. `tools/check_wheel.py` checks the result.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

GLIBC = (2, 28)
# Libraries of glibc 2.28, and which names are theirs: later all but libm's moved to libc.
LIBRARIES = {
    "libm.so.6": None,
    "libpthread.so.0": r"pthread_|sem_",
    "libdl.so.2": r"dl(addr|close|error|info|mopen|open|sym|vsym)",
    "librt.so.1": r"(aio|lio|mq|shm|timer)_",
    "libc.so.6": r"",
}
SYMBOL = re.compile(r"[0-9a-f]+ (?P<kind>[A-Za-z]) (?P<name>\w+)@@?GLIBC_(?P<version>[0-9.]+)$")

Symbols = dict[str, tuple[tuple[int, ...], str]]


def oldest_that_will_do(listing: str) -> Symbols:
    """Version and kind of each symbol that glibc 2.28 had, the newest version of those.

    Args:
        listing: what ``nm -D --with-symbol-versions --defined-only`` prints for one library.
    """
    found: Symbols = {}
    for match in filter(None, map(SYMBOL.match, listing.splitlines())):
        version = tuple(int(part) for part in match["version"].split("."))
        if version <= GLIBC:
            found[match["name"]] = max(found.get(match["name"], ((), "")), (version, match["kind"]))
    return found


def dotted(version: tuple[int, ...]) -> str:
    """``GLIBC_2.2.5`` for ``(2, 2, 5)``."""
    return "GLIBC_" + ".".join(map(str, version))


def assembly(symbols: Symbols) -> str:
    """Empty definitions of `symbols`, each in its version."""
    lines = [".text"]
    for number, (name, (version, kind)) in enumerate(sorted(symbols.items())):
        what = "object" if kind in "BDRVGS" else "function"
        lines += [f".globl s{number}", f".type s{number}, %{what}", f"s{number}: .quad 0"]
        lines += [f".size s{number}, 8", f".symver s{number}, {name}@@{dotted(version)}, remove"]
    return "\n".join(lines) + "\n"


def version_script(symbols: Symbols) -> str:
    """A linker script that declares the versions of `symbols`."""
    versions = sorted({version for version, _ in symbols.values()})
    return "".join(f"{dotted(version)} {{}};\n" for version in versions)


def compiler() -> list[str]:
    """The C++ compiler, as CMake finds it."""
    return shlex.split(os.environ.get("CXX", "c++"))


def run(*command: str | Path) -> str:
    """Standard output of a command, which must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def file_of_compiler(name: str) -> Path:
    """Where the compiler finds a file of the C library.

    Raises:
        SystemExit: it finds none, so its C library is not glibc.
    """
    path = Path(run(*compiler(), f"-print-file-name={name}"))
    if not path.is_absolute():
        raise SystemExit(f"{shlex.join(compiler())} finds no {name}: this needs glibc")
    return path


def link_stub(folder: Path, soname: str, symbols: Symbols) -> Path:
    """A shared library called `soname` that defines `symbols` and does nothing."""
    source, script, stub = (folder / f"{soname}{suffix}" for suffix in (".s", ".map", ""))
    source.write_text(assembly(symbols), encoding="utf-8")
    script.write_text(version_script(symbols), encoding="utf-8")
    flags = ("-shared", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script={script}")
    run(*compiler(), *flags, "-o", stub, source)
    return stub


def make(folder: Path) -> list[str]:
    """Fill `folder` with the stubs and the object; the flags that link with them."""
    folder.mkdir(parents=True, exist_ok=True)
    read = "nm", "-D", "--with-symbol-versions", "--defined-only"
    libm = oldest_that_will_do(run(*read, file_of_compiler("libm.so.6")))
    libc: Symbols = {}
    for name in [name for name in LIBRARIES if name != "libm.so.6"]:
        libc |= oldest_that_will_do(run(*read, file_of_compiler(name)))
    optional = []  # what a module needs only if it uses a symbol of it
    for soname, pattern in LIBRARIES.items():
        symbols = libm
        if pattern is not None:
            symbols = {name: libc.pop(name) for name in list(libc) if re.match(pattern, name)}
        stub = link_stub(folder, soname, symbols)
        if pattern:
            optional.append(str(stub))
        if soname != "libc.so.6":
            link = folder / f"{soname.partition('.')[0]}.so"  # what -lm, -lpthread, ... find
            link.unlink(missing_ok=True)
            link.symlink_to(stub.name)
    # The C library has a part that is linked statically; the loader has __tls_get_addr.
    loader = re.search(r"\S*/ld-linux\S+", file_of_compiler("libc.so").read_text(encoding="utf-8"))
    if loader:
        optional.append(loader[0])
    needed = f"{folder / 'libc.so.6'} {file_of_compiler('libc_nonshared.a')}"
    script = f"GROUP({needed} AS_NEEDED({' '.join(optional)}))\n"
    (folder / "libc.so").write_text(script, encoding="utf-8")
    shims = folder / "old_runtimes.o"
    source = Path(__file__).with_suffix(".cc")
    run(*compiler(), "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-c", "-o", shims, source)
    return [f"-L{folder}", str(shims)]


def main() -> None:
    """Print the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the stubs go")
    print(shlex.join(make(parser.parse_args().folder.resolve())))


if __name__ == "__main__":
    main()
