"""Coefficients and tables as users pass them, converted to what the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._engine.dispatch import plain_eager
from diffcore._types import Coef, Step

_SYMBOLS = (torch.SymInt, torch.SymFloat)


def as_coef(name: str, value: Coef, step: Step) -> Coef:
    """A float, a 0-dim or ``[B]`` tensor, or, with a step, a table ``[T, 1]``."""
    if type(value) is float:
        return value
    if not isinstance(value, Tensor):
        return as_number(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        as_number(name, value)
        value = value.float()
    dims = value.ndim
    if dims == 0:
        # A 0-dim CPU tensor goes with any device, as everywhere in torch, if it is only a number.
        number = value.device.type == "cpu" and not value.requires_grad and plain_eager()
        return float(value) if number else value
    if dims > 1:
        value = _flat(name, value)
    return value if step is None else value.unsqueeze(1)


def _flat(name: str, value: Tensor) -> Tensor:
    """``[B, 1, ...]`` as ``[B]``."""
    if value.ndim < 2:
        return value
    if value.numel() != len(value):
        raise ValueError(f"{name} must have one number per sample, got shape {tuple(value.shape)}")
    return value.reshape(-1)


def as_table(name: str, table: Tensor, *columns: int) -> Tensor:
    """A table ``[T, n]``, n one of ``columns``; a row becomes a table of one."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(table).__name__}")
    if table.ndim == 1 and len(table) in columns:
        return table.unsqueeze(0)
    if table.ndim != 2 or table.shape[1] not in columns:
        shapes = " or ".join(f"[T, {n}]" for n in columns)
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(table.shape)}")
    return table


def as_number(name: str, value: Coef) -> Coef:
    """A float or a floating-point tensor."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
        return value
    if type(value) is float:
        return value
    if not is_number(value):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a number or a torch.Tensor, got {kind}")
    return as_float(value)


def is_number(value: object) -> bool:
    """Whether ``float`` takes the value as a number; it would take a string too."""
    # The types first: Dynamo has no hasattr for a symbolic number.
    return isinstance(value, (int, float, *_SYMBOLS)) or hasattr(value, "__float__")


def as_float(value: float) -> float:
    """The value as a float. One that a tracer derives from a size stays symbolic."""
    number: float = torch.sym_float(value) if isinstance(value, _SYMBOLS) else float(value)
    return number


def in_float64(name: str, value: Coef) -> Coef:
    """A coefficient in float64, so that what is derived from it is rounded once only."""
    value = as_number(name, value)
    return _flat(name, value).double() if isinstance(value, Tensor) else value


def float_of(name: str, value: float) -> float:
    """A number; a tensor is refused."""
    if isinstance(value, Tensor) or not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return as_float(value)
