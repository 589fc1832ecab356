"""Arguments as float64 tensors; nothing here follows torch's default device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def as_float64(values: Tensor | Sequence[Any] | float) -> Tensor:
    """The values as float64: a tensor on its own device, anything else on the CPU.

    Args:
        values: Real numbers, of any shape.

    Returns:
        float64, the shape of ``values``.
    """
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def float64_vector(name: str, values: Tensor) -> Tensor:
    """The values as float64 ``[T]`` on the CPU, a copy.

    Args:
        name: Name of the argument.
        values: ``[T]``, T >= 1, finite.

    Returns:
        float64 ``[T]``.

    Raises:
        TypeError: Not real numbers.
        ValueError: Another shape, or not finite.
    """
    try:
        table = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(values).__name__
        raise TypeError(f"{name} must be a tensor of real numbers, got {kind}: {error}") from None
    table = table.detach()
    if table.is_complex() or table.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of real numbers, got {table.dtype}")
    if table.dim() != 1 or len(table) == 0:
        raise ValueError(f"{name} must have the shape [T] with T >= 1, got {tuple(table.shape)}")
    table = table.to(device="cpu", dtype=torch.float64, copy=True)
    if not bool(table.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {float(table[~table.isfinite()][0])}")
    return table
