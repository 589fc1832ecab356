"""Run the tests against another torch, in an environment for it alone.

    python tools/try_torch.py 2.10.0                      # compilers, transforms, the engine
    python tools/try_torch.py 2.15.0 tests/ops -x         # any arguments of pytest

The environment is kept in the folder for temporary files: a second run starts at once. It has the
Python that runs this script, and diffcore from the checkout with the module compiled for it: one
build serves every torch. pip follows its configuration: a version that a constraint there excludes
is not installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SELECTION = (
    "tests/ops/test_compile.py",
    "tests/ops/test_compiled_ops.py",
    "tests/ops/test_transforms.py",
    "tests/ops/test_routes.py",
    "tests/ops/test_forward.py",
    "tests/ops/test_backward.py",
    "tests/ops/test_loss_routes.py",
    "tests/diffusion/test_first_calls.py",
    "tests/sampling/test_compile.py",
    "tests/noise/test_ops.py",
    "tests/package/test_add_an_op.py",
)
"""What a version of torch may change: tracing, transforms, modes, autograd, the exchange API."""

REQUIREMENTS = ("numpy", "tqdm", "pytest", "pytest-xdist", "hypothesis", "scipy", "mpmath")


def environment(version: str) -> Path:
    """The interpreter of the environment with this torch, made if there is none yet."""
    folder = Path(tempfile.gettempdir()) / "diffcore-torch" / version
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        packages = [f"torch=={version}", *REQUIREMENTS]
        install = [str(python), "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(install, check=True)
        done.touch()
    return python


def main() -> int:
    """Install and run; the exit status is that of pytest."""
    version, *arguments = sys.argv[1:] or [""]
    if not re.fullmatch(r"\d+\.\d+\.\d+\S*", version):
        print(__doc__, file=sys.stderr)
        return 2
    python = environment(version)
    found = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    chosen = arguments or [name for name in SELECTION if (ROOT / name).exists()]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    os.nice(10)
    return subprocess.run(command, cwd=ROOT, env=found, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
