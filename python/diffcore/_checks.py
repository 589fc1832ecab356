"""Checks of single arguments. Every message reads `<argument> must be <what>, got <what came>`."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

# A data pointer from here on is not the null pointer plus an offset in a storage that was freed.
SURE = 2**32

_INTS = (int, torch.SymInt)


def check_choice(name: str, value: object, choices: tuple[str, ...], fix: str = "") -> None:
    """Refuse a string that is not one of ``choices``.

    Args:
        name: What to call the argument in the message.
        value: What came.
        choices: The strings that are allowed.
        fix: What to write instead, for the end of the message.

    Raises:
        TypeError: ``value`` is not a string.
        ValueError: ``value`` is a string, but not one of ``choices``.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}{hint(fix)}")
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{hint(fix)}")


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """An integer as a Python int: an int, a NumPy integer, anything with ``__index__``.

    Args:
        name: What to call the argument in the message.
        value: What came.
        least: The smallest value that is allowed; ``None`` for no limit.

    Returns:
        The int.

    Raises:
        TypeError: Not an integer (a bool is not one either).
        ValueError: Below ``least``, or beyond 64 bits.
    """
    number = value
    # A compiler's symbolic int is an int to isinstance, but has no __index__.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            number = operator.index(_no_bool(value))
        except TypeError:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if type(number) is int and not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got an int beyond them")
    return number  # type: ignore[no-any-return]


def as_real(name: str, value: Any) -> float:
    """A real number as a Python float: also an int, a NumPy scalar, a tensor of one element.

    Args:
        name: What to call the argument in the message.
        value: What came. The value of a tensor is read, which waits for its device.

    Returns:
        The float; it may be infinite or nan.

    Raises:
        TypeError: Not a real number (a bool is not one either), or a tensor that requires grad.
        ValueError: An int that is too large for a float.
    """
    if type(value) is float:
        return value
    if isinstance(value, (torch.SymFloat, torch.SymInt)):  # derived from a size by a tracer
        symbol: float = torch.sym_float(value)
        return symbol
    number = value
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.requires_grad:
            raise TypeError(
                f"{name} must be a number, got a tensor that requires grad, which would be lost; "
                "pass its .detach()"
            )
        if value.numel() != 1:
            raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}")
        if value.device.type == "meta":
            raise TypeError(f"{name} must be a number, got a tensor on meta, which has no value")
        check_memory(name, value)
        number = value.item()
    # The types first: Dynamo has no getattr for a symbolic number.
    elif not isinstance(value, (int, float)) and getattr(value, "ndim", None) == 0:
        number = value.item()  # of a 0-dim NumPy array
    if isinstance(number, bool) or not isinstance(number, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(
            f"{name} must be below 2^1024, the range of a float, got an int beyond it"
        ) from None


def as_flag(name: str, value: Any) -> bool:
    """A bool: also 0 and 1, a NumPy bool, a 0-dim tensor or array of bools.

    Args:
        name: What to call the argument in the message.
        value: What came.

    Returns:
        The bool.

    Raises:
        TypeError: Something else, such as the string "False", which Python takes for true.
    """
    if value is True or value is False:
        return value
    if type(value) is int and value in (0, 1):
        return value == 1
    # The types first: Dynamo has no getattr for a symbolic number.
    if not isinstance(value, (int, float, Tensor)) and getattr(value, "ndim", None) == 0:
        value = value.item()
    elif isinstance(value, Tensor) and value.dtype == torch.bool and not value.ndim:
        check_memory(name, value)
        value = value if value.device.type == "meta" else value.item()
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def as_shape(name: str, shape: Any) -> tuple[int, ...]:
    """A shape, or other numbers of 0 or more for each dimension, as a tuple of ints.

    Args:
        name: What to call the argument in the message.
        shape: A tuple, a list, a ``torch.Size`` or an array of ints, NumPy's or Python's.

    Returns:
        The tuple.

    Raises:
        TypeError: Something else, or an entry that is not an integer.
        ValueError: A negative entry, or more elements than an int64 counts.
    """
    allowed = "a tuple of non-negative ints"
    if not isinstance(shape, (tuple, list)):
        if isinstance(shape, Tensor) or getattr(shape, "ndim", None) != 1:
            came = repr(shape) if isinstance(shape, (int, float, str)) else type(shape).__name__
            raise TypeError(f"{name} must be {allowed}, got {came}")
        shape = tuple(shape)
    try:
        # A compiler's symbolic int is an int to isinstance, but has no __index__.
        found = tuple(
            [
                n if isinstance(n, _INTS) and type(n) is not bool else operator.index(_no_bool(n))
                for n in shape
            ]
        )
    except (TypeError, ValueError, RuntimeError):  # of a tensor that has no value
        raise TypeError(f"{name} must be {allowed}, got {shape!r}") from None
    if any(n < 0 for n in found):
        raise ValueError(f"{name} must be {allowed}, got {found}")
    counted = not torch.compiler.is_compiling() and all(type(n) is int for n in found)
    if counted and math.prod([max(n, 1) for n in found]) >= 2**63:
        raise ValueError(f"{name} must have fewer than 2^63 elements, got {found}")
    return found  # type: ignore[return-value] # a symbolic int counts as one


def as_device(name: str, device: Any) -> torch.device:
    """A device, also by its name or the index of an accelerator.

    Args:
        name: What to call the argument in the message.
        device: What came.

    Returns:
        The device.

    Raises:
        TypeError: Neither a device, nor a string or an int.
        ValueError: A string that names no device, or an index that no accelerator has.
    """
    if isinstance(device, torch.device):
        return device
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"{name} must be a torch.device or a string, got {type(device).__name__}")
    try:
        return torch.device(device)
    except (RuntimeError, ValueError, OverflowError):
        raise ValueError(
            f"{name} must be a device of torch, such as 'cuda:0', got {device!r}"
        ) from None


def as_positive(name: str, value: Any, *, finite: bool = False) -> float:
    """A number above 0, as a Python float.

    Args:
        name: What to call the argument in the message.
        value: What came, see ``as_real``.
        finite: Whether infinity is refused.

    Returns:
        The float.

    Raises:
        TypeError: Not a real number.
        ValueError: Not above 0, or infinite.
    """
    number = as_real(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be above 0, got {number}")
    if finite and number == math.inf:
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def as_tensor(
    name: str, value: Any, what: str = "a tensor of real numbers", fix: str = ""
) -> Tensor:
    """Values as a tensor: a NumPy array keeps its dtype, Python floats become float64.

    Nothing here follows torch's default device or dtype.

    Args:
        name: What to call the argument in the message.
        value: A tensor, which is returned as it is, a NumPy array, or a sequence of numbers.
        what: What it must be, in the message.
        fix: What to write instead, for the end of the message.

    Returns:
        A tensor; on the CPU unless ``value`` is a tensor elsewhere.

    Raises:
        TypeError: Something else.
    """
    if isinstance(value, Tensor):
        check_dense(name, value)
        check_memory(name, value)
        return value
    try:
        if hasattr(value, "__array__"):  # a copy, because torch takes no negative strides
            return torch.as_tensor(value.__array__().copy(), device="cpu")
        entries = [v.item() if hasattr(v, "item") else v for v in value]
        if not any(isinstance(v, bool) for v in entries):
            integers = all(isinstance(v, int) for v in entries)
            dtype = torch.int64 if integers else torch.float64
            return torch.tensor(entries, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be {what}, got {type(value).__name__}{hint(fix)}")


def check_not_compiling(name: str, instead: str) -> None:
    """Refuse to be traced by torch.compile or torch.export.

    Args:
        name: The public function.
        instead: What to do.

    Raises:
        RuntimeError: Compiling or exporting.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} must be called outside of torch.compile and torch.export, got a call inside; "
            f"{instead}"
        )


def check_float_tensor(name: str, value: object) -> None:
    """Refuse what is not a floating-point tensor.

    Args:
        name: What to call the argument in the message.
        value: What came.

    Raises:
        TypeError: Another type, or a tensor that has another dtype or is not dense.
        ValueError: A tensor whose memory was freed.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{name} must be a floating-point tensor, got {came}{to_floats(name, value)}"
        )
    check_dense(name, value)
    check_memory(name, value)


def check_dense(name: str, x: Tensor) -> None:
    """Refuse a tensor that is sparse, nested or quantized.

    Args:
        name: What to call the argument in the message.
        x: The tensor.

    Raises:
        TypeError: It is one of these.
    """
    if x.is_nested:
        kind = "a nested tensor"
    elif x.is_quantized:
        kind = "a quantized tensor"
    elif x.layout != torch.strided:
        kind = f"layout {x.layout}"
    else:
        return
    raise TypeError(f"{name} must be a dense, strided tensor, got {kind}")


def check_memory(name: str, x: Tensor) -> None:
    """Refuse a plain tensor whose storage was freed: torch would read it, and crash.

    Args:
        name: What to call the argument in the message.
        x: The tensor. A tensor of a functorch transform has no pointer, and needs none.

    Raises:
        ValueError: It has elements, but no memory.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return
    try:
        if x.data_ptr() >= SURE:  # the check of almost every call
            return
        hollow = (
            x.device.type in ("cpu", "cuda")
            and x.numel() > 0
            and (x.data_ptr() == 0 or x.untyped_storage().data_ptr() == 0)
        )
    except RuntimeError:
        return
    if hollow:
        raise no_memory(name)


def no_memory(name: str) -> ValueError:
    """The error of a tensor that has elements, but no memory."""
    return ValueError(f"{name} must have memory, got a fake, functional or freed tensor")


def to_floats(name: str, value: object) -> str:
    """How to make samples of an 8-bit image or a NumPy array, for the end of a message."""
    if isinstance(value, Tensor):
        return f"; for 8-bit images pass {name} / 127.5 - 1" if value.dtype == torch.uint8 else ""
    return f"; pass torch.from_numpy({name})" if hasattr(value, "__array_interface__") else ""


def hint(fix: str) -> str:
    """The end of a message: what to write instead, if there is something to say."""
    return f"; {fix}" if fix else ""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError
    return value
