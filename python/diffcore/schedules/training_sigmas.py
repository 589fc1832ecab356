"""Noise levels taken from a training schedule, under ComfyUI's names."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._checks import as_int
from diffcore.schedules.schedule import NoiseSchedule, check_schedule

# Tolerance for a schedule to be a rectified flow; it accepts tables rounded to float32.
_ON_PATH = 1e-6


def get_sigmas_simple(schedule: NoiseSchedule, n: int) -> Tensor:
    """The levels of timesteps T - 1 - floor(i T / n), i = 0 .. n - 1, and a 0.

    Args:
        schedule: The training schedule. Its levels are sigma / alpha, or sigma for a rectified
            flow, as ``NoiseLevels.from_schedule(schedule, sigmas=)`` and ``NoiseLevels.from_flow``
            take them.
        n: Number of levels, without the appended 0; at most T.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        TypeError: n is not an int, or the schedule no ``NoiseSchedule``.
        ValueError: n outside 1 .. T, or an infinite level (alpha = 0 without a rectified flow).

    Source:
        ComfyUI's scheduler "simple".
    """
    n, table = _checked(schedule, n)
    total = len(schedule)
    times = [total - 1 - int(i * (total / n)) for i in range(n)]
    return _ended(table, times)


def get_sigmas_ddim_uniform(schedule: NoiseSchedule, n: int) -> Tensor:
    """The levels of every (T // n)-th timestep from 1 on, from noisy to clean, and a 0.

    Timestep 0 is not visited. These are ceil((T - 1) / (T // n)) levels: n where n divides T, and
    more for some other n, as in ComfyUI.

    Args:
        schedule: As for ``get_sigmas_simple``, of two timesteps or more.
        n: Number of levels, without the appended 0, if it divides T; at most T.

    Returns:
        float64, falling.

    Raises:
        TypeError: As ``get_sigmas_simple``.
        ValueError: As ``get_sigmas_simple``, or a schedule of one timestep.

    Source:
        ComfyUI's scheduler "ddim_uniform"; Song et al. 2021 (arXiv 2010.02502) for the timesteps.
    """
    n, table = _checked(schedule, n)
    if len(schedule) < 2:
        raise ValueError("schedule must have at least 2 timesteps, got 1")
    return _ended(table, list(range(1, len(schedule), len(schedule) // n))[::-1])


def get_sigmas_sgm_uniform(schedule: NoiseSchedule, n: int) -> Tensor:
    """The levels at the first n of n + 1 evenly spaced timesteps from T - 1 to 0, and a 0.

    Between two timesteps log(sigma / alpha) is interpolated linearly, so
    ``NoiseLevels.from_schedule(schedule, sigmas=)`` finds these timesteps again.

    Args:
        schedule: The training schedule, not a rectified flow: ``get_sigmas_flow`` has the levels
            for that, with ``sigma_min=(1 + (n - 1) sigma_1) / n`` for the lowest level sigma_1 of
            training.
        n: Number of levels, without the appended 0.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        TypeError: As ``get_sigmas_simple``.
        ValueError: n < 1, a rectified flow, or an infinite level (alpha = 0).

    Source:
        ComfyUI's scheduler "sgm_uniform" (that of Stability AI's generative-models).
    """
    check_schedule(schedule)
    n = as_int("n", n, 1)
    if _is_flow(schedule):
        raise ValueError(
            "schedule must not be a rectified flow for get_sigmas_sgm_uniform, got one; use "
            "get_sigmas_flow(n, shift=, sigma_min=)"
        )
    logs: list[float] = _levels(schedule).log().tolist()
    highest = len(logs) - 1
    found = []
    for i in range(n):
        low, rest = divmod(highest * (n - i), n)
        share = rest / n
        found.append(logs[low] if rest == 0 else (1 - share) * logs[low] + share * logs[low + 1])
    sigmas = torch.tensor(found, dtype=torch.float64, device="cpu").exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _checked(schedule: NoiseSchedule, n: int) -> tuple[int, Tensor]:
    """The number of levels and those of the schedule, checked."""
    check_schedule(schedule)
    n = as_int("n", n, 1)
    if n > len(schedule):
        raise ValueError(f"n must be at most T = {len(schedule)}, got {n}")
    return n, _levels(schedule)


def _levels(schedule: NoiseSchedule) -> Tensor:
    """Sigma / alpha, or sigma for a rectified flow."""
    if _is_flow(schedule):
        return schedule.sigma
    table = schedule.sigma / schedule.alpha
    if not bool(table.isfinite().all()):
        raise ValueError(
            "schedule must have alpha above 0 at every timestep, got alpha = 0, where sigma / "
            "alpha is infinite; use NoiseLevels.from_schedule(schedule, timesteps)"
        )
    return table


def _is_flow(schedule: NoiseSchedule) -> bool:
    return bool(((schedule.alpha + schedule.sigma - 1).abs() <= _ON_PATH).all())


def _ended(table: Tensor, times: list[int]) -> Tensor:
    """The levels at the timesteps, and a 0."""
    return torch.cat([table[times], table.new_zeros(1)])
