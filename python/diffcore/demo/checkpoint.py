"""Checkpoints without pickle: tensors and JSON in one safetensors file, replaced in one move."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from diffcore._files import replace_file

Spec = tuple[tuple[int, ...], torch.dtype]
Value = TypeVar("Value")

_KEY = "diffcore"
_FIX = "delete it, or start a new run without --resume"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DamagedFileError(ValueError):
    """A file of a demo run is damaged, or another program wrote it."""

    @classmethod
    def of(cls, path: Path, kind: str, problem: object) -> DamagedFileError:
        """The error for a file.

        Args:
            path: The file.
            kind: What it should be.
            problem: What is wrong with it.
        """
        return cls(f"{path} must be {kind}, got a damaged or other file: {problem}; {_FIX}")


def save_checkpoint(path: Path, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Write tensors, and scalars as JSON in the file's header.

    The file is replaced in one move: a crash leaves the old file or the new one, never a part.

    Args:
        path: File to write; its folder is created if missing.
        tensors: Tensors to save, on any device.
        scalars: JSON-serializable values.

    Raises:
        OSError: The file could not be written, for example because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors refuses shared storage and non-contiguous strides, so every tensor is copied.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    replace_file(path, save(plain, metadata={_KEY: json.dumps(scalars)}))


def load_checkpoint(
    path: Path,
    check: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by ``save_checkpoint``.

    Args:
        path: File to read.
        check: Called with tensors and scalars, to raise a ValueError for what is wrong with them.

    Returns:
        Tensors on the CPU, and scalars.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: The file was not written by ``save_checkpoint``, is damaged, or ``check``
            refused it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        tensors, scalars = _read(path)
        if check is not None:
            check(tensors, scalars)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DamagedFileError.of(path, "a checkpoint of the demo", error) from error
    return tensors, scalars


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # Read once: safe_open opens the path a second time for the data, and another process may have
    # replaced the file in between.
    content = path.read_bytes()
    try:
        tensors = load(content)
    except KeyError as error:
        raise ValueError(f"dtypes must be those of torch, got {error}") from error
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:end]).get("__metadata__", {})
    if _KEY not in metadata:
        raise ValueError(f"metadata must have the entry {_KEY!r}, got {sorted(metadata)[:3]}")
    scalars = json.loads(metadata[_KEY])
    if not isinstance(scalars, dict):
        raise ValueError(f"metadata must be a JSON object, got {type(scalars).__name__}")
    return tensors, scalars


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Spec]) -> None:
    """Check names, shapes and dtypes.

    Args:
        tensors: What came.
        expected: Shape and dtype by name.

    Raises:
        ValueError: They differ.
    """
    missing, other = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or other:
        got = f"no {missing[0]}" if missing else f"also {other[0]}"
        raise ValueError(f"tensors must be the {len(expected)} of the run's settings, got {got}")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"{name} must have shape {list(shape)} and dtype {dtype}, got "
                f"{list(tensor.shape)} and {tensor.dtype}"
            )


def specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Shape and dtype of tensors, by name."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def optimizer_specs(model: nn.Module) -> dict[str, Spec]:
    """What ``optimizer_tensors`` returns for AdamW after a step.

    Args:
        model: The model whose parameters the optimizer updates.

    Returns:
        Shape and dtype by name.
    """
    found: dict[str, Spec] = {}
    for name, parameter in model.named_parameters():
        found[f"{name}/step"] = ((), torch.float32)
        found |= {f"{name}/{key}": (tuple(parameter.shape), parameter.dtype) for key in _MOMENTS}
    return found


def prefixed(prefix: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """Put a prefix and a dot before each name."""
    return {f"{prefix}.{name}": value for name, value in values.items()}


def stripped(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose name starts with the prefix and a dot, without it."""
    start = f"{prefix}."
    return {
        name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)
    }


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer by parameter name, as ``<parameter>/<state>``.

    Args:
        model: The model whose parameters the optimizer updates.
        optimizer: An optimizer whose state is tensors only, such as AdamW.

    Returns:
        The state.
    """
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Restore a state returned by ``optimizer_tensors``.

    Args:
        model: The model, of the same architecture.
        optimizer: A new optimizer of the same kind over the parameters of ``model``.
        tensors: The state.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        if tensor.shape == parameter.shape:
            # The optimizer creates moments with the strides of the parameter (channels_last).
            value = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        else:
            value = tensor.to(parameter.device)
        optimizer.state[parameter][key] = value
