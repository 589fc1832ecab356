"""Checks that hold for every multistep scheduler of diffusers, stock and fused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from support.schedulers import bent, in_float64, step_errors, walk, within_bound

SHAPE = (2, 3, 8, 8)
Make = Callable[[], Any]


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
    scheduler.set_timesteps(**_arguments(steps))
    table = family_of(scheduler).make_table(scheduler, Choice(start=start))
    sizes, stock_sizes = sizes_of(table)
    within_bound(errors, torch.float32, sizes, [math.inf] * len(table) if gathers else stock_sizes)


def check_16_bits(make: Make, steps: int, dtype: torch.dtype, **options: Any) -> None:
    """The errors of a walk in 16 bits, summed over its steps, are smaller than the stock ones.

    Args:
        make: Makes the stock scheduler.
        steps: How many.
        dtype: bfloat16 or float16.
        **options: For ``step_errors``.
    """
    errors = [of_x for of_x, _ in step_errors(make, steps, dtype=dtype, **options)]
    ours, stock = sum(e.ours for e in errors), sum(e.stock for e in errors)
    assert ours < stock, (ours, stock)


def start_of(x: Tensor, scheduler: Any) -> Tensor:
    return x * float(getattr(scheduler, "init_noise_sigma", 1.0))


def check_walk(
    make: Make,
    steps: Any,
    start: int = 0,
    *,
    begin_index: bool = False,
    drawn_in: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """A walk with the same generator is the stock one, and so is the generator after it.

    Where the two are not within 1e-5, because the stock walk gathers that much rounding, the stock
    one is farther from the walk in float64.

    Args:
        make: Makes the stock scheduler.
        steps: As for ``step_errors``.
        start: The first step.
        begin_index: Whether it is set; else the first timestep tells.
        drawn_in: The dtype of the noise.
        **options: Of ``walk`` and ``step``.
    """
    from diffcore.diffusers import fuse

    def taken(change: Callable[[Any], Any], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        scheduler, generator = change(make()), torch.Generator().manual_seed(5)
        scheduler.set_timesteps(**_arguments(steps))
        if begin_index:
            scheduler.set_begin_index(start)
        given = {**options, **_generator(scheduler, generator)}
        given["timesteps"] = scheduler.timesteps[start:]
        with in_float64(scheduler, drawn_in) if dtype == torch.float64 else nullcontext():
            found = [step.x for step in walk(scheduler, _noise().to(dtype), **given)]
        assert not getattr(scheduler, "fallbacks", None)
        return found, generator.get_state()

    same = lambda scheduler: scheduler  # noqa: E731
    (stock, before), (ours, after) = taken(same, torch.float32), taken(fuse, torch.float32)
    assert torch.equal(before, after)
    if any((a - b).abs().max() > 1e-5 * b.abs().max() for a, b in zip(ours, stock, strict=True)):
        true, _ = taken(same, torch.float64)
        for mine, theirs, wanted in zip(ours, stock, true, strict=True):
            assert (mine - wanted).abs().max() <= (theirs - wanted).abs().max()


def check_philox(make: Make, steps: int) -> None:
    """Walks with equal seeds are equal, and their noise is that of ``PhiloxNoise`` at the row.

    Args:
        make: Makes the stock scheduler, with noise in its steps.
        steps: How many.
    """
    from diffcore.diffusers import fuse, table_of
    from diffcore.noise import PhiloxNoise

    found = []
    for _ in range(2):
        scheduler = fuse(make(), noise="philox")
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(7)
        found.append([t.x for t in walk(scheduler, _noise(), generator=generator)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    key = PhiloxNoise.from_generator(torch.Generator().manual_seed(7))
    scheduler = make()
    scheduler.set_timesteps(steps)
    table = table_of(scheduler)
    x, history = start_of(_noise(), scheduler), ()
    for row, t in enumerate(scheduler.timesteps):
        output = bent(x * table.rows[row].input_scale, t)
        x, history = table.step(row, x, output, history, noise=key.at(row))
        assert torch.equal(x, found[0][row])


def check_add_noise(make: Make, steps: int) -> None:
    """The noisy samples are the stock ones: of one timestep, of several, and during a walk.

    Args:
        make: Makes the stock scheduler.
        steps: How many.
    """
    from diffcore.diffusers import fuse

    stock, ours = make(), fuse(make())
    x, noise = _noise(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for scheduler in (stock, ours):
        scheduler.set_timesteps(steps)
    for timesteps in (stock.timesteps[2:3].expand(2), stock.timesteps[1:3]):
        wanted = stock.add_noise(x, noise, timesteps)
        gap = (ours.add_noise(x, noise, timesteps) - wanted).abs().max()
        assert gap <= 1e-6 * wanted.abs().max()


def check_exact(make: Make, steps: int, table: Any) -> None:
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


def _arguments(steps: Any) -> dict[str, Any]:
    return steps if isinstance(steps, dict) else {"num_inference_steps": steps}


def _noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def _generator(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}
