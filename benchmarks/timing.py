"""Times contestants side by side: interleaved in one run, warmed up and repeated by time.

The contestants take turns, one sample each, and the order rotates with every round: a temporary
disturbance of the machine affects all of them, so the ratio of medians stays valid. A sample is
wall-clock time on the CPU, and device time between two events on CUDA. On CUDA the L2 cache is
emptied before each sample, and the device waits while the host enqueues, so that a slow host does
not count; :func:`call_overhead` measures the host, and :func:`walks` loops that have a state. On
the CPU freed memory is kept, see :func:`keep_freed_memory`.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]

MIN_SAMPLE_SECONDS = 100e-6
"""A sample on the CPU repeats its call until it lasts this long: the clock costs nothing then."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: the median of the samples, and their 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    samples: int
    calls_per_sample: int

    @classmethod
    def of(cls, samples: Sequence[float], calls_per_sample: int = 1) -> Timing:
        """Summarises samples.

        Args:
            samples: seconds a call, at least one.
            calls_per_sample: how many calls were averaged into each.
        """
        ordered = sorted(samples)
        return cls(
            _quantile(ordered, 0.5),
            _quantile(ordered, 0.2),
            _quantile(ordered, 0.8),
            len(ordered),
            calls_per_sample,
        )


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Budget:
    """How long to time one group of contestants; the fewest and most rounds whatever the time."""

    seconds: float = 1.0
    warmup_seconds: float = 0.1
    min_rounds: int = 10
    max_rounds: int = 500


def interleave(
    contestants: Mapping[str, Sequence[Call]],
    device: torch.device,
    budget: Budget | None = None,
    *,
    wall: bool = False,
) -> dict[str, Timing]:
    """Times contestants in turns.

    Args:
        contestants: for each name, the same call on one or more sets of inputs, used in rotation.
        device: where they run.
        budget: how long; its seconds of timing are for all contestants together, those of warm-up
            for each.
        wall: on CUDA, wall-clock time until the work is done, for what is bound by its host.

    Returns:
        The timing of each contestant.
    """
    budget = budget or Budget()
    if device.type == "cpu":
        keep_freed_memory()
    on_device = device.type == "cuda" and not wall
    sampler = _CudaSampler(device) if on_device else _WallSampler(device)
    for name, calls in contestants.items():
        sampler.warm_up(name, calls, budget.warmup_seconds)

    def sample(name: str, done: int) -> float:
        calls = contestants[name]
        return sampler.sample(name, calls[done % len(calls)])

    found = _rounds(list(contestants), sample, budget)
    return {name: Timing.of(x, sampler.repeats[name]) for name, x in found.items()}


def keep_freed_memory() -> None:
    """Tells glibc to hand nothing back to the system; another C library is left as it is.

    By default it hands back large blocks, depending on what was freed before. The pages of the next
    tensor are then new, and their faults cost more than an op: several times over for eager torch,
    with its temporaries, so that every comparison would flatter the fused op.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def call_overhead(
    contestants: Mapping[str, Call], device: torch.device, budget: Budget | None = None
) -> dict[str, Timing]:
    """Times what a call costs the host: on CUDA, until its work is enqueued, not until it is done.

    Args:
        contestants: calls on inputs so small that the work itself is nothing.
        device: where they run.
        budget: how long, as in :func:`interleave`.

    Returns:
        The timing of each contestant.
    """
    budget = budget or Budget(seconds=0.5)
    # A device's queue holds about a thousand launches; a full one would make the host wait.
    most = 20 if device.type == "cuda" else 10_000
    settle = _settle(device)
    repeats = {}
    for name, call in contestants.items():
        best = _warm_up([call], budget.warmup_seconds, settle)
        repeats[name] = max(1, min(most, math.ceil(4 * MIN_SAMPLE_SECONDS / best)))

    def sample(name: str, done: int) -> float:
        settle()
        return _clock(contestants[name], repeats[name])

    found = _rounds(list(contestants), sample, budget)
    settle()
    return {name: Timing.of(x, repeats[name]) for name, x in found.items()}


def walks(
    contestants: Mapping[str, tuple[Call, Call]],
    device: torch.device,
    budget: Budget,
    steps: int,
) -> dict[str, Timing]:
    """Times loops that use up a state, in turns: wall-clock seconds a step, until the work is done.

    Args:
        contestants: for each name, what makes the state, outside of the timed region; and the loop.
        device: where they run.
        budget: as in :func:`interleave`.
        steps: of a loop.

    Returns:
        The timing of each contestant.
    """
    if device.type == "cpu":
        keep_freed_memory()
    settle = _settle(device)

    def sample(name: str, _: int = 0) -> float:
        prepare, loop = contestants[name]
        prepare()
        settle()
        start = time.perf_counter()
        loop()
        settle()
        return (time.perf_counter() - start) / steps

    for name in contestants:
        deadline = time.perf_counter() + budget.warmup_seconds
        sample(name)
        while time.perf_counter() < deadline:
            sample(name)
    return {n: Timing.of(x, steps) for n, x in _rounds(list(contestants), sample, budget).items()}


def _rounds(
    names: Sequence[str], sample: Callable[[str, int], float], budget: Budget
) -> dict[str, list[float]]:
    """One sample of each name a round, in an order that turns, until the time is over."""
    found: dict[str, list[float]] = {name: [] for name in names}
    with _no_collector():
        deadline = time.perf_counter() + budget.seconds
        for done in range(budget.max_rounds):
            if done >= budget.min_rounds and time.perf_counter() > deadline:
                break
            first = done % len(names)
            for name in (*names[first:], *names[:first]):
                found[name].append(sample(name, done))
    return found


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keeps Python's cycle collector out of the timed region."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _clock(call: Call, repeats: int) -> float:
    """Seconds a call, on the host's clock."""
    loop = range(repeats)
    start = time.perf_counter()
    for _ in loop:
        call()
    return (time.perf_counter() - start) / repeats


def _warm_up(calls: Sequence[Call], seconds: float, settle: Callable[[], None]) -> float:
    """Calls each once, then in rotation for so many seconds; the shortest time that a call took."""
    for call in calls:
        call()
    settle()
    best = math.inf
    deadline = time.perf_counter() + seconds
    for call in itertools.cycle(calls):
        best = min(best, _clock(call, 1))
        settle()
        if time.perf_counter() > deadline:
            break
    return max(best, 1e-9)


def _settle(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done what it was given."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing


def _nothing() -> None:
    pass


class _WallSampler:
    """Wall-clock time until the work is done."""

    def __init__(self, device: torch.device) -> None:
        self.repeats: dict[str, int] = {}
        self.settle = _settle(device)

    def warm_up(self, name: str, calls: Sequence[Call], seconds: float) -> None:
        best = _warm_up(calls, seconds, self.settle)
        self.repeats[name] = max(1, math.ceil(MIN_SAMPLE_SECONDS / best))

    def sample(self, name: str, call: Call) -> float:
        repeats = self.repeats[name]
        loop = range(repeats)
        self.settle()
        start = time.perf_counter()
        for _ in loop:
            call()
        self.settle()
        return (time.perf_counter() - start) / repeats


class _CudaSampler:
    """Device time of one call, from a cold L2 cache and a queue that is never empty."""

    def __init__(self, device: torch.device) -> None:
        self.repeats: dict[str, int] = {}
        self.device = device
        self.host_seconds: dict[str, float] = {}
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # Read, never written: the call would pay for writing back lines that were left dirty.
        self.filler = torch.zeros(4 * l2_bytes, dtype=torch.int8, device=device).view(torch.int32)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def warm_up(self, name: str, calls: Sequence[Call], seconds: float) -> None:
        self.repeats[name] = 1
        self.host_seconds[name] = _warm_up(calls, seconds, _settle(self.device))

    def sample(self, name: str, call: Call) -> float:
        # Under 2e9 cycles a second, so long enough for the host to enqueue the call meanwhile.
        wait = min(0.02, 2 * self.host_seconds[name] + 50e-6)
        torch.cuda._sleep(int(2e9 * wait))
        self.filler.max()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        milliseconds: float = self.start.elapsed_time(self.end)
        return milliseconds * 1e-3
