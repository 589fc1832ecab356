"""Where a sampler steps in a training schedule, and how a flow's levels are shifted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .coefficients import check_choice
from .schedules import TIMESTEP_SPACINGS, NoiseSchedule

TIME_SHIFT_TYPES = ("exponential", "linear")


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move a flow's levels to where a larger image needs them: shift s / (1 + (shift - 1) s).

    Once: shifting twice by a is shifting by a^2. 0 and 1 stay where they are.

    Args:
        sigmas: In [0, 1].
        shift: Above 0; 3 for Stable Diffusion 3.

    Returns:
        float64, the shape of ``sigmas``.

    Raises:
        ValueError: shift not above 0.

    Source:
        Esser et al. 2024 (arXiv 2403.03206) eq. 23.
    """
    if not shift > 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    s = torch.as_tensor(sigmas, dtype=torch.float64)
    return shift * s / (1 + (shift - 1) * s)


def time_shift(sigmas: Tensor, mu: float, time_shift_type: str = "exponential") -> Tensor:
    """The dynamic shift, by a mu that follows from the size of the image: shift s / (1 + ...).

    exponential: ``shift_sigmas`` by exp(mu); linear: by mu.

    Args:
        sigmas: In [0, 1].
        mu: See ``dynamic_shift_mu``.
        time_shift_type: One of ``TIME_SHIFT_TYPES``.

    Returns:
        float64, the shape of ``sigmas``.

    Raises:
        ValueError: Unknown type, or mu not above 0 with "linear".
    """
    check_choice("time_shift_type", time_shift_type, TIME_SHIFT_TYPES)
    return shift_sigmas(sigmas, math.exp(mu) if time_shift_type == "exponential" else mu)


def dynamic_shift_mu(
    image_seq_len: int,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Mu of the dynamic shift: the straight line through (base length, base) and (max, max).

    Args:
        image_seq_len: Number of tokens of the image.
        base_image_seq_len: Where mu is ``base_shift``.
        max_image_seq_len: Where mu is ``max_shift``.
        base_shift: See there.
        max_shift: See there.

    Returns:
        mu.
    """
    if not base_image_seq_len < max_image_seq_len:
        raise ValueError(
            f"base_image_seq_len must be below max_image_seq_len, got {base_image_seq_len} and "
            f"{max_image_seq_len}"
        )
    share = (image_seq_len - base_image_seq_len) / (max_image_seq_len - base_image_seq_len)
    return base_shift + share * (max_shift - base_shift)


def stretch_to_terminal(sigmas: Tensor, shift_terminal: float) -> Tensor:
    """Scale 1 - sigma so that the last level becomes ``shift_terminal``.

    Args:
        sigmas: ``[N]``, in [0, 1], without the final 0.
        shift_terminal: The new last level, in [0, 1).

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: shift_terminal outside [0, 1), or the last sigma is 1.
    """
    if not 0 <= shift_terminal < 1:
        raise ValueError(f"shift_terminal must lie in [0, 1), got {shift_terminal}")
    signal = 1 - torch.as_tensor(sigmas, dtype=torch.float64)
    if signal[-1] == 0:
        raise ValueError("the last sigma is 1: it cannot be stretched to another")
    return 1 - signal * ((1 - shift_terminal) / signal[-1])


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


def check_count(value: int, name: str = "n") -> None:
    """Refuse what is no int of at least 1.

    Args:
        value: What came.
        name: What to call it.

    Raises:
        TypeError: No int.
        ValueError: Below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
