"""Docstrings as the site reads them: what is reST in them becomes Markdown.

A griffe extension, named in mkdocs.yml. ``::`` at the end of a line announces a code block in reST
and is a plain colon in Markdown; ``:func:`name``` is ```name```.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(?=`)")
ANNOUNCES_CODE = re.compile(r"::$", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring once, as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object.

        Args:
            obj: A module, class, function or attribute.
            **kwargs: What else griffe passes.
        """
        if obj.docstring is not None:
            text = ROLE.sub("", obj.docstring.value)
            obj.docstring.value = ANNOUNCES_CODE.sub(":", text)
