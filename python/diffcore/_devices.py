"""Where float64 numbers are: MPS has none, nor do some GPUs of XPU and most accelerators.

There, tables are rounded once to float32 when they go to the device. What would lose digits in
float32, such as the coefficients of a step or the mass of a pixel, is computed in float64 on the
CPU and rounded then; what would not is computed there. On other devices nothing is moved.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["beside", "has_float64", "in_float64", "to_device", "wide_dtype", "widened"]

Value = TypeVar("Value")

_ALWAYS = frozenset({"cpu", "cuda", "meta"})
_found: dict[torch.device, bool] = {}


def has_float64(device: torch.device | str) -> bool:
    """Whether a device computes in float64; asked of the device itself, once."""
    device = torch.device(device)
    return device.type in _ALWAYS or _computes_in_float64(device)


def _computes_in_float64(device: torch.device) -> bool:
    from torch.utils._python_dispatch import _disable_current_modes

    known = _found.get(device)
    if known is None:
        # A mode would answer for the device.
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            try:
                # Memory is not enough: on some devices only the arithmetic is missing.
                torch.ones(1, dtype=torch.float64, device=device).add_(1)
                known = True
            except (TypeError, RuntimeError, AssertionError):  # the last where torch has no such
                known = False
        _found[device] = known
    return known


# For Dynamo, as torch.compiler.assume_constant_result, which loads it.
_computes_in_float64._dynamo_marked_constant = True  # type: ignore[attr-defined]


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of tables and levels on a device: float64, or float32 where there is none."""
    return torch.float64 if has_float64(device) else torch.float32


def widened(x: Tensor) -> Tensor:
    """A tensor in the ``wide_dtype`` of its device."""
    return x.to(wide_dtype(x.device))


def in_float64(x: Tensor) -> Tensor:
    """A tensor in float64: on its device, or on the CPU if its device has no float64.

    In two conversions, as on the way back: no copy and no gradient is float64 on one side only.
    """
    return x.double() if has_float64(x.device) else x.cpu().double()


def to_device(x: Tensor, device: torch.device | str, *, copy: bool = False) -> Tensor:
    """A tensor on a device, which has its dtype or gets float64 rounded to float32.

    Args:
        x: The tensor.
        device: Where to.
        copy: Never the same memory.
    """
    if x.dtype == torch.float64 and not has_float64(device):
        x = x.float()
    return x.to(device, copy=copy)


def beside(value: Value, like: Any) -> Value:
    """What was computed of ``in_float64``, to be used with ``like``: on its device.

    Args:
        value: A tensor; anything else is returned as it is.
        like: A tensor, or an argument that is refused later.

    Returns:
        The same, but rounded to float32 and on the device of ``like`` where that has no float64.
    """
    if isinstance(value, Tensor) and isinstance(like, Tensor) and not has_float64(like.device):
        there: Any = to_device(value, like.device)
        return there  # type: ignore[no-any-return]
    return value
