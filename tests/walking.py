"""The specification of a solver table, in plain torch: what the fused op has to do."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffcore.solvers import COLUMNS, SolverTable

Model = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]


def no_noise(row: int) -> Tensor:
    raise AssertionError(f"row {row} of a deterministic table draws noise")


def walk(
    table: SolverTable,
    model: Model,
    x: Tensor,
    noise: Noise = no_noise,
    *,
    scale_in_place: bool = False,
) -> Tensor:
    """Row after row; ``model`` sees the scaled x and is told the timestep, noise(-1) is the start's.

    ``scale_in_place`` steps from the scaled x: what diffusers' own tests do, though its pipelines
    do not.
    """
    x = table.start_scale * x
    if table.start_noise:
        x = x + table.start_noise * noise(-1)
    h = [torch.full_like(x, math.nan) for _ in range(3)]  # nothing may read what no row wrote
    for row in range(len(table)):
        c = dict(zip(COLUMNS, table.coefficients[row].tolist(), strict=True))
        seen = table.input_scale[row] * x
        x = seen if scale_in_place else x
        m = model(seen, table.timesteps[row].item())
        x0 = (c["a_x"] * x + c["a_m"] * m).clamp(c["clip_min"], c["clip_max"])
        after = c["c_x"] * x + c["c_m"] * m + c["c_0"] * x0
        for k in (1, 2, 3):
            if c[f"c_{k}"]:
                after = after + c[f"c_{k}"] * h[k - 1]
        if c["c_z"]:
            after = after + c["c_z"] * noise(row)
        left = torch.full_like(x, math.nan)
        if c["e_x"] or c["e_m"] or c["e_0"]:
            left = c["e_x"] * x + c["e_m"] * m + c["e_0"] * x0
        x, h = after, [left, h[0], h[1]]
    return x
