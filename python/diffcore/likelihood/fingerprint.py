"""What a checkpoint says of tensors, noise and models, to tell them from others."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore._types import Model, Noise
from diffcore.noise import PhiloxNoise


def described(noise: Noise | None) -> Any:
    """What a checkpoint says of the noise it was given.

    Args:
        noise: A tensor, a recipe or ``None``.

    Returns:
        Something that JSON can hold.

    Raises:
        TypeError: It is something else.
        ValueError: A recipe that names more than its first sample.
    """
    if noise is None:
        return None
    if isinstance(noise, Tensor):
        return digest(noise)
    if not isinstance(noise, PhiloxNoise):
        raise TypeError(f"noise must be a tensor or a PhiloxNoise, got {type(noise).__name__}")
    if isinstance(noise.sample_ids, Tensor) and noise.sample_ids.ndim:
        raise ValueError("noise must name its first sample only: the others follow the data")
    parts = (noise.seed, noise.sample_ids, noise.stream, noise.first_element)
    return [p.tolist() if isinstance(p, Tensor) else p for p in parts]


def digest(tensor: Tensor, before: str = "") -> str:
    """The SHA-256 of the bytes of a tensor, and of a digest before it, in hexadecimal."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(before.encode() + content.tobytes()).hexdigest()


def of_model(model: Model, kwargs: Any) -> dict[str, Any]:
    """What a checkpoint says of a model and its arguments.

    Args:
        model: Of a module the parameters and buffers count; of another function nothing.
        kwargs: Of a mapping the tensors, numbers and strings count, and the types of the rest; of a
            function nothing.

    Returns:
        Something that JSON can hold.
    """
    told: dict[str, Any] = {"model": None, "model_kwargs": None}
    if isinstance(model, torch.nn.Module):
        held = (value for value in model.state_dict().values() if isinstance(value, Tensor))
        told["model"] = functools.reduce(lambda seen, tensor: digest(tensor, seen), held, "")
    if isinstance(kwargs, Mapping):
        told["model_kwargs"] = {name: _shown(value) for name, value in kwargs.items()}
    return told


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    return type(value).__name__  # the rest of a repr changes from run to run
