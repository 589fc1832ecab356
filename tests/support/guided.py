"""guided-diffusion's definitions once more, in plain float64, for the schedule of ``toys``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.toys import BETAS

T = len(BETAS)
BAR = torch.cumprod(1 - BETAS, 0)
BEFORE = torch.cat([torch.ones(1, dtype=torch.float64), BAR[:-1]])
TILDE = BETAS * (1 - BEFORE) / (1 - BAR)
LOG_SMALL = torch.cat([TILDE[1:2], TILDE[1:]]).log()
LOG_LARGE = BETAS.log()


def said_by(log_variance: Tensor, t: Tensor, variance_type: str) -> Tensor:
    """What a model says to mean a log-variance."""
    if variance_type == "learned":
        return log_variance
    return 2 * (log_variance - LOG_SMALL[t]) / (LOG_LARGE - LOG_SMALL)[t] - 1


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table[t].view(-1, *[1] * (like.ndim - 1))


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    return 0.5 * (
        -1.0
        + logvar2
        - logvar1
        + torch.exp(logvar1 - logvar2)
        + (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    )


def nll_of_pixels(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log of the mass of a bin, by the exact normal distribution function (x near the mean)."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * torch.special.erfc(-z / math.sqrt(2))

    above = cdf((x - mean + 1 / 255) / log_scale.exp())
    below = cdf((x - mean - 1 / 255) / log_scale.exp())
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.log()


def nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    z = (x - mean) * torch.exp(-log_scale)
    return 0.5 * (z**2 + math.log(2 * math.pi)) + log_scale


def x0_of(m: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> Tensor:
    alpha, sigma = at(BAR.sqrt(), t, m), at((1 - BAR).sqrt(), t, m)
    return {
        "epsilon": (x_t - sigma * m) / alpha,
        "sample": m,
        "v_prediction": alpha * x_t - sigma * m,
        "flow_prediction": (x_t - sigma * m) / (alpha + sigma),
    }[prediction_type]


def log_variance_of(v: Tensor | None, t: Tensor, like: Tensor, variance_type: str) -> Tensor:
    small, large = at(LOG_SMALL, t, like), at(LOG_LARGE, t, like)
    if variance_type == "fixed_small":
        return small.expand_as(like)
    if variance_type == "fixed_large":
        return torch.where(at(torch.arange(T), t, like) == 0, small, large).expand_as(like)
    assert v is not None
    if variance_type == "learned":
        return v
    part = (v + 1) / 2
    return part * large + (1 - part) * small


def vb_terms_bpd(
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    m: Tensor,
    v: Tensor | None,
    prediction_type: str,
    variance_type: str,
    decoder: str,
) -> Tensor:
    before = torch.cat([torch.ones(1, dtype=torch.float64), BAR[:-1]])
    shift = at(BETAS * before.sqrt() / (1 - BAR), t, x0)
    keep = at((1 - before) * (1 - BETAS).sqrt() / (1 - BAR), t, x0)
    log_variance = log_variance_of(v, t, x0, variance_type)
    mean = shift * x0_of(m, x_t, t, prediction_type) + keep * x_t
    true_mean, true_log = shift * x0 + keep * x_t, at(LOG_SMALL, t, x0)
    first = nll_of_pixels if decoder == "discretized" else nll
    terms = [
        first(x0[i], mean[i], 0.5 * log_variance[i])
        if t[i] == 0
        else normal_kl(true_mean[i], true_log[i], mean[i], log_variance[i])
        for i in range(len(t))
    ]
    return torch.stack(terms).flatten(1).mean(1) / math.log(2)


def target_of(x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
    alpha, sigma = at(BAR.sqrt(), t, x0), at((1 - BAR).sqrt(), t, x0)
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[prediction_type]


def losses_by_hand(
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    m: Tensor,
    v: Tensor | None,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    loss_type: str = "mse",
    decoder: str = "discretized",
) -> dict[str, Tensor]:
    x_t = at(BAR.sqrt(), t, x0) * x0 + at((1 - BAR).sqrt(), t, x0) * noise
    how = (prediction_type, variance_type, decoder)
    if "kl" in loss_type:
        vb = vb_terms_bpd(x0, x_t, t, m, v, *how)
        vb = T * vb if loss_type == "rescaled_kl" else vb
        return {"loss": vb, "vb": vb}
    found = {"mse": (target_of(x0, noise, t, prediction_type) - m).square().flatten(1).mean(1)}
    found["loss"] = found["mse"]
    if v is not None:
        vb = vb_terms_bpd(x0, x_t, t, m.detach(), v, *how)
        found["vb"] = vb * T / 1000 if loss_type == "rescaled_mse" else vb
        found["loss"] = found["mse"] + found["vb"]
    return found
