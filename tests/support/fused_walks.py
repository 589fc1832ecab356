"""What each family of fused schedulers is held to, beside the steps of ``support.schedulers``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore import PhiloxNoise
from support.schedulers import Taken, bent, step_errors, walk

SHAPE = (2, 4, 8, 8)
KARRAS: tuple[dict[str, bool], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)


# The constructor of some schedulers looks up every timestep of the training one by one, for a
# second with 1000 of them: the same range of sigmas with fewer.
SHORT = {"num_train_timesteps": 200, "beta_start": 0.004, "beta_end": 0.06}


def made_once(kind: Any, **config: Any) -> Callable[[], Any]:
    """Makes a scheduler by copying one, for constructors that take long."""
    found: list[Any] = []

    def make() -> Any:
        if not found:
            found.append(kind(**config))
        return copy.deepcopy(found[0])

    return make


def samples() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def closer_in_16_bits(make: Callable[[], Any], steps: Any, **options: Any) -> None:
    """The fused steps are nearer to float64 than the stock ones, summed over the steps of a walk.

    Some stock steps compute in float32 and round once. Both then are the value in float32, rounded,
    and differ by no more than its rounding: 8 units of float32 of the largest value of each step.
    """
    for dtype in (torch.bfloat16, torch.float16):
        found = [step for step, _ in step_errors(make, steps, dtype=dtype, **options)]
        ours, stock, largest, _ = (sum(column) for column in zip(*found, strict=True))
        limit = stock + 8 * torch.finfo(torch.float32).eps * largest
        assert ours <= limit, f"{dtype}: {ours:.4g} of the fused steps, {stock:.4g} of the stock"


def same_walk(
    make: Callable[[], Any],
    steps: Any,
    *,
    begin: int | None = None,
    skip: int = 0,
    generators: Callable[[], Any] | None = None,
    **options: Any,
) -> Any:
    """A whole walk, each step from the one before, is that of the stock scheduler.

    Args:
        make: Makes the stock scheduler.
        steps: How many steps, or the keyword arguments of ``set_timesteps``.
        begin: The argument of ``set_begin_index``, if it is called.
        skip: How many timesteps not to take, as where a pipeline passes the rest of them.
        generators: Makes the generator or list of them, for steps with noise.
        **options: Of ``step``.

    Returns:
        The fused scheduler, after the walk.
    """
    from diffcore.diffusers import fuse

    schedulers = [make(), fuse(make())]
    counts = steps if isinstance(steps, dict) else {"num_inference_steps": steps}
    walks: list[list[Taken]] = []
    states = []
    for scheduler in schedulers:
        scheduler.set_timesteps(**counts)
        if begin is not None:
            scheduler.set_begin_index(begin)
        given = {} if generators is None else {"generator": generators()}
        rest = scheduler.timesteps[(begin or 0) + skip :]
        walks.append(walk(scheduler, samples(), timesteps=rest, **given, **options))
        states.append(_states(given.get("generator")))
    for i, (stock, ours) in enumerate(zip(*walks, strict=True)):
        for wanted, found in zip(stock, ours, strict=True):
            if wanted is not None:
                assert wanted.dtype == found.dtype
                far = float((wanted - found).abs().max() / wanted.abs().max())
                assert far <= 1e-5, f"step {i}: {far}"
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert schedulers[0]._step_index == schedulers[1]._step_index
    assert not schedulers[1].fallbacks, schedulers[1].fallbacks
    return schedulers[1]


def same_from_philox(make: Callable[[], Any], steps: int, **options: Any) -> None:
    """With noise="philox" a walk has the noise of a key, and of its row."""
    from diffcore.diffusers import table_of

    first, again = (_philox_walk(make, steps, seed=5, **options) for _ in range(2))
    other = _philox_walk(make, steps, seed=6, **options)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    scheduler = make()
    scheduler.set_timesteps(steps)
    table = table_of(scheduler, **options)
    key = PhiloxNoise.from_generator(torch.Generator().manual_seed(5))
    x, history = samples() * float(scheduler.init_noise_sigma), ()
    for i, (row, t) in enumerate(zip(table.rows, scheduler.timesteps, strict=True)):
        output = bent(x * row.input_scale, t)
        x, history = table.step(i, x, output, history, noise=key.at(i))
    torch.testing.assert_close(first, x, rtol=1e-5, atol=1e-5)


def _philox_walk(make: Callable[[], Any], steps: int, seed: int, **options: Any) -> Tensor:
    from diffcore.diffusers import fuse

    scheduler = fuse(make(), noise="philox")
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    taken = walk(scheduler, samples(), generator=generator, **options)
    assert not scheduler.fallbacks, scheduler.fallbacks
    return taken[-1].x


def _states(generators: Any) -> list[Tensor]:
    if generators is None:
        return []
    several = generators if isinstance(generators, list) else [generators]
    return [generator.get_state() for generator in several]
