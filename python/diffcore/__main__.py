"""``python -m diffcore``, and the ``diffcore`` command: info, demo, bench."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line; without typer and rich, plain `info`, and advice for the rest."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if not missing:
        from diffcore.cli import app

        app()
        return
    if sys.argv[1:] == ["info"]:
        from diffcore._engine.info import collect_info

        for name, value in collect_info().items():
            print(f"{name}: {value}")
        return
    sys.exit(
        f"The diffcore command needs {' and '.join(missing)}, which this Python does not have.\n"
        'Install the extra: pip install "diffcore[demo]" ("diffcore[cli]" has info and bench only).'
    )


if __name__ == "__main__":
    main()
