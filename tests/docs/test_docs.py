"""Every ```python block of the README and the documentation runs, top to bottom, page by page.

The blocks of a page share one namespace. A block that is not meant to run is fenced as something
else (```py for Python that is only shown). A block under `<!-- requires: NAME -->` runs where NAME
can be imported.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from support.pages import ROOT, blocks, pages

EXCERPT = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


def test_there_are_pages_with_code() -> None:
    assert ROOT / "README.md" in pages()
    assert blocks(ROOT / "README.md")


@pytest.mark.parametrize(
    "page", [p for p in pages() if blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for line, code in blocks(page):
        # Newlines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_excerpts_are_in_the_files_they_name(page: Path) -> None:
    # White space aside, which belongs to the formatters.
    for name, excerpt in EXCERPT.findall(page.read_text(encoding="utf-8")):
        source = (ROOT / name).read_text(encoding="utf-8")
        assert "".join(excerpt.split()) in "".join(source.split()), (
            f"{name} has changed:\n{excerpt}"
        )
