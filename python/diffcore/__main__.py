"""``python -m diffcore``, and the ``diffcore`` command: info, demo, bench."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line. Without typer and rich, only ``info`` works."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if not missing:
        from diffcore.cli import app

        app()
        return
    if sys.argv[1:] == ["info"]:
        from diffcore._engine.info import collect_info, one_line

        facts = collect_info()
        for name, value in facts.items():
            print(f"{name}: {value}")
        print(f"For a bug report: {one_line(facts)}")
        return
    sys.exit(
        f"The diffcore command needs {' and '.join(missing)}, not installed here.\n"
        'Install an extra: pip install "diffcore[demo]" ("diffcore[cli]" for info and bench only).'
    )


if __name__ == "__main__":
    main()
