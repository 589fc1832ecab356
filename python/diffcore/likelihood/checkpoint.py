"""The checkpoint file of ``bits_per_dim``: what it holds, and how it recognizes its run."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore._types import Model
from diffcore.likelihood.tally import Tally
from diffcore.noise import Noise, PhiloxNoise

_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A file that is written after every batch, so that a run can be resumed.

    Attributes:
        path: The file.
        settings: What a run must share with the run that wrote the file.
    """

    path: Path
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise ValueError(f"checkpoint must be a file in an existing folder, got {self.path}")

    def save(self, tally: Tally, seed: Any) -> None:
        """Write the tally as JSON, which keeps float64 to the bit, in one atomic move.

        Args:
            tally: The sums so far.
            seed: The seed of the noise if the caller gave no noise.
        """
        state = {
            "format": _FORMAT,
            "settings": self.settings,
            "seed": seed,
            "kind": tally.kind,
            "batches": tally.batches,
            "calls": tally.calls,
            "seen": tally.digest,
            "samples": tally.samples,
            "sums": {name: tensor.tolist() for name, tensor in tally.tensors().items()},
        }
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(state))
        os.replace(partial, self.path)

    def restore(self, tally: Tally) -> Any:
        """Put the sums of the file, if there is one, into a new tally.

        Args:
            tally: An empty tally of the same run.

        Returns:
            The seed that ``save`` was given; ``None`` where there is no file.

        Raises:
            ValueError: The file is not a checkpoint, or belongs to a run with other settings.
        """
        state = self._read()
        if state is None:
            return None
        tally.kind, tally.batches = state["kind"], state["batches"]
        tally.calls, tally.digest = state["calls"], state["seen"]
        tally.totals.count = tally.parts.count = state["samples"]
        for name, tensor in tally.tensors().items():
            values = torch.tensor(state["sums"][name], dtype=torch.float64, device=tensor.device)
            tensor.copy_(values)
        return state["seed"]

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = json.loads(self.path.read_text())
            known, version = state["settings"], state["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint must be a file written by bits_per_dim, got {self.path}"
            ) from error
        if version != _FORMAT:
            raise ValueError(f"checkpoint must have format {_FORMAT}, got {version} in {self.path}")
        for name in {**self.settings, **known}:
            if self.settings.get(name) != known.get(name):
                raise ValueError(
                    f"checkpoint must belong to a run with {name} = {self.settings.get(name)}, "
                    f"got {known.get(name)} in {self.path}; remove it, or pass another file"
                )
        return state


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
