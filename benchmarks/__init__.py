"""Benchmarks: each op against eager PyTorch, ``torch.compile`` and a copy; and end to end.

``diffcore bench`` runs them. A wheel carries this folder as ``diffcore.benchmarks``.
"""

import importlib.util
import os
import sys
from pathlib import Path

# Read when torch is imported. Its profiler, which measures peak memory on the CPU, prints a lot.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _find_cases() -> None:
    """Makes ``support`` importable: one list of cases serves tests and benchmarks.

    It is among the tests of a clone, and in a wheel beside this file.
    """
    here = Path(__file__).resolve().parent
    beside = here / "support"
    folder = beside if beside.is_dir() else here.parent / "tests" / "support"
    spec = importlib.util.spec_from_file_location(
        "support", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["support"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["support"])


if "support" not in sys.modules:
    _find_cases()
