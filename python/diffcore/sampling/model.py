"""Calls of a model: its device, its input, and checks of what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffcore._checks import to_floats
from diffcore._engine import messages
from diffcore._types import Model

Prediction: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""What a model returned for one row of a solver table: the prediction ``[B, ...]``, under guidance
the conditional one; the unconditional prediction, or ``None``; the predicted variance, or
``None``."""


def predict(
    model: Model,
    x: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    guided: bool = False,
    learned: bool = False,
) -> Prediction:
    """Call a model once, or twice for classifier-free guidance.

    Args:
        model: ``model(x, t, **model_kwargs)``.
        x: Scaled model input ``[B, ...]``.
        t: Timestep input ``[B]``.
        model_kwargs: More arguments for the model.
        uncond_kwargs: The same for a second, unconditional call; ``None`` for one call.
        guided: Whether there is guidance. Without a second call the one call then returns two
            batches.
        learned: Whether the model predicts its variance too, in a second half of the channels.

    Returns:
        (output, uncond, variance), checked and in the dtype of ``x``; see ``Prediction``. The
        variance is that of the conditional prediction.

    Raises:
        TypeError: As ``call_model``.
        ValueError: As ``call_model``.
    """
    batches = 2 if guided and uncond_kwargs is None else 1
    output = call_model(model, x, t, model_kwargs, batches, learned)
    uncond = variance = None
    if uncond_kwargs is not None:
        uncond = call_model(model, x, t, uncond_kwargs, 1, learned)
    if learned:
        output, variance = output.chunk(2, dim=1)
        variance = variance.chunk(batches)[-1]  # of two batches the second is conditional
        uncond = None if uncond is None else uncond.chunk(2, dim=1)[0]
    if batches == 2:
        uncond, output = output.chunk(2)
    return output, uncond, variance


def call_model(
    model: Model,
    x: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None,
    batches: int = 1,
    learned: bool = False,
) -> Tensor:
    """Call a model and check what it returns.

    Args:
        model: ``model(x, t, **model_kwargs)``.
        x: Scaled model input ``[B, ...]``.
        t: Timestep input ``[B]``.
        model_kwargs: More arguments for the model.
        batches: How many predictions it returns for a sample, one batch after the other.
        learned: Whether it predicts its variance too: twice the channels, the prediction first.

    Returns:
        Its output, converted to the dtype of ``x`` where autocast or the model chose another
        floating-point dtype.

    Raises:
        TypeError: The output is not a floating-point tensor.
        ValueError: The output has another shape, or ``x`` has no channels where ``learned``.
    """
    if learned and x.ndim < 2:
        raise ValueError(
            "x must have the shape [B, C, ...] for a model that predicts its variance, because "
            f"the two predictions are halves of dimension 1, got {tuple(x.shape)}"
        )
    output = model(x, t, **(model_kwargs or {}))
    if not isinstance(output, Tensor):
        raise TypeError(
            f"model must return a torch.Tensor, got {type(output).__name__}{_way_to(output)}"
        )
    if not output.is_floating_point():
        raise TypeError(f"model must return a floating-point tensor, got {output.dtype}")
    expected = x.shape if batches == 1 else (batches * x.shape[0], *x.shape[1:])
    if learned:
        expected = (expected[0], 2 * expected[1], *expected[2:])
    if output.shape != expected:
        halves = " (the prediction, then the predicted variance)" if learned else ""
        fix = ""
        if batches == 2 and 2 * output.shape[:1].numel() == expected[0]:
            fix = "; under guidance pass uncond_kwargs, or return both batches, the "
            fix += "unconditional one first"
        raise ValueError(
            f"model must return the shape {tuple(expected)}{halves}, got {tuple(output.shape)}{fix}"
        )
    return output.to(x.dtype)


def _way_to(output: Any) -> str:
    """How to get the tensor out of what a model returned, for an error."""
    if isinstance(getattr(output, "sample", None), Tensor):  # an output class of diffusers
        return "; pass lambda x, t, **kwargs: model(x, t, **kwargs).sample"
    if isinstance(output, Mapping):
        first = next((key for key, value in output.items() if isinstance(value, Tensor)), None)
        return "" if first is None else f"; pass lambda x, t, **kwargs: model(...)[{first!r}]"
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return "; pass lambda x, t, **kwargs: model(x, t, **kwargs)[0]"
    names = getattr(output, "__dataclass_fields__", {})
    first = next((name for name in names if isinstance(getattr(output, name), Tensor)), None)
    return "" if first is None else f"; pass lambda x, t, **kwargs: model(x, t, **kwargs).{first}"


def check_model_kwargs(model_kwargs: Any, name: str = "model_kwargs") -> None:
    """Refuse arguments for a model that are neither a mapping nor ``None``.

    Args:
        model_kwargs: The argument.
        name: Name of the argument.

    Raises:
        TypeError: Something else.
    """
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        kind = type(model_kwargs).__name__
        raise TypeError(f"{name} must be a mapping or None, got {kind}")


def check_samples(x: Tensor, name: str = "x") -> None:
    """Refuse anything but a batch of floating-point samples.

    Args:
        x: The argument to check.
        name: Its name.

    Raises:
        TypeError: ``x`` is not a floating-point tensor ``[B, ...]``, or not a dense one.
        ValueError: The memory of ``x`` was freed: the model would read it.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
        came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a floating-point tensor [B, ...], got {came}{to_floats(name, x)}"
        )
    messages.check_tensor(name, x)


def model_device(model: Model) -> torch.device | None:
    """The device of a model's parameters, ``None`` where it has none.

    Args:
        model: Any callable; a ``torch.nn.Module`` may have parameters.

    Returns:
        The device of its first parameter.
    """
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return None if parameter is None else parameter.device
