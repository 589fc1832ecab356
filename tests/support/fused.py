"""What every fused scheduler is asked: whole walks, starts in the middle, 16 bits, noise keys."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from support.schedulers import Taken, bent, in_float64, step_errors, walk, within_bound

SHAPE = (2, 3, 8, 8)
STEPS = (5, 10, 20, 50)
Make = Callable[[], Any]
KARRAS: tuple[dict[str, bool], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)
# The constructor of some schedulers looks up every timestep of the training one by one, for a
# second with 1000 of them: the same range of sigmas with fewer.
SHORT = {"num_train_timesteps": 200, "beta_start": 0.004, "beta_end": 0.06}


def made_once(kind: Any, **config: Any) -> Make:
    """Makes a scheduler by copying one, for constructors that take long."""
    found: list[Any] = []

    def make() -> Any:
        if not found:
            found.append(kind(**config))
        return copy.deepcopy(found[0])

    return make


def samples(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def counts(steps: Any) -> dict[str, Any]:
    return steps if isinstance(steps, dict) else {"num_inference_steps": steps}


def takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def check_steps(make: Make, steps: Sequence[Any] = STEPS, **options: Any) -> None:
    """Every step in float32 is within the bound."""
    for count in steps:
        within_bound(step_errors(make, count, **options), torch.float32)


def check_closer(make: Make, steps: Any = 10, *, x0: bool = True, **options: Any) -> None:
    """In 16 bits the largest errors of the steps sum to no more than those of the stock steps.

    Some stock steps compute in float32 and round once. Both then are the value in float32, rounded,
    and differ by no more than its rounding: 8 units of float32 of the largest value of each step.

    Args:
        make: Makes the stock scheduler.
        steps: As for ``step_errors``.
        x0: Whether of ``pred_original_sample``, too, which some stock steps return in float32.
        **options: For ``step_errors``.
    """
    for dtype in (torch.bfloat16, torch.float16):
        errors = step_errors(make, steps, dtype=dtype, **options)
        for part in (0, 1) if x0 else (0,):
            found = [step[part] for step in errors if step[part] is not None]
            ours, stock, largest = (
                sum(getattr(e, name) for e in found) for name in ("ours", "stock", "largest")
            )
            limit = stock + 8 * torch.finfo(torch.float32).eps * largest
            assert ours <= limit, f"{dtype}, part {part}: {ours} over {stock}"


def check_walk(
    make: Make,
    steps: Any = 10,
    *,
    first: int = 0,
    last: int | None = None,
    begin_index: int | None = None,
    generators: Callable[[], Any] | None = None,
    drawn_in: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A walk of the fused scheduler is the stock one, and so is the generator after it.

    Where the two are not within 1e-5, because the stock walk gathers that much rounding, the stock
    one is farther from the walk in float64.

    Args:
        make: Makes the stock scheduler.
        steps: How many steps, or the keyword arguments of ``set_timesteps``.
        first: The first timestep to take.
        last: Before which to end.
        begin_index: The argument of ``set_begin_index``, if it is called; else the first timestep
            tells where a walk begins.
        generators: Makes the generator, or the list of them, of a step with noise.
        drawn_in: The dtype of the noise.
        **options: Of ``walk`` and ``step``.

    Returns:
        The fused scheduler, after the walk.
    """
    from diffcore.diffusers import fuse

    def taken(scheduler: Any, dtype: torch.dtype) -> tuple[list[Taken], list[Tensor]]:
        scheduler.set_timesteps(**counts(steps))
        if begin_index is not None:
            scheduler.set_begin_index(begin_index)
        given = dict(options)
        if takes_generator(scheduler):
            given["generator"] = generators() if generators else torch.Generator().manual_seed(5)
        given["timesteps"] = scheduler.timesteps[first:last]
        with in_float64(scheduler, drawn_in) if dtype == torch.float64 else nullcontext():
            found = walk(scheduler, samples().to(dtype), **given)
        return found, _states(given.get("generator"))

    stock, fused = make(), fuse(make())
    (wanted, before), (came, after) = taken(stock, torch.float32), taken(fused, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "other noise"
    assert getattr(stock, "_step_index", None) == getattr(fused, "_step_index", None)
    assert not fused.fallbacks, fused.fallbacks
    true: list[Taken] = []
    for i, (theirs, ours) in enumerate(zip(wanted, came, strict=True)):
        for name, a, b in zip(Taken._fields, theirs, ours, strict=True):
            if a is None:
                continue
            assert b.dtype == a.dtype
            if (b - a).abs().max() > 1e-5 * a.abs().max():
                true = true or taken(make(), torch.float64)[0]
                truth = getattr(true[i], name)
                gaps = [float((x.double() - truth).abs().max()) for x in (b, a)]
                assert gaps[0] <= gaps[1], f"{name} of step {i}: ours and the stock are off {gaps}"
    return fused


def check_starts(make: Make, *, steps: Any = 10, at: int = 4, last: int | None = None) -> None:
    """A walk from the middle, with an index or without."""
    check_walk(make, steps, first=at, last=last)
    if hasattr(make(), "set_begin_index"):
        check_walk(make, steps, first=at, last=last, begin_index=at)


def check_philox(make: Make, steps: Any = 6, *, last: int | None = None, **options: Any) -> None:
    """Noise by a key is that of ``PhiloxNoise(...).at(row)``: equal in a second walk, by its seed.

    Args:
        make: Makes the stock scheduler, with noise in its steps.
        steps: As for ``check_walk``.
        last: See there.
        **options: Of ``step``.
    """
    from diffcore.diffusers import fuse, table_of
    from diffcore.noise import PhiloxNoise

    def walked(seed: int) -> list[Taken]:
        scheduler = fuse(make(), noise="philox")
        scheduler.set_timesteps(**counts(steps))
        generator = torch.Generator().manual_seed(seed)
        times = scheduler.timesteps[:last]
        found = walk(scheduler, samples(), timesteps=times, generator=generator, **options)
        assert not scheduler.fallbacks, scheduler.fallbacks
        return found

    ours, again, other = walked(7), walked(7), walked(8)
    assert all(torch.equal(a.x, b.x) for a, b in zip(ours, again, strict=True))
    assert not torch.equal(ours[-1].x, other[-1].x)
    scheduler = make()
    scheduler.set_timesteps(**counts(steps))
    table = table_of(scheduler, **options)
    assert table.stochastic
    key = PhiloxNoise.from_generator(torch.Generator().manual_seed(7))
    x: Tensor = samples() * getattr(scheduler, "init_noise_sigma", 1.0)
    history: tuple[Tensor, ...] = ()
    for i, t in enumerate(scheduler.timesteps[:last]):
        output = bent(x * table.rows[i].input_scale, t)
        x, history = table.step(i, x, output, history, noise=key.at(i))
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


def _states(generators: Any) -> list[Tensor]:
    if generators is None:
        return []
    several = generators if isinstance(generators, list) else [generators]
    return [generator.get_state() for generator in several]
