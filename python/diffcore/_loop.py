"""Calling a model, and walking it down a table of ``reverse_step`` coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops

Model = Callable[..., Tensor]
StepNoise = Callable[[int, Tensor], Tensor]


def call_model(
    model: Model, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
) -> Tensor:
    """What a model says about ``x``, checked, in the dtype of ``x``.

    Args:
        model: ``model(x, t, **model_kwargs)``.
        x: ``[B, ...]``.
        t: int64 ``[B]``, timesteps of the training schedule.
        model_kwargs: More arguments for the model.

    Returns:
        Its output; converted where autocast or the model chose another floating dtype.

    Raises:
        TypeError: The output is no tensor of floating point numbers.
        ValueError: The output has another shape.
    """
    output = model(x, t, **(model_kwargs or {}))
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor, got {type(output).__name__}")
    if not output.is_floating_point():
        raise TypeError(f"model must return floating point numbers, got {output.dtype}")
    if output.shape != x.shape:
        raise ValueError(f"model must return shape {list(x.shape)}, got {list(output.shape)}")
    return output.to(x.dtype)


def initial(
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
) -> Tensor:
    """x_T: the noise given, in the dtype and on the device asked for, or a fresh draw.

    Args:
        model: Asked for its device, if it is a module with parameters.
        shape: What x_T must look like.
        noise: x_T, or ``None`` to draw it.
        device: ``None`` for that of ``noise``, else of the model, else torch's default.
        dtype: ``None`` for that of ``noise``, else torch's default.
        generator: Source of the draw.

    Returns:
        A tensor of the given shape.
    """
    if noise is not None:
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            what = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"noise must be a tensor of floating point numbers, got {what}")
        if tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise must have shape {list(shape)}, got {list(noise.shape)}")
        return noise.to(device=device, dtype=dtype)
    if device is None and isinstance(model, torch.nn.Module):
        parameter = next(model.parameters(), None)
        device = None if parameter is None else parameter.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)


@torch.no_grad()
def walk(
    model: Model,
    x: Tensor,
    table: Tensor,
    timesteps: Tensor,
    noisy: bool,
    step_noise: StepNoise | None,
    model_kwargs: Mapping[str, Any] | None,
    generator: torch.Generator | None,
    progress: bool,
) -> Tensor:
    """Take every step of a table, from its last row to its first.

    Rows are picked by Python ints, so nothing is ever read back from the device.

    Args:
        model: ``model(x, t, **model_kwargs)``.
        x: x_T.
        table: float64 ``[S, 8]`` beside ``x``, row 0 being the step to x_0.
        timesteps: int64 ``[S]`` beside ``x``, what the model is told at each row.
        noisy: Whether the steps before the last take noise.
        step_noise: ``(i, x) -> noise``, ``i`` counting steps from 0; ``None`` to draw it.
        model_kwargs: More arguments for the model.
        generator: Source of the draws.
        progress: Show a bar.

    Returns:
        x_0.
    """
    rows: Iterable[int] = range(len(timesteps) - 1, -1, -1)
    if progress:
        from tqdm.auto import tqdm

        rows = tqdm(rows)
    for i, row in enumerate(rows):
        output = call_model(model, x, timesteps[row].repeat(x.shape[0]), model_kwargs)
        noise = None
        if noisy and row > 0:
            noise = _draw(x, generator) if step_noise is None else step_noise(i, x)
        x = ops.reverse_step(x, output, table, t=row, noise=noise)
    return x


def _draw(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
