"""Coefficients and tables as users pass them, converted to what the kernels take."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch.nn import Parameter

from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager
from diffcore._types import Coef, Step

# A data pointer from here on is not the null pointer plus an offset in a storage that was freed.
_SURE = 2**32


def as_coef(name: str, value: Coef, step: Step) -> Coef:
    """A float, a 0-dim or ``[B]`` tensor, or, with a step, a table ``[T, 1]``."""
    if type(value) is float:
        return value
    if not isinstance(value, Tensor):
        return as_number(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        as_number(name, value)
        value = _readable(name, value).float()
    dims = value.ndim
    if dims == 0:
        # A 0-dim CPU tensor goes with any device, as everywhere in torch, if it is only a number.
        number = value.device.type == "cpu" and not value.requires_grad and plain_eager()
        return float(_readable(name, value)) if number else value
    if dims > 1:
        value = _flat(name, value)
    if step is None:
        return value
    try:
        return value.unsqueeze(1)
    except RuntimeError:  # torch makes no view of freed memory, nor of a tensor of MKL-DNN
        _readable(name, value)
        raise


def _flat(name: str, value: Tensor) -> Tensor:
    """``[B, 1, ...]`` as ``[B]``."""
    if value.ndim < 2:
        return value
    messages.check_dense(name, value)
    if value.numel() != len(value):
        raise ValueError(f"{name} must have one number per sample, got shape {tuple(value.shape)}")
    return value.reshape(-1)


def as_table(name: str, table: Tensor, *columns: int) -> Tensor:
    """A table ``[T, n]``, n one of ``columns``; a row becomes a table of one."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(table).__name__}")
    try:
        if table.ndim == 1 and len(table) in columns:
            return table.unsqueeze(0)
        if table.ndim != 2 or table.shape[1] not in columns:
            shapes = " or ".join(f"[T, {n}]" for n in columns)
            raise ValueError(f"{name} must have shape {shapes}, got {tuple(table.shape)}")
    except RuntimeError:  # a nested tensor has no shape, a freed one no views
        _readable(name, table)
        raise
    return table


def columns_of(name: str, table: Tensor, first: int, end: int) -> Tensor:
    """Some columns of a table."""
    try:
        return table[:, first:end]
    except RuntimeError:
        _readable(name, table)
        raise


def as_number(name: str, value: Coef) -> Coef:
    """A float or a floating-point tensor."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
        return value
    if type(value) is float:
        return value
    return to_float(name, value, "a number or a torch.Tensor")


def in_float64(name: str, value: Coef) -> Coef:
    """A coefficient in float64, so that what is derived from it is rounded once only."""
    value = as_number(name, value)
    if not isinstance(value, Tensor):
        return value
    return _flat(name, _readable(name, value)).double()


def negated(name: str, value: Coef) -> Coef:
    """``-value``, of a dtype in which it is exact."""
    if type(value) is float:
        return -value
    value = as_number(name, value)
    if not isinstance(value, Tensor):
        return -value
    value = _readable(name, value)
    return -(value.float() if value.itemsize < 4 else value)


def float_of(name: str, value: float) -> float:
    """A number; a tensor is refused."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return to_float(name, value, "a number")


def to_float(name: str, value: object, allowed: str) -> float:
    """What is no tensor as a float: Python's own numbers, NumPy's, arrays of no dimension."""
    real = type(value) is int or isinstance(value, numbers.Real)
    if (real or not isinstance(value, numbers.Complex)) and hasattr(
        value, "__float__"
    ):  # a string would do for float() itself
        try:
            return float(value)
        except TypeError:  # an array
            pass
        except OverflowError:
            raise ValueError(
                f"{name} must be in the range of float64, got an int of {value.bit_length()} bits"
                if isinstance(value, int)
                else f"{name} must be in the range of float64, got {value!r}"
            ) from None
    raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")


def _readable(name: str, value: Tensor) -> Tensor:
    """The same tensor, which torch is about to compute with: dense, and not freed."""
    if torch.compiler.is_dynamo_compiling() or type(value) not in (Tensor, Parameter):
        return value
    try:
        if value.data_ptr() >= _SURE:  # the check of almost every call
            return value
    except RuntimeError:
        pass
    messages.check_dense(name, value)
    messages.check_memory(name, value)
    return value
