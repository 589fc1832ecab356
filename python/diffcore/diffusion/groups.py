"""GaussianDiffusion with a timestep for each group of a sample, such as the frames of a video."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffcore._types import Model
from diffcore.diffusion import reverse, training
from diffcore.diffusion.checks import check_timestep_values, check_timesteps
from diffcore.diffusion.tables import DiffusionTables
from diffcore.noise import Noise, perturbation_key
from diffcore.ops._groups import Groups, in_groups
from diffcore.ops._masks import expanded_mask, of_groups
from diffcore.ops._noise import default_key


def noised(
    tables: DiffusionTables, x_start: Tensor, t: Tensor | int, noise: Noise | None, group_dim: int
) -> Tensor:
    """x_t from x_0: ``GaussianDiffusion.q_sample``.

    Args:
        tables: The diffusion.
        x_start: x_0, ``[B, ...]``.
        t: Timesteps, integers ``[B, G]`` or ``[B]``, or one int.
        noise: The noise; ``None`` for a key seeded by torch's generator.
        group_dim: The dimension of the groups.

    Returns:
        x_t, like ``x_start``.
    """
    if noise is None:
        noise = default_key(x_start)

    def noised_rows(x_start: Tensor, noise: Noise, t: Tensor | int) -> Tensor:
        t = check_timesteps(t, x_start, len(tables))
        return training.noised(tables, x_start, t, noise)

    samples = {"x_start": x_start, "noise": noise}
    x_t: Tensor = in_groups(noised_rows, group_dim, samples, {"t": t})
    return x_t


def timesteps(x_start: Tensor, t: Tensor | int, group_dim: int, num_timesteps: int) -> Tensor:
    """The timesteps of the groups, ``[B, G]``: what the model gets."""
    groups = Groups.of("x_start", x_start, group_dim)
    rows = groups.rows("x_start", x_start)
    by_row = check_timesteps(groups.levels("t", t), rows, num_timesteps)
    check_timestep_values(by_row, num_timesteps)
    return by_row.view(groups.counts)[:, 0]


def losses(
    tables: DiffusionTables,
    loss_type: str,
    model: Model,
    x_start: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None,
    noise: Noise,
    group_dim: int,
    *,
    perturbation: float,
    weights: Tensor | None,
    decoder: str,
    counted: training.Counted,
    error: training.ErrorLoss,
    reduction: str,
) -> dict[str, Tensor]:
    """The losses of each group: ``GaussianDiffusion.training_losses``.

    Args:
        tables: The diffusion.
        loss_type: Of the constructor.
        model: ``model(x_t, t, **model_kwargs)`` with t ``[B, G]``.
        x_start: x_0, ``[B, ...]``.
        t: Timesteps, integers ``[B, G]``, checked.
        model_kwargs: More arguments for the model.
        noise: The noise.
        group_dim: The dimension of the groups.
        perturbation: ``input_perturbation``, 0 for none; ``noise`` is a key otherwise.
        weights: ``[T]``, or ``None`` for 1.
        decoder: "discretized" or "gaussian".
        counted: The mask, or ``None``, and its reduction.
        error: The loss of an error and its delta.
        reduction: "sample" or "group".

    Returns:
        ``loss`` and its parts, each ``[B]``, or ``[B, G]`` by group.
    """
    x_t = noised(tables, x_start, t, noise, group_dim)
    if perturbation:
        again = {"x_t": x_t, "noise": perturbation_key(noise)}
        x_t = in_groups(
            functools.partial(training.perturbed, tables, strength=perturbation),
            group_dim,
            again,
            {"t": t},
        )
    output, variance_output = reverse.predict(tables, model, x_t, t, model_kwargs)
    names: list[str] = []

    def losses_of_rows(
        x_start: Tensor,
        output: Tensor,
        variance_output: Tensor | None,
        noise: Noise,
        t: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        found = training.losses(
            tables,
            loss_type,
            x_start,
            output,
            variance_output,
            noise,
            t,
            weights=weights,
            decoder=decoder,
            counted=(mask, "all" if mask is not None else "mask"),
            error=error,
        )
        names.extend(found)
        return tuple(found.values())

    mask = counted[0]
    if mask is not None:
        mask = expanded_mask(mask, x_start, "x_start")
    samples = {
        "x_start": x_start,
        "output": output,
        "variance_output": variance_output,
        "noise": noise,
        "mask": mask,
    }
    found = in_groups(losses_of_rows, group_dim, samples, {"t": t}, mean=True)
    divides = mask if counted[1] == "mask" else None
    each = [of_groups(x, divides, group_dim, reduction) for x in found]
    return dict(zip(names, each, strict=True))
