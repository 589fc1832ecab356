"""The package as a whole: what it holds, what it imports, how large its parts are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import diffcore
from diffcore._engine import native
from diffcore._engine.info import collect_info
from support.subprocess import run_python

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "diffcore"
SOURCE_SUFFIXES = {".py", ".pyi", ".h", ".cc", ".cu", ".cuh"}
SOURCE_FOLDERS = ("csrc", "python", "tests", "benchmarks", "examples", "tools")
MAX_LINES = 400

# Imports only go down: each name may import from those before it.
# fmt: off
ORDER = [
    "_C", "_types", "_devices", "_checks", "_files", "_usage", "reference", "coefficients",
    "_engine", "_kernels", "noise", "guidance", "ops", "schedules", "timesteps", "solvers",
    "sampling", "diffusion", "losses", "flows", "edm", "likelihood", "vae",
    "consistency", "testing", "sigmas", "spacings", "diffusers", "demo",
    "cli", "__main__",
]
# fmt: on
LEVEL = {name: level for level, name in enumerate(ORDER)}


# ---- size and shape of the sources -----------------------------------------------------------


def source_files() -> list[Path]:
    files = [f for folder in SOURCE_FOLDERS for f in (ROOT / folder).rglob("*")]
    return [f for f in files if f.suffix in SOURCE_SUFFIXES]


def lines_without_docstrings(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    count = len(text.splitlines())
    if path.suffix != ".py":
        return count
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            count -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return count


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(f.relative_to(ROOT)): lines_without_docstrings(f) for f in source_files()}
    assert len(lengths) > 150  # the folders were found
    assert {f: n for f, n in lengths.items() if n > MAX_LINES} == {}


# ---- the layer rule ----------------------------------------------------------------------------


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from running_nodes(node)


def imported_names(path: Path) -> set[str]:
    """Dotted names below diffcore that a file imports when it is imported or run."""
    names: set[str] = set()
    for node in running_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("diffcore.") for name in names if name.startswith("diffcore.")}


def imported_modules(path: Path) -> set[str]:
    """Folders and modules at the top of the package that a file imports."""
    return {name.split(".")[0] for name in imported_names(path)} & LEVEL.keys()


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_files(path: Path) -> set[str]:
    """Modules of the package that a file imports, each by the longest name that is a module."""
    modules = {dotted(p) for p in python_modules()}
    found = set()
    for name in imported_names(path):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def python_modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", python_modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert module in LEVEL, f"{module} has no place in LAYERS of {Path(__file__).name}"
    upward = {m for m in imported_modules(path) - {module} if LEVEL[m] > LEVEL[module]}
    assert upward == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    arrows = {dotted(path): imported_files(path) for path in python_modules()}
    done: set[str] = set()
    while ready := {m for m, to in arrows.items() if m not in done and to <= done | {m}}:
        done |= ready
    assert arrows.keys() - done == set(), "these import each other, or something that does"


@pytest.mark.parametrize("folder", ["reference", "coefficients"])
def test_the_specifications_import_only_torch(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        roots = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                own = node.module.split(".")[:2] in (
                    ["diffcore", folder],
                    ["diffcore", "_checks"],
                    ["diffcore", "_devices"],
                    ["diffcore", "_types"],
                )
                roots |= set() if own else {node.module.split(".")[0]}
        assert roots - set(sys.stdlib_module_names) == {"torch"} or path.stem == "__init__", path


# ---- importing ---------------------------------------------------------------------------------


def test_imports_without_a_gpu() -> None:
    out = run_python(
        "import diffcore, torch\nx = torch.ones(2)\nprint(diffcore.add_noise(x, x, 0.5, 0.25))",
        CUDA_VISIBLE_DEVICES="",
    )
    assert out.strip() == "tensor([0.7500, 0.7500])"


def test_import_loads_no_optional_dependency() -> None:
    out = run_python(
        "import sys, diffcore\n"
        "optional = 'matplotlib sklearn mlxtend typer rich safetensors diffusers PIL'.split()\n"
        "print([m for m in optional if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_import_loads_no_compiler() -> None:
    """Dynamo, AOTAutograd and DTensor take several times as long to load as diffcore."""
    out = run_python(
        "import sys, torch\nbefore = set(sys.modules)\nimport diffcore\n"
        "heavy = 'torch._dynamo', 'torch._inductor', 'torch._functorch'\n"
        "heavy += ('torch.distributed.tensor',)\n"
        "print([m for m in set(sys.modules) - before if m.startswith(heavy)])"
    )
    assert out.strip() == "[]"


def test_import_does_little_for_each_operator() -> None:
    """Calls, not time, which other processes change; 101,000 on Python 3.11 with torch 2.13.

    What torch makes of the backward pass of an operator takes 700 calls, of which there are 105.
    """
    out = run_python(
        "import sys, torch\n"
        "calls = 0\n"
        "def count(frame, event, argument):\n"
        "    global calls\n"
        "    calls += event in ('call', 'c_call')\n"
        "sys.setprofile(count)\n"
        "import diffcore\n"
        "sys.setprofile(None)\n"
        "print(calls)"
    )
    assert 1_000 < int(out) < 140_000


def test_import_does_not_start_cuda() -> None:
    out = run_python("import diffcore, torch; print(torch.cuda.is_initialized())")
    assert out.strip() == "False"


def test_every_public_name_is_documented() -> None:
    public = {name: value for name, value in vars(diffcore).items() if not name.startswith("_")}
    functions = {name: value for name, value in public.items() if callable(value)}
    assert len(functions) > 20
    assert [name for name, value in functions.items() if not value.__doc__] == []


def test_samplers_are_found_from_the_top() -> None:
    out = run_python(
        "import diffcore as d, torch\n"
        "table = d.solvers.euler_table([2.0, 1.0, 0.0], prediction_type='sample')\n"
        "assert isinstance(table, d.SolverTable)\n"
        "x, model = torch.ones(1, 2), lambda x, t: 0 * x\n"
        "print(d.sample(model, x, table), d.sampling.sample_euler(model, x, [2.0, 0.0]))"
    )
    assert out.strip() == "tensor([[0., 0.]]) tensor([[0., 0.]])"


def test_the_version_is_written_in_pyproject_alone() -> None:
    written = re.findall(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert [diffcore.__version__] == written
    assert collect_info()["version"] == diffcore.__version__
    with pytest.raises(AttributeError, match="no attribute 'versio'"):
        _ = diffcore.versio  # type: ignore[attr-defined]


def test_the_version_without_a_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the installed package; a tree that is not installed makes none up."""
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(metadata, "version", lambda name: {"diffcore": "1.2.3"}[name])
    assert diffcore.__version__ == "1.2.3"

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert diffcore.__version__ == "0+unknown"


def test_a_missing_peer_fails_where_peers_are_required(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    import conftest

    monkeypatch.setattr(pytestconfig.option, "require_peers", True)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(pytest.UsageError, match="diffusers is not installed"):
        conftest.pytest_configure(pytestconfig)
    monkeypatch.setattr(pytestconfig.option, "require_peers", False)
    conftest.pytest_configure(pytestconfig)


# ---- the binary --------------------------------------------------------------------------------


def test_stub_lists_the_names_of_the_compiled_module() -> None:
    from diffcore import _C

    stub = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    declared = set()
    for node in stub.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            declared.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            declared.add(node.target.id)
    private = {name for name in dir(_C) if name.startswith("__")}
    assert declared - private == set(dir(_C)) - private


def test_columns_have_the_order_that_the_compiled_module_reads() -> None:
    from diffcore import _C
    from diffcore._engine.native import check_columns
    from diffcore.coefficients.bound import VLB_COLUMNS
    from diffcore.coefficients.step import STEP_COLUMNS

    check_columns(_C)
    right = {
        "STEP_COLUMNS": ("guidance", "gain", "c_u", "e_u", "threshold", *STEP_COLUMNS),
        "VLB_COLUMNS": ("scale", *VLB_COLUMNS),
    }
    check_columns(SimpleNamespace(**right))
    for name, columns in right.items():
        wrong = (*columns[:6], columns[7], columns[6], *columns[8:])
        with pytest.raises(ImportError, match=name):
            check_columns(SimpleNamespace(**{**right, name: wrong}))


def shared_object() -> Path:
    from diffcore import _C

    assert _C.__file__ is not None
    return Path(_C.__file__)


def test_binary_is_small() -> None:
    # `make wheel` holds the wheel, a compressed binary and a little Python, to a size of its own
    # (tools/check_wheel.py). A development build is not for more architectures.
    assert shared_object().stat().st_size < 16_000_000


def test_binary_needs_no_torch_and_no_cuda_library() -> None:
    out = subprocess.run(
        ["readelf", "-d", shared_object()], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in out.splitlines() if "(NEEDED)" in line]
    assert needed
    assert [line for line in needed if "torch" in line or "cuda" in line or "c10" in line] == []


def isa_objects() -> list[Path]:
    """Objects of csrc/cpu/kernels.cc, one for each instruction set, in the build folders."""
    found = (ROOT / "build").rglob("cpu_kernels_*.dir/csrc/cpu/kernels.cc.o")
    return sorted(path for path in found if "sanitize" not in path.parts)


def test_instruction_set_objects_share_no_code() -> None:
    # The linker keeps one copy of a weak symbol. If an object compiled for AVX-512 defines, say, an
    # inline function of the standard library, that copy may end up in every caller, and crash on an
    # older CPU. So each object may define weak symbols only inside its own namespace.
    objects = isa_objects()
    if not objects:
        pytest.skip("no build folder here: this checks the objects of `make build`")
    for path in objects:
        isa = path.parts[path.parts.index("CMakeFiles") + 1].removesuffix(".dir").rpartition("_")[2]
        out = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        for line in out.splitlines():
            *_, kind, name = line.split()
            if kind in "TWVu":  # global, weak function, weak object, unique: what the linker merges
                assert f"8diffcore{len(isa)}{isa}" in name, f"{path} defines {name}"
            elif kind == "U":
                # of libm, for double; of libc, which knows the CPU
                assert name in ("hypot", "log", "memcpy", "memset"), f"{path} needs {name}"
