"""The training timesteps that a sampler visits, and conversions between timesteps and sigmas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._checks import as_int, as_real, check_choice
from diffcore.schedules.schedule import NoiseSchedule, check_schedule
from diffcore.schedules.tensors import as_float64

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def spaced_timesteps(
    num_timesteps: int,
    num_steps: int,
    spacing: str = "linspace",
    *,
    steps_offset: int = 0,
    drop_last: bool = False,
    last_timestep: int | None = None,
) -> Tensor:
    """The timesteps that diffusers' samplers visit, from noisy to clean, not rounded.

    With T = ``num_timesteps``, L = ``last_timestep`` (T by default), S = ``num_steps`` and i = 0 ..
    S-1: linspace: (S - 1 - i) (L - 1) / (S - 1); leading: (S - 1 - i) (L // S) + ``steps_offset``;
    trailing: round(L - i T / S) - 1. Linspace and trailing begin at L - 1, leading does not. With
    S = 1, leading and linspace visit timestep 0 alone. The sums are those of NumPy in diffusers, so
    that ties of trailing round as they do there.

    The Euler family takes these as they are; DDPM and DDIM take integers, see
    ``respaced_timesteps``; DPM-Solver++ and UniPC round linspace and, for linspace and leading,
    take S + 1 points and drop the last (``drop_last=True``).

    Args:
        num_timesteps: T, the length of the training schedule.
        num_steps: S.
        spacing: One of ``TIMESTEP_SPACINGS`` (the strings of diffusers).
        steps_offset: Added to every timestep of "leading", and to no other.
        drop_last: Take one point more and drop it; has no effect on "trailing".
        last_timestep: L, where the schedule is cut off (``clipped_length``).

    Returns:
        float64 ``[S]``, falling; integers except for linspace.

    Raises:
        TypeError: A count is not an int.
        ValueError: Unknown spacing, a count below 1, more steps than timesteps, or timesteps
            outside 0 .. T - 1.

    Source:
        Lin et al. 2023 (arXiv 2305.08891) table 2.
    """
    timesteps = _spaced(
        num_timesteps, num_steps, spacing, steps_offset, drop_last, last_timestep, exact=False
    )
    return torch.tensor(timesteps, dtype=torch.float64, device="cpu")


def respaced_timesteps(
    num_timesteps: int, num_steps: int, spacing: str = "leading", *, steps_offset: int = 0
) -> list[int]:
    """The integer timesteps that DDPM and DDIM visit, from noisy to clean.

    These are ``spaced_timesteps``, rounded half to even, with one difference: each is the quotient
    of two integers, so that no rounding error decides a tie.

    Args:
        num_timesteps: T, the length of the training schedule.
        num_steps: S, at most T.
        spacing: One of ``TIMESTEP_SPACINGS`` (the strings of diffusers).
        steps_offset: Added to every timestep of "leading", and to no other.

    Returns:
        S distinct timesteps, falling.

    Raises:
        TypeError: A count is not an int.
        ValueError: Unknown spacing, S outside 1 .. T, or an offset that leads out of the schedule.

    Source:
        Lin et al. 2023 (arXiv 2305.08891) table 2.
    """
    timesteps = _spaced(num_timesteps, num_steps, spacing, steps_offset, False, None, exact=True)
    return [round(t) for t in timesteps]


def lcm_timesteps(num_timesteps: int, num_steps: int, *, original_steps: int = 50) -> list[int]:
    """The timesteps that LCM and TCD models are called at, from noisy to clean.

    A distilled model was trained at k - 1, 2k - 1, ..., with k = T // ``original_steps``. Of these,
    from the noisiest, ``num_steps`` with indices floor(i ``original_steps`` / ``num_steps``).

    Args:
        num_timesteps: T, the length of the training schedule.
        num_steps: At most ``original_steps``.
        original_steps: How many timesteps the model was distilled at, at most T.

    Returns:
        ``num_steps`` timesteps, falling; the first is 999 for T = 1000.

    Raises:
        TypeError: A count is not an int.
        ValueError: A count below 1, or above its maximum.

    Source:
        Luo et al. 2023 (LCM, arXiv 2310.04378); the schedule of diffusers' ``LCMScheduler``.
    """
    num_timesteps = as_int("num_timesteps", num_timesteps, 1)
    original_steps = as_int("original_steps", original_steps, 1)
    num_steps = as_int("num_steps", num_steps, 1)
    if original_steps > num_timesteps:
        raise ValueError(f"original_steps must be at most {num_timesteps}, got {original_steps}")
    if num_steps > original_steps:
        raise ValueError(f"num_steps must be at most {original_steps}, got {num_steps}")
    gap = num_timesteps // original_steps
    places = [math.floor(i * (original_steps / num_steps)) for i in range(num_steps)]
    return [(original_steps - place) * gap - 1 for place in places]


def _spaced(
    num_timesteps: int,
    num_steps: int,
    spacing: str,
    steps_offset: int,
    drop_last: bool,
    last_timestep: int | None,
    *,
    exact: bool,
) -> list[float]:
    """``spaced_timesteps`` as floats; ``exact`` for quotients of integers instead of sums."""
    check_choice("spacing", spacing, TIMESTEP_SPACINGS)
    num_timesteps = as_int("num_timesteps", num_timesteps, 1)
    num_steps = as_int("num_steps", num_steps, 1)
    steps_offset = as_int("steps_offset", steps_offset)
    end = num_timesteps if last_timestep is None else as_int("last_timestep", last_timestep, 1)
    if end > num_timesteps:
        raise ValueError(f"last_timestep must be at most {num_timesteps}, got {end}")
    dropped = int(drop_last and spacing != "trailing")
    points = num_steps + dropped
    if points > end:
        raise ValueError(f"num_steps must be at most {end - dropped}, got {num_steps}")
    places = range(num_steps)
    if spacing == "linspace":
        gaps = max(points - 1, 1)
        if exact:
            timesteps = [(points - 1 - i) * (end - 1) / gaps for i in places]
        else:
            timesteps = [(points - 1 - i) * ((end - 1) / gaps) for i in places]
    elif spacing == "leading":
        timesteps = [float((points - 1 - i) * (end // points) + steps_offset) for i in places]
    elif exact:
        timesteps = [
            float(round((end * num_steps - i * num_timesteps) / num_steps) - 1) for i in places
        ]
    else:
        fall = end - num_timesteps / num_steps - end  # numpy.arange finds its step by difference
        timesteps = [float(round(end + i * fall) - 1) for i in places]
    if timesteps[0] >= num_timesteps or timesteps[-1] < 0:
        name = "steps_offset" if spacing == "leading" else "last_timestep"
        value = steps_offset if spacing == "leading" else last_timestep
        raise ValueError(
            f"{name} must keep the timesteps in 0 .. {num_timesteps - 1}, got {value}, which leads "
            f"from {timesteps[0]:g} to {timesteps[-1]:g}"
        )
    return timesteps


def clipped_length(schedule: NoiseSchedule, lambda_min_clipped: float) -> int:
    """How many timesteps of a schedule have log(alpha / sigma) >= a bound.

    The cosine schedule ends at lambda = -20 and beyond; solvers that step in lambda start at about
    -5.1 instead (``last_timestep`` of ``spaced_timesteps``).

    Args:
        schedule: The training schedule.
        lambda_min_clipped: The bound, minus infinity for none.

    Returns:
        The number of timesteps that remain, counted from the clean end.

    Raises:
        ValueError: None remains.
    """
    check_schedule(schedule)
    lambda_min_clipped = as_real("lambda_min_clipped", lambda_min_clipped)
    half_log_snr = schedule.log_snr / 2
    left = int((half_log_snr >= lambda_min_clipped).sum())
    if left < 1:
        raise ValueError(
            f"lambda_min_clipped must be at most {float(half_log_snr.max()):.6g}, the largest "
            f"lambda of the schedule, got {lambda_min_clipped}"
        )
    return left


def timesteps_to_sigmas(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Sigma / alpha at timesteps, by linear interpolation between two of them.

    Args:
        schedule: The training schedule.
        timesteps: In 0 .. T - 1, any real numbers.

    Returns:
        float64, the shape of ``timesteps``.

    Raises:
        ValueError: A timestep is outside the schedule, or lies before a last one with alpha = 0.
    """
    check_schedule(schedule)
    time = as_float64(timesteps, "timesteps")
    if not bool(((time >= 0) & (time <= len(schedule) - 1)).all()):
        raise ValueError(f"timesteps must lie in 0 .. {len(schedule) - 1}, got {time.tolist()}")
    table = schedule.sigma / schedule.alpha
    low = time.floor().long()
    high = time.ceil().long()
    share = time - low
    if bool((table[high].isinf() & (share > 0)).any()):
        raise ValueError(
            "timesteps must not lie between the last two of a schedule with alpha = 0 at the last, "
            f"where sigma / alpha is infinite, got {time.tolist()}"
        )
    between = table[low] * (1 - share) + table[high] * share
    return torch.where(share == 0, table[low], between)


def sigmas_to_timesteps(schedule: NoiseSchedule, sigmas: Tensor) -> Tensor:
    """The timesteps with given sigma / alpha, by linear interpolation in its logarithm.

    Values beyond those of the schedule give its first or last timestep.

    Args:
        schedule: The training schedule; sigma / alpha must rise.
        sigmas: Values of sigma / alpha, above 0.

    Returns:
        float64, the shape of ``sigmas``.

    Raises:
        ValueError: A sigma is not above 0.
    """
    check_schedule(schedule)
    ratio = as_float64(sigmas, "sigmas")
    if not bool((ratio > 0).all()):
        raise ValueError(f"sigmas must be above 0 to have a timestep, got {ratio.tolist()}")
    log_table = (schedule.sigma / schedule.alpha).log()
    if len(log_table) == 1:
        return torch.zeros_like(ratio)
    log_ratio = ratio.log().clamp(float(log_table[0]), float(log_table[-1]))
    high = torch.searchsorted(log_table, log_ratio).clamp(1, len(log_table) - 1)
    low = high - 1
    share = (log_ratio - log_table[low]) / (log_table[high] - log_table[low])
    return torch.where(log_ratio == log_table[high], high.double(), low + share)
