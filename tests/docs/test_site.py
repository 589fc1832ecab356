"""The site builds without a warning, documents every public name and asks no other server."""

from __future__ import annotations

import html
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

import diffcore
from support.pages import ROOT

REFERENCE = ROOT / "docs" / "reference"
MODULES = (
    "diffcore",
    "diffcore.coefficients",
    "diffcore.consistency",
    "diffcore.diffusion",
    "diffcore.flows",
    "diffcore.edm",
    "diffcore.guidance",
    "diffcore.likelihood",
    "diffcore.losses",
    "diffcore.noise",
    "diffcore.ops",
    "diffcore.sampling",
    "diffcore.schedules",
    "diffcore.sigmas",
    "diffcore.solvers",
    "diffcore.spacings",
    "diffcore.timesteps",
    "diffcore.testing",
    "diffcore.vae",
)
if importlib.util.find_spec("diffusers"):
    MODULES += ("diffcore.diffusers", "diffcore.diffusers.training")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        try:
            missing = importlib.util.find_spec(package) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            pytest.skip(f"{package} is not installed: pip install 'diffcore[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def inventory(site: Path) -> set[str]:
    """Every name that a page of the reference documents, under all its import paths.

    Modules left out: a function of the same name would count as documented by them.
    """
    *_, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    entries = [line.split() for line in zlib.decompress(packed).decode().splitlines()]
    return {name for name, role, *_ in entries if role != "py:module"}


def public_names(module: ModuleType) -> list[str]:
    return sorted(module.__all__)


def paths_of(module: ModuleType, name: str) -> set[str]:
    """The import paths that the object may be documented under."""
    value = getattr(module, name)
    found = {f"{module.__name__}.{name}"}
    if inspect.isfunction(value) or inspect.isclass(value):
        found.add(f"{value.__module__}.{value.__qualname__}")
    if not inspect.isfunction(value):
        found |= {
            f"{m}.{name}" for m in MODULES if vars(importlib.import_module(m)).get(name) is value
        }
    return found


def undocumented(module: ModuleType, inventory: set[str]) -> list[str]:
    missing = []
    for name in public_names(module):
        value = getattr(module, name)
        if inspect.ismodule(value) or name.startswith("__"):
            continue
        paths = paths_of(module, name) & inventory
        if not paths:
            missing.append(name)
        elif inspect.isclass(value):
            members = [m for m, _ in inspect.getmembers(value) if not m.startswith("_")]
            documented = [m for m in members if inspect.getdoc(inspect.getattr_static(value, m))]
            fields = getattr(value, "__dataclass_fields__", ())  # those are among the parameters
            missing += [
                f"{name}.{m}"
                for m in documented
                if m not in fields and not any(f"{p}.{m}" in inventory for p in paths)
            ]
    return missing


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_on_a_page(name: str, inventory: set[str]) -> None:
    module = importlib.import_module(name)
    assert public_names(module)
    assert undocumented(module, inventory) == []


def test_a_name_that_is_on_no_page_is_found(inventory: set[str]) -> None:
    without = {n for n in inventory if not n.endswith((".q_sample", ".PhiloxNoise.at"))}
    assert undocumented(diffcore.ops, without) == ["PhiloxNoise.at", "q_sample"]


def test_every_public_module_is_checked() -> None:
    # demo is the command's; cli has a page; reference is the specification, one file for each op.
    package = Path(diffcore.__file__).parent
    files = {p.stem for p in package.glob("*.py")} | {
        p.parent.name for p in package.glob("*/__init__.py")
    }
    public = {f"diffcore.{n}" for n in files if not n.startswith("_")}
    known = {*MODULES, "diffcore.cli", "diffcore.demo", "diffcore.diffusers", "diffcore.reference"}
    assert public - known == set()


def test_pages_ask_no_other_server(site: Path) -> None:
    # What a browser fetches by itself; links that a reader may follow are another thing.
    fetched = re.compile(
        r"<(?:script|img|iframe|source|link(?![^>]*rel=\"?canonical))\b[^>]*?"
        r"(?:src|href)=\"?((?:https?:)?//[^\s\">]+)"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert {url for p in pages for url in fetched.findall(p.read_text(encoding="utf-8"))} == set()
    assert fetched.findall('<script src="https://cdn.example/x.js">')  # the pattern can match
    styles = [p.read_text(encoding="utf-8") for p in site.rglob("*.css")]
    assert [
        u for s in styles for u in re.findall(r"(?:url\(|@import )[\"']?(https?:[^)\"']*)", s)
    ] == []


def test_katex_and_its_fonts_are_in_the_site(site: Path) -> None:
    style = (site / "assets/katex/katex.min.css").read_text(encoding="utf-8")
    fonts = set(re.findall(r"url\(([^)]*)\)", style))
    assert fonts
    assert [f for f in fonts if not (site / "assets/katex" / f).is_file()] == []
    page = (site / "glossary/index.html").read_text(encoding="utf-8")
    for part in ("katex/katex.min.css", "katex/katex.min.js", "assets/site.js"):
        assert part in page
    assert 'class="arithmatex">\\(' in page


def test_katex_reads_every_formula(site: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: formulas are typeset in the browser only")
    formula = re.compile(r'class="arithmatex">\\[(\[](.*?)\\[)\]]</', re.DOTALL)
    formulas = {
        f"{page.parent.name}: {html.unescape(f)}"
        for page in site.rglob("*.html")
        for f in formula.findall(page.read_text(encoding="utf-8"))
    }
    assert len(formulas) > 10
    code = (
        f"const katex = require({json.dumps(str(site / 'assets/katex/katex.min.js'))});"
        "const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "const bad = given.filter(f => { try { katex.renderToString(f.replace(/^[^:]*: /, ''),"
        " {displayMode: true, strict: 'ignore'}); } catch (e) { return true; } });"
        "console.log(JSON.stringify(bad));"
    )
    result = subprocess.run(
        [node, "-e", code],
        input=json.dumps(sorted(formulas)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == []


def test_search_finds_what_people_looked_for(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    words = " ".join(f"{d['title']} {d['text']}" for d in index["docs"]).lower()
    wanted = "get_sigmas_flow from_alphas_cumprod linear_combination warm_up img2img inversion"
    wanted += " lightning inpaint callback clip_sample_range capture stretch_to_terminal"
    assert [w for w in wanted.split() if w not in words] == []


def test_no_rest_is_left_in_the_reference(site: Path) -> None:
    pages = [p.read_text(encoding="utf-8") for p in (site / "reference").rglob("index.html")]
    assert [m for p in pages for m in re.findall(r":(?:func|class|mod|meth):|::</p>", p)] == []


def test_every_option_of_the_command_is_on_its_page() -> None:
    typer = pytest.importorskip("typer", reason="the command needs the extra [cli]")
    from diffcore._usage import benchmarks
    from diffcore.cli import app

    page = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(re.findall(r"^## `diffcore (\w+)`", page, re.MULTILINE))
    named = [o for c in commands.values() for p in c.params for o in p.opts]
    named += [o for action in benchmarks().parser()._actions for o in action.option_strings]
    options = {o for o in named if o.startswith("--")}
    assert options | {"--help", "--version"} == set(
        re.findall(r"^\| `(--[\w-]+)", page, re.MULTILINE)
    )


def test_every_environment_variable_is_on_its_page() -> None:
    page = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    read = re.compile(r'(?:environ\.get\(|environ\[|getenv\(|env = )\s*"(DIFFCORE_\w+)"')
    sources = [
        *(ROOT / "python").rglob("*.py"),
        *(ROOT / "csrc").rglob("*.c*"),
        ROOT / "pyproject.toml",
    ]
    found = {name for p in sources for name in read.findall(p.read_text(encoding="utf-8"))}
    assert {"DIFFCORE_BACKEND", "DIFFCORE_ISA", "DIFFCORE_CUDA"} <= found
    assert found == set(re.findall(r"^\| `(DIFFCORE_\w+)`", page, re.MULTILINE))
