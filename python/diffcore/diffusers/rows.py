"""Tables from the columns of one model call a step, for rules that are diffusers' own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.coefficients.step import STEP_COLUMNS, parse_clip_range
from diffcore.schedules.tensors import as_float64
from diffcore.solvers import SolverTable

_READ_X0 = STEP_COLUMNS.index("e_0")


def float64(values: Tensor | Sequence[float]) -> Tensor:
    """A vector that a scheduler holds, in float64 on the CPU.

    Args:
        values: A tensor on any device, or numbers.

    Returns:
        float64.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu().double()  # not in one step: some devices have no float64
    return as_float64(list(values))


def columns_table(
    name: str,
    *,
    timesteps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    end: tuple[float, float],
    columns: dict[str, Tensor],
    clip: float | None = None,
    input_scale: Tensor | None = None,
    init_noise_sigma: float = 1.0,
    variance: Tensor | None = None,
) -> SolverTable:
    """A table of one model call a step, from columns that need no levels that fall.

    Args:
        name: Name of the solver.
        timesteps: ``[N]``.
        alpha: Signal at each row, float64 ``[N]``.
        sigma: Noise there, float64 ``[N]``.
        end: Signal and noise of what the last row returns.
        columns: Those that are not 0, float64 ``[N]``.
        clip: Largest abs(x_0), or ``None``.
        input_scale: Of the model's input, ``[N]``; 1 by default.
        init_noise_sigma: Standard deviation to start from.
        variance: See ``SolverTable``.

    Returns:
        The table.
    """
    count = len(timesteps)
    low, high = parse_clip_range(clip)
    known = {**columns}
    known["clip_min"], known["clip_max"] = (as_float64([bound] * count) for bound in (low, high))
    zero = as_float64([0.0] * count)
    ratio = sigma / alpha
    last = end[1] / end[0] if end[0] else math.inf
    return SolverTable(
        name=name,
        coefficients=torch.stack([known.get(column, zero) for column in STEP_COLUMNS], dim=1),
        timesteps=_times(timesteps),
        alpha=alpha,
        sigma=sigma,
        input_scale=torch.ones_like(zero) if input_scale is None else input_scale,
        step_index=torch.arange(count, device="cpu"),
        noise_levels=torch.stack([ratio, torch.cat([ratio[1:], as_float64([last])])], dim=1),
        history=0,
        order=1,
        init_noise_sigma=init_noise_sigma,
        final_alpha=end[0],
        final_sigma=end[1],
        variance=variance,
    )


def keeping_x0(table: SolverTable) -> SolverTable:
    """The same table whose steps also write the x_0 that they predict, in the same launch.

    Args:
        table: One without history.

    Returns:
        The table; unchanged where the model predicts a variance, beside which there is no room.
    """
    if table.history or table.variance is not None:
        return table
    coefficients = table.coefficients.clone()
    coefficients[:, _READ_X0] = 1
    return dataclasses.replace(table, coefficients=coefficients, history=1, rows=())


def with_column(table: SolverTable, name: str, values: Tensor) -> SolverTable:
    """The same table with other values of one column.

    Args:
        table: The table.
        name: One of ``COLUMNS``.
        values: float64 ``[S]``.

    Returns:
        A new table.
    """
    coefficients = table.coefficients.clone()
    coefficients[:, STEP_COLUMNS.index(name)] = values
    return dataclasses.replace(table, coefficients=coefficients, rows=())


def without_x0(table: SolverTable) -> SolverTable:
    """The same steps with x_0 = a_x x + a_m m put in, for a table that clips nothing.

    A solver of the noise has epsilon = (x - alpha x_0) / sigma, which cancels at low noise if the
    kernel computes it; here the factors cancel, in float64.

    Args:
        table: The table.

    Returns:
        A new table, whose c_0 and e_0 are 0.
    """
    coefficients = table.coefficients.clone()
    at = STEP_COLUMNS.index
    for part in ("c", "e"):
        of_x0 = coefficients[:, at(f"{part}_0")].clone()
        for name in ("x", "m"):
            coefficients[:, at(f"{part}_{name}")] += of_x0 * coefficients[:, at(f"a_{name}")]
        coefficients[:, at(f"{part}_0")] = 0
    return dataclasses.replace(table, coefficients=coefficients, rows=())


def with_history(table: SolverTable, reads: int, **columns: Tensor) -> SolverTable:
    """The same table with rows that read h.

    Args:
        table: The table.
        reads: How many h its rows read at most.
        **columns: Those of ``COLUMNS`` that change, float64 ``[S]``.

    Returns:
        A new table.
    """
    coefficients = table.coefficients.clone()
    for name, values in columns.items():
        coefficients[:, STEP_COLUMNS.index(name)] = values
    return dataclasses.replace(table, coefficients=coefficients, history=reads, rows=())


def _times(timesteps: Tensor) -> Tensor:
    times = timesteps.detach().to("cpu")
    return times.double() if times.is_floating_point() else times.long()
