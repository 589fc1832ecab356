"""Calling a model, and walking it down a table of ``reverse_step`` coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._types import Callback, Model, Noise, StepNoise
from diffcore.noise import PhiloxNoise
from diffcore.solvers import SolverTable
from diffcore.solvers.table import Row

Threshold = Callable[[Row, Tensor, Tensor, Tensor | None], Tensor]


def call_model(
    model: Model,
    x: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None,
    batches: int = 1,
    learned: bool = False,
) -> Tensor:
    """What a model says about ``x``, checked, in the dtype of ``x``.

    Args:
        model: ``model(x, t, **model_kwargs)``.
        x: ``[B, ...]``.
        t: int64 ``[B]``, timesteps of the training schedule.
        model_kwargs: More arguments for the model.
        batches: How many predictions it makes of a sample, one batch after the other.
        learned: Whether it says its variance too: twice the channels, the prediction first.

    Returns:
        Its output; converted where autocast or the model chose another floating dtype.

    Raises:
        TypeError: The output is no tensor of floating point numbers.
        ValueError: The output has another shape, or ``x`` no channels to have twice.
    """
    if learned and x.ndim < 2:
        raise ValueError(
            "a model that says its variance needs samples [B, C, ...]: the prediction and the "
            f"variance are halves of dimension 1; got {list(x.shape)}"
        )
    output = model(x, t, **(model_kwargs or {}))
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor, got {type(output).__name__}")
    if not output.is_floating_point():
        raise TypeError(f"model must return floating point numbers, got {output.dtype}")
    wanted = x.shape if batches == 1 else (batches * x.shape[0], *x.shape[1:])
    if learned:
        wanted = (wanted[0], 2 * wanted[1], *wanted[2:])
    if output.shape != wanted:
        why = " (the prediction, then what it says of its variance)" if learned else ""
        raise ValueError(f"model must return shape {list(wanted)}{why}, got {list(output.shape)}")
    return output.to(x.dtype)


def check_samples(x: Tensor) -> None:
    """Refuse what is no batch of floating point numbers.

    Args:
        x: What came.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a tensor of floating point numbers [B, ...], got {what}")


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
    if len(shape) == 0:
        raise ValueError("shape must be [B, ...], got ()")
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
    table: SolverTable,
    step_noise: StepNoise,
    *,
    guidance_scale: float | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    threshold: Threshold | None = None,
    callback: Callback | None = None,
    progress: bool | None = False,
    noise_name: str = "step_noise",
    learned: bool = False,
) -> Tensor:
    """Walk down a solver's table: what every sampler here does.

    Rows are picked by Python ints, so nothing is ever read back from the device.

    Args:
        model: See ``diffcore.sample``, as for all that is not explained here.
        x: What to start from.
        table: The solver.
        step_noise: ``(row, x) -> noise``; a recipe, read at the stream 1 + row after its own; or a
            tensor ``[S, B, ...]``. The noise of churn before the first step has the row S.
        guidance_scale: w.
        model_kwargs: More arguments for the model.
        uncond_kwargs: The same for its unconditional call.
        threshold: ``(row, x, m, m_u) -> s``, the bound of x_0.
        callback: Told of every step.
        progress: Show a bar; ``None`` for one on terminals only.
        noise_name: What the caller calls ``step_noise``, for errors.
        learned: Whether the model says its variance too, read or not; a table that reads it says so
            itself.

    Returns:
        The samples.
    """
    if table.start_noise:
        noise = _of_step(step_noise, len(table), x, noise_name)
        x = ops.add_noise(x, noise, table.start_scale, table.start_noise)
    told = _told(table, x)
    batches = 2 if guidance_scale is not None and uncond_kwargs is None else 1
    history: tuple[Tensor, ...] = ()
    learned = learned or table.variance is not None
    for i, row in enumerate(_with_bar(table, progress)):
        seen = x if row.input_scale == 1 else row.input_scale * x
        m = call_model(model, seen, told[i], model_kwargs, batches, learned)
        m_u = v = None
        if uncond_kwargs is not None:
            m_u = call_model(model, seen, told[i], uncond_kwargs, 1, learned)
        if learned:
            m, said = m.chunk(2, dim=1)
            m_u = None if m_u is None else m_u.chunk(2, dim=1)[0]
            # Of two answers in one batch the conditional is the second.
            v = None if table.variance is None else said.chunk(batches)[-1]
        bound = None if threshold is None else threshold(row, x, m, m_u)
        if callback is not None and row.begins:
            denoised = table.denoised(
                i,
                x,
                m,
                model_output_uncond=m_u,
                guidance_scale=guidance_scale,
                threshold=bound,
            )
            state = {"x": x, "i": row.step, "t": told[i], "sigma": row.sigma, "denoised": denoised}
            callback(state)
        x, history = table.step(
            i,
            x,
            m,
            history,
            noise=_of_step(step_noise, i, x, noise_name) if row.noisy else None,
            model_output_uncond=m_u,
            guidance_scale=guidance_scale,
            threshold=bound,
            variance_output=v,
        )
    return x


def thresholding(
    ratio: float | None, max_value: float, guidance_scale: float | Tensor | None
) -> Threshold | None:
    """Imagen's bound of x_0, as ``walk`` takes it; ``None`` for none."""
    if ratio is None:
        return None
    p = ratio

    def bound(row: Row, x: Tensor, m: Tensor, m_u: Tensor | None) -> Tensor:
        return ops.dynamic_threshold(
            x,
            m,
            row.coefficients,
            ratio=p,
            sample_max_value=max_value,
            model_output_uncond=m_u,
            guidance_scale=guidance_scale,
        )

    return bound


def _with_bar(table: SolverTable, progress: bool | None) -> Iterable[Row]:
    if progress is False:
        return table.rows
    from tqdm.auto import tqdm

    disable = None if progress is None else False  # None: where there is no terminal
    bar: Iterable[Row] = tqdm(table.rows, desc=table.name, disable=disable)
    return bar


def _told(table: SolverTable, x: Tensor) -> Tensor:
    """What the model is told, ``[S, B]``: whole timesteps, or numbers as precise as x at least."""
    timesteps = table.to(x.device).timesteps
    if timesteps.is_floating_point() and x.dtype != torch.float64:
        timesteps = timesteps.float()
    return timesteps.unsqueeze(1).repeat(1, x.shape[0])


def _of_step(step_noise: StepNoise, i: int, x: Tensor, name: str) -> Noise:
    if isinstance(step_noise, PhiloxNoise):
        return step_noise.at(step_noise.stream + 1 + i)
    if not isinstance(step_noise, Tensor):
        noise = step_noise(i, x)
        if not isinstance(noise, (Tensor, PhiloxNoise)):
            kind = type(noise).__name__
            raise TypeError(f"{name} must return a tensor or a PhiloxNoise, got {kind}")
        return noise
    if step_noise.shape[1:] != x.shape or i >= len(step_noise):
        raise ValueError(
            f"{name} must have shape [S, {', '.join(map(str, x.shape))}] with S the number of "
            f"steps that add noise, got {list(step_noise.shape)}"
        )
    return step_noise[i]
