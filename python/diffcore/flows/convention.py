"""What a flow-matching model means: the direction of its time, and the sign of its output."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

TARGETS = ("noise_minus_data", "data_minus_noise")

_Number = TypeVar("_Number", float, Tensor)


class Convention(NamedTuple):
    """Direction, sign, the noise that is left at the data, and the scale of the timestep input.

    sigma counts time from the data, at 0, to the noise, at 1, whatever the direction of t. With s =
    ``sigma_min``, x = alpha x_0 + beta noise, alpha = 1 - sigma and beta = s + (1 - s) sigma; the
    model predicts sign ((1 - s) noise - x_0).

    Args:
        noise_at: The t of pure noise, 1 or 0.
        sign: 1 for "noise_minus_data", -1 for "data_minus_noise".
        sigma_min: s.
        scale: The timestep input of the model is this times t.
    """

    noise_at: int
    sign: float
    sigma_min: float
    scale: float

    def turned(self, t: _Number) -> _Number:
        """Sigma from t, or t from sigma."""
        return t if self.noise_at == 1 else 1 - t

    def signal(self, t: _Number) -> _Number:
        """Alpha = 1 - sigma."""
        return 1 - t if self.noise_at == 1 else t

    def noise(self, sigma: _Number) -> _Number:
        """Beta, the noise in x."""
        s = self.sigma_min
        return sigma if s == 0 else s + (1 - s) * sigma

    def target(self) -> tuple[float, float]:
        """(a, b) of the target a x_0 + b noise."""
        return -self.sign, self.sign * (1 - self.sigma_min)

    def x0(self, sigma: _Number) -> tuple[float, _Number]:
        """(a_x, a_m) with x_0 = a_x x + a_m m."""
        return 1 - self.sigma_min, -self.sign * self.noise(sigma)

    def epsilon(self, sigma: _Number) -> tuple[float, _Number]:
        """(e_x, e_m) with noise = e_x x + e_m m."""
        return 1.0, self.sign * (1 - sigma)
