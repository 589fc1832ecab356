"""Models that predict the variance: moments, and the optimal variance of a known world."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import GaussianDiffusion, PhiloxNoise
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.schedules import respaced_timesteps
from support.bounds import assert_same_bits
from support.guided import BAR, LOG_LARGE, LOG_SMALL, said_by
from support.toys import BETAS, EPS, Says, half

STEPS = len(BETAS)
each_type = pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
SHAPE = (4, 3, 2, 5)
PROMISE = 1e-10  # the documented error of a float64 loop, relative to the formulas

# ---- moments -----------------------------------------------------------------------------------


@each_type
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_guided_diffusions(variance_type: str, dtype: torch.dtype) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type)
    t = torch.arange(STEPS)
    x, v = torch.randn(2, STEPS, 3, 2).to(dtype)
    out = d.p_mean_variance(lambda x, t: torch.cat([0.5 * x, v], dim=1), x, t)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_variance = v.double()
    if variance_type == "learned_range":
        part = (log_variance + 1) / 2
        small, large = LOG_SMALL[:, None, None], LOG_LARGE[:, None, None]
        log_variance = part * large + (1 - part) * small
    # A few roundings of logarithms of up to 10, and of their exponentials.
    close = {"rtol": 0, "atol": 64 * torch.finfo(wide).eps} if wide == torch.float32 else {}
    torch.testing.assert_close(out["log_variance"], log_variance.to(wide), **close)
    torch.testing.assert_close(out["variance"], log_variance.exp().to(wide), rtol=1e-5, atol=0)
    fixed = GaussianDiffusion(BETAS).p_mean_variance(half, x, t)
    for name in ("mean", "pred_xstart"):
        assert_same_bits(out[name], fixed[name], name)
    assert out["variance"].shape == out["log_variance"].shape == x.shape


@pytest.mark.parametrize("fixed", ["fixed_small", "fixed_large"])
@each_type
def test_the_fixed_variances_as_learned_ones(variance_type: str, fixed: str) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64)
    wanted = GaussianDiffusion(BETAS, variance_type=fixed, clip_sample=False)
    d = GaussianDiffusion(BETAS, variance_type=variance_type, clip_sample=False)
    logs = LOG_SMALL if fixed == "fixed_small" else LOG_LARGE
    model = Says(said_by(logs, torch.arange(STEPS), variance_type))
    noise = PhiloxNoise(3)
    # Two computations of one deviation, a few roundings each, over as many steps.
    close = {"rtol": 0, "atol": 64 * STEPS * EPS}
    for t in (torch.tensor([0, 1, 7, 19]), 19, 0):
        step = d.p_sample(model, x, t, noise=noise)
        fixed_step = wanted.p_sample(half, x, t, noise=noise)
        torch.testing.assert_close(step["sample"], fixed_step["sample"], **close)
        assert_same_bits(step["pred_xstart"], fixed_step["pred_xstart"])
    found = d.p_sample_loop(model, SHAPE, noise=noise, dtype=torch.float64)
    loop = wanted.p_sample_loop(half, SHAPE, noise=noise, dtype=torch.float64)
    torch.testing.assert_close(found, loop, **close)
    if variance_type == "learned_range":  # the range of a respaced loop is its own
        model = Says(-1.0 if fixed == "fixed_small" else 1.0)
        options: dict[str, Any] = {"num_steps": 6, "noise": noise, "dtype": torch.float64}
        found = d.p_sample_loop(model, SHAPE, **options)
        torch.testing.assert_close(found, wanted.p_sample_loop(half, SHAPE, **options), **close)


@each_type
def test_one_timestep_and_the_last_step_add_no_noise(variance_type: str) -> None:
    d = GaussianDiffusion(torch.tensor([0.25]), "sample", variance_type)
    x = torch.randn(2, 3, dtype=torch.float64)
    out = d.p_mean_variance(Says(0.3, 0.1), x, 0)
    log_variance = 0.3 if variance_type == "learned" else math.log(0.25)
    torch.testing.assert_close(out["log_variance"], torch.full_like(x, log_variance))
    loop = d.p_sample_loop(Says(0.3, 0.1), (2, 3), noise=x)
    assert torch.equal(loop, 0.1 * x)
    # Not even where the model predicts a huge value.
    d = GaussianDiffusion(BETAS, "sample", variance_type)
    huge = d.p_sample(Says(1e6, 0.1), x, 0, noise=torch.ones_like(x))["sample"]
    assert torch.equal(huge, 0.1 * x)


# ---- a world with known answers ----------------------------------------------------------------

MEAN, STD = 0.7, 0.5
TOTAL = BAR * STD**2 + 1 - BAR  # the variance of x_t


class Best:
    """The optimal prediction and variance for data N(MEAN, STD^2), in a sampling loop."""

    def __init__(self, prediction_type: str, variance_type: str, timesteps: list[int]) -> None:
        self.prediction_type, self.variance_type = prediction_type, variance_type
        previous = [*timesteps[1:], None]
        self.walk: dict[int, dict[str, float]] = {}
        for t, before in zip(timesteps, previous, strict=True):
            bar, prev = BAR[t].item(), 1.0 if before is None else BAR[before].item()
            beta = 1 - bar / prev
            shift, keep = prev**0.5 * beta / (1 - bar), (bar / prev) ** 0.5 * (1 - prev) / (1 - bar)
            small = beta * (1 - prev) / (1 - bar)
            best = small + shift**2 * STD**2 * (1 - bar) / TOTAL[t].item()
            self.walk[t] = {
                "shift": shift, "keep": keep, "small": small, "large": beta, "best": best,
            }  # fmt: skip

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, total = ((c[t].sqrt())[:, None] for c in (BAR, 1 - BAR, TOTAL**2))
        x0 = MEAN + alpha * STD**2 / total * (x - alpha * MEAN)
        eps = (x - alpha * x0) / sigma
        m = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": alpha * eps - sigma * x0,
            "flow_prediction": eps - x0,
        }[self.prediction_type]
        step = self.walk[int(t[0])]
        v = math.log(step["best"])
        if self.variance_type == "learned_range":
            low = math.log(step["small"]) if step["small"] else 0.0
            v = 2 * (v - low) / (math.log(step["large"]) - low) - 1
        return torch.cat([m, torch.full_like(x, v)], dim=1)

    def moments(self, start: float = 1.0, at: float = 0.0) -> list[tuple[float, float]]:
        """Mean and variance after every step, from those of x_T."""
        mean, variance, found = at, start, []
        for t, step in self.walk.items():
            gain = BAR[t].sqrt().item() * STD**2 / TOTAL[t].item()
            slope = step["keep"] + step["shift"] * gain
            mean = slope * mean + step["shift"] * MEAN * (1 - BAR[t].item()) / TOTAL[t].item()
            variance = slope**2 * variance + (step["best"] if step["small"] else 0.0)
            found.append((mean, variance))
        return found


@pytest.mark.parametrize("num_steps", [None, 6])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@each_type
def test_samples_with_the_optimal_variance_follow_the_recursion(
    variance_type: str, prediction_type: str, num_steps: int | None
) -> None:
    d = GaussianDiffusion(BETAS, prediction_type, variance_type, clip_sample=False)
    timesteps = respaced_timesteps(STEPS, num_steps or STEPS, "trailing")
    steps = len(timesteps)
    model = Best(prediction_type, variance_type, timesteps)
    x_T = torch.zeros(steps + 1, 1, dtype=torch.float64)
    x_T[1] = 1

    def unit(i: int, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z[2 + i] = 1
        return z

    out = d.p_sample_loop(
        model,
        x_T.shape,
        num_steps=num_steps,
        timestep_spacing="trailing",
        noise=x_T,
        step_noise=unit,
    ).squeeze(1)
    mean, variance = model.moments()[-1]
    assert abs(out[0].item() - mean) <= PROMISE
    assert abs((out[1:] - out[0]).square().sum().item() - variance) <= PROMISE
    # From q(x_T) on, every x_t but x_0 has exactly the variance and the mean of q.
    last = timesteps[0]
    walked = model.moments(TOTAL[last].item(), BAR[last].sqrt().item() * MEAN)
    for t, (mean, variance) in zip(timesteps[1:], walked, strict=False):
        assert abs(mean - BAR[t].sqrt().item() * MEAN) <= PROMISE
        assert abs(variance - TOTAL[t].item()) <= PROMISE
