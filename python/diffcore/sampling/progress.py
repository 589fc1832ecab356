"""The progress bar of loops (tqdm)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from diffcore._checks import as_flag

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], description: str, progress: bool | None) -> Iterable[Item]:
    """The items, with a progress bar if requested.

    Args:
        items: What the loop runs over.
        description: Text before the bar.
        progress: ``True`` for a bar, ``False`` for none, ``None`` for one on terminals only.

    Returns:
        An iterable of the same items.
    """
    if progress is False:
        return items
    bar: Iterable[Item] = _tqdm(items, description, progress)
    return bar


def progress_counter(
    total: int | None, description: str, progress: bool | None, *, done: int = 0, unit: str = "it"
) -> Any:
    """A progress bar that the caller advances with ``update()``.

    Args:
        total: How many updates there will be, ``None`` where that is unknown.
        description: Text before the bar.
        progress: ``True`` for a bar, ``False`` for none, ``None`` for one on terminals only.
        done: How many of them are done already.
        unit: What one update counts.

    Returns:
        A ``tqdm.tqdm``, a context manager.
    """
    return _tqdm(None, description, progress, total=total, initial=done, unit=unit)


def _tqdm(items: Any, description: str, progress: bool | None, **options: Any) -> Any:
    from tqdm.auto import tqdm

    # To tqdm, disable=None means: where there is no terminal.
    disable = None if progress is None else not as_flag("progress", progress)
    return tqdm(items, desc=description, disable=disable, **options)
