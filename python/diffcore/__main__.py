"""``python -m diffcore``, and the ``diffcore`` command: info, demo, bench."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line. Without typer and rich, ``info``, ``bench`` and help work."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if not missing:
        from diffcore.cli import app

        app()
        return
    from diffcore._engine.info import as_text, collect_info, report, version
    from diffcore._usage import COMMANDS, benchmarks, help_text

    arguments = sys.argv[1:]
    command = next((name for name in arguments[:1] if name in COMMANDS), "")
    if not arguments or "--help" in arguments:
        print(help_text(command))
        sys.exit(0 if arguments else 2)
    if arguments == ["--version"]:
        print(f"diffcore {version()}")
        return
    if arguments == ["info"]:
        facts = collect_info()
        for name, text in as_text(facts).items():
            print(f"{name}: {text}")
        print(report(facts))
        return
    if command == "bench":
        sys.exit(benchmarks().main(arguments[1:]))
    sys.exit(
        f"The diffcore command needs {' and '.join(missing)}, not installed here.\n"
        'Install an extra: pip install "diffcore[demo]" ("diffcore[cli]" for info only).'
    )


if __name__ == "__main__":
    main()
