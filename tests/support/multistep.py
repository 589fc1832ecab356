"""What multistep schedulers are asked beside the checks of ``support.fused``."""

from __future__ import annotations

import math
from typing import Any

import torch

from support.fused import SHAPE, Make, counts, samples
from support.schedulers import step_errors, within_bound


def sizes_of(table: Any) -> tuple[list[float], list[float]]:
    """The sum of abs(c) of each row, at least 1, and with the factors of a solver of the noise.

    A polynomial through values at close levels is a sum of large terms with opposite signs. The
    stock step takes the difference of two values first, which is exact; a row rounds each term.
    Solvers of the noise take (alpha' / alpha) x, from which nearly all is subtracted at low signal;
    a row has the difference of the factors. For small h the stock phi_2, (exp(-h) - 1) / h + 1, and
    phi_3 cancel.
    """
    columns = [table.column(f"c_{name}").abs() for name in ("x", "m", "0", "1", "2", "3")]
    sizes = [max(size, 1.0) for size in sum(columns[1:], columns[0]).tolist()]
    grown = [row.next_alpha / row.alpha for row in table.rows]
    ratios = [row.alpha * row.next_sigma / (row.sigma * row.next_alpha) for row in table.rows]
    divided = [1.0, 1.0, *[1 / max(1 - ratio, 1e-2) ** 2 for ratio in ratios]]  # about 1 / h^2
    found = zip(sizes, grown, divided, divided[1:], divided[2:], strict=False)
    return sizes, [max(each) for each in found]


def check_steps(
    make: Make, steps: Any, start: int = 0, *, gathers: bool = False, **options: Any
) -> None:
    """Every step in float32 is as close to float64 as the stock one.

    Args:
        make: Makes the stock scheduler.
        steps: As for ``step_errors``.
        start: The first step.
        gathers: Whether the stock scheduler keeps a sample of its own from step to step, whose
            rounding grows by alpha' / alpha in each; then its errors say nothing about its rule.
        **options: For ``step_errors``.
    """
    from diffcore.diffusers.registry import family_of
    from diffcore.diffusers.scheduler import Choice

    shape = options.pop("shape", SHAPE)
    errors = step_errors(make, steps, start=start, shape=shape, **options)
    scheduler = make()
    scheduler.set_timesteps(**counts(steps))
    table = family_of(scheduler).make_table(scheduler, Choice(start=start))
    sizes, stock_sizes = sizes_of(table)
    within_bound(errors, torch.float32, sizes, [math.inf] * len(table) if gathers else stock_sizes)


def check_add_noise(make: Make, steps: int) -> None:
    """The noisy samples are the stock ones: of one timestep, of several, and during a walk.

    Args:
        make: Makes the stock scheduler.
        steps: How many.
    """
    from diffcore.diffusers import fuse

    stock, ours = make(), fuse(make())
    x, noise = samples(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for scheduler in (stock, ours):
        scheduler.set_timesteps(steps)
    for timesteps in (stock.timesteps[2:3].expand(2), stock.timesteps[1:3]):
        wanted = stock.add_noise(x, noise, timesteps)
        gap = (ours.add_noise(x, noise, timesteps) - wanted).abs().max()
        assert gap <= 1e-6 * wanted.abs().max()


def check_table(make: Make, steps: int, table: Any) -> None:
    """Under our rules the table is our table function's.

    Args:
        make: Makes the stock scheduler.
        steps: How many.
        table: What the function makes.
    """
    from diffcore.diffusers import table_of

    scheduler = make()
    scheduler.set_timesteps(steps)
    found = table_of(scheduler, rules="exact")
    assert torch.equal(found.coefficients, table.coefficients)
    assert torch.equal(found.timesteps.double(), table.timesteps.double())
