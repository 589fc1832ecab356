"""Where the noise of a sampling loop comes from: the first sample, and each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_device, as_shape, check_dense
from diffcore._engine import messages
from diffcore._types import Model
from diffcore.noise import Noise, PhiloxNoise, StepNoise
from diffcore.ops._noise import default_key
from diffcore.sampling.model import model_device
from diffcore.solvers import SolverTable


def noise_or_default(noise: Noise | None, like: Tensor) -> Noise:
    """The noise given, else a noise key seeded by torch's generator.

    Args:
        noise: A tensor, a noise key or ``None``.
        like: The samples it is for; the key gets their device.

    Returns:
        A tensor or a noise key.
    """
    return default_key(like) if noise is None else noise


def check_step_noise(name: str, step_noise: Any) -> None:
    """Refuse what cannot be the noise of steps.

    Args:
        name: Name of the argument.
        step_noise: The argument to check.

    Raises:
        TypeError: Neither a tensor, nor a noise key, nor a function.
    """
    if isinstance(step_noise, Tensor):
        check_dense(name, step_noise)
    elif not isinstance(step_noise, PhiloxNoise) and not callable(step_noise):
        raise TypeError(
            f"{name} must be a torch.Tensor, a PhiloxNoise or a function (r, x) -> noise, got "
            f"{type(step_noise).__name__}"
        )


def initial_sample(
    model: Model,
    shape: Sequence[int],
    noise: Noise | None,
    step_noise: StepNoise | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, StepNoise]:
    """x_T, and the noise of the steps.

    What is not given comes from one noise key: ``noise`` if that is one, else one seeded by torch's
    generator. x_T takes its own stream, and step i the stream 1 + i after that.

    Args:
        model: Source of the device, if it is a module with parameters.
        shape: Shape of x_T, ``[B, ...]``.
        noise: x_T as a tensor, a noise key for it, or ``None``.
        step_noise: As for ``run_table``, or ``None``.
        device: ``None`` for that of a ``noise`` tensor; for a key, that of the model, else of the
            tensors in the key, else torch's default.
        dtype: ``None`` for that of ``noise``, else torch's default.
        generator: Source of the seed; ``None`` for torch's default generator.

    Returns:
        x_T, and ``step_noise`` or its default.

    Raises:
        TypeError: ``noise`` or ``step_noise`` has another type.
        ValueError: ``shape`` is empty, ``noise`` has another shape, or ``generator`` comes with
            noise that leaves it nothing to seed.
    """
    shape = as_shape("shape", shape)
    messages.check_dtype(dtype)
    device = None if device is None else as_device("device", device)
    if len(shape) == 0:
        raise ValueError("shape must be [B, ...], got ()")
    if generator is not None and isinstance(noise, PhiloxNoise):
        raise ValueError(
            "generator must be None where noise is a PhiloxNoise, which has a seed already, got "
            "a torch.Generator; pass one of the two"
        )
    if generator is not None and noise is not None and step_noise is not None:
        raise ValueError(
            "generator must be None where noise and step_noise are both given, got a "
            "torch.Generator; nothing is left to seed"
        )
    if noise is not None and not isinstance(noise, (Tensor, PhiloxNoise)):
        raise TypeError(
            f"noise must be a torch.Tensor or a PhiloxNoise, got {type(noise).__name__}"
        )
    if isinstance(noise, Tensor):
        if not noise.is_floating_point():
            raise TypeError(f"noise must be a floating-point tensor, got {noise.dtype}")
        messages.check_tensor("noise", noise)
        if noise.device.type == "meta" and device not in (None, noise.device):
            raise ValueError(f"noise must have values to sample on {device}, got a meta tensor")
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must have the given shape, {shape}, got {tuple(noise.shape)}")
        x, key = noise.to(device=device, dtype=dtype), None
    else:
        device = model_device(model) if device is None else device
        key = noise
        if key is None:
            at = torch.empty(0, device=device).device
            key = PhiloxNoise.from_generator(generator, device=at)
        x = key.tensor(shape, dtype=dtype, device=device)
    if step_noise is None:
        step_noise = key or default_key(x, generator)
    check_step_noise("step_noise", step_noise)
    return x, step_noise


def check_noise_rows(step_noise: StepNoise, x: Tensor, table: SolverTable, name: str) -> None:
    """Refuse a tensor of noise that does not fit the rows of a table, before the first model call.

    Args:
        step_noise: See ``run_table``. A tensor may end at the last row that adds noise.
        x: The samples.
        table: The solver.
        name: What the caller calls ``step_noise``, for errors.

    Raises:
        TypeError: A tensor of another floating-point dtype.
        ValueError: A tensor of another shape.
    """
    if not isinstance(step_noise, Tensor) or not table.stochastic:
        return
    most = len(table) + 1  # one tensor serves a solver with churn and without
    least = max((i + 1 for i, row in enumerate(table.rows) if row.noisy), default=0)
    least = most if table.start_noise else least
    if step_noise.is_floating_point() and step_noise.dtype != x.dtype:
        raise TypeError(  # an op would promote x, in the middle of the loop
            f"{name} must have the dtype of the samples, {x.dtype}, got {step_noise.dtype}"
        )
    if step_noise.shape[1:] == x.shape and least <= len(step_noise) <= most:
        return
    count, entries = "S", f"an entry for each of the S = {len(table)} rows of {table.name}"
    if table.start_noise:
        count, entries = "S + 1", f"{entries} and one for the start, which churn raises"
    raise ValueError(
        f"{name} must have the shape [{', '.join([count, *map(str, x.shape)])}], {entries}, "
        f"got {tuple(step_noise.shape)}"
    )


def noise_of_row(step_noise: StepNoise, i: int, x: Tensor, name: str) -> Noise:
    """The noise of one row of a table; row S is the start, which churn raises.

    Args:
        step_noise: See ``run_table``.
        i: The row.
        x: The samples before it.
        name: What the caller calls ``step_noise``, for errors.

    Returns:
        A tensor like ``x``, or a noise key.

    Raises:
        TypeError: A function returned something else.
    """
    if isinstance(step_noise, PhiloxNoise):
        return step_noise.at(step_noise.stream + 1 + i)
    if not isinstance(step_noise, Tensor):
        noise = step_noise(i, x)
        if not isinstance(noise, (Tensor, PhiloxNoise)):
            kind = type(noise).__name__
            raise TypeError(f"{name} must return a torch.Tensor or a PhiloxNoise, got {kind}")
        return noise
    return step_noise[i]
