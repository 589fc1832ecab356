"""What every fused scheduler is asked: whole walks, starts in the middle, 16 bits, noise keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from support.schedulers import Taken, bent, step_errors, walk, within_bound

STEPS = (5, 10, 20, 50)
Make = Callable[[], Any]
# A walk repeats the rounding of a step; the model's slope is below 1, so nothing grows.
_RELATIVE = 1e-5


def samples(shape: tuple[int, ...] = (2, 3, 8, 8), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def counts(steps: Any) -> dict[str, Any]:
    return steps if isinstance(steps, dict) else {"num_inference_steps": steps}


def takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def check_steps(make: Make, steps: Sequence[Any] = STEPS, **options: Any) -> None:
    """Every step in float32 is within the bound."""
    for count in steps:
        within_bound(step_errors(make, count, **options), torch.float32)


def check_closer(make: Make, steps: Any = 10, **options: Any) -> None:
    """In 16 bits the largest errors of the steps sum to no more than those of the stock steps.

    Where the stock step computes in float32, too, both are a rounding of nearly the same number,
    and the sums are equal but for numbers near the middle of two.
    """
    for dtype in (torch.bfloat16, torch.float16):
        errors = step_errors(make, steps, dtype=dtype, **options)
        for part in (0, 1):
            found = [step[part] for step in errors if step[part] is not None]
            ours, stock = sum(e.ours for e in found), sum(e.stock for e in found)
            assert ours <= stock * (1 + 1e-3), f"{dtype}, part {part}: {ours} over {stock}"


def two_walks(
    make: Make,
    steps: Any,
    *,
    begin_index: int | None = None,
    first: int = 0,
    last: int | None = None,
    **options: Any,
) -> tuple[list[Taken], list[Taken]]:
    """The walks of a stock and of the fused scheduler, with equal generators after them."""
    from diffcore.diffusers import fuse

    found, generators = [], []
    for scheduler in (make(), fuse(make())):
        scheduler.set_timesteps(**counts(steps))
        if begin_index is not None:
            scheduler.set_begin_index(begin_index)
        generator = torch.Generator().manual_seed(5)
        drawn = {"generator": generator} if takes_generator(scheduler) else {}
        times = scheduler.timesteps[first:last]
        found.append(walk(scheduler, samples(), timesteps=times, **drawn, **options))
        generators.append(generator.get_state())
        assert not getattr(scheduler, "fallbacks", None), scheduler.fallbacks
    assert torch.equal(*generators), "the fused walk drew other noise"
    stock, fused = found
    return stock, fused


def check_walk(make: Make, steps: Any = 10, **options: Any) -> None:
    """A walk of the fused scheduler is the stock one."""
    for i, (stock, fused) in enumerate(zip(*two_walks(make, steps, **options), strict=True)):
        for name, wanted, came in zip(Taken._fields, stock, fused, strict=True):
            if wanted is not None:
                assert came.dtype == wanted.dtype
                error = float((came - wanted).abs().max() / wanted.abs().max().clamp(min=1))
                assert error <= _RELATIVE, f"{name} of step {i}: {error}"


def check_starts(make: Make, *, steps: Any = 10, at: int = 4, last: int | None = None) -> None:
    """A walk from the middle, with an index or without."""
    check_walk(make, steps, first=at, last=last)
    if hasattr(make(), "set_begin_index"):
        check_walk(make, steps, first=at, last=last, begin_index=at)


def check_philox(make: Make, *, steps: Any = 6, last: int | None = None, **options: Any) -> None:
    """Noise by a key is that of ``PhiloxNoise(...).at(row)``, and equal in a second walk."""
    from diffcore.diffusers import fuse, table_of
    from diffcore.noise import PhiloxNoise

    def fused() -> Any:
        scheduler = fuse(make(), noise="philox")
        scheduler.set_timesteps(**counts(steps))
        return scheduler

    def walked() -> list[Taken]:
        scheduler = fused()
        generator = torch.Generator().manual_seed(7)
        times = scheduler.timesteps[:last]
        return walk(scheduler, samples(), timesteps=times, generator=generator, **options)

    ours, again = walked(), walked()
    assert all(torch.equal(a.x, b.x) for a, b in zip(ours, again, strict=True))
    scheduler = fused()
    table = table_of(scheduler, **options)
    assert table.stochastic
    key = PhiloxNoise.from_generator(torch.Generator().manual_seed(7))
    x: Tensor = samples() * getattr(scheduler, "init_noise_sigma", 1.0)
    history: tuple[Tensor, ...] = ()
    for i, t in enumerate(scheduler.timesteps[:last]):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x, history = table.step(i, x, bent(seen, t), history, noise=key.at(i))
        torch.testing.assert_close(x, ours[i].x, rtol=1e-5, atol=1e-5)


def check_exact(make: Make, steps: Any = 6, **options: Any) -> None:
    """With ``rules="exact"`` a walk is that of the solver's table, with the same noise."""
    from diffcore.diffusers import fuse, table_of

    scheduler = fuse(make(), rules="exact")
    scheduler.set_timesteps(**counts(steps))
    table = table_of(scheduler, rules="exact", **options)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    drawn = {"generator": generators[0]} if takes_generator(scheduler) else {}
    x = y = samples()
    history: tuple[Tensor, ...] = ()
    for i, t in enumerate(scheduler.timesteps[: len(table)]):
        m = bent(y, t)
        x = scheduler.step(m, t, x, **drawn, **options).prev_sample
        z = torch.randn(y.shape, generator=generators[1]) if table.rows[i].noisy else None
        y, history = table.step(i, y, m, history, noise=z)
        torch.testing.assert_close(x, y)
    assert not scheduler.fallbacks, scheduler.fallbacks


def check_same_steps(table: Any, other: Any, **step: Any) -> None:
    """Two tables give the same walk from the same noise."""
    assert len(table) == len(other)
    x = [samples().double()] * 2
    history: list[tuple[Tensor, ...]] = [(), ()]
    for i in range(len(table)):
        m = torch.tanh(x[1]) + 0.1
        z = samples(seed=i + 1).double()
        for j, one in enumerate((table, other)):
            x[j], history[j] = one.step(i, x[j], m, history[j], noise=z, **step)
        torch.testing.assert_close(x[0], x[1], rtol=1e-9, atol=1e-9)


def check_refused(scheduler: Any, words: str, step: Callable[[Any], Any]) -> None:
    """A step goes to the stock scheduler, and is counted under a reason with these words."""
    step(scheduler)
    assert [words in reason for reason in scheduler.fallbacks] == [True], scheduler.fallbacks
