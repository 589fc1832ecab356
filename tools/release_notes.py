"""The notes of a release: its section of CHANGELOG.md.

    python tools/release_notes.py v1.2.3 > notes.md

Fails if pyproject.toml has another version, or the changelog no dated section with text for it.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes(changelog: str, pyproject: str, tag: str) -> str:
    """The section of `changelog` for the version of `tag`, without its heading.

    Raises:
        ValueError: the tag, the project's version and the changelog do not belong together.
    """
    version = tag.removeprefix("v")
    written = re.findall(r'(?m)^version = "(.+)"$', pyproject)
    if written != [version]:
        raise ValueError(f"the tag is {tag}, but pyproject.toml has version = {written}")
    section = re.search(
        rf"(?ms)^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$(.*?)(?=^## \[|^\[|\Z)",
        changelog,
    )
    if not section or not section[1].strip():
        raise ValueError(f"CHANGELOG.md has no text below '## [{version}] - YYYY-MM-DD'")
    return section[1].strip() + "\n"


def main() -> None:
    """Print the notes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tag", help="such as v1.2.3")
    files = (ROOT / name for name in ("CHANGELOG.md", "pyproject.toml"))
    changelog, pyproject = (file.read_text(encoding="utf-8") for file in files)
    try:
        print(notes(changelog, pyproject, parser.parse_args().tag), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
