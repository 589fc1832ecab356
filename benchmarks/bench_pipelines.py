"""Times whole pipelines of diffusers with tiny random networks, stock and fused, in turns.

"share" is the part of a run's time within the methods of the scheduler: what fusing it can save.
With networks of a few thousand weights it is as large as it gets; a network of use takes all.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .contest import WrongResultError
from .suite import Job, Row, Run, timings_of
from .timing import interleave

METHODS = ("set_timesteps", "scale_model_input", "step", "add_noise", "scale_noise")
AGREEMENT = 1e-4
"""Of the images, which lie within [0, 1]: the two walks round in another order."""
PROFILED = 5


def cases() -> dict[str, Any]:
    """The pipelines, by name."""
    from support.pipelines import CASES

    return dict(CASES)


def share_of(pipe: Any, run: Callable[[Any], Any], repeats: int) -> float:
    """The part of a run that is spent in the methods of the scheduler, a median.

    Args:
        pipe: the pipeline.
        run: calls it.
        repeats: how many runs.
    """
    scheduler, spent = pipe.scheduler, [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    own = [name for name in METHODS if hasattr(scheduler, name)]
    for name in own:
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    shares = []
    try:
        for _ in range(repeats):
            spent[0], start = 0.0, time.perf_counter()
            run(pipe)
            shares.append(spent[0] / (time.perf_counter() - start))
    finally:
        for name in own:
            delattr(scheduler, name)
    return statistics.median(shares)


def time_pipeline(name: str, run: Run) -> Row:
    """One row: compares the images, then times both in turns.

    Args:
        name: of the pipeline.
        run: how long.

    Returns:
        What the JSON holds of it.

    Raises:
        WrongResultError: The images differ, or a step was not fused.
    """
    from diffcore.diffusers import fuse

    case = cases()[name]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        pipes = {"stock": case.make(), "fused": fuse(case.make())}
        stock, fused = (torch.as_tensor(case.run(pipe)) for pipe in pipes.values())
        off = float((stock - fused).abs().max())
        if not off <= AGREEMENT:
            raise WrongResultError(f"the images are off by {off:.2g}")
        repeats = 1 if run.quick else PROFILED
        shares = {how: share_of(pipe, case.run, repeats) for how, pipe in pipes.items()}
        calls = {how: [functools.partial(case.run, pipe)] for how, pipe in pipes.items()}
        found = interleave(calls, run.device, run.budget(5.0))
    if pipes["fused"].scheduler.fallbacks:
        raise WrongResultError(f"not fused: {'; '.join(pipes['fused'].scheduler.fallbacks)}")
    return {
        "what": name,
        "pipeline": type(pipes["stock"]).__name__,
        "scheduler": type(pipes["stock"].scheduler).__name__,
        "steps": len(pipes["stock"].scheduler.timesteps),
        "largest_difference": off,
        "shares": shares,
        "times_stock": found["stock"].median / found["fused"].median,
        "timings": timings_of(found),
    }


def jobs(run: Run) -> Iterator[Job]:
    """The "pipelines" section, on the CPU."""
    if run.diffusers and run.device.type == "cpu":
        for name in cases():
            yield Job(
                name, f"{name}, the whole pipeline", functools.partial(time_pipeline, name, run)
            )
