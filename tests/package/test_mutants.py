"""The lists of mutants fit the sources: each edit finds its text, and each test its file."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _module(path: str) -> ModuleType:
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_mutants_of_signs_apply(tmp_path: Path) -> None:
    tool = _module("tools/mutants.py")
    for folder, suffixes, native in (("csrc", {".h", ".cc"}, True), ("python", {".py"}, False)):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
        mutants = [m for m in tool.MUTANTS if m.native == native]
        assert mutants
        tool.apply(mutants, tmp_path / folder, suffixes)
    for mutant in tool.MUTANTS:
        path = mutant.tests.split()[0].split("::")[0]
        assert (ROOT / path).exists(), mutant


def test_the_mutants_of_the_cuda_loops_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "emulation")
    tool = _module("tests/emulation/mutants.py")
    assert tool.MUTANTS
    for mutant in tool.MUTANTS:
        text = (ROOT / "csrc" / "cuda" / mutant.file).read_text(encoding="utf-8")
        assert mutant.edit(text) != text, mutant.name
