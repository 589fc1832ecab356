"""The shift of a flow's noise levels by the size of its samples, and spacings of sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from diffcore._checks import as_int, as_positive
from diffcore.schedules import dynamic_shift_mu, shift_sigmas

Shift: TypeAlias = float | Callable[[tuple[int, ...]], float]


@dataclass(frozen=True)
class ResolutionShift:
    """The shift exp(mu) of a sample shape, mu linear in the number of tokens.

    An image of ``[B, C, H, W]`` has (H / patch_size) (W / patch_size) tokens, a video that for each
    frame.

    Args:
        patch_size: The side of a token in rows and columns of the samples.
        base_image_seq_len: Number of tokens where mu is ``base_shift``.
        max_image_seq_len: Number of tokens where mu is ``max_shift``.
        base_shift: mu at ``base_image_seq_len``.
        max_shift: mu at ``max_image_seq_len``.

    Source:
        Black Forest Labs' Flux (``get_schedule``); diffusers' ``calculate_shift``.
    """

    patch_size: int = 2
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __call__(self, shape: Sequence[int]) -> float:
        """The shift of samples of this shape.

        Args:
            shape: ``[B, C, ..., H, W]``.

        Returns:
            exp(mu).

        Raises:
            ValueError: Fewer than four dimensions, or no token.
        """
        if len(shape) < 4:
            raise ValueError(f"shape must be [B, C, ..., H, W], got {tuple(shape)}")
        *frames, height, width = shape[2:]
        tokens = math.prod(frames) * (height // self.patch_size) * (width // self.patch_size)
        mu = dynamic_shift_mu(
            tokens,
            self.base_image_seq_len,
            self.max_image_seq_len,
            self.base_shift,
            self.max_shift,
        )
        return math.exp(mu)


def resolved(shift: Shift, shape: Sequence[int] | None) -> float:
    """The shift as a number.

    Args:
        shift: A number, or a function of the shape.
        shape: Of the samples, ``[B, ...]``; ``None`` where it is not known.

    Returns:
        The number.

    Raises:
        TypeError: A function returned no number.
        ValueError: It did not return one above 0, or the shape is missing.
    """
    if not callable(shift):
        return shift
    if shape is None:
        raise ValueError(
            "shape must be given where shift is a function, got None; pass the shape of the samples"
        )
    return as_positive("shift(shape)", shift(tuple(shape)), finite=True)


def groups_of(shape: tuple[int, ...] | None, group_dim: int) -> int:
    """The number of groups of samples.

    Args:
        shape: Of the samples; ``None`` where only their number is known.
        group_dim: The dimension of the groups.

    Returns:
        G.

    Raises:
        TypeError: ``group_dim`` is no int.
        ValueError: No shape, or no such dimension other than 0.
    """
    dim = as_int("group_dim", group_dim)
    if shape is None:
        raise ValueError("batch must be the shape of the samples with group_dim, got an int")
    if not -len(shape) <= dim < len(shape) or dim % len(shape) == 0:
        raise ValueError(
            f"group_dim must be a dimension of the samples other than 0, in 1 .. {len(shape) - 1}, "
            f"got {dim}"
        )
    return shape[dim]


def evenly(num_steps: int) -> Tensor:
    """From 1 to 0 in equal steps: Flux, openpi, flow_matching."""
    return 1 - torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps


def of_sd3(num_steps: int) -> Tensor:
    """From 1 to the shifted 1 / 1000 in equal steps, then 0: Stable Diffusion 3's own samplers."""
    last = float(shift_sigmas(torch.tensor(0.001, dtype=torch.float64, device="cpu"), 3.0))
    ramp = torch.arange(num_steps, dtype=torch.float64, device="cpu") / max(num_steps - 1, 1)
    return torch.cat([1 + ramp * (last - 1), ramp.new_zeros(1)])


def of_wan(num_steps: int, shift: float) -> Tensor:
    """From 1 towards 1 / 1000 in equal steps, and 0 in its place: Wan's UniPC in diffusers.

    The first level is what the shift makes 1 - 1e-6 of.
    """
    sigmas = 1 - 0.999 * (1 - evenly(num_steps))
    first = torch.tensor(1 - 1e-6, dtype=torch.float64, device="cpu")
    sigmas[0], sigmas[-1] = shift_sigmas(first, 1 / shift), 0.0
    return sigmas
