"""The forward process of GaussianDiffusion: how data become noise."""

from __future__ import annotations

from torch import Tensor

from diffcore import ops
from diffcore._types import Noise
from diffcore.diffusion.tables import DiffusionTables
from diffcore.sampling.noise import noise_or_default


class ForwardProcess(DiffusionTables):
    """q(x_t | x_0) and q(x_{t-1} | x_t, x_0); a part of ``GaussianDiffusion``."""

    def q_mean_variance(self, x_start: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I).

        Args:
            x_start: x_0, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.

        Returns:
            (mean, variance, log_variance), of the shape of ``x_start``. The last two are float32,
            or float64 for float64 samples.
        """
        t = self._check_t(t, x_start)
        scale = self._extract("sqrt_alphas_cumprod", t, x_start)
        variance = self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2
        log_variance = self._extract("log_one_minus_alphas_cumprod", t, x_start)
        return (scale * x_start).to(x_start.dtype), variance, log_variance

    def q_sample(self, x_start: Tensor, t: Tensor | int, noise: Noise | None = None) -> Tensor:
        """A sample of q(x_t | x_0): sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise.

        Args:
            x_start: x_0, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            noise: Standard normal, like ``x_start``, or a recipe for it; ``None`` for a recipe
                seeded by torch's generator.

        Returns:
            x_t, like ``x_start``.
        """
        t = self._check_t(t, x_start)
        noise = noise_or_default(noise, x_start)
        return ops.q_sample(x_start, t, noise, self._noise_table(x_start.device))

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor | int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of q(x_{t-1} | x_t, x_0) = N(coef1_t x_0 + coef2_t x_t, beta_tilde_t I).

        Args:
            x_start: x_0, ``[B, ...]``.
            x_t: Noised samples, like ``x_start``.
            t: Timesteps, integers ``[B]``, or one int.

        Returns:
            (mean, variance, log_variance_clipped), of the shape of ``x_start``; at t = 0 the
            variance is 0 and the clipped logarithm is that of t = 1.
        """
        t = self._check_t(t, x_start)
        return (
            ops.linear_combination(x_start, x_t, self._posterior_table(x_t.device), t=t),
            self._extract("posterior_variance", t, x_start),
            self._extract("posterior_log_variance_clipped", t, x_start),
        )
