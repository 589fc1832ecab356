"""Schedules in continuous time against their published formulas, in many digits."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch

from diffcore import make_betas, schedules

T = torch.tensor([0.0, 1e-6, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0], dtype=torch.float64)


def in_digits(formula: Any) -> torch.Tensor:
    with mpmath.workdps(40):
        found = [float(formula(mpmath.mpf(t))) for t in T.tolist()]
    return torch.tensor(found, dtype=torch.float64)


def test_cosine() -> None:
    def published(t: Any) -> Any:  # simple diffusion, of images of 256 with the noise of 64
        t_min, t_max = mpmath.atan(mpmath.exp(-7.5)), mpmath.atan(mpmath.exp(7.5))
        return -2 * mpmath.log(mpmath.tan(t_min + t * (t_max - t_min))) + 2 * mpmath.log(0.25)

    found = schedules.cosine_logsnr(T, shift=64 / 256)
    torch.testing.assert_close(found, in_digits(published), rtol=1e-12, atol=1e-12)
    ends = schedules.cosine_logsnr(T[[0, -1]], logsnr_min=-7.0, logsnr_max=9.0)
    torch.testing.assert_close(ends, torch.tensor([9.0, -7.0], dtype=torch.float64))
    # Wide limits leave the cosine itself: alpha = cos(pi t / 2).
    wide = schedules.cosine_logsnr(T[3:6], logsnr_min=-60, logsnr_max=60)
    alpha = torch.cos(torch.pi * T[3:6] / 2)
    torch.testing.assert_close(torch.sigmoid(wide), alpha**2, rtol=1e-12, atol=0)


def test_linear() -> None:
    found = schedules.linear_logsnr(T)
    torch.testing.assert_close(-found, -13.3 + 18.3 * T, rtol=1e-14, atol=0)


def test_beta_linear_is_the_sde_and_the_limit_of_ddpm() -> None:
    def published(t: Any) -> Any:  # the variance preserving SDE: mean and standard deviation
        log_mean = -mpmath.mpf(1) / 4 * t**2 * (mpmath.mpf(20) - mpmath.mpf(0.1)) - t * 0.1 / 2
        std = mpmath.sqrt(1 - mpmath.exp(2 * log_mean))
        return 2 * (log_mean - mpmath.log(std)) if t else mpmath.inf

    found = schedules.beta_linear_logsnr(T)
    torch.testing.assert_close(found, in_digits(published), rtol=1e-12, atol=1e-12)
    steps = 200_000
    bar = torch.log1p(-make_betas("linear", steps, scale_to_1000=True)).cumsum(0).exp()
    at = [steps // 10, steps // 2, steps - 1]
    t = torch.tensor(at, dtype=torch.float64).add(1) / steps
    torch.testing.assert_close(
        torch.sigmoid(schedules.beta_linear_logsnr(t)), bar[at], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("cosine", {"logsnr_min": 3, "logsnr_max": 3}, ValueError, "logsnr_min must be less than"),
        ("cosine", {"shift": 0}, ValueError, "shift must be above 0, got 0.0"),
        ("linear", {"logsnr_max": float("inf")}, ValueError, "logsnr_min must be less than"),
        ("linear", {"logsnr_min": "a"}, TypeError, "logsnr_min must be a number, got str"),
        ("beta_linear", {"beta_min": 30}, ValueError, "beta_min must be in"),
        ("beta_linear", {"beta_max": 0}, ValueError, "beta_max must be above 0"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        schedules.LOGSNR_SCHEDULES[name](T, **options)
    with pytest.raises(TypeError, match="t must be a tensor of floating-point numbers, got"):
        schedules.LOGSNR_SCHEDULES[name](torch.arange(3))
