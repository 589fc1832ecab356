"""Checkpoints without pickle: tensors and JSON in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_KEY = "diffcore"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Write tensors, and scalars as JSON in the file's header.

    The file is replaced atomically: a crash leaves the old file or the new one, never a part.

    Args:
        path: File to write; its folder is created if missing.
        tensors: Tensors to save, on any device.
        scalars: JSON-serializable values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors refuses shared storage and non-contiguous strides, so every tensor is copied.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    partial = path.with_name(path.name + ".partial")
    save_file(plain, partial, metadata={_KEY: json.dumps(scalars)})
    os.replace(partial, path)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by ``save_checkpoint``.

    Args:
        path: File to read.

    Returns:
        Tensors on the CPU, and scalars.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by ``save_checkpoint``.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _KEY not in metadata:
            raise ValueError(
                f"{path} must be a checkpoint of the demo, got another safetensors file"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return tensors, json.loads(metadata[_KEY])


def read_scalars(path: Path) -> dict[str, Any]:
    """Read the scalars of a checkpoint without its tensors.

    Args:
        path: File to read.

    Returns:
        The scalars.
    """
    with safe_open(path, framework="pt") as file:
        scalars: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
    return scalars


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix and a dot before each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


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
