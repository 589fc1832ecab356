"""What a wheel may ask of a distribution, and the settings that build and publish it."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_wheel  # noqa: E402
import old_runtimes  # noqa: E402
import pypi_readme  # noqa: E402
import release_notes  # noqa: E402

# ---- symbol versions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "allowed"),
    [
        ("memcpy@GLIBC_2.14", True),
        ("log@GLIBC_2.2.5", True),
        ("fcntl64@GLIBC_2.28", True),
        ("log@GLIBC_2.29", False),
        ("dlopen@GLIBC_2.34", False),
        ("_ZSt28__throw_bad_array_new_lengthv@GLIBCXX_3.4.29", False),
        ("_ZSt24__throw_out_of_range_fmtPKcz@GLIBCXX_3.4.20", True),
        ("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv@CXXABI_1.3.13", False),
        ("__cxa_throw_bad_array_new_length@CXXABI_1.3.8", True),
        ("GOMP_parallel@GOMP_4.0", True),
        ("PyList_New", True),
        ("_Py_Dealloc", True),
        ("stat", False),
    ],
)
def test_symbols_above_the_floor_are_named(symbol: str, allowed: bool) -> None:
    assert check_wheel.too_new(["malloc@GLIBC_2.2.5", symbol]) == ([] if allowed else [symbol])


@pytest.mark.parametrize("modules", [[], ["_C.cp311.so", "_C.cp312.so"]])
def test_a_wheel_has_one_compiled_module(tmp_path: Path, modules: list[str]) -> None:
    wheel = tmp_path / "diffcore-1-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("__init__.py", "py.typed", "_C.pyi", *modules):
            archive.writestr(f"diffcore/{name}", "")
    with pytest.raises(SystemExit, match="wanted one compiled module diffcore/_C in the wheel"):
        check_wheel.check_wheel_contents(wheel)


def test_newest_versions_are_those_of_numbers() -> None:
    symbols = [
        "a@GLIBC_2.9",
        "b@GLIBC_2.17",
        "c@GLIBC_2.2.5",
        "d@GLIBCXX_3.4",
        "e@GOMP_4.0",
        "Py_F",
    ]
    assert check_wheel.newest_versions(symbols) == "GLIBC_2.17, GLIBCXX_3.4"


@pytest.mark.parametrize(
    ("tag", "allowed"),
    [
        ("manylinux_2_28_x86_64", True),
        ("manylinux_2_17_aarch64", True),
        ("manylinux_2_24_x86_64.manylinux_2_28_x86_64", True),
        ("manylinux_2_35_x86_64", False),
        ("linux_x86_64", False),
    ],
)
def test_a_tag_that_an_index_refuses_is_an_error(tag: str, allowed: bool) -> None:
    name = f"diffcore-0.1.0-cp311-cp311-{tag}.whl"
    if allowed:
        check_wheel.check_tag(name)
    else:
        with pytest.raises(SystemExit, match="manylinux_2_28"):
            check_wheel.check_tag(name)


def test_the_newest_version_that_is_old_enough_is_taken() -> None:
    listing = """
0000000000013040 T log@GLIBC_2.2.5
0000000000039270 T log@@GLIBC_2.29
0000000000000010 W new@@GLIBC_2.29
0000000000000020 i memcpy@@GLIBC_2.14
0000000000000030 i memcpy@GLIBC_2.2.5
0000000000000040 B environ@@GLIBC_2.2.5
0000000000000000 A GLIBC_2.2.5
0000000000000050 T _dl_x@@GLIBC_PRIVATE
"""
    assert old_runtimes.oldest_that_will_do(listing) == {
        "log": ((2, 2, 5), "T"),
        "memcpy": ((2, 14), "i"),
        "environ": ((2, 2, 5), "B"),
    }


# What asks for newer symbols: the functions of libm and of threads, and what inline functions of
# libstdc++ call. `copies` is the number of owners of one exception while 4 pointers to it exist,
# and after they are gone.
PROGRAM = """
#include <cmath>
#include <exception>
#include <memory>
#include <new>
#include <pthread.h>
#include <vector>
static int alive = 0;
struct Counted {
  Counted() { ++alive; }
  Counted(const Counted&) { ++alive; }
  ~Counted() { --alive; }
};
extern "C" double logarithm(double x) { return std::log(x); }
extern "C" double length(double x, double y) { return std::hypot(x, y); }
extern "C" int joined(int (*f)()) {
  pthread_t thread;
  auto run = [](void* g) -> void* { return reinterpret_cast<void*>(long(((int (*)())(g))())); };
  void* result = nullptr;
  if (pthread_create(&thread, nullptr, run, (void*)f)) return -1;
  pthread_join(thread, &result);
  return int(long(result));
}
extern "C" int while_copied() {
  std::exception_ptr first;
  try { throw Counted(); } catch (...) { first = std::current_exception(); }
  std::vector<std::exception_ptr> copies(3, first);
  first = nullptr;
  copies.pop_back();
  int seen = alive;
  try { std::rethrow_exception(copies[1]); } catch (const Counted&) { seen += 10 * alive; }
  return seen;
}
extern "C" int afterwards() { return alive; }
extern "C" int too_long(long n) {
  try { return new int[n] == nullptr; } catch (const std::bad_array_new_length&) { return 7; }
}
extern "C" void ends() noexcept { throw Counted(); }
extern "C" int shared() {
  auto one = std::make_shared<Counted>();
  auto two = one;
  return int(two.use_count()) + 10 * alive;
}
"""


def build_program(folder: Path, *flags: str) -> Path:
    source, library = folder / "program.cc", folder / f"program{len(flags)}.so"
    source.write_text(PROGRAM)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [
        *compiler,
        "-std=c++17",
        "-shared",
        "-fPIC",
        *flags,
        "-o",
        library,
        source,
        "-pthread",
    ]
    subprocess.run(command, check=True)
    return library


def glibc() -> tuple[int, ...]:
    """The version of the C library of this machine; empty for another library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except ValueError:
        return ()
    return tuple(map(int, version.split("."))) if name == "glibc" else ()


needs_glibc = pytest.mark.skipif(
    not glibc() or shutil.which("c++") is None, reason="needs glibc and a C++ compiler"
)


@needs_glibc
def test_a_library_that_links_against_the_stubs_runs_on_old_distributions(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "tools/old_runtimes.py", tmp_path / "stubs"],
        capture_output=True,
        text=True,
        check=True,
    )
    old = build_program(tmp_path, *shlex.split(made.stdout))
    symbols = check_wheel.undefined_symbols(old)
    names = {symbol.partition("@")[0] for symbol in symbols}
    assert {"log", "hypot", "pthread_create"} <= names
    assert check_wheel.too_new(symbols) == []
    assert "libpthread.so.0" in check_wheel.needed_libraries(old)

    library = ctypes.CDLL(str(old))
    library.logarithm.restype = library.length.restype = ctypes.c_double
    library.logarithm.argtypes = [ctypes.c_double]
    library.length.argtypes = [ctypes.c_double, ctypes.c_double]
    assert library.logarithm(1.0) == 0.0
    assert library.length(3.0, 4.0) == 5.0
    forty_two = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 42)
    assert library.joined(forty_two) == 42
    assert (library.while_copied(), library.afterwards()) == (11, 0)
    assert library.too_long(ctypes.c_long(-1)) == 7
    assert (library.shared(), library.afterwards()) == (12, 0)
    ended = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(old)!r}).ends()"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == -signal.SIGABRT
    assert "instance of 'Counted'" in ended.stderr


@needs_glibc
def test_without_the_stubs_the_check_names_symbol_and_version(tmp_path: Path) -> None:
    if glibc() < (2, 29):
        pytest.skip("this machine's C library is old enough by itself")
    symbols = check_wheel.undefined_symbols(build_program(tmp_path))
    assert "log@GLIBC_2.29" in check_wheel.too_new(symbols)


# ---- what the index shows ------------------------------------------------------------------------

REPOSITORY = "https://github.com/some/where"
RAW = "https://raw.githubusercontent.com/some/where"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a [b](docs/c.md#d).", f"a [b]({REPOSITORY}/blob/v1.2.3/docs/c.md#d)."),
        ("![b](docs/c.png)", f"![b]({RAW}/v1.2.3/docs/c.png)"),
        ("[b](#c) [d](https://e.f/g)", "[b](#c) [d](https://e.f/g)"),
        (
            "| ![b](c.png) | [d](e) |",
            f"| ![b]({RAW}/v1.2.3/c.png) | [d]({REPOSITORY}/blob/v1.2.3/e) |",
        ),
        ("`x[0](y)`", "`x[0](y)`"),
    ],
)
def test_links_of_the_readme_lead_into_the_repository(text: str, wanted: str) -> None:
    assert pypi_readme.with_absolute_links(text, REPOSITORY, "v1.2.3") == wanted


def test_every_relative_link_of_the_readme_becomes_absolute() -> None:
    project = {"urls": {"Repository": REPOSITORY}, "version": "1.2.3"}
    made = pypi_readme.dynamic_metadata({}, project)["readme"]["text"]
    assert f"]({RAW}/v1.2.3/docs/assets/speed.png)" in made
    assert check_wheel.relative_links(pypi_readme.README.read_text("utf-8")) != []
    assert check_wheel.relative_links(made) == []


CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.0] - 2027-01-31

### Added

- Something.

## [1.1.0] - 2026-12-01

- Older.
"""


def test_the_notes_of_a_release_are_its_section() -> None:
    project = 'name = "x"\nversion = "1.2.0"\n'
    assert release_notes.notes(CHANGELOG, project, "v1.2.0") == "### Added\n\n- Something.\n"
    older = release_notes.notes(CHANGELOG, 'version = "1.1.0"\n', "v1.1.0")
    assert older == "- Older.\n"


@pytest.mark.parametrize(
    ("project", "tag", "message"),
    [
        ('version = "1.2.0"', "v1.2.1", "the tag is v1.2.1, but pyproject.toml has"),
        ('version = "1.3.0"', "v1.3.0", "has no text below"),
        ('version = "1x2.0"', "v1x2.0", "has no text below"),
    ],
)
def test_a_tag_without_its_version_or_section_is_an_error(
    project: str, tag: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        release_notes.notes(CHANGELOG, project + "\n", tag)


# ---- settings ------------------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def workflow(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))


def steps(name: str) -> Iterator[dict[str, Any]]:
    for job in workflow(name)["jobs"].values():
        yield from job["steps"]


def test_wheels_are_tested_on_the_pythons_that_the_classifiers_name(
    pyproject: dict[str, Any],
) -> None:
    versions = {
        line.rpartition(" ")[2]
        for line in pyproject["project"]["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    }
    settings = pyproject["tool"]["cibuildwheel"]
    assert "test-skip" not in settings
    plain = [name for name in settings["build"].split() if "t-" not in name]
    assert {re.sub(r"^cp3(\d+)-\*$", r"3.\1", name) for name in plain} == versions
    assert min(versions, key=lambda v: int(v[2:])) == pyproject["project"]["requires-python"][2:]
    matrix = workflow("wheels.yml")["jobs"]["wheels"]["strategy"]["matrix"]["python"]
    assert [f"{name}-*" for name in matrix] == settings["build"].split()


def test_the_wheels_in_the_workflow_are_repaired_and_checked_as_here(
    pyproject: dict[str, Any],
) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    settings = pyproject["tool"]["cibuildwheel"]
    linux = settings["linux"]
    repair = " && ".join(linux["repair-wheel-command"])
    for wanted in ("--exclude libgomp.so.1", "--only-plat", "--zip-compression-level 9"):
        assert wanted in makefile
        assert wanted in repair
    assert "tools/check_wheel.py --wheel-only" in repair
    assert "tools/wheel_smoke.py" in settings["test-command"]
    assert "tools/install_cuda.sh" in linux["before-all"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_call_targets_and_files_that_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"(?m)^([a-z-]+(?: [a-z-]+)*):", makefile))
    targets = {name for line in targets for name in line.split()}
    commands = [step["run"] for step in steps(path.name) if "run" in step]
    assert commands
    for command in commands:
        called = re.findall(r"(?m)^make ((?:[a-z-]+ ?)+)(?: |$)", command)
        assert {name for line in called for name in line.split()} <= targets, command
        for file in re.findall(r"(?:tools|benchmarks|tests)/[\w/]+\.\w+", command):
            assert (ROOT / file).is_file(), file
    for step in steps(path.name):
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@(v\d[\w.]*|release/v1)", step["uses"])


def test_only_a_tag_publishes_and_without_a_stored_secret() -> None:
    text = (ROOT / ".github/workflows/wheels.yml").read_text("utf-8")
    jobs = workflow("wheels.yml")["jobs"]
    assert "secrets." not in text
    assert workflow("wheels.yml")["permissions"] == {"contents": "read"}
    allowed = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert allowed == {"publish": {"id-token": "write"}, "notes": {"contents": "write"}}
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert {jobs[name]["if"] for name in allowed} == {"startsWith(github.ref, 'refs/tags/v')"}
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish", "notes", "nightly"}
    assert jobs["notes"]["needs"] == ["publish"]
