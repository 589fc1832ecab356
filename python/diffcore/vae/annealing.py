"""Schedules of the weight of the KL, or of its capacity: a number for each training step."""

from __future__ import annotations

import math

from diffcore._checks import as_int, as_real


def linear_annealing(
    step: int, num_steps: int, *, start: float = 0.0, end: float = 1.0, delay: int = 0
) -> float:
    """From ``start`` to ``end`` in ``num_steps`` training steps, and ``end`` from there on.

    Use it for the weight of the KL, ``vae_loss(beta=)``, or for its capacity,
    ``vae.capacity_loss``, with ``end`` in nats.

    Args:
        step: The training step, 0 for the first.
        num_steps: Steps from ``start`` to ``end``, at least 1.
        start: Value until ``delay``.
        end: Value from ``delay + num_steps`` on.
        delay: Steps before the value moves.

    Returns:
        The value at ``step``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A negative step or delay, or no steps.

    Source:
        Bowman et al. 2016 (arXiv 1511.06349) section 3.1; Burgess et al. 2018 (arXiv 1804.03599)
        for the capacity.
    """
    step, num_steps = as_int("step", step, 0), as_int("num_steps", num_steps, 1)
    done = (step - as_int("delay", delay, 0)) / num_steps
    return _between(as_real("start", start), as_real("end", end), done)


def cyclical_annealing(
    step: int,
    num_steps: int,
    *,
    cycles: int = 4,
    ratio: float = 0.5,
    start: float = 0.0,
    end: float = 1.0,
) -> float:
    """From ``start`` to ``end`` once in each of several cycles, and ``end`` after the last one.

    Step i is at tau = (i mod ceil(T / M)) / (T / M) of its cycle, with T = ``num_steps`` and M =
    ``cycles``; the value moves linearly until tau = ``ratio`` and stays at ``end`` for the rest of
    the cycle.

    Args:
        step: The training step, 0 for the first.
        num_steps: T, steps of all cycles together, at least ``cycles``.
        cycles: M.
        ratio: Part of a cycle in which the value moves, in (0, 1].
        start: Value at the begin of a cycle.
        end: Value at its end.

    Returns:
        The value at ``step``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A negative step, fewer steps than cycles, or a ratio outside (0, 1].

    Source:
        Fu et al. 2019 (arXiv 1903.10145) eq. 6 and 7.
    """
    step, cycles = as_int("step", step, 0), as_int("cycles", cycles, 1)
    num_steps, ratio = as_int("num_steps", num_steps, 1), as_real("ratio", ratio)
    if num_steps < cycles:
        raise ValueError(f"num_steps must be at least cycles, {cycles}, got {num_steps}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    start, end = as_real("start", start), as_real("end", end)
    if step >= num_steps:
        return end
    tau = step % math.ceil(num_steps / cycles) * cycles / num_steps
    return _between(start, end, tau / ratio)


def _between(start: float, end: float, part: float) -> float:
    if part >= 1:
        return end
    return start + (end - start) * max(part, 0.0)
