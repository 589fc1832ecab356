"""Runs the tests on the CUDA kernels, compiled for the CPU (tests/emulation)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

FOLDER = "DIFFCORE_EMULATED"
ACTIVE = bool(os.environ.get(FOLDER))


def install() -> bool:
    """Makes the module in the folder ``DIFFCORE_EMULATED`` the one that diffcore imports."""
    if not ACTIVE:
        return False
    folder = os.environ[FOLDER]
    found = sorted(Path(folder).glob("_C*.so"))
    if not found:
        raise FileNotFoundError(f"{FOLDER} must be a folder with the module _C, got {folder!r}")
    if "diffcore" in sys.modules:
        raise RuntimeError("the emulated module must be installed before diffcore is imported")
    import torch  # noqa: F401 - its OpenMP runtime before the module's

    spec = importlib.util.spec_from_file_location("diffcore._C", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["diffcore._C"] = module
    return True
