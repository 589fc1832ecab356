"""Files that are replaced in one move: a reader finds the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, or leave the old one as it is.

    Any number of processes may write one path at the same time: each writes a partial file with a
    unique name in the same folder and moves it into place, and the last move wins. Content and
    move are flushed to the disk, so the file survives a power cut. After an error, or Ctrl-C, there
    is no partial file; a process that is killed may leave ``.diffcore-*.partial``.

    Args:
        path: The file. If it is a link, the file that it points to is replaced.
        content: The new content.

    Raises:
        OSError: The file could not be written, for example because the disk is full.
    """
    target = Path(os.path.realpath(path))
    # Not tempfile: its files can be read by their owner only, whatever the umask.
    partial = target.with_name(f".diffcore-{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says more
            partial.unlink()
        raise
    _flush_folder(target.parent)


def _flush_folder(folder: Path) -> None:
    # Some file systems cannot flush a folder. The new file is in place, only less durable.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
