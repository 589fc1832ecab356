"""The training timesteps that a sampler visits, and conversions between timesteps and sigmas."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._checks import check_choice, check_count
from diffcore.schedules.schedule import NoiseSchedule

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def respaced_timesteps(
    num_timesteps: int, num_steps: int, spacing: str = "leading", *, steps_offset: int = 0
) -> list[int]:
    """The ``num_steps`` training timesteps that a sampler visits, from noisy to clean.

    With T = ``num_timesteps``, S = ``num_steps``, i = 0 .. S-1: leading: i * (T // S) +
    ``steps_offset``; trailing: round((i + 1) * T / S) - 1; linspace: round(i * (T - 1) / (S - 1)).
    Only the last two reach T - 1. With S = 1, leading and linspace visit timestep 0 alone.

    Args:
        num_timesteps: T, the length of the training schedule.
        num_steps: S, at most T.
        spacing: One of ``TIMESTEP_SPACINGS`` (the strings of diffusers).
        steps_offset: Added to every timestep of "leading", and to no other.

    Returns:
        S distinct timesteps, falling.

    Raises:
        ValueError: Unknown spacing, S outside 1 .. T, or an offset that leads out of the schedule.

    Source:
        Lin et al. 2023 (arXiv 2305.08891) table 2.
    """
    check_choice("timestep_spacing", spacing, TIMESTEP_SPACINGS)
    check_count(num_timesteps, "num_timesteps")
    check_count(num_steps, "num_steps")
    if num_steps > num_timesteps:
        raise ValueError(f"num_steps must be at most {num_timesteps}, got {num_steps}")
    # Quotients of integers, so that no rounding error decides a tie; round() is NumPy's, to even.
    if spacing == "leading":
        stride = num_timesteps // num_steps
        rising = [i * stride + steps_offset for i in range(num_steps)]
    elif spacing == "trailing":
        rising = [round((i + 1) * num_timesteps / num_steps) - 1 for i in range(num_steps)]
    else:
        gaps = max(num_steps - 1, 1)
        rising = [round(i * (num_timesteps - 1) / gaps) for i in range(num_steps)]
    if rising[0] < 0 or rising[-1] >= num_timesteps:
        raise ValueError(
            f"steps_offset={steps_offset} leads out of the schedule: timesteps {rising[0]} to "
            f"{rising[-1]} with num_timesteps={num_timesteps}"
        )
    return rising[::-1]


def spaced_timesteps(
    num_timesteps: int,
    num_steps: int,
    spacing: str = "linspace",
    *,
    steps_offset: int = 0,
    drop_last: bool = False,
    last_timestep: int | None = None,
) -> Tensor:
    """The timesteps that diffusers' samplers visit, from noisy to clean, float64 and not rounded.

    With T = ``last_timestep`` (by default ``num_timesteps``) and S points: linspace: from T - 1 to
    0; leading: i * (T // S) + ``steps_offset``; trailing: T - i * (num_timesteps / S) - 1, rounded.
    The Euler family takes these as they are, DDPM and DDIM round the linspace (for those see
    ``schedules.respaced_timesteps``); DPM-Solver++ and UniPC round it and take S + 1 points of
    linspace and leading, of which they drop the last (``drop_last=True``).

    Args:
        num_timesteps: Length of the training schedule.
        num_steps: S.
        spacing: One of ``TIMESTEP_SPACINGS``.
        steps_offset: Added with "leading" only.
        drop_last: See above; has no effect on "trailing".
        last_timestep: Where the schedule is cut off (``clipped_length``).

    Returns:
        float64 ``[S]``, falling; whole numbers but for linspace.

    Raises:
        ValueError: Unknown spacing, a count below 1, more steps than timesteps, an offset that
            leads out of the schedule.

    Source:
        Lin et al. 2023 (arXiv 2305.08891) table 2.
    """
    check_choice("timestep_spacing", spacing, TIMESTEP_SPACINGS)
    check_count(num_timesteps, "num_timesteps")
    check_count(num_steps, "num_steps")
    last = num_timesteps if last_timestep is None else last_timestep
    points = num_steps + 1 if drop_last and spacing != "trailing" else num_steps
    if not points <= last <= num_timesteps:
        raise ValueError(
            f"num_steps must be at most {last - (points - num_steps)} here, got {num_steps} "
            f"(num_timesteps={num_timesteps}, last_timestep={last}, drop_last={drop_last})"
        )
    # In NumPy's order of operations, so that a tie rounds to where it does in diffusers.
    i = torch.arange(num_steps, dtype=torch.float64)
    if spacing == "linspace":
        told = (points - 1 - i) * ((last - 1) / max(points - 1, 1))
    elif spacing == "leading":
        told = (points - 1 - i) * (last // points) + steps_offset
    else:
        told = (last + i * (last - num_timesteps / num_steps - last)).round() - 1
    if told[0] >= num_timesteps or told[-1] < 0:
        raise ValueError(
            f"the timesteps lead out of the schedule of {num_timesteps}: {told[0]:g} to "
            f"{told[-1]:g} with spacing={spacing!r}, steps_offset={steps_offset}"
        )
    return told


def clipped_length(schedule: NoiseSchedule, lambda_min_clipped: float) -> int:
    """How many timesteps of a schedule have log(alpha / sigma) >= a bound.

    The cosine schedule ends at lambda = -20 and beyond; solvers that step in lambda start at about
    -5.1 instead (``last_timestep`` of ``spaced_timesteps``).

    Args:
        schedule: The training schedule.
        lambda_min_clipped: The bound, minus infinity for none.

    Returns:
        The number of timesteps that are left, counted from the clean end.

    Raises:
        ValueError: None is.
    """
    left = int((schedule.log_snr / 2 >= lambda_min_clipped).sum())
    if left < 1:
        raise ValueError(f"lambda_min_clipped={lambda_min_clipped} leaves no timestep")
    return left


def timesteps_to_sigmas(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Sigma / alpha at timesteps, linear between two of them.

    Args:
        schedule: The training schedule.
        timesteps: In 0 .. T - 1, any real numbers.

    Returns:
        float64, the shape of ``timesteps``.

    Raises:
        ValueError: A timestep outside the schedule.
    """
    time = torch.as_tensor(timesteps, dtype=torch.float64)
    if not bool(((time >= 0) & (time <= len(schedule) - 1)).all()):
        raise ValueError(f"timesteps must lie in 0 .. {len(schedule) - 1}, got {time.tolist()}")
    table = schedule.sigma / schedule.alpha
    low = time.floor().long()
    high = time.ceil().long()
    share = time - low
    if bool((table[high].isinf() & (share > 0)).any()):
        raise ValueError(
            "alpha is 0 at the last timestep: there is no sigma / alpha between it and the one "
            f"before, got timesteps {time.tolist()}"
        )
    between = table[low] * (1 - share) + table[high] * share
    return torch.where(share == 0, table[low], between)


def sigmas_to_timesteps(schedule: NoiseSchedule, sigmas: Tensor) -> Tensor:
    """The timesteps where sigma / alpha takes given values, linear in its logarithm between two.

    Values beyond the schedule's take its first or last timestep.

    Args:
        schedule: The training schedule; sigma / alpha must rise.
        sigmas: Values of sigma / alpha, above 0.

    Returns:
        float64, the shape of ``sigmas``.

    Raises:
        ValueError: A sigma is not above 0.
    """
    wanted = torch.as_tensor(sigmas, dtype=torch.float64)
    if not bool((wanted > 0).all()):
        raise ValueError(f"sigmas must be above 0 to have a timestep, got {wanted.tolist()}")
    log_table = (schedule.sigma / schedule.alpha).log()
    if len(log_table) == 1:
        return torch.zeros_like(wanted)
    log_wanted = wanted.log().clamp(float(log_table[0]), float(log_table[-1]))
    high = torch.searchsorted(log_table, log_wanted).clamp(1, len(log_table) - 1)
    low = high - 1
    share = (log_wanted - log_table[low]) / (log_table[high] - log_table[low])
    return torch.where(log_wanted == log_table[high], high.double(), low + share)
