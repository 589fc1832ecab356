"""A world with known answers: Gaussian data, whose best model is linear and whose steps are affine.

Every expectation is then a closed form, here in many digits: the terms of the bound, the moments of
what a sampler makes, the log-likelihood of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mpmath
import torch
from torch import Tensor

DIGITS = 40

# The world of the terms of the bound.
STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
BAR = torch.log1p(-BETAS).cumsum(0).exp()
ALPHA, SIGMA = BAR.sqrt(), (-torch.expm1(torch.log1p(-BETAS).cumsum(0))).sqrt()
MEAN, STD = 0.3, 0.25


def column(values: Iterable[Any]) -> Tensor:
    """Numbers of many digits as a float64 tensor."""
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def best_prediction(
    x: Tensor,
    levels: tuple[Tensor, Tensor, Tensor],
    prediction_type: str,
    mean: float = MEAN,
    std: float = STD,
) -> Tensor:
    """What the best model predicts for x, at ``levels`` of alpha, sigma and Var(x)."""
    alpha, sigma, total = levels
    centered = x - alpha * mean
    x0, noise = mean + alpha * std**2 / total * centered, sigma / total * centered
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[prediction_type]


class World:
    """Data N(mean, std²) and a schedule; what has no tensor in its type has `DIGITS` digits."""

    def __init__(self, mean: float, std: float, betas: Tensor) -> None:
        self.mean, self.std = mean, std
        with mpmath.workdps(DIGITS):
            self.m, self.s2 = mpmath.mpf(mean), mpmath.mpf(std) ** 2
            self.betas = [mpmath.mpf(b) for b in betas.tolist()]
            self.bar, product = [], mpmath.mpf(1)
            for beta in self.betas:
                product *= 1 - beta
                self.bar.append(product)
            self.alpha = [mpmath.sqrt(b) for b in self.bar]
            self.sigma = [mpmath.sqrt(1 - b) for b in self.bar]
            self.total = [b * self.s2 + 1 - b for b in self.bar]  # Var(x_t)
            rest = zip(self.bar, self.total, strict=True)
            self.r = [self.s2 * (1 - b) / total for b, total in rest]  # Var(x_0 | x_t)
            self.c0, self.c1, self.tilde = [], [], []  # of the posterior of x_{t-1}
            before = [mpmath.mpf(1), *self.bar[:-1]]
            for beta, bar, prev in zip(self.betas, self.bar, before, strict=True):
                self.c0.append(mpmath.sqrt(prev) * beta / (1 - bar))
                self.c1.append(mpmath.sqrt(1 - beta) * (1 - prev) / (1 - bar))
                self.tilde.append(beta * (1 - prev) / (1 - bar))
        self.tables = torch.stack([column(v) for v in (self.alpha, self.sigma, self.total)])

    def model(
        self, prediction_type: str, logvar: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The best model, and the log-variances that it is to predict, if any: ``[T]``."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            assert t.dtype == torch.int64
            assert t.shape == x.shape[:1]
            alpha, sigma, total = self.tables[:, t].unsqueeze(-1)
            levels = (alpha, sigma, total)
            found = best_prediction(x.double(), levels, prediction_type, self.mean, self.std)
            if logvar is not None:
                found = torch.cat([found, logvar[t].reshape(-1, 1)], dim=1)
            return found.to(x.dtype)

        return predict

    # ---- the bound, in nats ---------------------------------------------------------------------

    def variance(self, kind: str) -> list[Any]:
        """The variance of each reverse step."""
        with mpmath.workdps(DIGITS):
            if kind == "optimal":
                return [q + c**2 * r for q, c, r in zip(self.tilde, self.c0, self.r, strict=True)]
            rest = self.tilde if kind == "fixed_small" else self.betas
            return [self.tilde[1], *rest[1:]]

    def terms(self, kind: str) -> list[Any]:
        """L_0, L_1, ..."""
        with mpmath.workdps(DIGITS):
            v = self.variance(kind)
            found = [mpmath.log(2 * mpmath.pi * v[0]) / 2 + self.r[0] / (2 * v[0])]
            for t in range(1, len(v)):
                ratio = (self.tilde[t] + self.c0[t] ** 2 * self.r[t]) / v[t]
                found.append((mpmath.log(v[t] / self.tilde[t]) + ratio - 1) / 2)
            return found

    def prior(self) -> Any:
        """E KL(q(x_T | x_0) || N(0, 1))."""
        with mpmath.workdps(DIGITS):
            bar = self.bar[-1]
            total = (1 - bar) + bar * (self.m**2 + self.s2)
            return (total - 1 - mpmath.log(1 - bar)) / 2

    def kl_of_the_end(self) -> Any:
        """KL(q(x_T) || N(0, 1))."""
        with mpmath.workdps(DIGITS):
            v = self.total[-1]
            return (self.bar[-1] * self.m**2 + v - 1 - mpmath.log(v)) / 2

    def entropy(self) -> Any:
        """Of the data."""
        with mpmath.workdps(DIGITS):
            return mpmath.log(2 * mpmath.pi * mpmath.e * self.s2) / 2

    def nll(self, kind: str) -> Any:
        """-E log p of the model, which is Gaussian: its steps are affine."""
        with mpmath.workdps(DIGITS):
            mean, var = mpmath.mpf(0), mpmath.mpf(1)
            noise = self.variance(kind)
            for t in reversed(range(len(noise))):
                slope = self.c1[t] + self.c0[t] * self.alpha[t] * self.s2 / self.total[t]
                shift = self.c0[t] * self.m * (1 - self.bar[t]) / self.total[t]
                mean, var = slope * mean + shift, slope**2 * var + noise[t]
            error = self.s2 + (self.m - mean) ** 2
            return mpmath.log(2 * mpmath.pi * var) / 2 + error / (2 * var)

    # ---- mean and variance of what samplers make, called with as many digits as are wanted -------

    def previous(self, timesteps: Sequence[int]) -> Iterator[tuple[int, Any, Any]]:
        """(t, bar, bar of the next timestep of the list) along a falling list, 1 at the end."""
        bars = [self.bar[t] for t in timesteps]
        return zip(timesteps, bars, [*bars[1:], mpmath.mpf(1)], strict=True)

    def ddpm_moments(self, timesteps: Sequence[int], variance_type: str) -> tuple[Any, Any]:
        """Of the ancestral sampler."""
        mean, variance = mpmath.mpf(0), mpmath.mpf(1)
        for t, bar, prev in self.previous(timesteps):
            beta = 1 - bar / prev
            c0 = mpmath.sqrt(prev) * beta / (1 - bar)
            c1 = mpmath.sqrt(bar / prev) * (1 - prev) / (1 - bar)
            noise = beta * (1 - prev) / (1 - bar) if variance_type == "fixed_small" else beta
            slope = c1 + c0 * self.alpha[t] * self.s2 / self.total[t]
            shift = c0 * self.m * (1 - bar) / self.total[t]
            mean, variance = slope * mean + shift, slope**2 * variance + (noise if prev < 1 else 0)
        return mean, variance

    def ddim_moments(self, timesteps: Sequence[int], eta: float) -> tuple[Any, Any]:
        """Of DDIM."""
        mean, variance = mpmath.mpf(0), mpmath.mpf(1)
        for t, bar, prev in self.previous(timesteps):
            noise = eta**2 * (1 - prev) / (1 - bar) * (1 - bar / prev)
            direction = mpmath.sqrt(1 - prev - noise)
            slope = (mpmath.sqrt(prev * bar) * self.s2 + direction * self.sigma[t]) / self.total[t]
            shift = mpmath.sqrt(prev) * (self.m - bar * self.s2 * self.m / self.total[t])
            shift -= direction * self.sigma[t] * self.alpha[t] * self.m / self.total[t]
            mean, variance = slope * mean + shift, slope**2 * variance + noise
        return mean, variance
