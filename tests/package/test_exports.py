"""What is exported: each family of ops lists its names once, and they appear on every level."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import diffcore
from diffcore import ops, reference

ROOT = Path(__file__).resolve().parents[2]


def families(package: ModuleType) -> list[ModuleType]:
    names = [i.name for i in pkgutil.iter_modules(package.__path__) if i.name[0] != "_"]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def public_functions(module: ModuleType) -> set[str]:
    own = inspect.getmembers(module, inspect.isfunction)
    return {n for n, f in own if f.__module__ == module.__name__ and not n.startswith("_")}


@pytest.mark.parametrize("package", [ops, reference], ids=["ops", "reference"])
def test_a_package_exports_what_its_families_list(package: ModuleType) -> None:
    listed = [n for f in families(package) for n in getattr(f, "__all__", ())]
    assert len(listed) == len(set(listed)) > 15
    assert set(listed) <= set(package.__all__)
    assert len(package.__all__) == len(set(package.__all__))
    for family in families(package):
        for name in getattr(family, "__all__", ()):
            assert getattr(package, name) is getattr(family, name)


def test_every_function_with_the_docstring_of_an_op_is_listed() -> None:
    # A new op that its family does not list could not be reached.
    for family in families(ops):
        documented = {
            n for n in public_functions(family) if "\n    Args:" in getattr(family, n).__doc__
        }
        assert documented <= set(getattr(family, "__all__", ())), family.__name__


def test_the_top_level_has_every_op() -> None:
    assert set(ops.__all__) <= set(diffcore.__all__)
    for name in diffcore.__all__:
        assert getattr(diffcore, name) is not None
    for name in ops.__all__:
        assert getattr(diffcore, name) is getattr(ops, name)


def test_the_top_level_lists_what_it_imports() -> None:
    public = {n for n in vars(diffcore) if not n.startswith("_")}
    modules = {n for n in public if inspect.ismodule(getattr(diffcore, n))}
    assert public - modules <= set(diffcore.__all__)


@pytest.mark.slow
def test_a_type_checker_sees_every_exported_name(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    user = tmp_path / "user.py"
    lines = ["import diffcore", *(f"diffcore.{name}" for name in diffcore.__all__)]
    lines += ["from diffcore import ops", *(f"ops.{name}" for name in ops.__all__)]
    lines += ["import torch", "x, row = torch.ones(2), torch.ones(14)", "T = torch.Tensor"]
    lines += ["y: T = diffcore.add_noise(x, x, 1.0, 0.0)"]
    lines += ["z: T = diffcore.reverse_step(x, x, row)"]
    lines += ["a: tuple[T, T] = diffcore.reverse_step(x, x, row, return_history=True)"]
    lines += ["b: tuple[T, T] = diffcore.reverse_step(x, x, row, return_log_prob=True)"]
    lines += ["diffcore.no_such_name"]
    user.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # The settings and the cache of `make lint`: after it this takes a second or two.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(user)], cwd=ROOT, capture_output=True, text=True
    )
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stdout
    assert "no_such_name" in errors[0]
