"""Worlds with known answers: Gaussian data, whose best model is linear."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
BAR = torch.log1p(-BETAS).cumsum(0).exp()
ALPHA, SIGMA = BAR.sqrt(), (-torch.expm1(torch.log1p(-BETAS).cumsum(0))).sqrt()
MEAN, STD = 0.3, 0.25


class World:
    """The closed forms in 50 digits, as float64 tensors over the timesteps."""

    def __init__(self) -> None:
        with mpmath.workdps(50):
            s2, m = mpmath.mpf(STD) ** 2, mpmath.mpf(MEAN)
            bars, bar = [], mpmath.mpf(1)
            for beta in BETAS.tolist():
                bar *= 1 - mpmath.mpf(beta)
                bars.append(bar)
            small, large, optimal, remaining = [], [], [], []
            for t, (beta, bar) in enumerate(zip(BETAS.tolist(), bars, strict=True)):
                b, prev = mpmath.mpf(beta), bars[t - 1] if t else mpmath.mpf(1)
                r = s2 * (1 - bar) / (bar * s2 + 1 - bar)  # Var(x_0 | x_t)
                shift = mpmath.sqrt(prev) * b / (1 - bar)
                small.append(b * (1 - prev) / (1 - bar))
                large.append(b)
                remaining.append(shift**2 * r)
                optimal.append(small[-1] + remaining[-1])
            small[0] = large[0] = small[1]
            variances = {"fixed_small": small, "fixed_large": large, "optimal": optimal}
            self.terms, self.variances = {}, {}
            true = [optimal[t] - remaining[t] for t in range(STEPS)]  # beta_tilde, 0 at t = 0
            for name, v in variances.items():
                terms = [mpmath.log(2 * mpmath.pi * v[0]) / 2 + remaining[0] / (2 * v[0])]
                for t in range(1, STEPS):
                    spread = mpmath.log(v[t] / true[t]) + (true[t] + remaining[t]) / v[t] - 1
                    terms.append(spread / 2)
                self.terms[name] = torch.tensor([float(x) for x in terms], dtype=torch.float64)
                self.variances[name] = torch.tensor([float(x) for x in v], dtype=torch.float64)
            last = bars[-1]
            self.prior = float((last * (m**2 + s2) - last - mpmath.log(1 - last)) / 2)
            self.entropy = float(mpmath.log(2 * mpmath.pi * mpmath.e * s2) / 2)
            total = last * s2 + 1 - last
            self.prior_of_marginal = float((total + last * m**2 - 1 - mpmath.log(total)) / 2)


def model(x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The best possible one."""
    total = alpha**2 * STD**2 + sigma**2
    centred = x_t - alpha * MEAN
    x0, noise = MEAN + alpha * STD**2 / total * centred, sigma / total * centred
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[prediction_type]


def four_points() -> tuple[Tensor, Tensor]:
    """x_0 and noise `[T, 4]`, whose means are expectations."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    return (MEAN + STD * signs[:, 0]).repeat(STEPS, 1), signs[:, 1].repeat(STEPS, 1)
