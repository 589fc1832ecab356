"""A noise schedule: (alpha, sigma) at every training timestep, float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore._checks import as_int
from diffcore.schedules.betas import check_betas
from diffcore.schedules.tensors import float64_vector


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A forward process x_t = alpha_t x_0 + sigma_t noise, as two float64 tables.

    Variance preserving (``from_betas``, ``from_alphas_cumprod``), variance exploding
    (``from_sigmas``) and rectified flow (``rectified_flow``) differ in the numbers alone.

    Args:
        alpha: Signal coefficients ``[T]``, >= 0.
        sigma: Noise coefficients ``[T]``, >= 0. Note that the Euler family of diffusers calls
            sigma / alpha "sigma".

    Raises:
        TypeError: Not tensors of real numbers.
        ValueError: Not one-dimensional, of different lengths, negative, or not finite.
    """

    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma"):
            table = float64_vector(name, getattr(self, name))
            if not bool((table >= 0).all()):
                raise ValueError(f"{name} must be at least 0, got {float(table.min()):.6g}")
            object.__setattr__(self, name, table)
        if len(self.alpha) != len(self.sigma):
            raise ValueError(
                f"sigma must have the length of alpha, {len(self.alpha)}, got {len(self.sigma)}"
            )
        if bool(((self.alpha == 0) & (self.sigma == 0)).any()):
            raise ValueError("sigma must be above 0 where alpha is 0, got 0 for both at a timestep")

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """Variance preserving: alpha = sqrt(prod(1 - beta)), sigma = sqrt(1 - prod(1 - beta)).

        Args:
            betas: ``[T]`` in (0, 1].

        Returns:
            The schedule. sigma uses expm1, which is exact where the product is close to 1.
        """
        log_bar = torch.log1p(-check_betas(betas)).cumsum(0)
        return cls(torch.exp(0.5 * log_bar), torch.sqrt(-torch.expm1(log_bar)))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """Variance preserving, from the product of 1 - beta.

        Args:
            alphas_cumprod: ``[T]`` in [0, 1].

        Returns:
            The schedule with alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod).
        """
        bar = float64_vector("alphas_cumprod", alphas_cumprod)
        if not bool(((bar >= 0) & (bar <= 1)).all()):
            raise ValueError(
                f"alphas_cumprod must lie in [0, 1], got values from {bar.min():.6g} to "
                f"{bar.max():.6g}"
            )
        return cls(bar.sqrt(), (1 - bar).sqrt())

    @classmethod
    def from_sigmas(cls, sigmas: Tensor) -> NoiseSchedule:
        """Variance exploding: alpha = 1.

        Args:
            sigmas: ``[T]``, the noise levels in the order of the timesteps.

        Returns:
            The schedule.
        """
        sigma = float64_vector("sigmas", sigmas)
        return cls(torch.ones_like(sigma), sigma)

    @classmethod
    def rectified_flow(cls, num_timesteps: int) -> NoiseSchedule:
        """Straight paths: sigma = (t + 1) / T and alpha = 1 - sigma, for t = 0 .. T-1.

        Args:
            num_timesteps: T.

        Returns:
            The schedule; its last entry is pure noise.
        """
        num_timesteps = as_int("num_timesteps", num_timesteps, 1)
        count = torch.arange(1, num_timesteps + 1, dtype=torch.float64, device="cpu")
        return cls((num_timesteps - count) / num_timesteps, count / num_timesteps)

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.alpha)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, float64 ``[T]``; infinite where sigma = 0."""
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Tensor:
        """log(``snr``) = 2 (log alpha - log sigma), float64 ``[T]``; -inf where alpha = 0."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def table(self) -> Tensor:
        """float64 ``[T, 2]``, columns (alpha, sigma), for ``ops.q_sample``."""
        return torch.stack([self.alpha, self.sigma], dim=1)


def check_schedule(schedule: object) -> None:
    """Refuse what is not a ``NoiseSchedule``, such as betas.

    Args:
        schedule: The argument to check.

    Raises:
        TypeError: Something else.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule must be a NoiseSchedule, got {type(schedule).__name__}; make one of betas "
            "by NoiseSchedule.from_betas(betas)"
        )
