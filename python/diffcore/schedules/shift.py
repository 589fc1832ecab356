"""Shifts of the noise levels of a rectified flow, by a number or by the size of the image."""

from __future__ import annotations

import math

from torch import Tensor

from diffcore._checks import as_int, as_positive, as_real, check_choice
from diffcore.schedules.tensors import as_float64

TIME_SHIFT_TYPES = ("exponential", "linear")

_LARGEST_EXPONENT = 700.0  # exp of it is a float64, as is exp of minus it


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Shift the noise levels of a flow, for larger images: shift s / (1 + (shift - 1) s).

    Apply it once: two shifts by a are one shift by a^2. 0 and 1 do not change.

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
    shift = as_positive("shift", shift, finite=True)
    s = as_float64(sigmas, "sigmas")
    return shift * s / (1 + (shift - 1) * s)


def time_shift(sigmas: Tensor, mu: float, time_shift_type: str = "exponential") -> Tensor:
    """The dynamic shift, by a mu that depends on the size of the image.

    exponential: ``shift_sigmas`` by exp(mu); linear: ``shift_sigmas`` by mu.

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
    mu = as_real("mu", mu)
    if time_shift_type == "exponential":
        if not abs(mu) < _LARGEST_EXPONENT:
            raise ValueError(f"mu must lie in -700 .. 700, where exp(mu) is a number, got {mu}")
        return shift_sigmas(sigmas, math.exp(mu))
    return shift_sigmas(sigmas, as_positive("mu", mu, finite=True))


def dynamic_shift_mu(
    image_seq_len: int,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Mu of the dynamic shift, linear in the number of tokens of the image.

    Args:
        image_seq_len: Number of tokens of the image.
        base_image_seq_len: Number of tokens where mu is ``base_shift``.
        max_image_seq_len: Number of tokens where mu is ``max_shift``.
        base_shift: mu at ``base_image_seq_len``.
        max_shift: mu at ``max_image_seq_len``.

    Returns:
        mu.

    Raises:
        ValueError: ``base_image_seq_len`` is not below ``max_image_seq_len``.
    """
    image_seq_len = as_int("image_seq_len", image_seq_len, 1)
    base_image_seq_len = as_int("base_image_seq_len", base_image_seq_len)
    max_image_seq_len = as_int("max_image_seq_len", max_image_seq_len)
    base_shift, max_shift = as_real("base_shift", base_shift), as_real("max_shift", max_shift)
    if not base_image_seq_len < max_image_seq_len:
        raise ValueError(
            f"base_image_seq_len must be below max_image_seq_len, {max_image_seq_len}, got "
            f"{base_image_seq_len}"
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
    shift_terminal = as_real("shift_terminal", shift_terminal)
    if not 0 <= shift_terminal < 1:
        raise ValueError(f"shift_terminal must lie in [0, 1), got {shift_terminal}")
    signal = 1 - as_float64(sigmas, "sigmas")
    if signal.ndim != 1 or len(signal) == 0:
        raise ValueError(f"sigmas must have the shape [N] with N >= 1, got {tuple(signal.shape)}")
    if signal[-1] == 0:
        raise ValueError("sigmas must end below 1 to be stretched, got 1")
    return 1 - signal * ((1 - shift_terminal) / signal[-1])
