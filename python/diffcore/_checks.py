"""Checks of single arguments. Every message reads `<argument> must be <what>, got <what came>`."""

from __future__ import annotations

from torch import Tensor


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a string that is not one of ``choices``.

    Args:
        name: What to call the argument in the message.
        value: What came.
        choices: The strings that are allowed.

    Raises:
        TypeError: ``value`` is not a string.
        ValueError: ``value`` is a string, but not one of ``choices``.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(value: int, name: str = "n") -> None:
    """Refuse what is no int of at least 1.

    Args:
        value: What came.
        name: What to call it.

    Raises:
        TypeError: No int.
        ValueError: Below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_float_tensor(name: str, value: object) -> None:
    """Refuse what is not a floating-point tensor.

    Args:
        name: What to call the argument in the message.
        value: What came.

    Raises:
        TypeError: Another type, or a tensor of another dtype.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
