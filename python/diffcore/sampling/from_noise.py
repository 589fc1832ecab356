"""From noise to samples with a solver table: what ``sample`` of the training classes does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_int
from diffcore._engine.kept import FixedSettings
from diffcore._types import ClipRange, Model
from diffcore.coefficients.step import parse_clip_range
from diffcore.noise import Noise, StepNoise
from diffcore.sampling.noise import initial_sample
from diffcore.sampling.sample import sample
from diffcore.solvers import SolverTable


class KeepsSolvers(FixedSettings):
    """Base of a class that samples with any solver; it has a method ``_table``."""

    def _solver(
        self, solver: Any, num_steps: Any, clip_range: ClipRange, *options: Any
    ) -> SolverTable:
        """What ``_table`` makes of these arguments, made once.

        Args:
            solver: A function from noise levels to a table.
            num_steps: How many steps.
            clip_range: Bounds of the predicted x_0.
            options: More arguments of ``_table``.

        Returns:
            The table.

        Raises:
            TypeError: An argument, or what ``solver`` returned, has the wrong type.
            ValueError: ``num_steps`` below 1, or an empty ``clip_range``.
        """
        if not callable(solver):
            raise TypeError(
                "solver must be a function of diffcore.solvers, such as solvers.euler_table, got "
                f"{type(solver).__name__}"
            )
        num_steps = as_int("num_steps", num_steps, 1)
        if clip_range is not None:
            clip_range = parse_clip_range(clip_range)
        table = self._kept("_table", solver, num_steps, clip_range, *options)
        if not isinstance(table, SolverTable):
            raise TypeError(f"solver must return a SolverTable, got {type(table).__name__}")
        return table


def default_as_constant(value: Any, default: Any) -> Any:
    """The value, and the default as a constant: with dynamic=True Dynamo takes it for dynamic."""
    return default if value == default else value


def sample_from_noise(
    model: Model,
    shape: Sequence[int] | Tensor,
    table: SolverTable,
    *,
    noise: Noise | None,
    step_noise: StepNoise | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
    **options: Any,
) -> Any:
    """Run a table from noise of the standard deviation at its first level.

    Args:
        model: ``model(x, t, **model_kwargs)``.
        shape: Shape of the samples, ``[B, ...]``, or their noise.
        table: The solver; the noise is multiplied by its ``init_noise_sigma``.
        noise: Standard normal, of the given shape, or a noise key; see ``initial_sample`` for it
            and the four arguments after it.
        step_noise: The noise of the steps.
        device: Where to sample.
        dtype: Of the samples.
        generator: Source of seeds.
        options: Other arguments of ``diffcore.sample``.

    Returns:
        What ``diffcore.sample`` returns.
    """
    if isinstance(shape, Tensor):
        if noise is not None:
            raise ValueError(
                f"noise must be None where shape is a tensor of noise, got {type(noise).__name__}"
            )
        noise, shape = shape, tuple(shape.shape)
    x, step_noise = initial_sample(model, shape, noise, step_noise, device, dtype, generator)
    if table.init_noise_sigma != 1:
        x = x * table.init_noise_sigma
    return sample(model, x, table, noise=step_noise, **options)
