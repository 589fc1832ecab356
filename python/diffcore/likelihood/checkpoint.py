"""The checkpoint file of ``bits_per_dim``, and how it recognizes its run."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore._files import replace_file
from diffcore._types import Model
from diffcore.likelihood import content
from diffcore.likelihood.tally import Tally
from diffcore.noise import Noise, PhiloxNoise

_FIX = "delete it, or pass another path"


@dataclass(frozen=True)
class Checkpoint:
    """A file that is written after every batch, so that a run can be resumed.

    Attributes:
        path: The file.
        settings: What a run must share with the run that wrote the file.
    """

    path: Path
    settings: dict[str, Any]

    @classmethod
    def at(cls, path: str | Path, settings: dict[str, Any]) -> Checkpoint:
        """The checkpoint of a run.

        Args:
            path: A file that exists, or that can be created.
            settings: What a run must share with the run that wrote the file.

        Raises:
            TypeError: ``path`` has another type.
            ValueError: ``path`` is no file, or no file can be created there.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoint must be a path, got {type(path).__name__}")
        file = Path(path)
        if not _can_be_written(file):
            raise ValueError(
                f"checkpoint must be a file in a folder that can be written, got {file}"
            )
        return cls(file, settings)

    def save(self, tally: Tally, seed: int | None) -> None:
        """Write the tally in one move.

        Args:
            tally: The sums so far.
            seed: The seed of the noise if the caller gave no noise.
        """
        state = content.state_of(tally, self.settings, seed)
        replace_file(self.path, json.dumps(state).encode())

    def restore(self, tally: Tally) -> int | None:
        """Put the sums of the file, if there is one, into a new tally.

        Args:
            tally: An empty tally of the same run.

        Returns:
            The seed that ``save`` was given; ``None`` where there is no file.

        Raises:
            ValueError: The file is not a checkpoint, or belongs to a run with other settings.
        """
        state = self._read(tally)
        if state is None:
            return None
        tally.kind, tally.batches = state["kind"], state["batches"]
        tally.calls, tally.digest = state["calls"], state["seen"]
        tally.totals.count = tally.parts.count = state["samples"]
        for name, tensor in tally.tensors().items():
            tensor.copy_(torch.tensor(state["sums"][name], dtype=torch.float64, device="cpu"))
        seed: int | None = state["seed"]
        return seed

    @contextmanager
    def named_by_interrupt(self) -> Iterator[None]:
        """Make Ctrl-C say where the sums are."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self.path.exists():
                where = f"the sums of all completed batches are in {self.path}, and the same call "
                stop.args = (f"bits_per_dim stopped; {where}continues from there",)
            else:
                stop.args = (f"bits_per_dim stopped before {self.path} was written",)
            raise

    def _read(self, tally: Tally) -> dict[str, Any] | None:
        try:
            with self.path.open("rb") as file:
                start = file.read(1)
                # Another kind of file may have gigabytes.
                found = start + file.read() if start in (b"{", b"") else start
        except FileNotFoundError:
            return None
        try:
            state = content.parse(found)
            self._check_settings(state["settings"])
            content.check(state, tally, seeded=self.settings["noise"] is None)
        except _OtherRunError:
            raise
        except ValueError as error:
            raise ValueError(
                f"checkpoint must be a file written by bits_per_dim, got {self.path}, where "
                f"{error}; {_FIX}"
            ) from error
        return state

    def _check_settings(self, known: Mapping[str, Any]) -> None:
        for name in {**self.settings, **known}:
            mine, other = self.settings.get(name), known.get(name)
            if json.dumps(mine) != json.dumps(other):
                raise _OtherRunError(
                    f"checkpoint must belong to a run with {name} = {mine}, got "
                    f"{textwrap.shorten(str(other), 200)} in {self.path}; {_FIX}"
                )


class _OtherRunError(ValueError):
    """The file is a checkpoint, but of a run with other settings."""


def _can_be_written(path: Path) -> bool:
    try:
        folder = Path(os.path.realpath(path)).parent
        path.stat()
    except FileNotFoundError:
        return folder.is_dir() and os.access(folder, os.W_OK)
    except (OSError, ValueError):  # too long, below a file, a null character
        return False
    return path.is_file() and os.access(folder, os.W_OK)


def describe_noise(noise: Noise | None) -> Any:
    """Identify the noise of a run.

    Args:
        noise: A tensor, a noise key or ``None``.

    Returns:
        A value that JSON can hold.

    Raises:
        TypeError: The noise has another type.
    """
    if noise is None:
        return None
    if isinstance(noise, Tensor):
        return digest(noise)
    if not isinstance(noise, PhiloxNoise):
        raise TypeError(f"noise must be a tensor or a PhiloxNoise, got {type(noise).__name__}")
    parts = noise.__reduce__()[1]  # of the key of a shard, also the shard
    return [p.tolist() if isinstance(p, Tensor) else p for p in parts]


def describe_model(model: Model, kwargs: Any) -> dict[str, Any]:
    """Identify a model and its arguments.

    Args:
        model: A module is identified by its parameters and buffers; another function is not.
        kwargs: A mapping is identified by its tensors, numbers and strings, and by the types of
            its other values; a function is not.

    Returns:
        Values that JSON can hold.
    """
    found: dict[str, Any] = {"model": None, "model_kwargs": None}
    if isinstance(model, torch.nn.Module):
        tensors = (value for value in model.state_dict().values() if isinstance(value, Tensor))
        found["model"] = functools.reduce(lambda before, x: digest(x, before), tensors, "")
    if isinstance(kwargs, Mapping):
        found["model_kwargs"] = {name: _describe(value) for name, value in kwargs.items()}
    return found


def digest(tensor: Tensor, before: str = "") -> str:
    """The hexadecimal SHA-256 of a previous digest and the bytes of a tensor."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(before.encode() + content.tobytes()).hexdigest()


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    return type(value).__name__  # the repr of other objects changes from run to run
