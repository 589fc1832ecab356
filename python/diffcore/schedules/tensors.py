"""Arguments as float64 tensors; nothing here follows torch's default device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_tensor, hint
from diffcore._devices import widened


def as_float64(values: Tensor | Sequence[Any] | float, name: str = "values") -> Tensor:
    """The values as float64: a tensor on its own device, anything else on the CPU.

    Args:
        values: Real numbers, of any shape.
        name: Name of the argument.

    Returns:
        float64, the shape of ``values``; float32 on a device without float64.

    Raises:
        TypeError: Not real numbers.
    """
    if isinstance(values, Tensor):
        check_has_values(name, values)
        if values.is_complex():
            raise TypeError(f"{name} must be real numbers, got {values.dtype}")
        return widened(values)
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be real numbers, got {type(values).__name__}") from None


def check_has_values(name: str, values: Tensor) -> None:
    """Refuse a meta tensor, whose values cannot be read.

    Args:
        name: Name of the argument.
        values: The argument.

    Raises:
        ValueError: A tensor on "meta".
    """
    if values.device.type == "meta":
        raise ValueError(f"{name} must have values, got a tensor on meta; make it on the CPU")


def float64_vector(
    name: str, values: Any, *, least: int = 1, shape: str = "[T] with T >= 1", fix: str = ""
) -> Tensor:
    """The values as a float64 vector on the CPU, a copy.

    Args:
        name: Name of the argument.
        values: A tensor, a NumPy array or a sequence of real numbers, finite.
        least: The least number of entries.
        shape: The shape in words, for the message.
        fix: What to write instead of something that is not a vector, for the message.

    Returns:
        float64 ``[T]``.

    Raises:
        TypeError: Not real numbers.
        ValueError: Another shape, not finite, or a tensor that requires grad.
    """
    table = as_tensor(name, values, fix=fix)
    if table.is_complex() or table.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of real numbers, got {table.dtype}")
    if table.requires_grad:
        raise ValueError(
            f"{name} must not require grad, because tables are constants, got a tensor that does; "
            f"pass {name}.detach(), or give the ops alpha and sigma as tensors to train them"
        )
    check_has_values(name, table)
    if table.dim() != 1 or len(table) < least:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(table.shape)}{hint(fix)}")
    table = table.to(device="cpu", copy=True).double()
    if not bool(table.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {float(table[~table.isfinite()][0])}")
    return table
