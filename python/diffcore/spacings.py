"""Timesteps and shifts: functions of :mod:`diffcore.schedules`."""

from diffcore.schedules import (
    TIME_SHIFT_TYPES,
    clipped_length,
    dynamic_shift_mu,
    lcm_timesteps,
    shift_sigmas,
    sigmas_to_timesteps,
    spaced_timesteps,
    stretch_to_terminal,
    time_shift,
    timesteps_to_sigmas,
)

__all__ = [
    "TIME_SHIFT_TYPES",
    "clipped_length",
    "dynamic_shift_mu",
    "lcm_timesteps",
    "shift_sigmas",
    "sigmas_to_timesteps",
    "spaced_timesteps",
    "stretch_to_terminal",
    "time_shift",
    "timesteps_to_sigmas",
]
