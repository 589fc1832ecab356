"""Calling a model, and walking it down a table of ``reverse_step`` coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .noise import PhiloxNoise

Model = Callable[..., Tensor]
Noise = Tensor | PhiloxNoise
StepNoise = Noise | Callable[[int, Tensor], Noise]


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


def or_drawn(noise: Noise | None, like: Tensor) -> Noise:
    """The noise given, else a recipe seeded by torch's generator."""
    return PhiloxNoise.from_generator(device=like.device) if noise is None else noise


def start(
    model: Model,
    shape: Sequence[int],
    noise: Noise | None,
    step_noise: StepNoise | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, StepNoise]:
    """x_T, and where the noise of the steps comes from.

    What is not given comes from one recipe: ``noise`` if that is one, else one seeded by torch's
    generator. x_T is its own stream, and step i draws at the stream 1 + i after that.

    Args:
        model: Asked for its device, if it is a module with parameters.
        shape: What x_T must look like.
        noise: x_T as a tensor or a recipe, or ``None`` to draw it.
        step_noise: As for ``walk``, or ``None`` to draw it.
        device: ``None`` for that of ``noise``, else of the model, else torch's default.
        dtype: ``None`` for that of ``noise``, else torch's default.
        generator: Source of the seed.

    Returns:
        A tensor of the given shape, and ``step_noise`` or what stands in for it.
    """
    if noise is not None and not isinstance(noise, (Tensor, PhiloxNoise)):
        raise TypeError(f"noise must be a tensor or a PhiloxNoise, got {type(noise).__name__}")
    if isinstance(noise, Tensor):
        if not noise.is_floating_point():
            raise TypeError(f"noise must be a tensor of floating point numbers, got {noise.dtype}")
        if tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise must have shape {list(shape)}, got {list(noise.shape)}")
        x = noise.to(device=device, dtype=dtype)
        recipe = None
    else:
        if device is None and isinstance(model, torch.nn.Module):
            parameter = next(model.parameters(), None)
            device = None if parameter is None else parameter.device
        if noise is None:
            at = torch.empty(0, device=device).device
            noise = PhiloxNoise.from_generator(generator, device=at)
        x = noise.tensor(shape, dtype=dtype, device=device)
        recipe = noise
    if step_noise is None:
        step_noise = recipe or PhiloxNoise.from_generator(generator, device=x.device)
    elif not isinstance(step_noise, (Tensor, PhiloxNoise)) and not callable(step_noise):
        raise TypeError(
            "step_noise must be a tensor, a PhiloxNoise or a function (i, x) -> noise, "
            f"got {type(step_noise).__name__}"
        )
    return x, step_noise


@torch.no_grad()
def walk(
    model: Model,
    x: Tensor,
    table: Tensor,
    timesteps: Tensor,
    noisy: bool,
    step_noise: StepNoise,
    model_kwargs: Mapping[str, Any] | None,
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
        step_noise: ``(i, x) -> noise``, ``i`` counting steps from 0; a recipe, read at the stream
            1 + i after its own; or a tensor ``[S, B, ...]``.
        model_kwargs: More arguments for the model.
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
            noise = _of_step(step_noise, i, x)
        x = ops.reverse_step(x, output, table, t=row, noise=noise)
    return x


def _of_step(step_noise: StepNoise, i: int, x: Tensor) -> Noise:
    if isinstance(step_noise, PhiloxNoise):
        return step_noise.at(step_noise.stream + 1 + i)
    if not isinstance(step_noise, Tensor):
        noise = step_noise(i, x)
        if not isinstance(noise, (Tensor, PhiloxNoise)):
            kind = type(noise).__name__
            raise TypeError(f"step_noise must return a tensor or a PhiloxNoise, got {kind}")
        return noise
    if step_noise.shape[1:] != x.shape or i >= len(step_noise):
        raise ValueError(
            f"step_noise must have shape [S, {', '.join(map(str, x.shape))}] with S the number of "
            f"steps that add noise, got {list(step_noise.shape)}"
        )
    return step_noise[i]
