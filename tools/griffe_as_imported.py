"""The package as the reference reads it. A griffe extension, named in mkdocs.yml.

griffe reads sources without importing them. Two things are put right: a function that a package
imports from its module of the same name (``sampling/sample.py``) is the function, as it is when the
package is imported, and not the module; and what is reST in a docstring becomes Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(?=`)")
ANNOUNCES_CODE = re.compile(r"::$", re.MULTILINE)


class AsImported(griffe.Extension):
    """Adjusts names and docstrings once the package is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ARG002
        """Rewrite the docstring of one object.

        Args:
            obj: A module, class, function or attribute.
            **kwargs: What else griffe passes.
        """
        if obj.docstring is not None:
            text = ROLE.sub("", obj.docstring.value)
            obj.docstring.value = ANNOUNCES_CODE.sub(":", text)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:  # noqa: ARG002
        """Put functions in the place of the modules that they hide.

        Args:
            pkg: The package.
            loader: What loaded it.
            **kwargs: What else griffe passes.
        """
        loader.resolve_aliases(implicit=True)  # while hidden modules can be found
        functions: dict[str, griffe.Object] = {}
        for module in _modules(pkg):
            for name, source in module.imports.items():
                hidden = module.members.get(name)
                if isinstance(hidden, griffe.Module) and source == f"{hidden.path}.{name}":
                    functions[hidden.path] = hidden[name]
        for module in _modules(pkg):
            for name, member in list(module.members.items()):
                resolved = not isinstance(member, griffe.Alias) or member.resolved
                if resolved and member.canonical_path in functions:
                    function = functions[member.canonical_path]
                    module.members[name] = griffe.Alias(name, function, parent=module)


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for inner in list(module.members.values()):
        if isinstance(inner, griffe.Module):
            yield from _modules(inner)
