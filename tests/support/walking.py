"""The specification of a solver table, in plain torch: what the fused op has to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore.solvers import COLUMNS, SolverTable
from diffcore.spacings import spaced_timesteps

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
    """Row after row; ``model`` sees the scaled x and the timestep; noise(-1) is the start's.

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


# ---- the loops of diffusers' own tests ---------------------------------------------------------

SHAPE = (4, 3, 8, 8)


def dummy(flip: bool = False) -> torch.Tensor:
    count = math.prod(SHAPE)
    ramp = torch.arange(count, dtype=torch.float64)
    ramp = (ramp.flip(-1) if flip else ramp) / count
    return ramp.reshape(*SHAPE[1:], SHAPE[0]).permute(3, 0, 1, 2)


def told(num_timesteps: int, steps: int = 10, **options: Any) -> torch.Tensor:
    """The timesteps of DPM-Solver++ and UniPC: one more, rounded, and the last dropped."""
    return spaced_timesteps(num_timesteps, steps, drop_last=True, **options).round().long()


def ancestral_noise(steps: int) -> list[torch.Tensor]:
    """What a loop with ``generator = torch.manual_seed(0)`` draws, in float32."""
    generator = torch.manual_seed(0)
    return [torch.randn(SHAPE, generator=generator).double() for _ in range(steps)]
