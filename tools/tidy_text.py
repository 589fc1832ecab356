"""Text files end with one newline, lines without blanks, and YAML that parses.

    python tools/tidy_text.py [--check] [FILE ...]

Rewrites the files, or only names them with `--check`; without files, all that git tracks.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

SUFFIXES = {
    *(".py", ".pyi", ".h", ".cc", ".cu", ".cuh", ".md", ".toml", ".txt", ".yml", ".yaml", ".cff"),
    *(".js", ".css", ".html"),
}
VENDORED = Path("docs/assets/katex")  # as its authors ship it
NAMES = {"Makefile", "LICENSE", ".gitignore", ".clang-format", ".editorconfig"}


def tidy(text: str) -> str:
    """`text` without blanks at the end of lines, and with one newline at its own."""
    lines = [line.rstrip() for line in text.split("\n")]
    return "\n".join(lines).rstrip("\n") + "\n" if text.strip() else ""


def yaml_error(text: str) -> str | None:
    """Why `text` is not YAML; None if it is. Tags are not resolved: mkdocs.yml has its own."""
    try:
        list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        return " ".join(str(error).split())
    return None


def tracked() -> list[Path]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name]


def main() -> None:
    """Check the files; exit 1 if one was not tidy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="rewrite nothing")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    failed = False
    for path in options.files or tracked():
        text_file = path.suffix in SUFFIXES or path.name in NAMES
        if not text_file or not path.is_file() or VENDORED in path.parents:
            continue
        text = path.read_bytes().decode("utf-8")
        if tidy(text) != text:
            failed = True
            print(f"{path}: blanks at the end of a line, or not one newline at the end")
            if not options.check:
                path.write_bytes(tidy(text).encode("utf-8"))
        problem = yaml_error(text) if path.suffix in {".yml", ".yaml", ".cff"} else None
        if problem:
            failed = True
            print(f"{path}: {problem}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
