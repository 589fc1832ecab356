"""DPM-Solver with error control against a loop of its formulas, and where the answer is known."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, sampling
from diffcore.sampling import BrownianNoise
from support.bounds import assert_same_bits
from support.solver_world import MEAN, STD

HIGH, LOW = 20.0, 0.05
X = HIGH * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def denoiser(x: Tensor, sigma: Any) -> Tensor:
    scale = 1 + (sigma if isinstance(sigma, float) else sigma.reshape(-1, 1))
    return torch.tanh(x / scale) + 0.1 * torch.cos(3 * x / scale)


def best(x: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.reshape(-1, 1)
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def published(
    x: Tensor,
    low: float,
    high: float,
    z: Any,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pid: tuple[float, float, float] = (0.0, 1.0, 0.0),
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> tuple[Tensor, list[float], int]:
    """In t = -log(sigma) and epsilon, as the paper writes the steps; (x, all sigmas, rejected)."""

    def sigma(t: float) -> float:
        return math.exp(-t)

    def eps(x: Tensor, t: float) -> Tensor:
        return (x - denoiser(x, sigma(t))) / sigma(t)

    def to(x: Tensor, t: float, share: float, h: float, e: Tensor) -> Tensor:
        return x - sigma(t + share * h) * math.expm1(share * h) * e

    def steps(x: Tensor, t: float, end: float) -> tuple[Tensor, Tensor]:
        h, e = end - t, eps(x, t)
        r_1 = 1 / 2 if order == 2 else 1 / 3
        e_1 = eps(to(x, t, r_1, h, e), t + r_1 * h)
        second = to(x, t, 1.0, h, e) - sigma(end) / (2 * r_1) * math.expm1(h) * (e_1 - e)
        if order == 2:
            return to(x, t, 1.0, h, e), second
        r_2 = 2 / 3
        inner = math.expm1(r_2 * h) / (r_2 * h) - 1
        at_2 = to(x, t, r_2, h, e) - sigma(t + r_2 * h) * r_2 / r_1 * inner * (e_1 - e)
        e_2 = eps(at_2, t + r_2 * h)
        third = to(x, t, 1.0, h, e) - sigma(end) / r_2 * (math.expm1(h) / h - 1) * (e_2 - e)
        return second, third

    p, i, d = pid
    power = 1.5 if eta else order
    t, end = -math.log(high), -math.log(low)
    sign = 1 if end > t else -1
    h, before, visited, rejected = sign * h_init, x, [high], 0
    errors: list[float] = []
    while sign * (end - t) > 1e-5:
        there = sign * min(sign * end, sign * (t + h))
        down, up = there, 0.0
        if eta:
            one, two = sigma(t), sigma(there)
            noise = min(two, eta * math.sqrt(two**2 * (1 - two**2 / one**2)))
            down = min(end, -math.log(math.sqrt(two**2 - noise**2)) if noise < two else end)
            up = math.sqrt(two**2 - sigma(down) ** 2)
        low_x, high_x = steps(x, t, down)
        size = (rtol * torch.maximum(low_x.abs(), before.abs())).clamp(min=atol)
        error = float(((low_x - high_x) / size).norm()) / math.sqrt(x.numel())
        now = 1 / (error + 1e-8)
        errors = [now, *errors[1:]] if errors else [now] * 3
        factor = errors[0] ** ((p + i + d) / power) * errors[1] ** (-(p + 2 * d) / power)
        factor = 1 + math.atan(factor * errors[2] ** (d / power) - 1)
        h *= factor
        if factor >= accept_safety:
            errors = [now, *errors[:2]]
            before, x, t = low_x, high_x, there
            visited.append(sigma(t))
            if up:
                x = x + up * s_noise * z()
        else:
            rejected += 1
    return x, visited, rejected


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "order-2": {"order": 2},
    "tight": {"rtol": 1e-3, "atol": 1e-4},
    "rejections": {"rtol": 1e-3, "atol": 1e-4, "h_init": 2.0, "accept_safety": 0.9},
    "pid": {"pcoeff": 0.4, "icoeff": 0.7, "dcoeff": 0.1, "rtol": 0.01},
    "noise": {"eta": 0.7, "s_noise": 1.1, "rtol": 0.02},
    "noise-2": {"eta": 1.0, "order": 2},
}


def of_pid(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    pid = tuple(options.pop(f"{k}coeff", float(k == "i")) for k in "pid")
    return {**options, "pid": pid}


@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_the_published_one(name: str) -> None:
    draws = torch.randn(200, 3, 4, dtype=torch.float64)
    order = iter(draws)
    wanted, visited, rejected = published(X, LOW, HIGH, lambda: next(order), **of_pid(CASES[name]))
    order, asked, states = iter(draws), [], []

    def noise(sigma: Tensor, after: Tensor) -> Tensor:
        asked.append((float(sigma), float(after)))
        return next(order)

    found, info = sampling.sample_dpm_adaptive(
        denoiser, X, LOW, HIGH, callback=states.append, disable=True, return_info=True,
        noise_sampler=noise, **CASES[name],
    )  # fmt: skip
    # The length of a step follows from a small difference of samples, and the noise from it.
    assert (found - wanted).abs().max() <= (1e-7 if "eta" in CASES[name] else 1e-9)
    calls = CASES[name].get("order", 3)
    assert info == {
        "steps": len(states), "n_accept": len(visited) - 1, "n_reject": rejected,
        "nfe": calls * len(states) - rejected,
    }  # fmt: skip
    accepted = [HIGH, *(s["sigma"].item() for s in states)]
    moved = [s for s, before in zip(accepted[1:], accepted, strict=False) if s != before]
    assert moved == pytest.approx(visited[1:], rel=1e-7)
    if "eta" in CASES[name]:
        assert [a for a, _ in asked] == pytest.approx(visited[: len(asked)], rel=1e-7)
    assert states[-1]["n_accept"] == info["n_accept"]
    assert states[-1]["x"] is found


def test_a_rejected_step_is_taken_again() -> None:
    *_, rejected = published(X, LOW, HIGH, None, **of_pid(CASES["rejections"]))
    assert rejected > 0


def test_up_and_down_again() -> None:
    x = 0.3 + 0.7 * torch.randn(2, 5, dtype=torch.float64)
    options: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8, "disable": True}
    top = sampling.sample_dpm_adaptive(best, x, HIGH, LOW, **options)
    exact = MEAN + (x - MEAN) * math.hypot(STD, HIGH) / math.hypot(STD, LOW)
    assert (top - exact).abs().max() < 1e-4
    assert (sampling.sample_dpm_adaptive(best, top, LOW, HIGH, **options) - x).abs().max() < 1e-5


@pytest.mark.parametrize("order", [2, 3])
def test_the_error_follows_the_tolerance(order: int) -> None:
    exact = MEAN + (X - MEAN) * math.hypot(STD, LOW) / math.hypot(STD, HIGH)
    errors, calls = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        found, info = sampling.sample_dpm_adaptive(
            best, X, LOW, HIGH, order=order, rtol=tolerance, atol=tolerance, disable=True,
            return_info=True,
        )  # fmt: skip
        errors.append(float((found - exact).abs().max()))
        calls.append(info["nfe"])
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-5
    assert calls == sorted(calls)


def test_noise_of_a_key_and_of_a_path() -> None:
    options: dict[str, Any] = {"eta": 1.0, "disable": True}
    key = PhiloxNoise(4)
    one = sampling.sample_dpm_adaptive(denoiser, X, LOW, HIGH, noise_sampler=key, **options)
    numbers = iter(range(1, 1000))
    other = sampling.sample_dpm_adaptive(
        denoiser, X, LOW, HIGH, **options,
        noise_sampler=lambda s, n: key.at(next(numbers)).tensor(X.shape, dtype=X.dtype),
    )  # fmt: skip
    assert_same_bits(one, other)
    path = BrownianNoise(key).sampler(X)
    ends = [
        sampling.sample_dpm_adaptive(
            best, X, LOW, HIGH, noise_sampler=path, rtol=r, atol=r, **options
        )
        for r in (3e-3, 1e-3)
    ]
    assert (ends[0] - ends[1]).abs().max() < 0.25
    torch.manual_seed(0)
    default = sampling.sample_dpm_adaptive(denoiser, X, LOW, HIGH, **options)
    torch.manual_seed(0)
    assert_same_bits(sampling.sample_dpm_adaptive(denoiser, X, LOW, HIGH, **options), default)


def test_the_signature_is_that_of_k_diffusion() -> None:
    parameters = inspect.signature(sampling.sample_dpm_adaptive).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == (
        "model, x, sigma_min, sigma_max, extra_args=None, callback=None, disable=None, order=3, "
        "rtol=0.05, atol=0.0078, h_init=0.05, pcoeff=0.0, icoeff=1.0, dcoeff=0.0, "
        "accept_safety=0.81, eta=0.0, s_noise=1.0, noise_sampler=None, return_info=False"
    )


def test_dtypes_arguments_of_the_model_and_no_gradient() -> None:
    def model(x: Tensor, sigma: Tensor, scale: float) -> Tensor:
        assert sigma.shape == (3,)
        assert sigma.dtype == x.dtype
        return scale * torch.tanh(x.float())

    for dtype in (torch.float32, torch.bfloat16):
        x = X.to(dtype).requires_grad_()
        out = sampling.sample_dpm_adaptive(
            model, x, LOW, HIGH, extra_args={"scale": 0.5}, disable=True
        )
        assert out.dtype == dtype
        assert not out.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"order": 4}, ValueError, "^order must be 2 or 3, got 4"),
        ({"sigma_min": 0.0}, ValueError, "^sigma_min must be above 0, got 0.0"),
        ({"eta": 1.0, "sigma_min": 30.0}, ValueError, "^eta must be 0 where sigma_min is above"),
        ({"atol": 0.0}, ValueError, "^atol must be above 0"),
        ({"rtol": -1.0}, ValueError, "^rtol must be at least 0"),
        ({"noise_sampler": 3}, TypeError, "^noise_sampler must be a function or a PhiloxNoise"),
        ({"callback": lambda state: X}, TypeError, "^callback must return None in a sampler of k-"),
        ({"model": lambda x, s: x * math.nan}, ValueError, "^model must return finite numbers"),
        ({"model": lambda x, s: x[0]}, ValueError, "^model must return the shape"),
        ({"extra_args": 3}, TypeError, "^extra_args must be a mapping or None, got int"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    known = {"model": denoiser, "x": X, "sigma_min": LOW, "sigma_max": HIGH, "disable": True}
    with pytest.raises(error, match=message):
        sampling.sample_dpm_adaptive(**{**known, **arguments})


def test_steps_that_get_no_shorter() -> None:
    def noisy(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.randn_like(x) * 1e8

    with pytest.raises(
        ValueError, match=r"^rtol and atol must allow steps, got 0.05 and 0.0078: a"
    ):
        sampling.sample_dpm_adaptive(noisy, X, LOW, HIGH, disable=True)
