"""Coefficients and tables as users pass them, converted to what the kernels take."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from diffcore import _devices
from diffcore._checks import SURE, as_int, as_real, as_tensor, check_dense, check_memory
from diffcore._devices import wide_dtype
from diffcore._engine.dispatch import plain_eager, run
from diffcore._engine.kernel import Kernel
from diffcore._types import Coef, Coefs, Step, Tensors

_SYMBOLS = (torch.SymInt, torch.SymFloat)


def as_coef(name: str, value: Coef, step: Step) -> Coef:
    """A float, a 0-dim or ``[B]`` tensor, or, with a step, a table ``[T, 1]``."""
    if type(value) is float:
        return value
    if not isinstance(value, Tensor):
        value = as_number(name, value)
        if not isinstance(value, Tensor):
            return value
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
        _check_readable(name, value)
        raise


def _flat(name: str, value: Tensor) -> Tensor:
    """``[B, 1, ...]`` as ``[B]``."""
    if value.ndim < 2:
        return value
    check_dense(name, value)
    if value.numel() != len(value):
        raise ValueError(
            f"{name} must have one number per sample, got shape {tuple(value.shape)}; for a level "
            "of each frame pass [B, F] with group_dim, the dimension of the frames"
        )
    return value.reshape(-1)


def as_dof(dof: float | Tensor, x: Tensor) -> float | Tensor:
    """Numbers of dimensions of a subspace: a float, or ``[B]`` in the wide dtype of a device.

    Args:
        dof: A number or ``[B]``.
        x: Samples, ``[B, ...]``, on that device.

    Returns:
        The numbers.

    Raises:
        TypeError: No real numbers.
        ValueError: A number that is not in 1 .. n for samples of n dimensions, or a tensor of
            another shape; the values of a tensor are not read.
    """
    n = x.shape[1:].numel()
    if not isinstance(dof, Tensor) or dof.ndim == 0:
        number = as_real("dof", dof)
        if not 0 < number <= n:
            raise ValueError(f"dof must be above 0 and at most {n}, got {number}")
        return number
    check_dense("dof", dof)
    if dof.is_complex() or dof.dtype == torch.bool:
        raise TypeError(f"dof must be a number or a real tensor, got {dof.dtype}")
    if dof.shape != x.shape[:1]:
        raise ValueError(f"dof must be a number or {list(x.shape[:1])}, got {tuple(dof.shape)}")
    return dof.detach().to(x.device, wide_dtype(x.device))


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
        _check_readable(name, table)
        raise
    return table


def columns_of(name: str, table: Tensor, first: int, end: int) -> Tensor:
    """Some columns of a table."""
    try:
        return table[:, first:end]
    except RuntimeError:
        _check_readable(name, table)
        raise


def as_number(name: str, value: Coef) -> Coef:
    """A float or a floating-point tensor; a NumPy array is a tensor on the CPU."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
        return value
    if type(value) is float:
        return value
    if not isinstance(value, (int, float, *_SYMBOLS)):
        # Dynamo has no getattr for a symbolic number.
        if getattr(value, "ndim", 0):
            return as_number(name, as_tensor(name, value, "a number or a torch.Tensor"))
        if isinstance(value, str) or not hasattr(value, "__float__"):
            kind = type(value).__name__
            raise TypeError(f"{name} must be a number or a torch.Tensor, got {kind}")
    elif isinstance(value, bool):
        raise TypeError(f"{name} must be a number or a torch.Tensor, got bool")
    return as_real(name, value)


def in_float64(name: str, value: Coef) -> Coef:
    """A coefficient in float64, so that what is derived from it is rounded once only.

    A tensor is on the CPU if its device has no float64: what is derived of it goes ``beside`` the
    samples.
    """
    value = as_number(name, value)
    if not isinstance(value, Tensor):
        return value
    return _devices.in_float64(_flat(name, _readable(name, value)))


def negated(name: str, value: Coef) -> Coef:
    """``-value``, of a dtype in which it is exact."""
    if type(value) is float:
        return -value
    value = as_number(name, value)
    if not isinstance(value, Tensor):
        return -value
    value = _readable(name, value)
    return -(value.float() if value.itemsize < 4 else value)


def converted(error: TypeError, coefs: Coefs, step: Step, like: Any) -> tuple[Coefs, Step]:
    """The coefficients and the step of a refused call, as floats and as an int or a tensor.

    Ints for floats, NumPy scalars, and lists or arrays of steps are converted here, after a call
    was refused, so that a call with floats pays nothing for them.

    Args:
        error: Why the call was refused: raised again if there is nothing to convert.
        coefs: The coefficients.
        step: The step.
        like: A tensor on the device of the samples.
    """
    try:
        numbers = tuple(map(_as_float, coefs))
        found = step if step is None or isinstance(step, Tensor) else as_step(step, like.device)
    except (AttributeError, TypeError, ValueError):  # not these, or like is no tensor
        raise error from None
    same_step = found is step or (type(step) is int and found == step)
    if same_step and all(map(operator.is_, numbers, coefs)):
        raise error
    return numbers, found


def run_converted(
    kernel: Kernel, inputs: Tensors, coefs: Coefs, t: Step, out: Tensor | None = None
) -> Tensor:
    """Runs a kernel, with the coefficients and the step converted if it refuses them."""
    try:
        return run(kernel, inputs, coefs, t, False, out)
    except TypeError as error:
        coefs, t = converted(error, coefs, t, inputs[0])
    return run(kernel, inputs, coefs, t, False, out)


def _as_float(coef: Any) -> Any:
    """A number as a float; anything else as it is."""
    try:
        return coef if isinstance(coef, Tensor) else as_real("coefficient", coef)
    except (TypeError, ValueError):
        return coef


def as_step(step: Any, device: torch.device) -> int | Tensor:
    """A step that is no tensor: an int, or int64 ``[B]`` from a list or an array of ints.

    Args:
        step: The step.
        device: Where to put the tensor.

    Raises:
        TypeError: Not integers.
    """
    if not hasattr(step, "__len__") or getattr(step, "ndim", 1) == 0:
        return as_int("t", step)
    steps = as_tensor("t", step)
    if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
        raise TypeError(f"t must be integers, got {type(step).__name__} of {steps.dtype}")
    return steps.to(device=device, dtype=torch.int64)


def float_of(name: str, value: float) -> float:
    """A number; a tensor is refused, because its value would be read."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return as_real(name, value)


def _readable(name: str, value: Tensor) -> Tensor:
    """The same tensor, which torch is about to compute with: dense, and not freed."""
    if torch.compiler.is_dynamo_compiling() or type(value) not in (Tensor, Parameter):
        return value
    try:
        if value.data_ptr() >= SURE:  # the check of almost every call
            return value
    except RuntimeError:
        pass
    _check_readable(name, value)
    return value


def _check_readable(name: str, value: Tensor) -> None:
    check_dense(name, value)
    check_memory(name, value)
