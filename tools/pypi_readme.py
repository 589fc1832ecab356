"""The README as package indexes show it: links into the repository, at the tag of the version.

An index has no files beside the README. scikit-build-core calls `dynamic_metadata` when it writes
the metadata (`[[tool.dynamic-metadata]]` of pyproject.toml).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
# Relative: no scheme, and no place in the page itself. Not `x[0](y)`.
LINK = re.compile(r"(?<!\w)(?P<image>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<path>[^)\s]+)\)")


def with_absolute_links(text: str, repository: str, tag: str) -> str:
    """`text` with every relative link of Markdown led to `repository`, where `tag` is.

    Args:
        text: Markdown.
        repository: its address on GitHub, without a slash at the end.
        tag: such as ``v1.2.3``.
    """
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def absolute(link: re.Match[str]) -> str:
        base = f"{raw}/{tag}" if link["image"] else f"{repository}/blob/{tag}"
        return f"{link['image']}[{link['text']}]({base}/{link['path']})"

    return LINK.sub(absolute, text)


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """The field ``readme`` of the project.

    Raises:
        ValueError: settings in pyproject.toml, of which there are none.
    """
    if settings:
        raise ValueError(f"tools/pypi_readme.py has no settings, got {sorted(settings)}")
    text = README.read_text(encoding="utf-8")
    repository, tag = project["urls"]["Repository"], f"v{project['version']}"
    return {
        "readme": {
            "content-type": "text/markdown",
            "text": with_absolute_links(text, repository, tag),
        }
    }
